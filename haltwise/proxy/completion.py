"""One watched completion: from the first token of its thought to the last of its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from haltwise import Control, HaltHead, ThoughtRequest
from haltwise.control.cascade_replay import question_of
from haltwise.policy.cascade_head import CascadeHead, EscalatingHead
from haltwise.proxy.acceptance import Acceptance
from haltwise.proxy.answer import ClientAnswer
from haltwise.proxy.billing import Bill
from haltwise.proxy.chat_form import ChatForm
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.large import FAILED, LargeLM, Where
from haltwise.proxy.lm_server import LMServer, opened_in_text
from haltwise.proxy.metrics import Metrics
from haltwise.proxy.probing import AnswerProber, ProbeRoom
from haltwise.proxy.second_leg import ThoughtCloser
from haltwise.proxy.thought import ThoughtReader
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage, UpstreamLeg
from haltwise.proxy.wire import DONE, Json, StreamEvent, UpstreamError, WholeAnswer, texts_of
from haltwise.session.request import Spent
from haltwise.session.session import UNGIVEN
from haltwise.session.stream import StreamedThought
from haltwise.session.thought import Probe


class EndedRequests(Protocol):
    """Takes over requests that have ended, if they are audits: what asks more of the LM for them.

    That is a completion too, so that it is not named here.
    """

    def take(
        self,
        request: ThoughtRequest,
        reader: ThoughtReader,
        said: str | None,
        settings: CompletionSettings,
    ) -> None:
        """Takes over a request, see `haltwise.proxy.auditor.Auditor.take`."""

    async def close(self) -> None:
        """Gives up what is under way."""


@dataclass(frozen=True)
class CompletionSettings:
    """What all watched completions have in common."""

    head: HaltHead
    """The policy."""
    control: Control
    """Sets terms and prices."""
    metrics: Metrics
    """Where completions are counted."""
    shadow: bool
    """Whether they only tell what they would have done."""
    patience: float
    """Seconds to wait for a second leg."""
    probes: ProbeRoom
    """Where answers are forced, if the head looks at any."""
    probe_patience: float
    """Seconds that a probe may take."""
    gives_seen: bool
    """Whether the answer that the head has seen is the answer, if it is whole."""
    acceptance: Acceptance
    """Says whether an answer behind a halted thought can be given."""
    large: LargeLM | None = None
    """The LM that requests may be left to; None if there is none."""
    auditor: EndedRequests | None = None
    """Asks for the answers of audits; None if there are none."""


class Completion(Protocol):
    """What a client is answered with; it is asked, read and closed in this order."""

    request: CompletionRequest
    """What the client asked for."""

    @property
    def waits(self) -> bool:
        """Whether it may keep what an LM says until more is known, so that a stream is silent."""

    @property
    def has_answered(self) -> bool:
        """Whether its answer has come to an end."""

    async def open(self) -> UpstreamLeg:
        """Asks the upstream for a stream that can be watched; returns its first leg.

        Raises:
            UpstreamError: If no answer comes.
        """

    def release(self, reason: str) -> None:
        """Leaves the thought to its LM, whose server has refused to show it."""

    def events(self, first: UpstreamLeg) -> AsyncGenerator[StreamEvent, None]:
        """The events of a stream, of which this is the first leg.

        Raises:
            UpstreamError: If the answer is not whole.
        """

    def usage(self) -> Json:
        """What the client is told of its tokens, with a report about the thought."""

    def count(self) -> Json:
        """Adds the completion to the metrics, once it has ended; returns the report about it."""

    async def close(self) -> None:
        """Ends whatever still runs, and tells the control what has happened."""

    async def whole(self, first: UpstreamLeg) -> Json:
        """The answer to a client that wants no stream.

        Args:
            first: The first leg.

        Raises:
            UpstreamError: If the answer is not whole.
        """
        whole = WholeAnswer()
        async for event in self.events(first):
            if event.chunk is not None:
                whole.add(event.chunk)
        return whole.answer(self.request.shows_chat) | {"usage": self.usage()}


class WatchedCompletion(Completion):
    """One completion that is watched, from the first token to the last.

    The thought is read (`ThoughtReader`) until it is to be halted; then it is closed and continued
    (`ThoughtCloser`); all that the client gets is given its form (`ClientAnswer`).

    Args:
        request: What the client asked for.
        asked: The terms that it asks for, and what else is known of it.
        server: The LM's server.
        settings: What all completions have in common.
        bill: Takes what it has cost; None if nobody wants to know.
    """

    def __init__(
        self,
        request: CompletionRequest,
        asked: ThoughtRequest,
        server: LMServer,
        settings: CompletionSettings,
        bill: Bill | None = None,
    ) -> None:
        """Asks nothing yet."""
        self.request, self._bill = request, bill
        self._server, self._settings = server, settings
        self._asked, self._texts = asked, list[str]()
        begins = not request.chat and opened_in_text(request.prompt, server.rules)
        opening = server.rules.think_start if begins else ""
        is_kept = bill is not None and bill.is_unescalated
        self._large = None if is_kept else settings.large
        self._head = settings.head
        if self._large is not None and isinstance(settings.head, CascadeHead):
            self._head = settings.head.asked(question_of(asked))
        self._streamed = StreamedThought(self._head, server.rules, asked, opening, settings.control)
        self._prober = AnswerProber(
            request,
            server,
            settings.probes,
            settings.probe_patience,
            settings.metrics,
            settings.gives_seen,
        )
        self._reader = ThoughtReader(
            request, server, self._streamed, self._prober, settings.metrics
        )
        self._reader.not_escalated = "budget" if is_kept else ""
        self._closer = ThoughtCloser(self._reader, settings.patience, settings.acceptance)
        self._answer = ClientAnswer(self._reader, settings.shadow)
        self._form: ChatForm | None = None
        if request.chat_body is not None:
            self._form = ChatForm(server.rules, bool(opening), request.wants_usage)
        self._halts = False  # at the newest event
        self._where: Where | None = None  # it is to be left to the large LM
        self._unshown: StreamEvent | None = None  # if that is so at the thought's end
        self._is_released = False

    async def open(self) -> UpstreamLeg:
        """Asks the upstream for a stream that can be watched; returns its first leg.

        Raises:
            UpstreamError: If no answer comes.
        """
        settings, server = self._settings, self._server
        if self._large is not None and self._escalates("start"):
            large = await self._closer.escalated_at_start(self._large)
            if large is not None:
                return large
        goes_on = not settings.shadow or settings.head.config.halting.probing == "always"
        extra = server.extra_fields(self.request) if goes_on else {}
        wants_numbers = self._streamed.wants_logprobs or server.needs_numbers(self.request)
        has_numbers = wants_numbers and server.shows_numbers(self.request)
        body = self.request.watched_body(extra, has_numbers)
        if self.request.comes_in_turns:
            return await self._closer.ask_in_turns(body)
        return await self._closer.ask(body, self.request.chat)

    async def opened(self) -> UpstreamLeg:
        """Its first leg, whose server shows its thought.

        Raises:
            UpstreamError: If it does not.
        """
        leg = await self.open()
        if leg.response.is_success and leg.is_readable:
            return leg
        await leg.close()
        if leg.response.is_success:
            raise UpstreamError("malformed", "the LM's server did not answer with a stream")
        told = f"the LM's server answered with {leg.response.status_code}"
        raise UpstreamError("status", told, wait=leg.wait)

    @property
    def reader(self) -> ThoughtReader:
        """Reads its thought."""
        return self._reader

    @property
    def waits(self) -> bool:
        """Whether it may wait for the whole answer of a large LM."""
        return self._large is not None

    @property
    def has_answered(self) -> bool:
        """Whether its answer has come to an end."""
        return self._answer.has_ended

    def release(self, reason: str) -> None:
        """Leaves the thought to its LM, whose server has refused to show it."""
        self._streamed.release(reason)
        self._is_released = True

    async def close(self) -> None:
        """Ends whatever still runs, and tells the control what has happened."""
        self._streamed.note_spent(self._spent())
        self._streamed.finish()
        await self._prober.close()
        if self._settings.auditor is not None:
            said = "".join(self._texts) if self._answer.finish is not None else None
            self._settings.auditor.take(self._asked, self._reader, said, self._settings)
        await self._closer.close()

    def _spent(self) -> Spent:
        """What it has taken, which goes on the bill."""
        spent, bill = self._answer.spent(), self._bill
        if self._is_released:
            spent = Spent(outcome="passed on", seconds=spent.seconds)  # what follows is not seen
        if bill is None:
            return spent
        if bill.large is not None and self._reader.large is not None:
            bill.large.count(self._answer.spent_by_large(), 1)
        if not self._is_released:
            self._count_small(bill)
        if bill.tariff is None:
            return spent
        return replace(spent, cost_nano=bill.cost().nano)

    def _count_small(self, bill: Bill) -> None:
        """Puts what the small LM has taken on a bill."""
        if not self._closer.has_asked:
            bill.count(Spent(input_tokens=0, output_tokens=0), 0)
            return
        num_legs = sum(not one.is_large for one in self._reader.legs)
        # Where the large LM was not asked, a second leg may be on its way.
        num_asked = num_legs + self._prober.usage.num + (self._reader.large is None)
        num_asked += self._reader.num_turns - 1
        bill.count(self._answer.spent_by_small(), num_asked)

    def usage(self) -> Json:
        """The usage of all legs and probes together, and the report about the thought."""
        return self._answer.usage()

    async def events(self, first: UpstreamLeg) -> AsyncGenerator[StreamEvent, None]:
        """The events of a stream: those of the first leg, and of what takes its place.

        An answer that breaks off behind its own end is whole.

        Args:
            first: The first leg.

        Raises:
            UpstreamError: If the answer is not whole.
        """
        try:
            async with aclosing(self._events_of_all_legs(first)) as events:
                async for event in events:
                    shown = event if self._form is None else self._form.shaped(event)
                    if shown is not None:
                        yield shown
        except UpstreamError:
            if not self._answer.has_ended:
                raise
        yield DONE

    async def _events_of_all_legs(self, first: UpstreamLeg) -> AsyncGenerator[StreamEvent, None]:
        source: AsyncIterable[StreamEvent | None] = self._events_and_answers(first)
        second: UpstreamLeg | None = None
        while second is None:
            try:
                async for event in self._until_halted(source):
                    yield event
                if not (self._halts or self._reader.thinks_on):
                    self._answer.check_whole()
                    return
            except UpstreamError as error:
                source = await self._closer.asked_plainly(first, self._answer.envelope, error)
            else:
                seen = self._seen_answer() if self._halts and self._where is None else None
                if seen is None:
                    second, source = await self._goes_on(first)
                elif self._closer.refuses(seen.text):
                    self._reader.fall_back(UNGIVEN)
                else:
                    await first.close()
                    for event in self._events_of_seen(seen):
                        yield event
                    return
        async for event in self._events_behind_thought(second):
            yield event

    async def _goes_on(
        self, first: UpstreamLeg
    ) -> tuple[UpstreamLeg | None, AsyncIterable[StreamEvent]]:
        """What takes the place of a first leg whose thought is closed, see `continued`."""
        envelope, where, large = self._answer.envelope, self._where, self._large
        if where is None or large is None:
            return await self._closer.continued(first, envelope)
        if self._unshown is not None:
            first.put_back(self._unshown)
        self._where = None
        return None, await self._closer.escalated(first, envelope, large, where)

    async def _until_halted(
        self, source: AsyncIterable[StreamEvent | None]
    ) -> AsyncIterator[StreamEvent]:
        """What the client gets of a leg, up to where its thought is to be halted."""
        self._halts = False
        async for event in source:
            shown, self._halts = await self._take(event)
            if shown is not None:
                yield shown
            if self._halts:
                self._prober.cancel()
                return

    async def _events_and_answers(self, leg: UpstreamLeg) -> AsyncGenerator[StreamEvent | None]:
        """The events of a leg, and None where the answer of a probe comes between two of them."""
        events = aiter(leg)
        while True:
            probe = self._prober.running
            if probe is not None and not await leg.comes_before(probe):
                if probe.cancelled():
                    self._prober.drop()
                else:
                    yield None
                continue
            try:
                event = await anext(events)
            except StopAsyncIteration:
                return
            yield event

    def _seen_answer(self) -> Probe | None:
        """The answer that the head has seen, where it is to be the answer and can be."""
        if self._streamed.report().reason != "halted":
            return None
        return self._prober.to_give(self._prober.latest, self._reader.generated.num_tokens)

    def _events_of_seen(self, seen: Probe) -> Iterator[StreamEvent]:
        """The close text, an answer that the head has seen, and the usage."""
        self._reader.may_halt, self._reader.is_closed = False, True
        self._streamed.keep_answer(seen.answer)
        yield from self._answer.close_events()
        yield self._answer.whole_event("".join(map(str, seen.tokens)))
        first = self._reader.usages[0]
        if first.prompt_tokens is None and self._prober.latest is not None:
            first.prompt_tokens = self._prober.latest.num_before
        if self.request.wants_usage:
            yield self._answer.usage_event()

    async def _take(self, event: StreamEvent | None) -> tuple[StreamEvent | None, bool]:
        """Takes in an event of the first leg, or the answer of a probe if there is none.

        Returns:
            What to show of it, and whether to halt.
        """
        if event is None:
            halts = await self._reader.read_answer()
            halts = halts and self._answer.finish is None and not self._settings.shadow
            self._where = "point" if halts and self._escalates("point") else None
            return None, halts
        if event.chunk is None:
            return self._answer.passed(event), False
        choice, halts = event.choice, False
        self._reader.check_choices(event.chunk)
        if choice is not None and self._reader.is_thinking:
            num_shown = len(self._reader.shown_texts)
            halts = await self._reader.read(event.chunk, choice)
            if self._escalates_instead(halts, choice):
                self._unshown = event
                del self._reader.shown_texts[num_shown:]
                return None, True
        elif choice is not None and any(texts_of(choice)) and not self._reader.escalated:
            self._reader.usages[-1].completion_tokens += 1  # unless the server tells it better
        if choice is not None and self._settings.auditor is not None:
            self._texts.append(texts_of(choice)[1])
        shown = self._answer.shown(event, event.chunk)
        return shown, halts and self._answer.finish is None and not self._settings.shadow

    def _escalates_instead(self, halts: bool, choice: Json) -> bool:
        """Whether the newest chunk of the small LM is not shown, as the large LM is to answer.

        Args:
            halts: Whether the thought is to be closed behind it.
            choice: Its choice.
        """
        reader = self._reader
        if halts:
            self._where = "point" if self._escalates("point") else None
            return False  # it is the thought's, which the client gets
        reader.note_end(choice)
        if reader.is_cut is not None:
            self._where = "end" if self._escalates("end", reader.is_cut) else None
        return self._where is not None

    def _escalates(self, where: Where, is_cut: bool = False) -> bool:
        """Whether the request is to be left to the large LM here.

        Args:
            where: Where it is.
            is_cut: Whether the token budget has ended the thought.
        """
        report, large = self._streamed.report(), self._large
        is_off = self._settings.shadow or self._reader.fallback in (FAILED, UNGIVEN)
        if large is None or is_off or not isinstance(self._head, EscalatingHead):
            return False
        if not report.price:  # under a control, that is what all else is measured against
            return large.is_reference and where == "start"
        if where == "start":
            return bool(self._head.escalates_at_start(report.price)[0])
        if where == "end":
            return bool(self._head.escalates_at_end(report.price, is_cut)[0])
        return bool(self._head.escalates_here(report.price, report.reason == "capped")[0])

    async def _events_behind_thought(self, leg: UpstreamLeg) -> AsyncIterator[StreamEvent]:
        """The close text, the second leg's answer, and the rest in a third if that breaks off."""
        for event in self._answer.close_events():
            yield event
        said = GeneratedSoFar()
        try:
            async for event in self._events_of_leg(leg, said):
                yield event
        except UpstreamError as error:
            if self._answer.finish is None:
                await leg.close()
                leg = await self._closer.resumed(said.text, error)
                async for event in self._events_of_leg(leg, GeneratedSoFar()):
                    yield event
        first, second, *_ = self._reader.usages
        if first.prompt_tokens is None and second.prompt_tokens is not None:
            num_sent = self._reader.generated.num_tokens + self._server.num_close_tokens
            first.prompt_tokens = max(second.prompt_tokens - num_sent, 0)
        if self.request.wants_usage:
            yield self._answer.usage_event()

    async def _events_of_leg(
        self, leg: UpstreamLeg, said: GeneratedSoFar
    ) -> AsyncIterator[StreamEvent]:
        """The answer of a leg behind the thought, in the form that the client expects.

        Args:
            leg: The second or third leg.
            said: Takes in what it says.

        Raises:
            UpstreamError: If it breaks off.
        """
        usage = LegUsage()
        self._reader.usages.append(usage)
        async for event in leg:
            shown = self._answer.passed(event)
            if event.chunk is not None:
                said.add(event.chunk)
                usage.completion_tokens = said.num_tokens
                usage.take(event.chunk.get("usage"))
                shown = None if event.choice is None else self._answer.continued(event.choice)
            if shown is not None:
                yield shown
        self._answer.check_whole()

    def count(self) -> Json:
        """Adds the completion to the metrics, once it has ended; returns the report about it."""
        report, metrics = self._answer.report(), self._settings.metrics
        metrics.thoughts.labels(report["reason"]).inc()
        if "fallback" in report:
            metrics.fallbacks.labels(report["fallback"]).inc()
        metrics.thinking_tokens.inc(self._reader.thought.position)
        metrics.bad_signals.inc(self._streamed.report().num_bad_signals)
        metrics.shadow_saved_tokens.inc(report.get("shadow", {}).get("saved_tokens", 0))
        return report
