"""The books of one head: the state of all groups and what their audits sum up to.

The books are a fold of entries, so that a restart finds them as they were, and several processes
that take in the same entries have the same books.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.estimates import Audit, Sums
from haltwise.control.groups import (
    BrokenOff,
    Event,
    Expired,
    Groups,
    Told,
    event_from_json,
    event_to_json,
)
from haltwise.errors import InputError

# Newest audits that are remembered because their answers differ.
_MOST_DIFFERING = 20


@dataclass(frozen=True)
class Awaited:
    """What is waited for of an audit whose answers differ: which of them is right."""

    answers: tuple[str, ...]
    """(K + 1,) digests of the answers at each price, and of the full one."""
    until: float
    """Seconds since 1970 until when it is waited for."""
    places: tuple[str, ...] = ()
    """(K,) where each price's answer was forced, in tokens of the thought; "full" is not forced."""


@dataclass(frozen=True)
class Differing:
    """An audit whose answers differ."""

    request: str
    groups: tuple[str, ...]
    """That count it."""
    step: int
    """The strictest step whose answer is not the full one."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What the books take in at once."""

    event: Event | None = None
    """What happened to an audit."""
    audit: Audit | None = None
    """What the audit tells, if the event is that it has told it."""
    num_requests: Mapping[str, int] = field(default_factory=dict)
    """By group, the requests that have come since the entry before."""
    awaited: Awaited | None = None
    """What is waited for, if the event leaves labels due."""
    why: str = ""
    """Why the audit was broken off, if the event is that."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "event": None if self.event is None else event_to_json(self.event),
            "audit": None if self.audit is None else _audit_to_json(self.audit),
            "num_requests": dict(self.num_requests),
            "awaited": None if self.awaited is None else asdict(self.awaited),
            "why": self.why,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Rebuilds an entry from parsed JSON.

        Raises:
            InputError: If it is none.
        """
        try:
            event, told, awaited = data["event"], data["audit"], data["awaited"]
            return cls(
                None if event is None else event_from_json(event),
                None if told is None else _audit_from_json(told),
                data["num_requests"],
                None if awaited is None else _awaited_from_json(awaited),
                data["why"],
            )
        except (TypeError, KeyError) as error:
            raise InputError(f"entry of the books is not readable ({error!r})") from None


@dataclass(frozen=True, eq=False)
class Books:
    """What is known of all groups."""

    groups: Groups
    """What they may do."""
    sums: Mapping[str, Sums]
    """By group, what its requests and audits sum up to."""
    most_tokens: float
    """The most tokens that an answer can have."""
    num_too_long: int = 0
    """Audits with more tokens than that, which no sum has."""
    awaited: Mapping[str, tuple[Audit, Awaited]] = field(default_factory=dict)
    """By request, the audits whose labels are due, the oldest first."""
    differing: tuple[Differing, ...] = ()
    """The newest audits whose answers differ, the newest first."""
    num_broken_off: int = 0
    """Requests that were drawn as audits and tell nothing."""
    why_broken_off: str = ""
    """Why the newest of them does not."""

    def after(self, entry: Entry) -> Books:
        """Returns the books after an entry."""
        event, books = entry.event, self
        if event is not None:
            books = replace(self, groups=self.groups.after(event))
            told = event.request if isinstance(event, Told | Expired) else ""
            if isinstance(event, BrokenOff) and event.request in self.groups.under_way:
                num = self.num_broken_off + 1
                books = replace(books, num_broken_off=num, why_broken_off=entry.why)
            under_way = self.groups.under_way.get(told)
            if under_way is not None and under_way.may_tell:
                books = books._told(told, entry, under_way.groups)
        return books._counted(entry.num_requests)

    def _told(self, request: str, entry: Entry, probabilities: Mapping[str, float]) -> Books:
        """Returns the books after an audit has told something, or nothing more is waited for."""
        others = {name: one for name, one in self.awaited.items() if name != request}
        before, audit = self.awaited.get(request), entry.audit
        if audit is None:
            return replace(self, awaited=others)
        if self.is_too_long(audit):
            return replace(self, num_too_long=self.num_too_long + 1)
        sums, differing = dict(self.sums), self.differing
        if before is None and not audit.agrees.all():
            step = int(audit.agrees.argmin()) + 1
            newest = Differing(request, tuple(probabilities), step)
            differing = (newest, *differing)[:_MOST_DIFFERING]
        for name, probability in probabilities.items():
            one = self.sum_of(name)
            if before is None:
                sums[name] = one.audit(audit, probability)
            else:
                sums[name] = one.label(before[0], audit, probability)
        if entry.awaited is not None:
            others[request] = audit, entry.awaited
        return replace(self, sums=sums, awaited=others, differing=differing)

    def is_too_long(self, audit: Audit) -> bool:
        """Returns whether an audit has more tokens than there can be."""
        return bool(max(audit.full_cost, audit.cost.max()) > self.most_tokens)

    def _counted(self, num_requests: Mapping[str, int]) -> Books:
        known = {n: num for n, num in num_requests.items() if n in self.groups.groups}
        counted = {name: self.sum_of(name).request(num) for name, num in known.items()}
        return replace(self, sums={**self.sums, **counted})

    def sum_of(self, name: str) -> Sums:
        """Returns the sums of a group, which may have had no request yet."""
        promise, num = self.groups.promise, self.groups.num_prices
        return self.sums.get(name) or Sums.none(num, promise.rest, self.most_tokens)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return vars(self) | {
            "groups": self.groups.to_json(),
            "sums": {name: one.to_json() for name, one in self.sums.items()},
            "awaited": {
                request: [_audit_to_json(audit), asdict(awaited)]
                for request, (audit, awaited) in self.awaited.items()
            },
            "differing": [asdict(one) for one in self.differing],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Books:
        """Rebuilds books from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            groups = Groups.from_json(data["groups"])
            sums = {name: Sums.from_json(one) for name, one in data["sums"].items()}
            awaited = {
                request: (_audit_from_json(audit), _awaited_from_json(one))
                for request, (audit, one) in data["awaited"].items()
            }
            differing = tuple(
                Differing(one["request"], tuple(one["groups"]), one["step"])
                for one in data["differing"]
            )
            built = {"groups": groups, "sums": sums, "awaited": awaited, "differing": differing}
            return cls(**{**data, **built})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"books are not readable ({error!r})") from None


def _audit_to_json(audit: Audit) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(audit).items()}


def _audit_from_json(data: Mapping[str, Any]) -> Audit:
    values: dict[str, Any] = {
        name: np.array(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return Audit(**values)


def _awaited_from_json(data: Mapping[str, Any]) -> Awaited:
    return Awaited(tuple(data["answers"]), data["until"], tuple(data["places"]))
