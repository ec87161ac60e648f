"""The connections to the LM's server: how a request gets there, and how its answer comes back.

An answer is a leg of a completion. One whose thought runs to its end has one leg. One that is
halted has a second, which goes on behind the closed thought, and sometimes a third.
"""

import asyncio
import functools
import itertools
import os
import ssl
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeGuard, TypeVar

import anyio
import httpx2

from haltwise.proxy import wire
from haltwise.proxy.aside import encoded
from haltwise.proxy.config import UpstreamConfig

_STREAMS_A_POOL = 16
# Seconds that the answer to a question of the proxy's own may take: a client waits for it.
_CALL_TIMEOUT = 5.0
# Seconds for which a server that did not answer such a question in time is not asked it again.
_SILENCE_LASTS = 10.0
# Bytes of an answer that is read as a whole; no honest one is longer.
_LONGEST_BODY = 64 * 2**20
# Where the environment may say whom to trust.
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
# Statuses that an answer can have.
_STATUSES = range(200, 600)
# Those of a server that has too much to do, or that has had enough of a client.
_OF_LOAD = (429, 503)
# Digits that are read of the seconds that a server wants to be left alone.
_WAIT_DIGITS = 9
# More tokens than any request can have.
_MOST_TOKENS = 10**9

T = TypeVar("T")


@contextmanager
def as_upstream_errors() -> Iterator[None]:
    """Turns what may go wrong on the way to the upstream into an UpstreamError."""
    try:
        yield
    except httpx2.ConnectTimeout:
        message = "upstream could not be reached in time, see --connect-timeout"
        raise wire.UpstreamError("connect timeout", message, 504) from None
    except httpx2.TimeoutException:
        raise wire.UpstreamError("timeout", "upstream did not answer in time", 504) from None
    except httpx2.ConnectError:
        raise wire.UpstreamError("unreachable", "upstream cannot be reached") from None
    except httpx2.TransportError:
        raise wire.UpstreamError("cut", "upstream broke off its answer") from None
    except httpx2.DecodingError:
        raise wire.UpstreamError("malformed", "upstream's answer cannot be unpacked") from None


class UpstreamLeg:
    """One answer of the upstream; as an iterator it gives the events that are left.

    What comes behind the mark of a stream's end is not waited for: the answer is whole.

    Args:
        response: The answer, whose headers have come.
    """

    def __init__(self, response: httpx2.Response) -> None:
        """Reads nothing of the body yet."""
        self.response = response
        self._events = self._read()
        self._put_back: list[wire.StreamEvent | wire.UpstreamError] = []
        # The next event, if somebody waits for it beside something else; None is the end.
        self._coming: asyncio.Task[wire.StreamEvent | None] | None = None

    @property
    def is_readable(self) -> bool:
        """Whether the answer may be a stream of events, or a whole one in place of it.

        Servers and those before them have all kinds of names for either.
        """
        kind = self.response.headers.get("content-type", "").lower()
        return self.response.is_success and "html" not in kind

    @property
    def wait(self) -> float:
        """Seconds for which the server does not want to be asked again; 0 if it does not tell."""
        told = self.response.headers.get("retry-after", "").strip()
        if self.response.status_code not in _OF_LOAD:
            return 0.0
        if told.isascii() and told.isdigit():
            return float(told[:_WAIT_DIGITS])
        try:
            until = parsedate_to_datetime(told)
        except (ValueError, TypeError, OverflowError):
            return 0.0
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max((until - datetime.now(UTC)).total_seconds(), 0.0)

    def __aiter__(self) -> AsyncIterator[wire.StreamEvent]:
        """Returns the leg itself."""
        return self

    async def __anext__(self) -> wire.StreamEvent:
        """The next event.

        Raises:
            UpstreamError: If it is malformed or an error, or the answer is cut or too late.
        """
        if self._put_back:
            event = self._put_back.pop()
            if isinstance(event, wire.UpstreamError):
                raise event
            return event
        if self._coming is None:
            return await anext(self._events)
        found = await asyncio.shield(self._coming)
        self._coming = None
        if found is None:
            raise StopAsyncIteration
        return found

    async def comes_before(self, other: asyncio.Future[Any]) -> bool:
        """Waits for the next event or for something else; returns whether the event is first."""
        if not self._put_back and not other.done():
            self._coming = self._coming or asyncio.create_task(self._next())
            await asyncio.wait((self._coming, other), return_when=asyncio.FIRST_COMPLETED)
        return not other.done()

    async def _next(self) -> wire.StreamEvent | None:
        return await anext(self._events, None)

    def put_back(self, event: wire.StreamEvent) -> None:
        """Makes an event that the leg has given its next one again."""
        self._put_back.append(event)

    async def _read(self) -> AsyncGenerator[wire.StreamEvent, None]:
        reader = wire.EventReader()
        async with aclosing(self._decoded()) as pieces:
            async for data in pieces:
                for event in reader.feed(data):
                    yield event
                    if event is wire.DONE:
                        return
        for event in reader.end():
            yield event

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body piece by piece, as it was sent, whatever its type.

        Raises:
            UpstreamError: If the answer is cut or too late.
        """
        with as_upstream_errors():
            async for data in self.response.aiter_raw():
                yield data

    async def _decoded(self) -> AsyncGenerator[bytes, None]:
        """The body piece by piece, unpacked where a server packs what was to be left as it is."""
        with as_upstream_errors():
            async for data in self.response.aiter_bytes():
                yield data

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            UpstreamError: If the answer is cut, too late or too long.
        """
        body = bytearray()
        async with aclosing(self._decoded()) as pieces:
            async for data in pieces:
                body += data
                if len(body) > _LONGEST_BODY:
                    raise wire.UpstreamError("malformed", "upstream's answer does not end")
        return bytes(body)

    async def opening(self, start: str, end: str) -> tuple[str, str] | None:
        """The first of the texts that it adds to a thought and to its answer; None without any end.

        The events up to there are given by the iterator all the same, and so is an error.

        Args:
            start: Where the answer may begin with this marker, it is read until that is known.
            end: This marker is left out of the beginning.

        Raises:
            UpstreamError: If one is malformed or an error, or the answer is cut or too late.
        """
        passed: list[wire.StreamEvent | wire.UpstreamError] = []
        answer = ""
        try:
            async for event in self:
                passed.append(event)
                choice = event.choice
                thought, text = ("", "") if choice is None else wire.texts_of(choice)
                answer = wire.without_markers(answer + text, end)
                is_known = answer.strip() and not wire.may_become(answer, start, end)
                is_over = choice and (choice.get("finish_reason") or wire.says_more(choice))
                if thought or is_known or is_over:
                    return thought, answer
        except wire.UpstreamError as error:
            passed.append(error)
            raise
        finally:
            self._put_back += passed[::-1]
        return None

    async def thinks(self, start: str, end: str) -> bool:
        """Whether it thinks where it is to answer; the arguments are those of `opening`."""
        with suppress(wire.UpstreamError):  # which comes again in its place
            thought, answer = await self.opening(start, end) or ("", "")
            return bool(thought) or answer.lstrip().startswith(start)
        return False

    async def pause(self) -> bool:
        """Ends what runs of the leg, if whoever reads on gets the rest all the same.

        Returns:
            Whether that is so.
        """
        return False

    async def close(self) -> None:
        """Ends the leg: the upstream need not go on with it."""
        with anyio.CancelScope(shield=True):
            if self._coming is not None:
                self._coming.cancel()
                await asyncio.wait((self._coming,))
            await self._events.aclose()
            await self.response.aclose()


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

    def add(self, chunk: wire.Json, tokens: Sequence[wire.ServedToken] | None = None) -> None:
        """Takes in the next chunk.

        Args:
            chunk: The chunk.
            tokens: Its tokens, if the caller has read them already.
        """
        choice = wire.choice_of(chunk)
        if choice is None:
            return
        tokens, text = tokens or wire.tokens_of(choice), "".join(wire.texts_of(choice))
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
        if tokens or text:
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
    computed_tokens: int | None = None
    """Tokens of the prompt that the server's cache did not have; None if it does not tell."""
    told: wire.Json = field(default_factory=dict)
    """All that the server told of it."""
    is_large: bool = False
    """Whether it is the large LM's."""

    @property
    def cached_tokens(self) -> int | None:
        """Tokens of the prompt that the server's cache had; None if it does not tell."""
        if self.prompt_tokens is None or self.computed_tokens is None:
            return None
        return self.prompt_tokens - self.computed_tokens

    def counts(self) -> wire.Json:
        """The numbers of its tokens, as a client is told them."""
        told = {n: getattr(self, n) for n in ("prompt_tokens", "completion_tokens")}
        return told | ({"large": True} if self.is_large else {})

    def take(self, usage: Any) -> None:
        """Believes the usage that the server tells, if it is one."""
        self.told = usage if isinstance(usage, dict) else self.told
        for name in ("prompt_tokens", "completion_tokens"):
            if _is_count(self.told.get(name)):
                setattr(self, name, self.told[name])
        details = self.told.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        if _is_count(cached) and self.prompt_tokens is not None:
            self.computed_tokens = max(self.prompt_tokens - cached, 0)

    def take_turn(self, usage: Any, num_tokens: int) -> None:
        """Takes in what the server tells of a request that goes on from all that is counted here.

        Its prompt is what was said before: it counts once.

        Args:
            usage: The usage that the server tells, if it is one.
            num_tokens: Tokens of the request, as they were counted.
        """
        usage = usage if isinstance(usage, dict) else {}
        prompt, own = usage.get("prompt_tokens"), usage.get("completion_tokens")
        num_before = self.completion_tokens
        more = {n: v for n, v in usage.items() if not n.startswith("prompt")}
        told = summed(self.told, more) if self.told else dict(usage)
        if "prompt_tokens" not in told and _is_count(prompt):
            told["prompt_tokens"] = max(prompt - num_before, 0)
        told["completion_tokens"] = num_before + (own if _is_count(own) else num_tokens)
        told["total_tokens"] = told.get("prompt_tokens", 0) + told["completion_tokens"]
        self.take(told)

    def take_timings(self, timings: Any) -> None:
        """Believes llama-server's timings of a prompt, of which it has computed a part anew."""
        if isinstance(timings, dict):
            cached, computed = (timings.get(name) for name in wire.PROMPT_PARTS)
            if _is_count(cached) and _is_count(computed):
                self.prompt_tokens, self.computed_tokens = cached + computed, computed


def summed(one: wire.Json, other: wire.Json) -> wire.Json:
    """Two objects in one, the numbers of both added up on every level."""
    both = one | other
    for name in one.keys() & other.keys():
        first, second = one[name], other[name]
        if isinstance(first, dict) and isinstance(second, dict):
            both[name] = summed(first, second)
        elif isinstance(first, int | float) and isinstance(second, int | float):
            both[name] = first + second
        else:
            both[name] = first if second is None else second
    return both


def _is_count(told: Any) -> TypeGuard[int]:
    """Whether what a server tells can be a number of tokens."""
    return isinstance(told, int) and not isinstance(told, bool) and 0 <= told <= _MOST_TOKENS


@functools.cache  # reading its certificates takes longer than all else that a proxy does at start
def _whom_the_system_trusts(*_: str | None) -> ssl.SSLContext:
    """What checks servers' certificates, for these values of `_CERTIFICATES`."""
    return httpx2.create_ssl_context(trust_env=True)


class Upstream:
    """The connections to the LM's server.

    Args:
        config: Says where the server is, which key it wants, and how long it may take.

    Raises:
        InputError: If the address or the key's environment variable cannot be used.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        """Prepares the pools; no connection is opened yet."""
        self._url = httpx2.URL(config.url)
        key = config.key
        self._key = None if key is None else f"Bearer {key}".encode()
        # No connection is used twice: one that the server closes just then would lose an answer.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._timeout = httpx2.Timeout(config.read_timeout, connect=config.connect_timeout)
        # A pool looks at each of its connections at every request: many small ones look less.
        context = _whom_the_system_trusts(*map(os.environ.get, _CERTIFICATES))
        self._pools = [
            httpx2.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)
            for _ in range(-(-config.max_streams // _STREAMS_A_POOL))
        ]
        self._next_pool = itertools.cycle(self._pools)

    async def close(self) -> None:
        """Closes all connections."""
        for pool in self._pools:
            await pool.aclose()

    async def open(
        self, method: str, target: bytes, headers: wire.RawHeaders, content: bytes
    ) -> UpstreamLeg:
        """Sends a request and waits for the headers of its answer.

        Args:
            method: The HTTP method.
            target: The path and the query.
            headers: The client's; its authorization gives way to the upstream's own key.
            content: The body.

        Raises:
            UpstreamError: If no answer comes.
        """
        if self._key is not None:
            headers = [pair for pair in headers if pair[0] != b"authorization"]
            headers.append((b"authorization", self._key))
        url = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + target)
        request = httpx2.Request(method, url, headers=headers, content=content)
        request.extensions["timeout"] = self._timeout.as_dict()
        with as_upstream_errors():
            leg = UpstreamLeg(await next(self._next_pool).handle_async_request(request))
        if leg.response.status_code not in _STATUSES:
            await leg.close()
            raise wire.UpstreamError("malformed", "upstream answered with a status that is none")
        return leg

    async def stream(self, path: str, body: wire.Json, headers: wire.RawHeaders) -> UpstreamLeg:
        """Posts JSON; a stream of events is expected, but not checked.

        Raises:
            UpstreamError: If no answer comes.
        """
        headers = [pair for pair in headers if pair[0] not in (b"accept-encoding", b"content-type")]
        headers += [(b"accept-encoding", b"identity"), (b"content-type", b"application/json")]
        return await self.open("POST", path.encode(), headers, await encoded(body))

    async def call(self, path: str, body: wire.Json | None, headers: wire.RawHeaders) -> wire.Json:
        """Asks the server a question of the proxy's own, and returns the JSON that it answers.

        Args:
            path: The path.
            body: What is posted; None to get instead.
            headers: The client's, of which only the authorization is sent.

        Raises:
            UpstreamError: If the answer is no JSON object, or does not come soon.
        """
        own = [pair for pair in headers if pair[0] == b"authorization"]
        with anyio.move_on_after(_CALL_TIMEOUT):
            if body is None:
                leg = await self.open("GET", path.encode(), own, b"")
            else:
                leg = await self.stream(path, body, own)
            try:
                found = wire.json_object(await leg.body())
            finally:
                await leg.close()
            status = leg.response.status_code
            if status != 200 or found is None:
                told = f"upstream answered {path} with {status}" + ", no JSON" * (status == 200)
                raise wire.UpstreamError("status", told, answered=status)
            return found
        raise wire.UpstreamError("timeout", "upstream did not answer a call in time", 504)


class SharedQuestion(Generic[T]):
    """A question to the server whose answer is the same for all: it is asked once, and kept.

    Who asks while it is being asked waits for the same answer, and so for the same time. A failure
    is shared too: with those who ask with the same key, whose fault it may be, and with all for a
    while if the server does not answer in time.

    Args:
        ask: Asks it with a client's headers.
    """

    def __init__(self, ask: Callable[[wire.RawHeaders], Awaitable[T]]) -> None:
        """Asks nothing yet."""
        self._ask = ask
        self._answers: list[T] = []
        self._running: dict[bytes, asyncio.Task[T]] = {}
        self._silent_until = 0.0

    async def answer(self, headers: wire.RawHeaders) -> T:
        """The answer.

        Raises:
            UpstreamError: If it does not come, or in time.
        """
        if self._answers:
            return self._answers[0]
        if anyio.current_time() < self._silent_until:
            raise wire.UpstreamError("timeout", "upstream did not answer a call in time", 504)
        key = next((value for name, value in headers if name == b"authorization"), b"")
        if key not in self._running:
            self._running[key] = asyncio.create_task(self._asked(headers))
            self._running[key].add_done_callback(lambda task: self._end(key, task))
        # It goes on for the others if this client leaves.
        return await asyncio.shield(self._running[key])

    async def _asked(self, headers: wire.RawHeaders) -> T:
        with anyio.move_on_after(_CALL_TIMEOUT):
            answer = await self._ask(headers)
            self._answers = [answer]
            return answer
        raise wire.UpstreamError("timeout", "upstream did not answer a call in time", 504)

    def _end(self, key: bytes, task: asyncio.Task[T]) -> None:
        del self._running[key]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, wire.UpstreamError) and error.kind == "timeout":
            self._silent_until = asyncio.get_running_loop().time() + _SILENCE_LASTS
