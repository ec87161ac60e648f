"""A thought in turns with the answers that are forced: one request of the two at a time.

A turn of the thought ends at the next decision point. There the server's slot is free, and its
cache has all but the close text of a forced answer; behind that, the next turn goes on from all
that was said. So nothing is computed twice, and the thought does not run on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio

from haltwise.proxy.completion_request import numbers_asked
from haltwise.proxy.generation import refusal
from haltwise.proxy.thought import SEVERAL, ThoughtReader
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage, UpstreamLeg
from haltwise.proxy.wire import (
    Json,
    StreamEvent,
    UpstreamError,
    has_others,
    num_generated,
    tokens_of,
)
from haltwise.session.signal_collector import NUM_TOP
from haltwise.session.thought import NEVER

# Seconds before a turn is asked for once more, unless the server names others.
_BREATH = 1.0
# llama-server's seeds; the next one stands for any.
_NUM_SEEDS = 2**32 - 1
# What the chunks of all turns have in common.
_ENVELOPE = ("id", "created")

#: Sends the request of a turn, of which this is the body.
Ask = Callable[[Json], Awaitable[UpstreamLeg]]


class LegInTurns(UpstreamLeg):
    """A first leg that comes in turns, each a request of its own; what ends one is not shown.

    The next one is asked for once somebody reads on. If that fails, the rest is asked for at once,
    and nobody looks at answers any more.

    Args:
        first: The first turn.
        limit: Tokens that it has at most; NEVER if the client's own limit is all.
        reader: Knows the request, the server and the thought.
        ask: Sends the requests of the others.
        patience: Most seconds to wait before a turn is asked for once more.
    """

    def __init__(
        self, first: UpstreamLeg, limit: int, reader: ThoughtReader, ask: Ask, patience: float
    ) -> None:
        """Has asked for the first turn."""
        super().__init__(first.response)
        self._turn, self._limit = first, limit
        self._reader, self._ask, self._patience = reader, ask, patience
        self._said, self._envelope = GeneratedSoFar(), Json()
        self._num_before = 0  # tokens of the turns before
        self._ends_turn = False  # there is another one
        self._is_over = False  # the LM or the client's limit has ended the answer
        self._used, self._told = LegUsage(), Json()  # of the turns before; of this one

    @classmethod
    async def begun(
        cls, body: Json, reader: ThoughtReader, ask: Ask, patience: float
    ) -> LegInTurns:
        """Asks for the first turn.

        Args:
            body: The body of the request that would ask for all turns at once.
            reader: As the class has it, and so are the others.
            ask: Likewise.
            patience: Likewise.

        Raises:
            UpstreamError: If no answer comes.
        """
        limit = _num_until_look(reader, 0)
        return cls(await ask(_limited(body, limit)), limit, reader, ask, patience)

    async def comes_before(self, other: asyncio.Future[Any]) -> bool:
        """Waits for something else, before which nothing comes."""
        await asyncio.wait((other,))
        return False

    async def pause(self) -> bool:
        """Ends the turn that runs, after what is left of one that has come to its limit.

        Returns:
            That the leg goes on all the same.
        """
        rest: list[StreamEvent] = []
        try:
            if self._is_at_limit:
                with suppress(UpstreamError):
                    rest += [event async for event in self._turn if self._is_shown(event)]
        finally:
            self._put_back += rest[::-1]
            self._ends_turn = not self._is_over
        await self._end_turn()
        return True

    async def close(self) -> None:
        """Ends the leg and its turn."""
        await super().close()
        await self._turn.close()

    @property
    def _num_of_turn(self) -> int:
        return self._said.num_tokens - self._num_before

    @property
    def _is_at_limit(self) -> bool:
        return self._num_of_turn >= self._limit and not self._is_over

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        while True:
            async for event in self._turn:
                if self._is_shown(event):
                    yield event
            if not (self._ends_turn or self._is_at_limit):
                return
            await self._end_turn()
            await self._next_turn()

    def _is_shown(self, event: StreamEvent) -> bool:
        """Takes in an event of a turn; returns whether the leg has it too."""
        chunk, choice = event.chunk, event.choice
        if chunk is None:
            return not (self._ends_turn or self._is_at_limit)
        if has_others(chunk):
            raise UpstreamError(SEVERAL, "upstream gave other choices than it was asked for")
        self._said.add(chunk)
        if choice is not None and (finish := choice.get("finish_reason")):
            num = max(self._num_of_turn, num_generated(chunk))
            self._ends_turn = finish == "length" and num >= self._limit
            self._is_over = not self._ends_turn
            if self._ends_turn:
                choice["finish_reason"] = None
        if isinstance(usage := chunk.get("usage"), dict):
            self._told = usage
            chunk["usage"] = self._used_by_now().told if self._num_before else usage
            if self._ends_turn:
                del chunk["usage"]
        self._envelope = self._envelope or {n: chunk[n] for n in _ENVELOPE if n in chunk}
        if self._num_before or self._ends_turn:
            chunk |= self._envelope
            event.raw = b""
        has_more = choice is not None and (choice.get("text") or tokens_of(choice))
        return bool(has_more) or not self._ends_turn

    def _used_by_now(self) -> LegUsage:
        """The tokens of all turns, this one as far as it has come."""
        used = LegUsage()
        used.take(self._used.told)
        used.take_turn(self._told, self._num_of_turn)
        return used

    async def _end_turn(self) -> None:
        await self._turn.close()
        if self._num_before:
            self._reader.prober.note_turn(self._told)
        self._used, self._told = self._used_by_now(), {}
        self._num_before = self._said.num_tokens
        self._reader.usages[0].take(self._used.told)

    async def _next_turn(self) -> None:
        """Asks for the next turn, once more if that fails.

        Raises:
            UpstreamError: If that fails too.
        """
        reader, self._ends_turn = self._reader, False
        try:
            await self._open(_num_until_look(reader, self._used.completion_tokens))
        except UpstreamError as error:
            if reader.is_thinking:
                reader.fall_back(error.kind)
            await anyio.sleep(min(error.wait or _BREATH, self._patience))
            await self._open(NEVER)

    async def _open(self, limit: int) -> None:
        """Asks for a turn, and waits until it has begun.

        Raises:
            UpstreamError: If it does not begin.
        """
        reader, request = self._reader, self._reader.request
        body = await reader.server.body_after(request, self._said, "")
        body = request.less_tokens(body, self._used.completion_tokens)
        if isinstance(seed := body.get("seed"), int) and seed >= 0:
            # Other draws than those of the turns before.
            body["seed"] = (seed + self._used.completion_tokens) % _NUM_SEEDS
        if reader.is_thinking and reader.may_halt and reader.streamed.wants_logprobs:
            body |= numbers_asked(False, max(NUM_TOP, request.num_top or 0))
        turn = await self._ask(_limited(body, limit))
        try:
            if not turn.is_readable:
                raise await refusal("the next turn of a thought", turn)
            turn.put_back(await anext(turn))
        except StopAsyncIteration:
            raise UpstreamError("cut", "upstream broke off its answer") from None
        self._turn, self._limit = turn, limit
        reader.num_turns += 1


def _num_until_look(reader: ThoughtReader, num_used: int) -> int:
    """Tokens up to the next decision point or the cap; NEVER if the client's limit comes first.

    So it is if nobody looks, or might not look there.
    """
    look, budget = reader.streamed.next_look, reader.request.max_tokens
    num = look - reader.thought.num_tokens
    is_looked_at = reader.is_thinking and reader.may_halt and reader.prober.has_room
    is_first = look < NEVER and (budget is None or num < budget - num_used)
    return num if is_looked_at and is_first else NEVER


def _limited(body: Json, limit: int) -> Json:
    return body if limit == NEVER else body | {"max_tokens": limit}
