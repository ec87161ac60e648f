"""The client's end of a request: what it sends, what it gets, and whether it is still there."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from haltwise.proxy.metrics import RequestRecord
from haltwise.proxy.wire import Json, RawHeaders, error_body, json_bytes

# Seconds within which a server sees that a client has gone.
_SEEN_GONE = 5.0
# Seconds of silence after which a client, and whoever stands between, might take a stream for dead.
_SILENCE = 15.0
# A comment of a stream, which every reader skips.
_COMMENT = b":\n\n"
_JSON: RawHeaders = [(b"content-type", b"application/json")]


class RefusedError(Exception):
    """A request that the proxy itself refuses; the message is for the client."""

    def __init__(
        self, status: int, kind: str, message: str, headers: RawHeaders | None = None
    ) -> None:
        """Takes the status, the error's type, its message, and headers beside them."""
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or []
        self.body = error_body(message, kind)


class ClientGoneError(Exception):
    """The client has left, or does not read; the message says which of both, in a word."""


def check_browser(headers: Headers, lets_in_by: Callable[[str], bool]) -> None:
    """Refuses a browser that asks by a name which a hostile page may have lent to the proxy.

    Args:
        headers: Of its request.
        lets_in_by: Whether browsers may ask by a Host header.

    Raises:
        RefusedError: If it is a browser and may not.
    """
    is_page = any(name in headers for name in ("origin", "referer", "sec-fetch-site"))
    is_page |= headers.get("user-agent", "").startswith("Mozilla/")
    if is_page and not lets_in_by(headers.get("host", "")):
        message = "browsers are let in by known names alone, see --allowed-hosts"
        raise RefusedError(421, "unknown_host", message)


class RequestingClient:
    """The client's end of one request.

    Args:
        scope: ASGI's description of the request.
        receive: Gives what the client sends, as ASGI's messages.
        send: Takes what the client gets, as ASGI's messages.
        patience: Seconds that the client may take to send its request, and may not read.
        record: Notes what the client gets.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, patience: float, record: RequestRecord
    ) -> None:
        """Reads nothing yet."""
        self.scope = scope
        self.record = record
        self.request = Request(scope, receive)
        self.headers = self.request.headers
        self.has_started = False
        """Whether the client has got a status."""
        self.is_gone = False
        """Whether the client has left, or was dropped."""
        self._receive, self._send = receive, send
        self._last = b""
        self._sent = 0.0  # when the newest piece was
        self._patience = patience
        # What the server's own connection can do, if it tells.
        state: dict[str, Any] = scope.get("state", {})
        self._abort: Callable[[], None] = state.get("abort", lambda: None)
        self._is_closing: Callable[[], bool] = state.get("is_closing", lambda: False)

    async def body(self, limit: int) -> bytes:
        """The body of the request.

        Args:
            limit: The most bytes that it may have.

        Raises:
            RefusedError: If it has more, or does not come in time.
            ClientGoneError: If the client leaves before its end.
        """
        too_large = RefusedError(413, "too_large", f"request has more than {limit} bytes")
        length = self.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._patience):
                async for piece in self.request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RefusedError(408, "timeout", "the request's body did not come") from None
        except ClientDisconnect:
            raise ClientGoneError("disconnected") from None
        return bytes(body)

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Runs its block for as long as the client is there, and cancels it when that leaves.

        Raises:
            ClientGoneError: If the block was cancelled.
        """
        with anyio.CancelScope() as scope:
            watching = asyncio.create_task(self._watch(scope))
            try:
                yield
            finally:
                watching.cancel()
        if self.is_gone:
            raise ClientGoneError("disconnected")

    async def _watch(self, scope: anyio.CancelScope) -> None:
        """Cancels a block once the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        scope.cancel()

    async def start(self, status: int, headers: RawHeaders) -> None:
        """Sends the status and the headers.

        Raises:
            ClientGoneError: If the client has left, or does not read.
        """
        self.has_started = True
        await self._deliver({"type": "http.response.start", "status": status, "headers": headers})
        self.record.status = status

    async def send(self, data: bytes) -> None:
        """Sends a piece of the body.

        Raises:
            ClientGoneError: If the client has left, or does not read.
        """
        await self._deliver({"type": "http.response.body", "body": data, "more_body": True})

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Sends comments into the stream that its block sends, wherever that is silent for long."""
        self._sent = time.monotonic()
        commenting = asyncio.create_task(self._comment())
        try:
            yield
        finally:
            commenting.cancel()

    async def _comment(self) -> None:
        with suppress(ClientGoneError):  # the block finds out as well
            while not self.is_gone:
                silent_for = time.monotonic() - self._sent
                if silent_for < _SILENCE:
                    await asyncio.sleep(_SILENCE - silent_for)
                else:
                    await self.send(_COMMENT)

    async def answer(self, status: int, content: Json, headers: RawHeaders) -> None:
        """Sends the status and the headers of a JSON answer; its body follows with `finish`.

        Raises:
            ClientGoneError: If the client has left, or does not read.
        """
        self._last = json_bytes(content)
        length = (b"content-length", str(len(self._last)).encode())
        await self.start(status, [*headers, *_JSON, length])

    async def finish(self) -> None:
        """Sends what is left: a client that has its whole answer is through with the proxy.

        One that has gone is let go.

        Raises:
            ClientGoneError: If the client has left, or does not read.
        """
        if not self.is_gone:
            await self._deliver({"type": "http.response.body", "body": self._last})
            return
        self._abort()
        # The server takes an answer without an end for a defect until it has seen this.
        with anyio.move_on_after(_SEEN_GONE):
            while (await self._receive())["type"] != "http.disconnect":
                pass

    async def drop(self) -> None:
        """Cuts the connection; a server that cannot does so when the answer gets no end."""
        self.is_gone = True
        self._abort()
        await asyncio.sleep(0)  # the server sees it

    async def _deliver(self, message: Json) -> None:
        try:
            if self._is_closing():
                raise ConnectionError  # asyncio would log each attempt
            async with asyncio.timeout(self._patience):
                await self._send(message)
            self._sent = time.monotonic()
        except TimeoutError:
            await self.drop()
            raise ClientGoneError("stalled") from None
        except OSError:
            self.is_gone = True
            raise ClientGoneError("disconnected") from None
