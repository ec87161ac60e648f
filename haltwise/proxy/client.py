"""The client's end of a request: what it sends, what it gets, and whether it is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from haltwise.proxy.request_record import RequestRecord
from haltwise.proxy.wire import Json, RawHeaders

_JSON: RawHeaders = [(b"content-type", b"application/json")]


class RefusedError(Exception):
    """A request that the proxy itself refuses; the message is for the client."""

    def __init__(
        self, status: int, kind: str, message: str, headers: RawHeaders | None = None
    ) -> None:
        """Takes the status, the error's type, its message, and headers beside them."""
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or []


class ClientGoneError(Exception):
    """The client has left, or does not read."""

    def __init__(self, kind: str) -> None:
        """Takes which of both, in a word."""
        super().__init__(kind)
        self.kind = kind


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
        self.headers = Headers(scope=scope)
        self.raw_headers: RawHeaders = list(scope["headers"])
        self.has_started = False
        """Whether the client has got a status."""
        self.is_gone = False
        """Whether the client has left, or was dropped."""
        self._receive, self._send = receive, send
        self._last = b""
        self._patience = patience

    async def body(self, limit: int) -> bytes:
        """The body of the request.

        Args:
            limit: The most bytes that it may have.

        Raises:
            RefusedError: If it has more, or does not come in time.
            ClientGoneError: If the client leaves before its end.
        """
        length = self.headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._patience):
                return await self._body(limit)
        except TimeoutError:
            raise RefusedError(408, "timeout", "the request's body did not come") from None

    async def _body(self, limit: int) -> bytes:
        pieces, num = [], 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("disconnected")
            pieces.append(message.get("body", b""))
            num += len(pieces[-1])
            if num > limit:
                raise _too_large(limit)
            more = message.get("more_body", False)
        return b"".join(pieces)

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Runs its block for as long as the client is there, and cancels it when that leaves.

        Raises:
            ClientGoneError: If the block was cancelled.
        """
        failure: Exception | None = None

        async def leave(scope: anyio.CancelScope) -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.is_gone = True
            scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(leave, group.cancel_scope)
            try:
                yield
            except Exception as error:
                failure = error  # a task group would wrap it
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if self.is_gone:
            raise ClientGoneError("disconnected")

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

    async def answer(self, status: int, content: Json, headers: RawHeaders) -> None:
        """Sends the status and the headers of a JSON answer; its body follows with `finish`.

        Raises:
            ClientGoneError: If the client has left, or does not read.
        """
        self._last = json.dumps(content).encode()
        length = (b"content-length", str(len(self._last)).encode())
        await self.start(status, [*headers, *_JSON, length])

    async def finish(self) -> None:
        """Sends what is left: a client that has its whole answer is through with the proxy.

        Raises:
            ClientGoneError: If the client has left, or does not read.
        """
        if not self.is_gone:
            await self._deliver({"type": "http.response.body", "body": self._last})

    async def drop(self) -> None:
        """Cuts the connection; a server that cannot does so when the answer gets no end."""
        self.is_gone = True
        abort: Callable[[], None] | None = self.scope.get("state", {}).get("abort")
        if abort is not None:
            abort()
            await asyncio.sleep(0)  # the server sees it

    async def _deliver(self, message: Json) -> None:
        is_closing: Callable[[], bool] | None = self.scope.get("state", {}).get("is_closing")
        if is_closing is not None and is_closing():
            self.is_gone = True  # asyncio would log each attempt
            raise ClientGoneError("disconnected")
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except TimeoutError:
            await self.drop()
            raise ClientGoneError("stalled") from None
        except OSError:
            self.is_gone = True
            raise ClientGoneError("disconnected") from None


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, "too_large", f"request has more than {limit} bytes")
