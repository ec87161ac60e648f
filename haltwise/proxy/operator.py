"""The pages under /v1/haltwise: what the control knows, and what it is told about requests."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from haltwise import InputError
from haltwise.control.governed import GovernedControl
from haltwise.proxy.billing import Cashier
from haltwise.proxy.client import RefusedError, check_browser
from haltwise.proxy.load import Load
from haltwise.proxy.wire import Json, json_object

_MOST_BYTES = 2**16


class OperatorPages:
    """Answers those who run the proxy.

    Args:
        mode: What the settings name as the control.
        control: The control; None if it is not one of haltwise's own.
        key: What a request has to show; None if everybody may read, and nobody write.
        lets_in_by: Whether browsers may ask by a Host header.
        cashier: Who keeps the budgets; None if there are none.
        load: Who watches how many requests wait at the server; None if nobody does.
    """

    def __init__(
        self,
        mode: str,
        control: GovernedControl | None,
        key: str | None,
        lets_in_by: Callable[[str], bool],
        cashier: Cashier | None = None,
        load: Load | None = None,
    ) -> None:
        """Answers nothing yet."""
        self._mode, self._control, self._key = mode, control, key
        self._lets_in_by = lets_in_by
        self._cashier, self._load = cashier, load
        self._taking = anyio.Lock()
        self.routes = [
            Route("/v1/haltwise/control", self.tell),
            Route("/v1/haltwise/labels", self.tell_awaited),
            Route("/v1/haltwise/labels", self.take_label, methods=["POST"]),
            Route("/v1/haltwise/feedback", self.take_feedback, methods=["POST"]),
            Route("/v1/haltwise/breaker", self.open_breaker, methods=["POST"]),
            Route("/v1/haltwise/promote", self.promote, methods=["POST"]),
            Route("/v1/haltwise/experiment", self.begin_experiment, methods=["POST"]),
            Route("/v1/haltwise/rollback", self.roll_back, methods=["POST"]),
        ]

    async def tell(self, request: Request) -> Response:
        """Tells what the audits have told, and what is served because of it."""
        try:
            self._let_in(request)
            group = request.query_params.get("group")
            return JSONResponse(await anyio.to_thread.run_sync(self._status, group))
        except RefusedError as error:
            return _refused(error)
        except InputError as error:
            return _refused(RefusedError(404, "not_found", str(error)))

    def _status(self, group: str | None) -> Json:
        """Returns what the control, the budgets and the load tell."""
        told: Json = {"mode": self._mode} if self._control is None else self._control.status(group)
        told |= {} if self._cashier is None else {"budgets": self._cashier.status()}
        return told | ({} if self._load is None else {"load": self._load.status()})

    async def tell_awaited(self, request: Request) -> Response:
        """Tells which audits wait for labels."""
        try:
            self._let_in(request)
        except RefusedError as error:
            return _refused(error)
        return JSONResponse([] if self._control is None else self._control.awaited())

    async def take_label(self, request: Request) -> Response:
        """Takes in the right answer of an audit, or how right others hold its answers to be."""

        def take(control: GovernedControl, told: dict[str, Any]) -> None:
            (control.judge if "right" in told else control.label)(**told)

        return await self._take(request, take)

    async def take_feedback(self, request: Request) -> Response:
        """Takes in how content somebody was with an answer."""
        return await self._take(request, lambda control, told: control.rate(**told))

    async def open_breaker(self, request: Request) -> Response:
        """Opens the breaker of a group."""
        return await self._take(request, lambda control, told: control.open_breaker(**told))

    async def promote(self, request: Request) -> Response:
        """Lets another head serve."""
        return await self._take(request, lambda control, told: control.roster.promote(**told))

    async def begin_experiment(self, request: Request) -> Response:
        """Lets a challenger serve a share of all requests."""
        return await self._take(
            request, lambda control, told: control.roster.begin_experiment(**told)
        )

    async def roll_back(self, request: Request) -> Response:
        """Takes back the newest step of who serves."""
        return await self._take(request, lambda control, told: control.roster.roll_back(**told))

    async def _take(
        self, request: Request, take: Callable[[GovernedControl, dict[str, Any]], None]
    ) -> Response:
        """Gives what a request tells to the control, or says why it cannot be used."""
        try:
            control = self._writable(request)
            told = json_object(await _body(request))
            if told is None:
                raise RefusedError(400, "invalid_request_error", "expected a JSON object")
            async with self._taking:  # what is told twice at once is refused once
                await anyio.to_thread.run_sync(take, control, told)
        except ClientDisconnect:
            return Response(status_code=400)
        except RefusedError as error:
            return _refused(error)
        except InputError as error:
            return _refused(RefusedError(400, "invalid_request_error", str(error)))
        return Response(status_code=204)

    def _writable(self, request: Request) -> GovernedControl:
        """Returns the control if a request may tell it something.

        Raises:
            RefusedError: If it may not, or there is no control.
        """
        if self._key is None:
            message = "expected the operator's key, see --operator-key-env"
            raise RefusedError(403, "forbidden", message)
        self._let_in(request)
        if self._control is None:
            message = f"control is {self._mode}, expected observe or apply"
            raise RefusedError(404, "not_found", message)
        return self._control

    def _let_in(self, request: Request) -> None:
        """Refuses who does not show the key, and pages that are not known.

        Raises:
            RefusedError: If there is a key and the request has another or none, or a browser asks
                by a name that is not let in.
        """
        check_browser(request.headers, self._lets_in_by)
        if not shows_key(request, self._key):
            bearer = [(b"www-authenticate", b"Bearer")]
            raise RefusedError(401, "unauthorized", "expected the operator's key", bearer)


def shows_key(request: Request, key: str | None) -> bool:
    """Whether a request shows the operator's key, or there is none to show."""
    scheme, _, told = request.headers.get("authorization", "").partition(" ")
    shown = told.strip().encode() if scheme.lower() == "bearer" else b""
    return key is None or hmac.compare_digest(shown, key.encode())


async def _body(request: Request) -> bytes:
    """Returns the body of a request.

    Raises:
        RefusedError: If it is too long.
    """
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BYTES:
            raise RefusedError(413, "too_large", f"expected at most {_MOST_BYTES} bytes")
    return body


def _refused(error: RefusedError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return JSONResponse(error.body, error.status, headers)
