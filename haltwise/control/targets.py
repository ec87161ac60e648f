"""Targets of their own, for groups that are promised a smaller loss than everything.

A tenant may be promised something for all that it asks, as the group `tenant:X`: then its requests
of every task are in that group too, and the tenant's target holds for each of its tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from haltwise.control.group_names import is_name, whole_tenant
from haltwise.errors import InputError


def read_targets(told: Iterable[str]) -> dict[str, float]:
    """Reads targets of groups.

    Args:
        told: Each in the form NAME=TARGET, such as "task:math=0.01".

    Returns:
        By group, its target, of which only the form is known to be right.

    Raises:
        InputError: If one has another form, or a group has two.
    """
    found: dict[str, float] = {}
    for text in told:
        name, _, number = text.rpartition("=")
        try:
            target = float(number)
        except ValueError:
            name = ""
        if not name:
            raise InputError(f"{text!r:.80} is no target of a group, expected like task:math=0.01")
        if name in found:
            raise InputError(f"{name:.80} has two targets, expected one")
        found[name] = target
    return found


def check_targets(targets: Mapping[str, float], usual: float, most: int) -> None:
    """Refuses targets that nobody could keep, or that would promise nothing more.

    Args:
        targets: By group.
        usual: That of everything.
        most: The most groups that may have one.

    Raises:
        InputError: If a group has a name that no group has, or a target out of its range, or there
            are too many of them.
    """
    if len(targets) > most:
        found = f"{len(targets)} groups have a target of their own"
        raise InputError(f"{found}, expected at most {most}")
    for name, target in targets.items():
        if not is_name(name):
            kinds = "task:..., segment:..., tenant:... or tenant:... task:..."
            raise InputError(f"{name!r:.80} can have no target, expected {kinds}")
        tenant = whole_tenant(name)
        whose = "everything's" if tenant == name or tenant not in targets else "its tenant's"
        largest = usual if whose == "everything's" else targets[tenant]
        if not 0 < target <= largest:
            expected = f"expected above 0 and at most {largest:g}, which is {whose}"
            raise InputError(f"target of {name:.80} is {target:g}, {expected}")
