"""The proxy behind a socket."""

import asyncio
import errno
import json
import math
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from haltwise.proxy.app import Proxy, app_of, told_context
from haltwise.proxy.config import ServeConfig
from haltwise.proxy.metrics import log

# A request has its client's connection and two to the upstream.
_UPSTREAM_FILES = 2
_OTHER_FILES = 256
# Files that are left for all else where fewer may be open than wanted.
_FEWEST_OTHER_FILES = 64
# Clients may be connected for each request that may run, and some beside.
_CONNECTIONS_A_STREAM = 2
_OTHER_CONNECTIONS = 64
# Seconds in which requests that are cut off may tell their clients.
_LAST_WORDS = 1.0
# Seconds that a client may be connected without asking, or take to say what it asks.
_SILENCE = 60.0
# Seconds between two complaints that no more files can be opened.
_BETWEEN_COMPLAINTS = 60.0
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class _Protocol(H11Protocol):
    """Lets the application cut the connection of a client, and see that the client has cut it.

    A client that asks for nothing is let go, also amid a header and behind a request; and any such
    one as soon as there are too many.

    Args:
        most: The most connections.
        settings: Those of uvicorn.
    """

    def __init__(self, most: int, **settings: Any) -> None:
        """Has no connection yet."""
        super().__init__(**settings)
        self._most = most
        self._waiting: asyncio.TimerHandle | None = None
        self._has_asked = False  # for anything, and got it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called once a client has connected."""
        connection = cast(asyncio.Transport, transport)
        super().connection_made(connection)
        of_connection = {"abort": connection.abort, "is_closing": connection.is_closing}
        self.app_state = self.app_state | of_connection
        self._look()
        if len(self.connections) > self._most:
            self._make_room()

    def _make_room(self) -> None:
        """Lets a client go that asks for nothing: one that never has, the longest there first."""
        others = (one for one in self.connections if one is not self)
        waits = [
            (one._has_asked, one._waiting.when(), id(one), one)
            for one in others
            if isinstance(one, _Protocol) and one._waiting is not None
        ]
        idle = (one for *_, one in sorted(waits) if not one._is_heard)
        next(idle, self)._cut()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once the connection is no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with what the client sends."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Called once an answer has been sent."""
        super().on_response_complete()
        self._has_asked = True
        self._look()

    def _look(self) -> None:
        """Waits for the client if it has nothing that runs, from when on that is so."""
        runs = self.cycle is not None and not self.cycle.response_complete
        if runs or self.transport.is_closing():
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_SILENCE, self._let_go)

    def _let_go(self) -> None:
        self._stop_waiting()
        if self._is_heard:
            self._look()
        else:
            self._cut()

    @property
    def _is_heard(self) -> bool:
        """Whether the client has sent something that nobody has read yet: it would be reset."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    def _cut(self) -> None:
        self._stop_waiting()
        if self.transport.get_write_buffer_size():  # of what the client does not read
            self.transport.abort()
        else:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None


class _Server(uvicorn.Server):
    """Complains seldom about connections that it cannot take, and has last words for requests.

    Args:
        config: uvicorn's settings.
        reload: Is called at a SIGHUP.
    """

    def __init__(self, config: uvicorn.Config, reload: Callable[[], None]) -> None:
        """Does not run yet."""
        super().__init__(config)
        self._reload = reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(Complaints())
        if threading.current_thread() is threading.main_thread():  # others get no signals
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends: requests that still run after the wait, or that nobody waits for, are told."""
        await super().shutdown(sockets)
        running = list(self.server_state.tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_LAST_WORDS)


class Complaints:
    """Logs what goes wrong in an event loop; where files run out, once in a while.

    asyncio itself tries again later, but for each of those that wait to be taken it complains.
    """

    def __init__(self) -> None:
        """Has not complained yet."""
        self._next = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Takes in what went wrong, in asyncio's words."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_FILES:
            loop.default_exception_handler(context)
        elif loop.time() >= self._next:
            self._next = loop.time() + _BETWEEN_COMPLAINTS
            log.warning(json.dumps({"warning": f"clients have to wait: {error.strerror}"}))


def create_server(config: ServeConfig) -> uvicorn.Server:
    """The proxy and uvicorn around it, which `run` starts.

    Args:
        config: The settings.

    Raises:
        InputError: If a setting, the head or the file of keys cannot be used, or the head looks at
            forced answers and they do not run beside a thought on the server.
    """
    config.check()  # before a server is asked for anything
    proxy = Proxy(config, context=told_context(config))
    proxy.try_upstream()
    most = _CONNECTIONS_A_STREAM * config.max_streams + _OTHER_CONNECTIONS
    wanted = most + _UPSTREAM_FILES * config.max_streams + _OTHER_FILES
    if (allowed := _allow_files(wanted)) < wanted:
        most = max((allowed - _FEWEST_OTHER_FILES) // (1 + _UPSTREAM_FILES), 1)
    return _Server(
        uvicorn.Config(
            app_of(proxy),
            host=config.host,
            port=config.port,
            http=cast(type[asyncio.Protocol], partial(_Protocol, most)),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            backlog=4096,
            timeout_keep_alive=int(2 * _SILENCE),  # after which nobody waits any more
            timeout_graceful_shutdown=cast(int, config.drain_timeout),
        ),
        proxy.reload,
    )


def _allow_files(num: int) -> int:
    """Lets the process have so many open files, or as many as it may; returns how many it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num if hard == resource.RLIM_INFINITY else min(num, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return num if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
