"""What a client's headers name: its terms, and what else X-Haltwise-... tells of a request."""

from collections.abc import Mapping

from haltwise import InputError, Terms
from haltwise.control.tariffs import Tariffs
from haltwise.proxy.client import RefusedError, RequestingClient
from haltwise.proxy.config import Customer, read_dollars
from haltwise.proxy.wire import Json

#: How headers with terms begin: X-Haltwise-Price, -Off, -Min-Tokens, -Max-Tokens, -Segment.
TERMS = "x-haltwise-"
# What beside terms such headers name.
_TOLD = ("task", "session", "value", "max_cost", "thoughts")
_KNOWN = ("price", "off", "min_tokens", "max_tokens", "segment", *_TOLD)
# Digits of a number of thoughts; longer ones are none.
_MOST_DIGITS = 10


def named_by(client: RequestingClient) -> dict[str, str]:
    """What the headers of a request name about its terms and itself.

    Raises:
        RefusedError: If one is there twice.
    """
    found: dict[str, str] = {}
    for header, value in client.headers.items():
        if not header.startswith(TERMS):
            continue
        name = header.removeprefix(TERMS).replace("-", "_")
        if name in found:
            message = f"{_header(name)} is given twice, expected one"
            raise RefusedError(400, "invalid_request_error", message)
        found[name] = value
    return found


def terms_of(
    client: RequestingClient, customer: Customer, tariffs: Tariffs | None, model: str
) -> Terms:
    """The terms of a request: what its headers name, and what holds for the client for all else.

    Args:
        client: The client.
        customer: What holds for it.
        tariffs: What tokens cost, if anybody has said so.
        model: The LM that the request names.

    Raises:
        RefusedError: If the headers make no sense, or name a value of an LM without a tariff.
    """
    named = named_by(client)
    if unknown := named.keys() - {*_KNOWN}:
        message = f"{_header(min(unknown))}: expected {', '.join(map(_header, _KNOWN))}"
        raise RefusedError(400, "invalid_request_error", message)
    value = dollars_named("value", named.get("value"))
    if value is None and {"price", "off", "segment"}.isdisjoint(named):
        value = customer.value
    asked = {name: told for name, told in named.items() if name not in _TOLD}
    try:
        if value is not None and not {"price", "off"}.isdisjoint(asked):
            raise InputError("value is given, expected it without price and off")
        terms = Terms.within(asked, customer.terms)
    except InputError as error:
        message = f"{_headers_of(str(error), named)}: {error}"
        raise RefusedError(400, "invalid_request_error", message) from None
    if value is None:
        return terms
    tariff = None if tariffs is None else tariffs.of(model)
    if tariff is None:
        raise unknown_tariff(model)
    try:
        return terms.naming(tariff.price_of(value))
    except InputError as error:
        message = f"X-Haltwise-Value: {value} dollars: {error}"
        raise RefusedError(400, "invalid_request_error", message) from None


def _headers_of(fault: str, named: Mapping[str, str]) -> str:
    """The header that a fault is about, which begins with the term's name; else all with terms."""
    about = [name for name in named if fault.startswith((f"{name} ", repr(name)))]
    return ", ".join(map(_header, about or named))


def _header(name: str) -> str:
    """The header that names a term."""
    return f"{TERMS}{name.replace('_', '-')}".title()


def unknown_tariff(model: str) -> RefusedError:
    """What a client is told that names an LM of which nobody knows what its tokens cost."""
    message = (
        f"nobody has said what the tokens of model {model!r:.80} cost: expected one that --tariffs "
        "names, or '*' there for all"
    )
    return RefusedError(400, "unknown_tariff", message)


def dollars_named(name: str, told: str | None) -> float | None:
    """An amount of money that a header names; None if it names none.

    Raises:
        RefusedError: If it is none.
    """
    try:
        return read_dollars(f"X-Haltwise-{name.title()}", told)
    except InputError as error:
        raise RefusedError(400, "invalid_request_error", str(error)) from None


def thoughts_named(client: RequestingClient, most: int) -> int:
    """How many thoughts there may be behind the answer: 1 if the headers of a request name none.

    Args:
        client: The client.
        most: As many as the operator offers.

    Raises:
        RefusedError: If the headers name more, or what is no number of thoughts.
    """
    told = named_by(client).get("thoughts", "1").strip()
    num = int(told) if told.isascii() and told.isdigit() and len(told) < _MOST_DIGITS else 0
    if 1 <= num <= most:
        return num
    offered = (
        f"a whole number from 1 to {most}" if most > 1 else "1, or a proxy with --most-thoughts"
    )
    message = f"X-Haltwise-Thoughts is {told!r:.40}, expected {offered}"
    raise RefusedError(400, "invalid_request_error", message)


def logged(terms: Terms) -> Json:
    """What a request asks, for its line of the log."""
    names = ("price", "min_tokens", "max_tokens", "segment")
    return {name: getattr(terms, name) for name in names}


def ignored(terms: Terms) -> list[str]:
    """The names of those terms that ask for something."""
    return [name for name in ("price", "min_tokens", "max_tokens") if getattr(terms, name)]
