"""Asks for the answers of audits where prices would have halted them, once clients have theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import anyio

from haltwise import ThoughtRequest
from haltwise.control.answers import GivenAnswer
from haltwise.control.audit_traces import DenseAudit
from haltwise.control.audited import AuditedRequest, UnhaltedThought
from haltwise.control.governed import GovernedControl
from haltwise.proxy.acceptance import Acceptance
from haltwise.proxy.completion import CompletionSettings, WatchedCompletion
from haltwise.proxy.metrics import Metrics
from haltwise.proxy.second_leg import ThoughtCloser
from haltwise.proxy.thought import ThoughtReader
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage
from haltwise.proxy.wire import UpstreamError, without_markers
from haltwise.session.thought import ForcedAnswer, Probe

T = TypeVar("T")

# Audits whose answers are asked for at once, so that clients' own requests have the server; and
# audits of a cascade whose thoughts the small LM has at once.
_AT_ONCE, _THOUGHTS_AT_ONCE = 2, 4
# Audits that may wait for it; others tell nothing.
_MOST_WAITING = 256
# Errors of a server that may be too busy, or away for a while.
_NOT_NOW = ("timeout", "connect timeout", "unreachable", "cut", "late")
# Seconds after which it is asked again, each time; and as long as it may ask for at most.
_PAUSES, _LONGEST_PAUSE = (2.0, 10.0, 60.0), 300.0
# By position, the answer if the thought is closed there; None if the LM would think on.
Answers = dict[int, GivenAnswer | None]
# Where the LM thinks on behind a closed thought, halting is given up. One that says nothing may
# have been cut off by its server, and tells nothing.
_THINKS_ON = "second thought"


class Auditor:
    """Asks for answers in the background, as they would be asked for if a price had halted there.

    Args:
        control: Tells which requests are audits, and takes in their answers.
        metrics: Where what happens is counted.
        patience: Seconds to wait for an answer to begin.
        acceptance: Says whether an answer could be given.
    """

    def __init__(
        self, control: GovernedControl, metrics: Metrics, patience: float, acceptance: Acceptance
    ) -> None:
        """Asks nothing yet."""
        self._acceptance = acceptance
        control.asks_answers = True
        self._control, self._metrics, self._patience = control, metrics, patience
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._room_to_think = asyncio.Semaphore(_THOUGHTS_AT_ONCE)
        self._running: set[asyncio.Task[None]] = set()

    def take(
        self,
        request: ThoughtRequest,
        reader: ThoughtReader,
        said: str | None,
        settings: CompletionSettings,
    ) -> None:
        """Takes over a request that has ended, if it is an audit.

        Args:
            request: What was asked.
            reader: Has read its thought.
            said: All text outside of the thought's own field; None if the answer is not whole.
            settings: Those of its completion.
        """
        audit = self._control.taken(request)
        if audit is None:
            return
        if said is None or reader.fallback:
            self._control.break_off(audit, reader.fallback or "the client's answer is not whole")
            return
        if len(self._running) >= _MOST_WAITING:
            self._control.break_off(audit, f"{_MOST_WAITING} others wait for their answers")
            return
        full = _full(reader, said)
        if reader.escalated and not full.text.strip():  # a tool call, or a thought that was cut
            self._control.break_off(audit, "the large LM's answer has no text")
            return
        audit.question = reader.request.question
        task = asyncio.create_task(self._ask(audit, reader, full, settings))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Leaves what is still to be asked."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _ask(
        self,
        audit: AuditedRequest,
        reader: ThoughtReader,
        full: GivenAnswer,
        settings: CompletionSettings,
    ) -> None:
        """Asks for all answers of an audit, one after the other.

        What else a dense audit asks for can only cost its trace.
        """
        answers: Answers = {}
        why = "the proxy has ended"
        try:
            if reader.escalated:
                async with self._room_to_think:
                    reader = await self._small(audit, reader, settings)
            async with self._room:
                await self._answer_at(audit.positions, audit, reader, answers)
                why = ""
                if audit.is_dense:
                    await self._complete(audit, reader, full, answers)
        except Exception as error:
            self._control.failures.add("an audit's answers", error)
            why = _in_a_word(error)
        finally:
            self._tell(audit, reader, full, answers, why)

    async def _small(
        self, audit: AuditedRequest, reader: ThoughtReader, settings: CompletionSettings
    ) -> ThoughtReader:
        """Lets the small LM answer to its end what the large one has answered.

        Args:
            audit: Takes in its thought and its answer.
            reader: Knows the request and the small LM's server.
            settings: Those of the completion that the large LM has answered.

        Returns:
            What has read its thought.

        Raises:
            UpstreamError: If it gives no answer, or its thought could not be watched.
        """
        unhalted = UnhaltedThought(self._control)
        alone = replace(settings, control=unhalted, large=None, auditor=None)
        completion = WatchedCompletion(reader.request, audit.request, reader.server, alone)
        small = completion.reader
        try:
            answer = await completion.whole(await self._patiently(completion.opened))
        finally:
            await completion.close()
            audit.thought = unhalted.report
        if small.fallback or unhalted.report is None:
            raise UpstreamError(small.fallback or "cut", "the small LM could not be watched")
        choice = answer["choices"][0]
        said = choice["message"].get("content") if small.request.shows_chat else choice["text"]
        audit.end(unhalted.report, small.is_cut, _full(small, said or ""))
        return small

    async def _complete(
        self, audit: AuditedRequest, reader: ThoughtReader, full: GivenAnswer, answers: Answers
    ) -> None:
        """Keeps an audit as a trace, with the answers that were seen or are asked for now."""
        try:
            others = [at for at in audit.other_positions if at not in reader.prober.seen]
            await self._answer_at(others, audit, reader, answers)
            self._control.keep(_dense(audit, reader, full, answers))
        except Exception as error:
            self._control.lose_trace(error)

    def _tell(
        self,
        audit: AuditedRequest,
        reader: ThoughtReader,
        full: GivenAnswer,
        answers: Answers,
        why: str,
    ) -> None:
        """Tells what came of an audit; why it is none if some answers at its prices are missing."""
        known = {at: one for at, one in answers.items() if one is not None}
        spent = sum(one.num_tokens - audit.looks[at].reached for at, one in known.items())
        spent += audit.num_more_tokens
        self._metrics.audit_tokens.inc(spent)
        if why:
            self._control.break_off(audit, why, spent)
            return
        halted = {at: self._given(audit, reader, full, answers[at], at) for at in audit.positions}
        self._control.tell(audit, full, halted, spent)

    def _given(
        self,
        audit: AuditedRequest,
        reader: ThoughtReader,
        full: GivenAnswer,
        answer: GivenAnswer | None,
        position: int,
    ) -> GivenAnswer | None:
        """The answer that the client would get: where this one is refused, the LM's own one too."""
        body, rules = reader.request.body, reader.server.rules
        if answer is None or not self._acceptance.refuses(body, answer.text, rules):
            return answer
        spent, own = answer.num_tokens - audit.looks[position].reached, audit.own or full
        return replace(own, num_tokens=own.num_tokens + spent)

    async def _answer_at(
        self, positions: Sequence[int], audit: AuditedRequest, reader: ThoughtReader, found: Answers
    ) -> None:
        """Finds the answers at some positions, and puts each where it is wanted."""
        for position in positions:
            reached = audit.looks[position].reached
            seen = reader.prober.to_give(reader.prober.seen.get(position), reached)
            if seen is not None:
                found[position] = GivenAnswer(seen.answer, seen.text, reached)
            else:
                found[position] = await self._patiently(partial(self._answer, reader, reached))

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What a server is asked for, and again where it has no time for it now.

        Raises:
            UpstreamError: If the server does not give it.
        """
        for pause in _PAUSES:
            try:
                return await ask()
            except UpstreamError as error:
                if error.kind not in _NOT_NOW and not error.wait:
                    raise
                await asyncio.sleep(max(pause, min(error.wait, _LONGEST_PAUSE)))
        return await ask()

    async def _answer(self, reader: ThoughtReader, position: int) -> GivenAnswer | None:
        """The answer if the thought is closed at a position; None if the LM would think on.

        Raises:
            UpstreamError: If the server does not give it.
        """
        until = ThoughtReader(
            reader.request, reader.server, reader.streamed, reader.prober, self._metrics
        )
        until.generated = _generated(reader, position)
        until.usages[0].completion_tokens = position
        closer = ThoughtCloser(until, self._patience, self._acceptance)
        answer, usage = GeneratedSoFar(), LegUsage()
        try:
            with anyio.fail_after(self._patience):
                async for event in await closer.answering():
                    if event.chunk is not None:
                        answer.add(event.chunk)
                        usage.completion_tokens = answer.num_tokens
                        usage.take(event.chunk.get("usage"))
        except UpstreamError as error:
            if error.kind != _THINKS_ON:
                raise
            return None
        finally:
            await closer.close()
        rules = reader.server.rules
        text = without_markers(answer.text, rules.think_end)
        read = rules.read(ForcedAnswer([text], [], usage.completion_tokens)).answer
        return GivenAnswer(read, text, position + usage.completion_tokens)


def _dense(
    audit: AuditedRequest, reader: ThoughtReader, full: GivenAnswer, answers: Answers
) -> DenseAudit:
    """What is known of an audit with an answer at every decision point.

    Where the LM would be left to think on, the full answer is what halting comes to.
    """
    about, report, seen = audit.request.about, audit.report, reader.prober.seen
    halted = [_seen(seen[at].probe, at) if at in seen else answers[at] for at in audit.looks]
    ended = report is not None and report.reason == "closed by the LM"
    return DenseAudit(
        audit.id,
        [look.signals for look in audit.looks.values()],
        [answer or full for answer in halted],
        full,
        finished=ended and reader.thought.finished,
        model=str(about.get("model") or ""),
        task=str(about.get("task") or ""),
        question=audit.question,
        text=reader.generated.text + full.text,
    )


def _in_a_word(error: Exception) -> str:
    """Returns why answers did not come, without what the server says, which may be content."""
    if not isinstance(error, UpstreamError):
        return type(error).__name__
    return f"asking for its answers failed: {error.kind} {error.answered or ''}".rstrip()


def _seen(probe: Probe, position: int) -> GivenAnswer:
    """An answer that was seen behind a position."""
    return GivenAnswer(probe.answer, probe.text, position + probe.num_tokens, probe.logprobs)


def _full(reader: ThoughtReader, said: str) -> GivenAnswer:
    """A whole answer, without a thought that stands in its text; one that has no end is all."""
    text = reader.answer_in(said)
    num_tokens = sum(usage.completion_tokens for usage in reader.usages)
    return GivenAnswer(reader.server.rules.read_answer(text), text, num_tokens)


def _generated(reader: ThoughtReader, position: int) -> GeneratedSoFar:
    """What the first leg had shown when the thought stood at a position."""
    seen, tokens = reader.generated, reader.thought.tokens
    is_known = seen.has_ids and len(tokens) == seen.num_tokens
    text = reader.server.rules.decode(tokens[:position], skip_special_tokens=False)
    return GeneratedSoFar(
        [text], seen.ids[:position] if is_known else [], seen.prompt_ids, position
    )
