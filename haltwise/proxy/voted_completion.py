"""Several thoughts of a request behind one answer: the one that most of them give.

They run in turn, each a watched completion of its own, and none begins that could not change the
answer any more. So nothing is known of the answer before the vote is settled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import reduce

from haltwise.policy.votes import elected, is_settled
from haltwise.proxy.billing import Bill
from haltwise.proxy.completion import Completion, WatchedCompletion
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.large import TOOK_NOTHING
from haltwise.proxy.metrics import Metrics
from haltwise.proxy.upstream import UpstreamLeg, summed
from haltwise.proxy.wire import Json, StreamEvent, UpstreamError, texts_of

#: Makes the completion of one thought, which is not asked yet: its request, and its own bill.
Begin = Callable[[CompletionRequest, Bill | None], WatchedCompletion]


@dataclass(frozen=True)
class _Heard:
    """A thought that has ended, with what followed it."""

    events: list[StreamEvent]
    answer: str | None
    """As the head's answer rule reads it, empty if it reads none; None if it is not whole."""
    usage: Json


class VotedCompletion(Completion):
    """The completion of a request with several thoughts.

    The first one fails as if it were the only one. If a later one fails, those before it decide.

    Args:
        request: What the client asked for.
        begin: Makes the completion of each thought.
        metrics: Where failures of later thoughts are counted.
        bill: Takes what they have cost together; None if nobody wants to know.
    """

    def __init__(
        self, request: CompletionRequest, begin: Begin, metrics: Metrics, bill: Bill | None
    ) -> None:
        """Asks nothing yet."""
        self.request, self._begin, self._bill = request, begin, bill
        self._metrics = metrics
        self._shares: list[Bill] = []
        self._heard: list[_Heard] = []
        self._failed = ""  # how a later thought has failed
        self._running: WatchedCompletion | None = None
        self._first = self._begun()

    @property
    def waits(self) -> bool:
        """It waits for the vote."""
        return True

    @property
    def has_answered(self) -> bool:
        """Whether the vote has come to an end."""
        return bool(self._answers)

    async def open(self) -> UpstreamLeg:
        """Asks for the first thought."""
        return await self._first.open()

    def release(self, reason: str) -> None:
        """Leaves the first thought to its LM, and asks for no other."""
        self._first.release(reason)
        if self._bill is not None:
            self._bill.held = self._shares[0].held

    async def events(self, first: UpstreamLeg) -> AsyncGenerator[StreamEvent, None]:
        """The events of the thought whose answer is given, once the vote is settled.

        Args:
            first: The first thought's first leg.

        Raises:
            UpstreamError: If the first answer is not whole.
        """
        await self._hear(self._first, first)
        while not (self._failed or is_settled(self._answers, self.request.num_thoughts)):
            try:
                await self._think_again()
            except UpstreamError as error:
                self._failed = error.kind
                self._metrics.upstream_errors.labels(error.kind).inc()
        for event in self._heard[self._given].events:
            if event.chunk is not None and _tells_report(event.chunk):
                event = StreamEvent(chunk=event.chunk | {"usage": self.usage()})
            yield event

    def usage(self) -> Json:
        """The usage of all thoughts together, and the report about the one that is given."""
        usages = [{n: v for n, v in one.usage.items() if n != "haltwise"} for one in self._heard]
        usage: Json = reduce(summed, usages)
        return usage | {"haltwise": self._report()}

    def count(self) -> Json:
        """Returns the report about all thoughts, each of which is in the metrics already."""
        return self._report() if self._heard else self._first.count()

    async def close(self) -> None:
        """Ends the thought that runs, and puts all on the bill."""
        await self._end()
        if self._bill is not None:
            self._bill.count_shares(self._shares)

    def _begun(self) -> WatchedCompletion:
        """The next thought, which is not asked for yet."""
        share = None if self._bill is None else self._bill.share(self.request.num_thoughts)
        if share is not None:
            self._shares.append(share)
        self._running = self._begin(self.request.of_thought(len(self._heard)), share)
        return self._running

    async def _end(self) -> None:
        """Ends the thought that runs, if there is one: a slot of the server may be all there is."""
        running, self._running = self._running, None
        if running is not None:
            await running.close()

    async def _think_again(self) -> None:
        """Asks for the next thought, and hears it to the end of its answer.

        Raises:
            UpstreamError: If it fails.
        """
        thought = self._begun()
        try:
            first = await thought.opened()
        except UpstreamError as error:
            await self._end()
            if self._shares and error.kind in TOOK_NOTHING:
                self._shares.pop()
            raise
        await self._hear(thought, first)

    async def _hear(self, thought: WatchedCompletion, first: UpstreamLeg) -> None:
        """Takes in what a thought and its answer are.

        Args:
            thought: The thought.
            first: Its first leg.

        Raises:
            UpstreamError: If its answer is not whole.
        """
        events, answer = list[StreamEvent](), None
        try:
            async with aclosing(thought.events(first)) as told:
                events += [event async for event in told]
            answer = _answer_of(thought, events)
        finally:
            self._heard.append(_Heard(events, answer, thought.usage()))
            thought.count()
            await self._end()

    @property
    def _answers(self) -> list[str]:
        return [one.answer for one in self._heard if one.answer is not None]

    @property
    def _given(self) -> int:
        """Which thought's answer is given: the first one's if there is none."""
        return elected(self._answers) if self._answers else 0

    def _report(self) -> Json:
        """The report about the thought that is given, with what is to be known of the others."""
        report: Json = self._heard[self._given].usage["haltwise"] | {
            "thoughts": [*self._votes()],
            "most_thoughts": self.request.num_thoughts,
            "given": self._given,
        }
        return report | ({"failed": self._failed} if self._failed else {})

    def _votes(self) -> Iterator[Json]:
        """By thought, how it ended, and how many thoughts have given its answer; not which."""
        for one in self._heard:
            told = {name: one.usage["haltwise"][name] for name in ("reason", "position")}
            yield told | {"votes": self._answers.count(one.answer) if one.answer else 0}


def _tells_report(chunk: Json) -> bool:
    usage = chunk.get("usage")
    return isinstance(usage, dict) and "haltwise" in usage


def _answer_of(thought: WatchedCompletion, events: list[StreamEvent]) -> str:
    """The answer that a thought has led to, as the head's answer rule reads it."""
    choices = [event.choice for event in events]
    said = "".join(texts_of(choice)[1] for choice in choices if choice is not None)
    reader = thought.reader
    # A rendered chat has its form again, where the thought stands apart.
    text = said if reader.request.chat_body is not None else reader.answer_in(said)
    return reader.server.rules.read_answer(text)
