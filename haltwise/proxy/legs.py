"""Answers of the upstream while they come in: read, held back, skipped, and remembered."""

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
    EVENT_STREAM,
    REASONING_FIELDS,
    Event,
    EventReader,
    Json,
    Token,
    UpstreamError,
    choice_of,
    texts_of,
    tokens_of,
)

log = logging.getLogger("haltwise.proxy")

# Bytes of events that are held back; with more the upstream has to wait.
_MOST_HELD = 2 * 2**20


@contextmanager
def told() -> Iterator[None]:
    """Turns what may happen on the way to the upstream into UpstreamError."""
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


class Leg:
    """One answer of the upstream. As an iterator it gives the events that are left."""

    def __init__(self, response: httpx2.Response) -> None:
        """Takes an answer whose headers have come."""
        self.response = response
        self._events = self._read()
        self._back: list[Event] = []

    @property
    def is_stream(self) -> bool:
        """Whether it is a stream of events."""
        kind = self.response.headers.get("content-type", "")
        return self.response.status_code == 200 and kind.startswith(EVENT_STREAM)

    def __aiter__(self) -> AsyncIterator[Event]:
        """Gives itself."""
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            UpstreamError: If it is malformed or an error, or the answer is cut or too late.
        """
        return self._back.pop() if self._back else await anext(self._events)

    async def _read(self) -> AsyncGenerator[Event, None]:
        reader = EventReader()
        async with aclosing(self.pieces()) as pieces:
            async for data in pieces:
                for event in reader.feed(data):
                    yield event

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The answer as it was sent, of any kind.

        Raises:
            UpstreamError: If it is cut or too late.
        """
        with told():
            async for data in self.response.aiter_raw():
                yield data

    async def body(self) -> bytes:
        """All of it.

        Raises:
            UpstreamError: If it is cut or too late.
        """
        async with aclosing(self.pieces()) as pieces:
            return b"".join([data async for data in pieces])

    async def first_choice(self) -> Json | None:
        """The first choice with a text or an end; None without one. Nothing is taken away.

        Raises:
            UpstreamError: As `__anext__`.
        """
        passed = []
        async for event in self:
            passed.append(event)
            choice = choice_of(event.chunk) if event.chunk else None
            if choice and (any(texts_of(choice)) or choice.get("finish_reason")):
                self._back = passed[::-1]
                return choice
        return None

    async def close(self) -> None:
        """Ends it; the upstream need not go on."""
        with anyio.CancelScope(shield=True):
            await self._events.aclose()
            await self.response.aclose()


class Held:
    """Reads on in a leg while nobody listens, up to a limit, and forgets nothing."""

    def __init__(self, leg: Leg) -> None:
        """Begins to read."""
        self.is_enough = False
        """Whether the end of its answer has come, or there is no room for it."""
        self._leg = leg
        self._on_enough: Callable[[], None] | None = None
        self._events: asyncio.Queue[Event | UpstreamError | None] = asyncio.Queue()
        self._num_bytes, self._room = 0, asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._leg:
                self._events.put_nowait(event)
                self._num_bytes += len(event.raw)
                is_full = self._num_bytes > _MOST_HELD
                if is_full or _is_last(event):
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
        """Sets what to call, perhaps at once, when there is no more to wait for."""
        self._on_enough = call
        self._tell()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """What the leg says from where it was held back.

        Raises:
            UpstreamError: As of a leg.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, UpstreamError):
                raise event
            self._num_bytes -= len(event.raw)
            if self._num_bytes <= _MOST_HELD:
                self._room.set()
            yield event

    def num_tokens(self) -> int:
        """Tokens that nobody has listened to, and nobody will."""
        seen = Seen()
        while not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, Event) and event.chunk:
                seen.add(event.chunk)
        return seen.num_tokens

    async def close(self) -> None:
        """Reads no more."""
        self._task.cancel()
        with anyio.CancelScope(shield=True), suppress(asyncio.CancelledError):
            await self._task


def _is_last(event: Event) -> bool:
    """Whether an answer ends with it."""
    choice = choice_of(event.chunk) if event.chunk else None
    return choice is not None and bool(choice.get("finish_reason"))


@dataclass
class Seen:
    """What an answer has shown so far, for going on from it."""

    texts: list[str] = field(default_factory=list)
    """All of it, in pieces."""
    ids: list[int] = field(default_factory=list)
    """Of its tokens, if the server tells them."""
    prompt_ids: list[int] | None = None
    """Of the prompt, if the server tells them."""
    num_tokens: int = 0

    def add(self, chunk: Json, tokens: Sequence[Token] | None = None) -> None:
        """Takes in a chunk; its tokens, if the caller has them."""
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
        whole = len(own) >= len(text) and "\ufffd" not in own
        self.texts.append(own if whole else text)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    @property
    def has_ids(self) -> bool:
        """Whether the ids of all tokens are known."""
        return len(self.ids) == self.num_tokens


@dataclass
class Used:
    """Tokens of one leg."""

    prompt_tokens: int | None = None
    completion_tokens: int = 0

    def take(self, usage: Any) -> None:
        """Believes what the server says."""
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                setattr(self, name, usage[name])


class Skip:
    """Leaves out of an answer that comes anew what the client has of it.

    If it is another answer this time, what follows its thought is left.

    Args:
        has: All text that the client has: it broke off inside of a thought.
        think_end: The marker that closes a thought.
    """

    def __init__(self, has: str, think_end: str) -> None:
        """Starts before the first chunk."""
        self._has, self._think_end = has, think_end
        self._text, self._reasons, self._is_over = "", False, False

    def rest(self, choice: Json) -> bool:
        """Cuts a choice to what is new; whether that is anything."""
        if self._is_over:
            return True
        thought, text = texts_of(choice)
        self._text += thought + text
        self._reasons |= bool(thought)
        num = self._num_new(text)
        self._is_over = num > 0
        new = self._text[len(self._text) - num :]
        border = max(num - len(text), 0) if thought else 0
        _replace_texts(choice, new[:border], new[border:])
        return self._is_over or bool(choice.get("finish_reason"))

    def _num_new(self, text: str) -> int:
        """Characters at the end that are new."""
        if self._has.startswith(self._text):
            return 0
        if self._text.startswith(self._has):
            return len(self._text) - len(self._has)
        if self._reasons:
            return len(text)
        end = self._text.find(self._think_end)
        return 0 if end < 0 else len(self._text) - end


def _replace_texts(choice: Json, thought: str, text: str) -> None:
    part = choice.get("delta", choice)
    for names, value in ((REASONING_FIELDS, thought), (("content", "text"), text)):
        part.update({name: value for name in names if part.get(name)})
