"""How a thought is closed: by the server itself, or by a second leg that goes on behind it.

No answer is lost: whatever fails on the way, the LM thinks on, and its client sees no difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, suppress

import anyio

from haltwise.proxy.acceptance import Acceptance
from haltwise.proxy.large import FAILED, TOOK_NOTHING, LargeLM, Where
from haltwise.proxy.metrics import log
from haltwise.proxy.probing import counting
from haltwise.proxy.thought import SEVERAL, ThoughtReader
from haltwise.proxy.turns import LegInTurns
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage, UpstreamLeg
from haltwise.proxy.wire import (
    Json,
    StreamEvent,
    UpstreamError,
    has_others,
    replace_texts,
    says_more,
    texts_of,
)
from haltwise.session.session import UNGIVEN

# Bytes of events that are held back; with more the upstream has to wait.
_MOST_HELD = 2 * 2**20
# Seconds that a second leg has at least, even if the first one's own answer is whole by then.
_SOON = 2.0
# Errors of a first leg that may come from what it is asked for beside the client's own fields.
_ASKED_PLAINLY = ("said", "malformed", "cut")
# Tokens that may come of a thought whose server has been told to end it: they were on their way.
_ON_THEIR_WAY = 256


class ThoughtCloser:
    """Sends the requests of one completion: the first one, and those that close its thought.

    Args:
        reader: Knows the request, the server, and the thought as far as it was shown.
        patience: Seconds to wait for a second leg.
        acceptance: Says whether an answer can be given.
    """

    def __init__(self, reader: ThoughtReader, patience: float, acceptance: Acceptance) -> None:
        """Sends nothing yet."""
        self.has_asked = False
        """Whether the small LM has been asked."""
        self._reader, self._patience, self._acceptance = reader, patience, acceptance
        self._request, self._server = reader.request, reader.server
        self._headers = reader.request.headers
        self._tail = reader.server.close_text
        self._running = AsyncExitStack()

    async def ask(self, body: Json, chat: bool) -> UpstreamLeg:
        """Sends a request of this completion; `close` ends its leg.

        Args:
            body: Its body.
            chat: Whether it goes to the endpoint of chats.

        Raises:
            UpstreamError: If no answer comes.
        """
        path = "/v1/chat/completions" if chat else "/v1/completions"
        return await self._asked(self._server.upstream.stream(path, body, self._headers))

    async def _asked(self, answer: Awaitable[UpstreamLeg]) -> UpstreamLeg:
        self.has_asked = True
        leg = await answer
        self._running.push_async_callback(leg.close)
        # Two requests must not have one name.
        self._headers = [pair for pair in self._headers if pair[0] != b"x-request-id"]
        return leg

    async def _ask_turn(self, body: Json) -> UpstreamLeg:
        return await self._asked(self._server.open_turn(body, self._headers))

    async def ask_in_turns(self, body: Json) -> LegInTurns:
        """As `ask`, for a leg that comes in turns with the answers that are forced.

        Raises:
            UpstreamError: If no answer comes.
        """
        prober = self._reader.prober
        prober.leg = leg = await LegInTurns.begun(
            body, self._reader, self._ask_turn, self._patience
        )
        self._running.push_async_callback(leg.close)
        return leg

    async def close(self) -> None:
        """Ends all legs that still run."""
        await self._running.aclose()

    async def continued(
        self, first: UpstreamLeg, envelope: Json
    ) -> tuple[UpstreamLeg | None, AsyncIterable[StreamEvent]]:
        """Closes the thought: the server does so by itself if it can, else a second leg goes on.

        Args:
            first: The first leg. It stays open until a second one has begun to answer, unless that
                has to run in its slot.
            envelope: What all chunks of the answer have in common.

        Returns:
            The second leg and itself; if there is none, None and what the client gets instead:
            the first leg from where it is now, or the whole request asked anew.
        """
        reader = self._reader
        reader.may_halt = False
        is_checked = self._acceptance.is_on and reader.streamed.report().reason == "halted"
        if not (reader.thinks_on or is_checked) and await self._server_ends_thought(envelope):
            reader.is_closed = True
            return None, self._told_to_end(first)
        reader.is_closed = reader.thinks_on = False
        if not reader.is_close_shown:
            self._tail = reader.call_end + self._tail
        lets_go = self._server.caches_by_slot and not is_checked and reader.prober.keeps_slot
        held, is_paused = await self._held_back(first, lets_go)
        rest: AsyncIterable[StreamEvent] = held or first
        try:
            body = await self._body_after(self._tail)
            if not (held or is_paused):
                await self._server.leave(first, self._headers)
                rest = self._asked_anew(envelope)
            second = await self._begun_to_answer(body, held)
            if is_checked:
                await self._check(second)
        except UpstreamError as error:
            reader.fall_back("second thought" if reader.is_close_shown else error.kind)
            reader.is_close_shown = False
            return None, rest
        reader.is_closed = True
        if held is not None:
            await held.close()
            reader.usages[0].completion_tokens += held.num_tokens()
            await first.close()
        return second, second

    async def _held_back(
        self, first: UpstreamLeg, lets_go: bool = False
    ) -> tuple[HeldBackLeg | None, bool]:
        """The first leg, which is held back, if it runs on; and whether it pauses instead.

        Args:
            first: The leg.
            lets_go: Whether it is better left, even where a second one can run beside it.
        """
        is_paused = await first.pause()
        if is_paused or lets_go or self._server.one_at_a_time:
            return None, is_paused
        held = HeldBackLeg(first)
        self._running.push_async_callback(held.close)
        return held, False

    def refuses(self, text: str) -> bool:
        """Whether an answer behind the closed thought cannot be given."""
        return self._acceptance.refuses(self._request.asked_body, text, self._server.rules)

    async def _check(self, leg: UpstreamLeg) -> None:
        """Reads the whole answer of a leg, which gives it again unless it is refused.

        What is refused counts as a look at an answer.

        Raises:
            UpstreamError: If it is refused or not whole.
        """
        events, text, usage = list[StreamEvent](), "", LegUsage()
        calls = False
        async for event in counting(usage, leg):
            events.append(event)
            if (choice := event.choice) is not None:
                text += texts_of(choice)[1]
                calls |= bool(choice.get("delta", {}).get("tool_calls"))
        if not calls and self.refuses(text):
            probes = self._reader.prober.usage
            probes.num += 1
            probes.prompt_tokens += usage.prompt_tokens or 0
            probes.completion_tokens += usage.completion_tokens
            await leg.close()
            raise UpstreamError(UNGIVEN, "the answer of a halted thought was refused")
        for event in reversed(events):
            leg.put_back(event)

    async def escalated(
        self, first: UpstreamLeg, envelope: Json, large: LargeLM, where: Where
    ) -> AsyncIterable[StreamEvent]:
        """Leaves the request to the large LM; returns what the client gets from here on.

        The first leg goes on until the large LM has begun to answer. Its answer comes as a whole;
        where there is none, the small LM goes on, or is asked anew.

        Args:
            first: The first leg.
            envelope: What all chunks of the answer have in common.
            large: The large LM.
            where: Where it is asked.
        """
        reader = self._reader
        reader.may_halt = False
        reader.is_thinking &= where != "end"
        held, _ = await self._held_back(first)
        try:
            leg, usage = await self._begun_by(large)
        except UpstreamError:
            reader.fall_back(FAILED)
            return first if held is None else held
        if held is not None:
            await held.close()
            reader.usages[0].completion_tokens += held.num_tokens()
        await first.close()
        try:
            events = await large.events_of(leg, usage)
        except UpstreamError:
            reader.fall_back(FAILED)
            return self._asked_anew(envelope)
        reader.leave_to_large(where)
        return _in_envelope(events, envelope)

    async def escalated_at_start(self, large: LargeLM) -> UpstreamLeg | None:
        """The large LM's answer, whole, before the small one is asked; None if there is none."""
        try:
            leg, usage = await self._begun_by(large)
            events = await large.events_of(leg, usage)
        except UpstreamError:
            self._reader.fall_back(FAILED)
            return None
        self._reader.leave_to_large("start")
        for event in reversed(events):
            leg.put_back(event)
        return leg

    async def _begun_by(self, large: LargeLM) -> tuple[UpstreamLeg, LegUsage]:
        """A leg of the large LM whose first event has come, and what counts its tokens.

        Raises:
            UpstreamError: If none comes.
        """
        self._reader.large = usage = LegUsage(is_large=True)
        try:
            return await large.begun(self._request, self._headers), usage
        except UpstreamError as error:
            if error.kind in TOOK_NOTHING:
                self._reader.large = None
            raise

    async def answering(self) -> UpstreamLeg:
        """A leg that answers behind the closed thought, where no first leg runs any more.

        Raises:
            UpstreamError: If none begins to answer.
        """
        return await self._begun_to_answer(await self._body_after(self._tail), None)

    async def _server_ends_thought(self, envelope: Json) -> bool:
        with suppress(UpstreamError):
            completion_id = str(envelope.get("id", ""))
            return await self._server.end_thought(self._request, completion_id)
        return False

    async def _told_to_end(self, first: UpstreamLeg) -> AsyncIterator[StreamEvent]:
        """The rest of a leg whose server was told to end the thought.

        It breaks off where the LM does not heed that, for a second leg to go on: at a second
        thought, which nobody sees, or where the first one does not end soon.
        """
        reader, rules = self._reader, self._server.rules
        last = reader.generated.num_tokens + _ON_THEIR_WAY
        async for event in first:
            choice = event.choice
            if not reader.is_close_shown and choice is not None:
                reader.thinks_on = reader.is_thinking and reader.generated.num_tokens > last
                reader.is_close_shown = not reader.is_thinking or reader.begins_answer(choice)
                if reader.thinks_on or reader.is_close_shown:
                    first.put_back(event)
                if reader.is_close_shown and await first.thinks(rules.think_start, rules.think_end):
                    reader.thinks_on = True
                    self._tail = self._rest_of_close() + rules.think_start + self._tail
                if reader.thinks_on:
                    return
                if reader.is_close_shown:
                    continue
            yield event

    def _rest_of_close(self) -> str:
        """What of the close text the server has written without showing it."""
        before, marker = self._server.close_parts[0], self._server.rules.think_end
        rest = self._tail[len(before) :]
        return rest.removeprefix(marker) if marker in self._reader.generated.text else rest

    async def _begun_to_answer(self, body: Json, held: HeldBackLeg | None) -> UpstreamLeg:
        """As `begun`, but a second thought is closed too: before it has begun, and once."""
        may_be_empty = bool(self._server.close_parts[1])
        try:
            return await self.begun(body, may_be_empty, held)
        except UpstreamError as error:
            if error.kind != "second thought":
                raise
        self._tail += self._server.rules.think_start + self._server.close_text
        return await self.begun(await self._body_after(self._tail), may_be_empty, held)

    async def _body_after(self, tail: str) -> Json:
        """The body of a request that answers behind the thought and a tail that closes it."""
        body = await self._server.answer_body(self._request, self._reader.generated, tail)
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

            def hurry(_: asyncio.Future[None]) -> None:
                scope.deadline = min(scope.deadline, soon)

            if held is not None:
                held.enough.add_done_callback(hurry)
            leg = await self.ask(body, "messages" in body)
            rules = self._server.rules
            markers = (rules.think_start, rules.think_end)
            opening = await leg.opening(*markers) if leg.is_readable else None
            thought, text = opening or ("", "")
            thinks = bool(rules.think_start) and text.lstrip().startswith(rules.think_start)
            if opening and not thought and not thinks and (text or may_be_empty):
                return leg
            await leg.close()
            if thinks:
                raise UpstreamError("second thought", "upstream thought on where it was to answer")
            raise UpstreamError("no answer", "upstream did not answer where it was to")
        if held is not None and held.enough.done():
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
            body = await self._body_after(self._tail + said)
            return await self.begun(body, may_be_empty=True)
        except UpstreamError:
            raise error from None

    async def asked_plainly(
        self, first: UpstreamLeg, envelope: Json, error: UpstreamError
    ) -> AsyncIterator[StreamEvent]:
        """The client's own request in place of a first leg that has failed before it said anything.

        What the proxy asked for beside may have been too much for the server. Several choices are
        asked for so in any case: they do not come in turns.

        Args:
            first: The leg.
            envelope: What all chunks of the answer have in common.
            error: How it failed.

        Raises:
            UpstreamError: That error, if it had said something or is none of this kind.
        """
        reader = self._reader
        has_said = not reader.is_thinking or any(reader.shown_texts)
        is_several = error.kind == SEVERAL
        if not is_several and (has_said or error.kind not in _ASKED_PLAINLY):
            raise error
        await first.close()
        reader.fall_back(SEVERAL if is_several else "refused")
        return self._asked_anew(envelope)

    async def _asked_anew(self, envelope: Json) -> AsyncIterator[StreamEvent]:
        """The client's request from its beginning, without what the client has of it."""
        self._reader.usages.append(LegUsage())
        self._reader.is_thinking = False
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        leg = await self.ask(self._request.body | streaming, self._request.chat)
        if not leg.is_readable:
            raise UpstreamError("status", f"upstream answered with {leg.response.status_code}")
        reader, think_end = self._reader, self._server.rules.think_end
        shown = AlreadyShown("".join(reader.shown_texts), think_end, bool(reader.field))
        async for event in leg:
            choice = event.choice
            is_new = choice is None or has_others(event.chunk or {}) or shown.leave_out_of(choice)
            if event.chunk and is_new:
                yield StreamEvent(chunk=event.chunk | envelope)
            elif event.chunk is None:
                yield event


async def _in_envelope(events: Sequence[StreamEvent], envelope: Json) -> AsyncIterator[StreamEvent]:
    """The events of another leg in the envelope of the first one."""
    for event in events:
        yield event if event.chunk is None else StreamEvent(chunk=event.chunk | envelope)


class HeldBackLeg:
    """Reads on in a leg while nobody listens, up to a limit, and forgets nothing.

    Args:
        leg: The leg; nobody else may read it from now on.
    """

    def __init__(self, leg: UpstreamLeg) -> None:
        """Begins to read, in a task of its own."""
        self.enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the end of its answer has come, or there is no room for it."""
        self._leg = leg
        self._events: asyncio.Queue[StreamEvent | UpstreamError | None] = asyncio.Queue()
        self._num_bytes, self._room = 0, asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._leg:
                self._events.put_nowait(event)
                self._num_bytes += len(event.raw)
                is_full = self._num_bytes > _MOST_HELD
                is_enough = is_full or (event.choice or {}).get("finish_reason")
                if is_enough and not self.enough.done():
                    self.enough.set_result(None)
                if is_full:
                    self._room.clear()
                    await self._room.wait()
            self._events.put_nowait(None)
        except UpstreamError as error:
            self._events.put_nowait(error)
        except Exception:
            log.exception("a defect of the proxy")
            self._events.put_nowait(UpstreamError("cut", "upstream's answer could not be read"))

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        """Gives the leg's events from where it was held back.

        Raises:
            UpstreamError: If one is malformed or an error, or the answer is cut or too late.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, UpstreamError):
                raise event
            self._num_bytes -= len(event.raw)
            if self._num_bytes <= _MOST_HELD:
                self._room.set()
            yield event

    def num_tokens(self) -> int:
        """Counts the tokens that were held back, and drops them: nobody will listen to them."""
        unheard = GeneratedSoFar()
        while not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, StreamEvent) and event.chunk:
                unheard.add(event.chunk)
        return unheard.num_tokens

    async def close(self) -> None:
        """Reads no more."""
        self._task.cancel()
        with anyio.CancelScope(shield=True), suppress(asyncio.CancelledError):
            await self._task


class AlreadyShown:
    """Leaves out of an answer that comes anew what the client has of it already.

    If it is another answer this time, what follows its thought is left, and all of it if it has
    no thought.

    Args:
        shown: All text that the client has: it broke off inside of a thought.
        think_end: The marker that closes a thought.
        has_field: Whether thoughts have a field of their own.
    """

    def __init__(self, shown: str, think_end: str, has_field: bool = False) -> None:
        """Starts before the first chunk."""
        self._shown, self._think_end, self._has_field = shown, think_end, has_field
        self._text, self._is_over = "", False

    def leave_out_of(self, choice: Json) -> bool:
        """Cuts the next choice to what is new; returns whether anything of it is."""
        if self._is_over:
            return True
        ends, (thought, text) = bool(choice.get("finish_reason")), texts_of(choice)
        self._has_field |= bool(thought)
        self._text += thought if self._has_field else text
        new = self._new_text(ends)
        thought, text = (new, text) if self._has_field else ("", new)
        self._is_over = bool(thought or text) or says_more(choice)
        replace_texts(choice, thought, text)
        return self._is_over or ends

    def _new_text(self, ends: bool) -> str:
        """What the client does not have of the text so far, which may be the whole one."""
        if self._shown.startswith(self._text):
            return ""
        if self._text.startswith(self._shown):
            return self._text[len(self._shown) :]
        if self._has_field:
            return ""
        end = self._text.find(self._think_end)
        if end < 0:
            return self._text if ends else ""
        return self._text[end:]
