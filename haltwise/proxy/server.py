"""The proxy behind a socket."""

import asyncio
import resource
from typing import cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from haltwise.proxy.app import create_app
from haltwise.proxy.config import ServeConfig

# A request has its client's connection and two to the upstream.
_FILES_A_STREAM = 3
_OTHER_FILES = 256
# Seconds that a client may be connected before it asks for something.
_SILENCE = 60.0


class _Protocol(H11Protocol):
    """Lets the application cut the connection of a client, and see that the client has cut it.

    A client that asks for nothing is let go.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called once a client has connected."""
        connection = cast(asyncio.Transport, transport)
        super().connection_made(connection)
        of_connection = {"abort": connection.abort, "is_closing": connection.is_closing}
        self.app_state = self.app_state | of_connection
        self._waiting = self.loop.call_later(_SILENCE, self._let_go)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once the connection is no more."""
        self._waiting.cancel()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        if self.cycle is None:
            self.transport.close()


def create_server(config: ServeConfig) -> uvicorn.Server:
    """The proxy and uvicorn around it, which `run` starts.

    Args:
        config: The settings.

    Raises:
        InputError: If a setting, the head or the file of keys cannot be used.
    """
    app = create_app(config)
    _allow_files(_FILES_A_STREAM * config.max_streams + _OTHER_FILES)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            backlog=4096,
            timeout_graceful_shutdown=cast(int, config.drain_timeout),
        )
    )


def _allow_files(num: int) -> None:
    """Lets the process have so many open files, or as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num if hard == resource.RLIM_INFINITY else min(num, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
