"""All groups of requests together: a state that only events move, so that it can be replayed.

A request is in everything, and mostly in other groups too: a task, a segment, a tenant. It is
served the strictest step of its groups. Everything has a certificate; another group has none of its
own before its breaker has opened once, so that it may go as far as everything may, and its reach
and its detector watch over it.

The state is a fold of events: the same events in the same order make the same state, bit by bit. An
event that makes no sense, such as a label for an unknown request, changes nothing but a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.ceiling import WORST
from haltwise.control.governor import (
    FOREVER,
    GroupState,
    Promise,
    audit_rate,
    audits_due,
    complained,
    corrected,
    counted,
    felt,
    opened,
)
from haltwise.errors import InputError

#: The group that every request is in.
EVERYTHING = "everything"
# Of what may be wrong with any certificate, what everything has; the other groups share the rest.
_EVERYTHING_SHARE = 0.5


@dataclass(frozen=True)
class Drawn:
    """A request is to be an audit; it counts as lost until it tells more."""

    request: str
    step: int
    """The step that it would be served if it were none."""
    groups: Mapping[str, float]
    """By group that counts it, the probability that the group would, known before the draw."""
    process: str = ""
    """Who is to tell of it."""


@dataclass(frozen=True)
class Told:
    """An audit's answers have come, or labels for them."""

    request: str
    losses: tuple[float, ...]
    """(K,) of all prices; where a label is due, the largest that they can be."""
    due: tuple[bool, ...]
    """(K,) where labels are due."""


@dataclass(frozen=True)
class Expired:
    """No more labels are waited for: what is due is lost."""

    request: str


@dataclass(frozen=True)
class BrokenOff:
    """A request got no full answer, as its client left or the LM failed: it is no audit."""

    request: str


@dataclass(frozen=True)
class Gone:
    """A process has ended: what it has not told yet, it never will."""

    process: str


@dataclass(frozen=True)
class Complained:
    """Users complained about requests of a group, which can only make it stricter."""

    group: str
    weight: float
    """In [0, 1]."""


@dataclass(frozen=True)
class Opened:
    """Somebody opened the breaker of a group by hand."""

    group: str


Event = Drawn | Told | Expired | BrokenOff | Gone | Complained | Opened
_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Drawn, Told, Expired, BrokenOff, Gone, Complained, Opened)
}


def event_to_json(event: Event) -> dict[str, Any]:
    """Returns a JSON object."""
    return {"event": type(event).__name__} | asdict(event)


def event_from_json(data: Mapping[str, Any]) -> Event:
    """Rebuilds an event from parsed JSON.

    Raises:
        InputError: If it is none.
    """
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data.items()
            if name != "event"
        }
        return _EVENTS[data["event"]](**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"event is not readable ({error!r})") from None


@dataclass(frozen=True)
class UnderWay:
    """An audit that may tell more."""

    step: int
    """The step that it would have been served."""
    groups: Mapping[str, float]
    """By group that counts it, the probability that the group would."""
    epochs: Mapping[str, int]
    """By group, the epoch that it was drawn in."""
    losses: tuple[float, ...]
    """(K,) what it counts with."""
    process: str = ""
    """Who is to tell of it."""
    told: bool = False
    """Whether it has told something."""
    felt: bool = False
    """Whether the groups have felt what the served step lost."""


@dataclass(frozen=True)
class Groups:
    """The state of all groups."""

    promise: Promise
    num_prices: int
    """K."""
    error: float
    """The probability that any certificate of any group is wrong, at most."""
    most_groups: int
    """The most groups there may be; requests of others are in everything alone."""
    groups: Mapping[str, GroupState]
    under_way: Mapping[str, UnderWay] = field(default_factory=dict)
    """By request, the audits that may tell more."""
    num_pooled: int = 0
    """Audits of groups that were too many."""
    num_refused: int = 0
    """Events that made no sense."""

    @classmethod
    def begin(
        cls,
        promise: Promise,
        num_prices: int,
        confidence: float = 0.9,
        most_groups: int = 100,
        certified: int = 0,
        unvouched: int = 0,
        trial: int = 1_000,
    ) -> Groups:
        """Returns the state before any event.

        Args:
            promise: What is promised for every group.
            num_prices: K.
            confidence: The probability that no certificate is ever wrong, at least; what
                calibrate.py's may be wrong with comes on top.
            most_groups: The most groups there may be, everything included.
            certified: The prices that calibrate.py has certified, counted from the strictest.
            unvouched: The largest step that is served at first though nobody vouches for it, such
                as another LM's.
            trial: For so many audits, see `GroupState`.

        Raises:
            InputError: If a value is out of its range.
        """
        if not 0 < confidence < 1 or num_prices < 1 or most_groups < 1:
            raise InputError(
                f"{num_prices} prices of {most_groups} groups with a confidence of {confidence}, "
                "expected at least 1 and 1, and a confidence between 0 and 1"
            )
        if not (0 <= certified <= num_prices and 0 <= unvouched <= num_prices):
            raise InputError(f"steps {certified} and {unvouched}, expected 0 to {num_prices}")
        error = 1 - confidence
        level = error * (_EVERYTHING_SHARE if most_groups > 1 else 1)
        trial = trial if unvouched > certified else 0
        everything = GroupState.begin(num_prices, level, certified, unvouched, trial)
        return cls(promise, num_prices, error, most_groups, {EVERYTHING: everything})

    def group(self, name: str) -> GroupState:
        """Returns the state of a group, which may be one that no audit has told about yet."""
        return self.groups.get(name) or self._new_group()

    def step(self, names: Iterable[str]) -> int:
        """Returns the step of a request of some groups and of everything: their strictest."""
        return min(int(self.group(name).step) for name in self._known([*names, EVERYTHING]))

    def ceiling(self, names: Iterable[str]) -> int:
        """Returns the largest step that such a request may be served: their lowest ceiling."""
        return min(int(self.group(name).ceiling) for name in self._known([*names, EVERYTHING]))

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        """Returns, by group of a request, with which probability the group is to audit it."""
        known = self._known([*names, EVERYTHING])
        return {name: float(audit_rate(self.group(name), self.promise)) for name in known}

    def audits_due(self) -> int:
        """Returns how many audits at least are due before anything is halted; 0 if none is."""
        return int(audits_due(self.groups[EVERYTHING], self.promise))

    def after(self, event: Event) -> Groups:
        """Returns the state after an event."""
        handlers: dict[type, Callable[[Any], Groups | None]] = {
            Drawn: self._drawn,
            Told: self._told,
            Expired: self._expired,
            BrokenOff: self._broken_off,
            Gone: self._gone,
            Complained: self._complained,
            Opened: self._opened,
        }
        done = handlers[type(event)](event)
        return replace(self, num_refused=self.num_refused + 1) if done is None else done

    def _known(self, names: Iterable[str]) -> list[str]:
        """Returns those of some groups that there are, or are to be, each once."""
        room = len(self.groups) < self.most_groups
        return [name for name in dict.fromkeys(names) if room or name in self.groups]

    def _new_group(self) -> GroupState:
        number = len(self.groups)
        level = self.error * (1 - _EVERYTHING_SHARE) / (number * (number + 1))
        return GroupState.begin(self.num_prices, level, ceiling=self.num_prices, trial=FOREVER)

    def _drawn(self, event: Drawn) -> Groups | None:
        probabilities = event.groups.values()
        if event.request in self.under_way or not 0 <= event.step <= self.num_prices:
            return None
        if not all(self.promise.rest <= p <= 1 for p in probabilities):
            return None
        state, worst = self, np.full(self.num_prices, WORST)
        for name in event.groups:
            if state._known([name]):
                group = counted(state.group(name), worst, self.promise)
                state = replace(state, groups={**state.groups, name: group})
        counting = {name: p for name, p in event.groups.items() if name in state.groups}
        epochs = {name: int(state.groups[name].epoch) for name in counting}
        drawn = UnderWay(event.step, counting, epochs, tuple(worst.tolist()), event.process)
        return replace(
            state,
            under_way={**self.under_way, event.request: drawn},
            num_pooled=self.num_pooled + (len(counting) < len(event.groups)),
        )

    def _told(self, event: Told) -> Groups | None:
        audit = self.under_way.get(event.request)
        lengths = {len(event.losses), len(event.due)}
        if audit is None or lengths != {self.num_prices}:
            return None
        if not all(-1 <= new <= old for new, old in zip(event.losses, audit.losses, strict=True)):
            return None
        state = self._each(
            audit,
            lambda group: corrected(group, audit.losses, event.losses, self.promise),
        )
        known = audit.step == 0 or not event.due[audit.step - 1]
        told = replace(audit, losses=event.losses, told=True)
        if known and not audit.felt:
            state, told = state._feel(told), replace(told, felt=True)
        return state._keep(event.request, told if any(event.due) else None)

    def _expired(self, event: Expired) -> Groups | None:
        audit = self.under_way.get(event.request)
        if audit is None:
            return self  # another process has told it too
        state = self if audit.felt else self._feel(audit)
        return state._keep(event.request, None)

    def _broken_off(self, event: BrokenOff) -> Groups | None:
        audit = self.under_way.get(event.request)
        if audit is None or audit.felt:
            return None
        neutral = np.full(self.num_prices, self.promise.target)  # at which no bet moves
        state = self._each(
            audit,
            lambda group: corrected(group, audit.losses, neutral, self.promise),
        )
        return state._keep(event.request, None)

    def _gone(self, event: Gone) -> Groups:
        state = self
        for request, audit in self.under_way.items():
            if audit.process == event.process and not audit.told:
                state = state._broken_off(BrokenOff(request)) or state
        return state

    def _complained(self, event: Complained) -> Groups | None:
        known = event.group in self.groups and event.group != EVERYTHING
        if not known or not 0 <= event.weight <= 1:
            return None
        group = complained(self.groups[event.group], event.weight, self.promise)
        return replace(self, groups={**self.groups, event.group: group})

    def _opened(self, event: Opened) -> Groups | None:
        if event.group not in self.groups:
            return None
        group = opened(self.groups[event.group])
        return replace(self, groups={**self.groups, event.group: group})

    def _feel(self, audit: UnderWay) -> Groups:
        """Lets every group of an audit feel what the served step lost."""
        loss = audit.losses[audit.step - 1] if audit.step else 0.0
        groups = dict(self.groups)
        for name, probability in audit.groups.items():
            groups[name] = felt(groups[name], loss, probability, self.promise)
        return replace(self, groups=groups)

    def _each(self, audit: UnderWay, move: Callable[[GroupState], GroupState]) -> Groups:
        """Moves the groups of an audit, but not those that have begun a new epoch since."""
        groups = dict(self.groups)
        for name, epoch in audit.epochs.items():
            if groups[name].epoch == epoch:
                groups[name] = move(groups[name])
        return replace(self, groups=groups)

    def _keep(self, request: str, audit: UnderWay | None) -> Groups:
        """Keeps an audit that may tell more; None forgets it."""
        others = {name: one for name, one in self.under_way.items() if name != request}
        return replace(self, under_way=others if audit is None else {**others, request: audit})

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return vars(self) | {
            "promise": asdict(self.promise),
            "groups": {name: group.to_json() for name, group in self.groups.items()},
            "under_way": {request: asdict(audit) for request, audit in self.under_way.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Groups:
        """Rebuilds a state from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            groups = {name: GroupState.from_json(one) for name, one in data["groups"].items()}
            under_way = {
                request: UnderWay(**one | {"losses": tuple(one["losses"])})
                for request, one in data["under_way"].items()
            }
            promise = Promise(**data["promise"])
            built = {"promise": promise, "groups": groups, "under_way": under_way}
            return cls(**{**data, **built})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"state of the groups is not readable ({error!r})") from None
