"""What labels and judges say about the answers of audits that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from haltwise.control.books import Awaited, Entry
from haltwise.control.estimates import LOSSES, Audit
from haltwise.control.groups import Told
from haltwise.control.replay import FULL
from haltwise.errors import InputError

#: Who may hold answers to be right beside those that know the right one.
JUDGES = ("judge", "test")
_NET = LOSSES.index("net-em-loss")


def told_by_labels(request: str, known: Audit) -> Entry:
    """Returns what an audit tells once it is known how right its answers are."""
    losses = tuple(known.losses[_NET].tolist())
    return Entry(Told(request, losses, (False,) * len(losses)), known)


def places_due(found: Mapping[str, tuple[Audit, Awaited]]) -> list[str]:
    """Returns the places of an audit's answers that differ, each once; the full answer is one."""
    pairs = (
        pair
        for audit, awaited in found.values()
        for pair in zip(awaited.places, audit.due, strict=False)  # an older one has no places
    )
    return list(dict.fromkeys([FULL, *(place for place, due in pairs if due)]))


def due_until(found: Mapping[str, tuple[Audit, Awaited]]) -> float:
    """Returns the seconds since 1970 until when labels are waited for."""
    return max(awaited.until for _, awaited in found.values())


def check_verdicts(right: Mapping[Any, Any], places: Sequence[str]) -> None:
    """Refuses verdicts that are not about all places, or no shares.

    Raises:
        InputError: If they are.
    """
    if set(right) != set(places) or len(places) < 2:
        raise InputError(f"right is about {sorted(right)!s:.80}, expected {', '.join(places)}")
    for place, value in right.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"right of {place} is {value!r:.40}, expected a number from 0 to 1")
