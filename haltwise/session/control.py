"""Who sets the terms of requests, and moves their prices while they run."""

from pkgutil import resolve_name
from typing import Any, Protocol, cast

from haltwise.errors import InputError
from haltwise.session.request import RunningRequest, Terms, ThoughtReport, ThoughtRequest


class Control(Protocol):
    """Steers the requests of a session; every adapter takes one.

    With a method that raises, or gives a price or terms that are none, the head does not halt that
    request; its own cap holds. A request that asks to be off has a price of 0 in its terms, which
    is the control's to respect. Methods are called between two tokens, so they must be quick; they
    may be called from several threads if several sessions share a control.
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


def check_control(control: Any) -> Control:
    """Returns what can steer a session.

    Raises:
        InputError: If a method or the attribute of a control is missing.
    """
    methods = [getattr(control, name, None) for name in ("terms", "price", "finished")]
    if not all(map(callable, methods)) or not isinstance(
        getattr(control, "moves_prices", None), bool
    ):
        raise InputError(
            f"control is a {type(control).__name__}, expected one with terms, price, finished and "
            "moves_prices, see haltwise.Control"
        )
    return cast(Control, control)


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
        return check_control(resolve_name(name)())
    except InputError:
        raise
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"control is {name!r}, expected MODULE:NAME of a class ({error})"
        ) from None
