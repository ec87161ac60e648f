"""Legs: the answers of the upstream that make up one completion, while they come in.

A completion whose thought runs to its end has one leg. One that is halted has a second, which goes
on behind the closed thought, and sometimes a third.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2

from haltwise.proxy.wire import (
    DONE,
    EVENT_STREAM,
    REASONING_FIELDS,
    EventReader,
    Json,
    ServedToken,
    StreamEvent,
    UpstreamError,
    choice_of,
    texts_of,
    tokens_of,
)

log = logging.getLogger("haltwise.proxy")

# Bytes of events that are held back; with more the upstream has to wait.
_MOST_HELD = 2 * 2**20


@contextmanager
def as_upstream_errors() -> Iterator[None]:
    """Turns what may go wrong on the way to the upstream into an UpstreamError."""
    try:
        yield
    except httpx2.ConnectTimeout:
        message = "upstream could not be reached in time, see --connect-timeout"
        raise UpstreamError("connect timeout", message, 504) from None
    except httpx2.TimeoutException:
        raise UpstreamError("timeout", "upstream did not answer in time", 504) from None
    except httpx2.ConnectError:
        raise UpstreamError("unreachable", "upstream cannot be reached") from None
    except httpx2.TransportError:
        raise UpstreamError("cut", "upstream broke off its answer") from None


class UpstreamLeg:
    """One answer of the upstream; as an iterator it gives the events that are left.

    Args:
        response: The answer, whose headers have come.
    """

    def __init__(self, response: httpx2.Response) -> None:
        """Reads nothing of the body yet."""
        self.response = response
        self._events = self._read()
        self._put_back: list[StreamEvent] = []

    @property
    def is_stream(self) -> bool:
        """Whether the answer is a stream of events."""
        kind = self.response.headers.get("content-type", "")
        return self.response.status_code == 200 and kind.startswith(EVENT_STREAM)

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        """Returns the leg itself."""
        return self

    async def __anext__(self) -> StreamEvent:
        """The next event.

        Raises:
            UpstreamError: If it is malformed or an error, or the answer is cut or too late.
        """
        return self._put_back.pop() if self._put_back else await anext(self._events)

    async def _read(self) -> AsyncGenerator[StreamEvent, None]:
        reader = EventReader()
        async with aclosing(self.pieces()) as pieces:
            async for data in pieces:
                for event in reader.feed(data):
                    if event is not DONE:  # a completion ends with its last leg
                        yield event

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body piece by piece, as it was sent, whatever its type.

        Raises:
            UpstreamError: If the answer is cut or too late.
        """
        with as_upstream_errors():
            async for data in self.response.aiter_raw():
                yield data

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            UpstreamError: If the answer is cut or too late.
        """
        async with aclosing(self.pieces()) as pieces:
            return b"".join([data async for data in pieces])

    async def first_choice(self) -> Json | None:
        """The first choice with a text or an end; None without one.

        The events up to it are given by the iterator all the same.

        Raises:
            UpstreamError: If one is malformed or an error, or the answer is cut or too late.
        """
        passed = []
        async for event in self:
            passed.append(event)
            choice = event.choice
            if choice and (any(texts_of(choice)) or choice.get("finish_reason")):
                self._put_back = passed[::-1]
                return choice
        return None

    async def close(self) -> None:
        """Ends the leg: the upstream need not go on with it."""
        with anyio.CancelScope(shield=True):
            await self._events.aclose()
            await self.response.aclose()


class HeldBackLeg:
    """Reads on in a leg while nobody listens, up to a limit, and forgets nothing.

    Args:
        leg: The leg; nobody else may read it from now on.
    """

    def __init__(self, leg: UpstreamLeg) -> None:
        """Begins to read, in a task of its own."""
        self.is_enough = False
        """Whether the end of its answer has come, or there is no room for it."""
        self._leg = leg
        self._on_enough: Callable[[], None] | None = None
        self._events: asyncio.Queue[StreamEvent | UpstreamError | None] = asyncio.Queue()
        self._num_bytes, self._room = 0, asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._leg:
                self._events.put_nowait(event)
                self._num_bytes += len(event.raw)
                is_full = self._num_bytes > _MOST_HELD
                if is_full or (event.choice or {}).get("finish_reason"):
                    self.is_enough = True
                    self._tell()
                if is_full:
                    self._room.clear()
                    await self._room.wait()
            self._events.put_nowait(None)
        except UpstreamError as error:
            self._events.put_nowait(error)
        except Exception:
            log.exception("a defect of the proxy")
            self._events.put_nowait(UpstreamError("cut", "upstream's answer could not be read"))

    def _tell(self) -> None:
        if self.is_enough and self._on_enough is not None:
            self._on_enough()

    def when_enough(self, call: Callable[[], None]) -> None:
        """Sets what is called, perhaps at once, when there is no more to wait for."""
        self._on_enough = call
        self._tell()

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


@dataclass
class GeneratedSoFar:
    """What a leg has shown of the LM's tokens: enough to count them and to go on from them."""

    texts: list[str] = field(default_factory=list)
    """The text, in pieces."""
    ids: list[int] = field(default_factory=list)
    """Ids of the tokens, if the server tells them."""
    prompt_ids: list[int] | None = None
    """Ids of the prompt's tokens, if the server tells them."""
    num_tokens: int = 0
    """Number of tokens."""

    def add(self, chunk: Json, tokens: Sequence[ServedToken] | None = None) -> None:
        """Takes in the next chunk.

        Args:
            chunk: The chunk.
            tokens: Its tokens, if the caller has read them already.
        """
        choice = choice_of(chunk)
        if choice is None:
            return
        tokens, text = tokens or tokens_of(choice), "".join(texts_of(choice))
        prompt_ids = chunk.get("prompt_token_ids") or choice.get("prompt_token_ids")
        self.prompt_ids = prompt_ids if isinstance(prompt_ids, list) else self.prompt_ids
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            ids = [token.id for token in tokens if token.id is not None]
        self.ids += ids
        self.num_tokens += len(ids) or len(tokens) or bool(text)
        # A token that ends inside of a character has no text of its own.
        own = "".join(token.text for token in tokens)
        is_whole = len(own) >= len(text) and "\ufffd" not in own
        self.texts.append(own if is_whole else text)

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    @property
    def has_ids(self) -> bool:
        """Whether the ids of all tokens are known."""
        return len(self.ids) == self.num_tokens


@dataclass
class LegUsage:
    """The tokens of one leg, as they were counted until the server tells them itself."""

    prompt_tokens: int | None = None
    """None if they are not known."""
    completion_tokens: int = 0

    def take(self, usage: Any) -> None:
        """Believes the usage that the server tells, if it is one."""
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                setattr(self, name, usage[name])


class AlreadyShown:
    """Leaves out of an answer that comes anew what the client has of it already.

    If it is another answer this time, what follows its thought is left.

    Args:
        shown: All text that the client has: it broke off inside of a thought.
        think_end: The marker that closes a thought.
    """

    def __init__(self, shown: str, think_end: str) -> None:
        """Starts before the first chunk."""
        self._shown, self._think_end = shown, think_end
        self._text, self._has_field, self._is_over = "", False, False

    def leave_out_of(self, choice: Json) -> bool:
        """Cuts the next choice to what is new; returns whether anything of it is."""
        if self._is_over:
            return True
        thought, text = texts_of(choice)
        self._text += thought + text
        self._has_field |= bool(thought)
        num = self._num_new(text)
        self._is_over = num > 0
        new = self._text[len(self._text) - num :]
        border = max(num - len(text), 0) if thought else 0
        _replace_texts(choice, new[:border], new[border:])
        return self._is_over or bool(choice.get("finish_reason"))

    def _num_new(self, text: str) -> int:
        """The number of characters at the end of all text that are new."""
        if self._shown.startswith(self._text):
            return 0
        if self._text.startswith(self._shown):
            return len(self._text) - len(self._shown)
        if self._has_field:
            return len(text)
        end = self._text.find(self._think_end)
        return 0 if end < 0 else len(self._text) - end


def _replace_texts(choice: Json, thought: str, text: str) -> None:
    part = choice.get("delta", choice)
    for names, value in ((REASONING_FIELDS, thought), (("content", "text"), text)):
        part.update({name: value for name in names if part.get(name)})
