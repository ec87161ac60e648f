"""The connections to the LM's server: how a request gets there, and how its answer comes back."""

from __future__ import annotations

import itertools
import json

import anyio
import httpx2

from haltwise.proxy.config import ServeConfig
from haltwise.proxy.legs import UpstreamLeg, as_upstream_errors
from haltwise.proxy.wire import Json, RawHeaders, UpstreamError, json_object

_STREAMS_A_POOL = 16
# Seconds that the answer to a question of the proxy's own may take: a client waits for it.
_CALL_TIMEOUT = 5.0


class Upstream:
    """The connections to the LM's server.

    Args:
        config: Says where the server is, which key it wants, and how long it may take.

    Raises:
        InputError: If the address or the key's environment variable cannot be used.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Prepares the pools; no connection is opened yet."""
        self._url = httpx2.URL(config.upstream_url)
        key = config.upstream_key
        self._key = None if key is None else f"Bearer {key}".encode()
        # No connection is used twice: one that the server closes just then would lose an answer.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._timeout = httpx2.Timeout(config.read_timeout, connect=config.connect_timeout)
        # A pool looks at each of its connections at every request: many small ones look less.
        context = httpx2.create_ssl_context(trust_env=True)  # whom the system trusts
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
        self, method: str, target: bytes, headers: RawHeaders, content: bytes
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
        url = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + target)
        request = httpx2.Request(method, url, headers=self._signed(headers), content=content)
        request.extensions["timeout"] = self._timeout.as_dict()
        with as_upstream_errors():
            return UpstreamLeg(await next(self._next_pool).handle_async_request(request))

    async def stream(self, path: str, body: Json, headers: RawHeaders) -> UpstreamLeg:
        """Posts JSON; a stream of events is expected, but not checked.

        Raises:
            UpstreamError: If no answer comes.
        """
        headers = [pair for pair in headers if pair[0] not in (b"accept-encoding", b"content-type")]
        headers += [(b"accept-encoding", b"identity"), (b"content-type", b"application/json")]
        return await self.open("POST", path.encode(), headers, json.dumps(body).encode())

    async def call(self, path: str, body: Json | None, headers: RawHeaders) -> Json:
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
                found = json_object(await leg.body())
            finally:
                await leg.close()
            status = leg.response.status_code
            if status != 200 or found is None:
                raise UpstreamError("status", f"upstream answered a call with {status}")
            return found
        raise UpstreamError("timeout", "upstream did not answer a call in time", 504)

    def _signed(self, headers: RawHeaders) -> RawHeaders:
        if self._key is None:
            return headers
        others = [pair for pair in headers if pair[0] != b"authorization"]
        return [*others, (b"authorization", self._key)]
