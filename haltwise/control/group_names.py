"""How groups of requests are called, and which of them a request is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haltwise.session.request import Terms, ThoughtRequest

#: What the names of tenants' groups are made of.
TENANT, OF_TASK = "tenant:", " task:"
SEGMENT = "segment:"
#: The most characters of a task, segment or tenant in a group's name.
LONGEST_NAME = 100
_KINDS = ("task:", SEGMENT, TENANT)


@dataclass(frozen=True)
class Usual:
    """The prices of requests that name none, see `usual_price`."""

    price: float
    segment_prices: Mapping[str, float]
    is_served: bool
    """Whether they are served, as in observe mode; else the governor says what is served."""


def groups_of(request: ThoughtRequest) -> list[str]:
    """Returns the names of the groups that a request is in, beside everything.

    They are those of its task, of its segment, and of its tenant's requests of that task, as far
    as these are known.
    """
    about, segment = request.about, request.terms.segment
    task = str(about.get("task") or "")[:LONGEST_NAME]
    names = [f"task:{task}"] if task else []
    names += [f"{SEGMENT}{segment[:LONGEST_NAME]}"] if segment else []
    return names + [one for one in [tenant_group(about)] if one]


def tenant_group(about: Mapping[str, Any]) -> str:
    """Returns the name of the group of a request's tenant; empty if it has none.

    Args:
        about: What is known of the request.
    """
    tenant, task = (str(about.get(name) or "")[:LONGEST_NAME] for name in ("tenant", "task"))
    of_task = f"{OF_TASK}{task}" if task else ""
    return f"{TENANT}{tenant}{of_task}" if tenant else ""


def usual_price(name: str, usual: Terms | Usual) -> float:
    """Returns the price that those of a group's requests ask for that name none.

    Args:
        name: The group's name. Only a segment has a price of its own: in other groups it is that
            of who names no segment either.
        usual: The terms of requests that ask for no others, or their prices.
    """
    own = {f"{SEGMENT}{one[:LONGEST_NAME]}": price for one, price in usual.segment_prices.items()}
    return own.get(name, usual.price)


def whole_tenant(name: str) -> str:
    """Returns the group of all that a group's tenant asks; other groups are returned themselves."""
    return name.partition(OF_TASK)[0] if name.startswith(TENANT) else name


def is_name(name: str) -> bool:
    """Returns whether a group may be called so."""
    kind = next((kind for kind in _KINDS if name.startswith(kind)), None)
    if kind is None:
        return False
    rest = name.removeprefix(kind)
    tenant, of_task, task = rest.partition(OF_TASK)
    parts = [tenant, task] if kind == TENANT and of_task else [rest]
    return all(part == part.strip() and 0 < len(part) <= LONGEST_NAME for part in parts)
