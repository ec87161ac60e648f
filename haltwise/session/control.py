"""Who sets the terms of requests, and moves their prices while they run."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Protocol, cast

from haltwise.errors import InputError
from haltwise.session.report import RunningRequest, ThoughtReport, ThoughtRequest
from haltwise.session.terms import Terms


class Control(Protocol):
    """Steers the requests of a session; every adapter takes one.

    A method that raises, or gives a price that is none, halts nothing: the LM thinks on. Methods
    are called between two tokens, so they must be quick; they may be called from several threads
    if several sessions share a control.
    """

    moves_prices: bool
    """Whether prices can rise while requests run. If not, a request at a price of 0 is not looked
    at, which costs nothing."""

    def terms(self, request: ThoughtRequest) -> Terms:
        """Returns the terms on which a request begins."""

    def price(self, running: RunningRequest) -> float:
        """Returns the price of a request at a decision point; at 0 the head does not halt it."""

    def finished(self, report: ThoughtReport) -> None:
        """Takes in what happened to a request; called once for each."""


class ConstantControl:
    """The control of who has none: each request runs on the terms that it asks for."""

    moves_prices = False

    def terms(self, request: ThoughtRequest) -> Terms:
        """Returns what the request asks for."""
        return request.terms

    def price(self, running: RunningRequest) -> float:
        """Returns the price of the request's terms."""
        return running.terms.price

    def finished(self, report: ThoughtReport) -> None:
        """Keeps nothing."""


def load_control(name: str | None) -> Control:
    """Makes the control that a setting names.

    Args:
        name: "MODULE:NAME" of a class or function that takes no arguments; None for a constant
            control.

    Raises:
        InputError: If there is none of that name.
    """
    if name is None:
        return ConstantControl()
    try:
        return cast(Control, resolve_name(name)())
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"control is {name!r}, expected MODULE:NAME of a class ({error})"
        ) from None
