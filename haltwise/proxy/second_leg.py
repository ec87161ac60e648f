"""How a thought is closed: by the server itself, or by a second leg that goes on behind it.

No answer is lost: whatever fails on the way, the LM thinks on, and its client sees no difference.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from haltwise.proxy.legs import AlreadyShown, HeldBackLeg, LegUsage, UpstreamLeg
from haltwise.proxy.lm_server import CannotContinueError
from haltwise.proxy.thought import ThoughtReader
from haltwise.proxy.wire import Json, StreamEvent, UpstreamError, texts_of

# Seconds that a second leg has at least, even if the first one's own answer is whole by then.
_SOON = 2.0


class ThoughtCloser:
    """Sends the requests of one completion: the first one, and those that close its thought.

    Args:
        reader: Knows the request, the server, and the thought as far as it was shown.
        patience: Seconds to wait for a second leg.
    """

    def __init__(self, reader: ThoughtReader, patience: float) -> None:
        """Sends nothing yet."""
        self.has_closed = False
        """Whether the proxy closed the thought."""
        self._reader, self._patience = reader, patience
        self._request, self._server = reader.request, reader.server
        self._legs: list[UpstreamLeg] = []
        self._held: HeldBackLeg | None = None

    async def ask(self, body: Json) -> UpstreamLeg:
        """Sends a request of this completion; `close` ends its leg.

        Raises:
            UpstreamError: If no answer comes.
        """
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        headers = self._request.headers
        if self._legs:  # two requests must not have one name
            headers = [pair for pair in headers if pair[0] != b"x-request-id"]
        leg = await self._server.upstream.stream(path, body, headers)
        self._legs.append(leg)
        return leg

    async def close(self) -> None:
        """Ends all legs that still run."""
        if self._held is not None:
            await self._held.close()
        for leg in self._legs:
            await leg.close()

    async def is_ended_by_server(self, completion_id: str) -> bool:
        """Tells the server to end the running thought by itself; returns whether it will."""
        try:
            self.has_closed = await self._server.end_thought(self._request, completion_id)
        except UpstreamError:
            self.has_closed = False
        self._reader.may_halt = False
        return self.has_closed

    async def continued(
        self, first: UpstreamLeg, envelope: Json
    ) -> tuple[UpstreamLeg | None, AsyncIterator[StreamEvent] | HeldBackLeg]:
        """Closes the thought by a second leg.

        Args:
            first: The first leg, which stays open until the second one has begun to answer.
            envelope: What all chunks of the answer have in common.

        Returns:
            The second leg and itself; if it fails, None and what the client gets instead: the
            first leg from where it was held back, or the whole request asked anew.
        """
        if not self._server.one_at_a_time:
            self._held = HeldBackLeg(first)
        try:
            body = await self._body_after(self._server.close_text)
        except (UpstreamError, CannotContinueError) as error:
            self._reader.fall_back(error.kind)
            return None, self._held or first
        if self._held is None:
            await first.close()
        may_be_empty = bool(self._server.close_parts[1])
        try:
            second = await self.begun(body, may_be_empty, self._held)
        except UpstreamError as error:
            self._reader.fall_back(error.kind)
            return None, self._held or self._asked_anew(envelope)
        self.has_closed = True
        if self._held is not None:
            await self._held.close()
            self._reader.usages[0].completion_tokens += self._held.num_tokens()
            await first.close()
        return second, second

    async def _body_after(self, tail: str) -> Json:
        """The body of a request that goes on from the thought and a tail behind it."""
        body = await self._server.body_after(self._request, self._reader.generated, tail)
        self._reader.note_prompt()
        num_used = sum(usage.completion_tokens for usage in self._reader.usages)
        return self._request.less_tokens(body, num_used)

    async def begun(
        self, body: Json, may_be_empty: bool, held: HeldBackLeg | None = None
    ) -> UpstreamLeg:
        """A leg that has begun to answer, or has nothing to add if it may.

        Args:
            body: The body of its request.
            may_be_empty: Whether it may have nothing to add.
            held: The leg that goes on instead, if this one begins neither soon nor before the
                held one has enough.

        Raises:
            UpstreamError: If it does not begin to answer, or thinks on.
        """
        soon = anyio.current_time() + _SOON
        with anyio.move_on_after(self._patience) as scope:

            def hurry() -> None:
                scope.deadline = min(scope.deadline, soon)

            if held is not None:
                held.when_enough(hurry)
            leg = await self.ask(body)
            choice = await leg.first_choice() if leg.is_stream else None
            thought, text = ("", "") if choice is None else texts_of(choice)
            if choice is not None and not thought and (text or may_be_empty):
                return leg
            await leg.close()
            raise UpstreamError("no answer", "upstream did not answer where it was to")
        if held is not None and held.is_enough:
            raise UpstreamError("late", "upstream went on by itself for too long")
        raise UpstreamError("timeout", "upstream did not answer in time", 504)

    async def resumed(self, said: str, error: UpstreamError) -> UpstreamLeg:
        """A leg that goes on where an answer broke off.

        Args:
            said: What the client has of the answer.
            error: What broke it off.

        Raises:
            UpstreamError: What broke it off, if no leg goes on.
        """
        try:
            body = await self._body_after(self._server.close_text + said)
            return await self.begun(body, may_be_empty=True)
        except (UpstreamError, CannotContinueError):
            raise error from None

    async def _asked_anew(self, envelope: Json) -> AsyncIterator[StreamEvent]:
        """The client's request from its beginning, without what the client has of it."""
        self._reader.usages.append(LegUsage())
        self._reader.is_thinking = False
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        leg = await self.ask(self._request.body | streaming)
        if not leg.is_stream:
            raise UpstreamError("status", f"upstream answered with {leg.response.status_code}")
        shown = AlreadyShown("".join(self._reader.shown_texts), self._server.rules.think_end)
        async for event in leg:
            choice = event.choice
            if event.chunk and (choice is None or shown.leave_out_of(choice)):
                yield StreamEvent(chunk=event.chunk | envelope)
