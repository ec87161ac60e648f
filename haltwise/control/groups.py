"""All groups of requests together: a state that only events move, so that it can be replayed.

A request is in everything, and mostly in other groups too: a task, a segment, a tenant. It is
served the strictest step of its groups. Everything has a certificate; another group has none of its
own before its breaker has opened once, so that it may go as far as everything may, and its reach
and its detector watch over it. A group with a target of its own is there from the beginning, and
begins with nothing: everything's certificate tells what is lost in the mean of everything, so none
of its requests is halted before its own audits vouch for it.

Audits are evidence in the order of their draws: one that has not told yet holds up those behind it,
so that slow answers choose nothing, and many at once cost nothing but time.

The state is a fold of events: the same events in the same order make the same state, bit by bit. An
event that makes no sense, such as a label for an unknown request, changes nothing but a count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.ceiling import WORST, Counted
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
    stakes,
)
from haltwise.control.group_names import whole_tenant
from haltwise.control.targets import check_targets
from haltwise.errors import InputError

#: The group that every request is in.
EVERYTHING = "everything"
# Of what may be wrong with any certificate, what everything has. The rest is shared evenly by the
# groups with a target of their own and, together, all others.
_EVERYTHING_SHARE = 0.5
# How far the worst score turns a user's dial, and the best one turns it back.
_TURN = 0.25
# Audits that one which does not tell may hold up; then it counts as lost until it does.
_MOST_HELD_UP = 4_000
# Dials that are remembered; the one that was moved longest ago is forgotten first.
_MOST_DIALS = 10_000


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
class Rated:
    """A user said how content it was, which moves the user's own dial and nothing else."""

    user: str
    """Or a session, which has a dial too."""
    score: float
    """From 0, which makes its requests stricter, to 1, which undoes that."""


@dataclass(frozen=True)
class Opened:
    """Somebody opened the breaker of a group by hand."""

    group: str


Event = Drawn | Told | Expired | BrokenOff | Gone | Complained | Rated | Opened
_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (Drawn, Told, Expired, BrokenOff, Gone, Complained, Rated, Opened)
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
    """An audit that may tell more, or is not counted yet."""

    step: int
    """The step that it would have been served."""
    groups: Mapping[str, float]
    """By group that counts it, the probability that the group would."""
    epochs: Mapping[str, int]
    """By group, the epoch that it was drawn in."""
    losses: tuple[float, ...]
    """(K,) what it counts with."""
    due: tuple[bool, ...]
    """(K,) where that is not known yet."""
    stakes: Mapping[str, tuple[float, ...]]
    """By group, (K,) what is bet on it."""
    process: str = ""
    """Who is to tell of it."""
    told: bool = False
    """Whether it has told something."""
    counted: bool = False
    """Whether it is among the evidence."""
    felt: bool = False
    """Whether the groups have felt what the served step lost."""

    @property
    def may_tell(self) -> bool:
        """Whether it may tell more."""
        return any(self.due) or not self.told

    def counts(self, group: str) -> Counted:
        """Returns what it counts with in a group."""
        return Counted(np.array(self.stakes[group]), np.array(self.losses), np.array(self.due))


@dataclass(frozen=True)
class Groups:
    """The state of all groups."""

    promise: Promise
    """What is promised to every group; some have another target, see `promise_of`."""
    num_prices: int
    """K."""
    error: float
    """The probability that any certificate of any group is wrong, at most."""
    most_groups: int
    """The most groups there may be; requests of others are in everything alone."""
    groups: Mapping[str, GroupState]
    targets: Mapping[str, float] = field(default_factory=dict)
    """By group that is promised a loss of its own, that target."""
    under_way: Mapping[str, UnderWay] = field(default_factory=dict)
    """By request, in the order of their draws, the audits that may tell more or wait for such."""
    dials: Mapping[str, float] = field(default_factory=dict)
    """By user, the share of its groups' step that it is served, where that is less than all."""
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
        targets: Mapping[str, float] | None = None,
    ) -> Groups:
        """Returns the state before any event.

        Args:
            promise: What is promised to every group without a target of its own.
            num_prices: K.
            confidence: The probability that no certificate is ever wrong, at least; what
                calibrate.py's may be wrong with comes on top.
            most_groups: The most groups there may be, everything included.
            certified: The prices that calibrate.py has certified, counted from the strictest.
            unvouched: The largest step that is served at first though nobody vouches for it, such
                as another LM's.
            trial: For so many audits, see `GroupState`.
            targets: By group that is promised a smaller loss than everything, that target.

        Raises:
            InputError: If a value is out of its range, or a name is that of no group.
        """
        if not 0 < confidence < 1 or num_prices < 1 or most_groups < 1:
            raise InputError(
                f"{num_prices} prices of {most_groups} groups with a confidence of {confidence}, "
                "expected at least 1 and 1, and a confidence between 0 and 1"
            )
        if not (0 <= certified <= num_prices and 0 <= unvouched <= num_prices):
            raise InputError(f"steps {certified} and {unvouched}, expected 0 to {num_prices}")
        own = dict(sorted((targets or {}).items()))
        check_targets(own, promise.target, most_groups - 1)
        error = 1 - confidence
        level = error * (_EVERYTHING_SHARE if most_groups > 1 else 1)
        trial = trial if unvouched > certified else 0
        everything = GroupState.begin(num_prices, level, certified, unvouched, trial)
        each = error * (1 - _EVERYTHING_SHARE) / (len(own) + 1)
        begun = {name: GroupState.begin(num_prices, each) for name in own}
        groups = {EVERYTHING: everything} | begun
        return cls(promise, num_prices, error, most_groups, groups, own)

    def group(self, name: str) -> GroupState:
        """Returns the state of a group, which may be one that no audit has told about yet."""
        return self.groups.get(name) or self._new_group()

    def promise_of(self, name: str) -> Promise:
        """Returns what is promised to a group: with its own target or its tenant's, if any."""
        target = self.targets.get(name, self.targets.get(whole_tenant(name)))
        return self.promise if target is None else replace(self.promise, target=target)

    def step(self, names: Iterable[str], users: Iterable[str] = ()) -> int:
        """Returns the step of a request of some groups and of everything: their strictest.

        Args:
            names: The groups.
            users: On whose dials it hangs too: on the strictest.
        """
        step = min(int(self.group(name).step) for name in self._known([*names, EVERYTHING]))
        return int(min((self.dials.get(user, 1.0) for user in users), default=1.0) * step)

    def ceiling(self, names: Iterable[str]) -> int:
        """Returns the largest step that such a request may be served: their lowest ceiling."""
        return min(int(self.group(name).ceiling) for name in self._known([*names, EVERYTHING]))

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        """Returns, by group of a request, with which probability the group is to audit it."""
        known = self._known([*names, EVERYTHING])
        return {n: float(audit_rate(self.group(n), self.promise_of(n))) for n in known}

    def takes(self, name: str) -> bool:
        """Returns whether a group is there, or there is room for it."""
        return name in self._known([name])

    def audits_due(self, name: str = EVERYTHING) -> int:
        """Returns how many audits of a group at least are due before it halts; 0 if none is."""
        return int(audits_due(self.group(name), self.promise_of(name)))

    def after(self, event: Event) -> Groups:
        """Returns the state after an event."""
        handlers: dict[type, Callable[[Any], Groups | None]] = {
            Drawn: self._drawn,
            Told: self._told,
            Expired: self._expired,
            BrokenOff: self._broken_off,
            Gone: self._gone,
            Complained: self._complained,
            Rated: self._rated,
            Opened: self._opened,
        }
        done = handlers[type(event)](event)
        return replace(self, num_refused=self.num_refused + 1) if done is None else done

    def _known(self, names: Iterable[str]) -> list[str]:
        """Returns those of some groups that there are, or are to be, each once.

        With them are those of whole tenants that have a target of their own.
        """
        room = len(self.groups) < self.most_groups
        every = dict.fromkeys(one for name in names for one in (name, *self._whole_tenant(name)))
        return [name for name in every if room or name in self.groups]

    def _whole_tenant(self, name: str) -> list[str]:
        """Returns the group of all that a group's tenant asks, if it has a target of its own."""
        return [one for one in [whole_tenant(name)] if one in self.targets]

    def _new_group(self) -> GroupState:
        """Returns the state of the next group without a target of its own.

        The levels of all numbers from n on sum to 1 / n of the level that there is for them.
        """
        number = len(self.groups)
        level = self.error * (1 - _EVERYTHING_SHARE) / (number * (number + 1))
        return GroupState.begin(self.num_prices, level, ceiling=self.num_prices, trial=FOREVER)

    def _drawn(self, event: Drawn) -> Groups | None:
        probabilities = event.groups.values()
        if event.request in self.under_way or not 0 <= event.step <= self.num_prices:
            return None
        if not all(self.promise.rest <= p <= 1 for p in probabilities):
            return None
        groups = dict(self.groups)
        for name in event.groups:
            if replace(self, groups=groups).takes(name):
                groups[name] = replace(self, groups=groups).group(name)
        counting = {name: p for name, p in event.groups.items() if name in groups}
        epochs = {name: int(groups[name].epoch) for name in counting}
        bets = {n: tuple(stakes(groups[n], self.promise_of(n)).tolist()) for n in counting}
        worst, due = (WORST,) * self.num_prices, (True,) * self.num_prices
        drawn = UnderWay(event.step, counting, epochs, worst, due, bets, event.process)
        state = replace(
            self,
            groups=groups,
            under_way={**self.under_way, event.request: drawn},
            num_pooled=self.num_pooled + (len(counting) < len(event.groups)),
        )
        return state._count()

    def _told(self, event: Told) -> Groups | None:
        audit = self.under_way.get(event.request)
        lengths = {len(event.losses), len(event.due)}
        if audit is None or not audit.may_tell or lengths != {self.num_prices}:
            return None
        if not all(-1 <= new <= old for new, old in zip(event.losses, audit.losses, strict=True)):
            return None
        known = audit.step == 0 or not event.due[audit.step - 1]
        told = replace(audit, losses=event.losses, due=event.due, told=True)
        state = self._corrected(audit, told)
        if known and not audit.felt:
            state, told = state._feel(told), replace(told, felt=True)
        return state._keep(event.request, told)._count()

    def _expired(self, event: Expired) -> Groups | None:
        audit = self.under_way.get(event.request)
        if audit is None or not audit.may_tell:
            return self  # another process has told it too
        state = self if audit.felt else self._feel(audit)
        late = replace(audit, due=(False,) * self.num_prices, told=True, felt=True)
        return state._corrected(audit, late)._keep(event.request, late)._count()

    def _broken_off(self, event: BrokenOff) -> Groups | None:
        audit = self.under_way.get(event.request)
        if audit is None or audit.felt:
            return None
        return self._corrected(audit, None)._keep(event.request, None)._count()

    def _count(self) -> Groups:
        """Takes audits in as evidence, in their order, up to the first that has not told yet."""
        state = self
        waiting = [(name, audit) for name, audit in self.under_way.items() if not audit.counted]
        for place, (request, audit) in enumerate(waiting):
            if not audit.told and len(waiting) - place - 1 <= _MOST_HELD_UP:
                break
            state = state._counted(audit)._keep(request, replace(audit, counted=True))
        return state

    def _counted(self, audit: UnderWay) -> Groups:
        """Takes an audit in as evidence."""
        return self._each(audit, lambda name, group, own: counted(group, audit.counts(name), own))

    def _gone(self, event: Gone) -> Groups:
        state = self
        for request, audit in self.under_way.items():
            if audit.process == event.process and not audit.told:
                state = state._broken_off(BrokenOff(request)) or state
        return state

    def _complained(self, event: Complained) -> Groups | None:
        known = event.group != EVERYTHING and self.takes(event.group)
        if not known or not 0 <= event.weight <= 1:
            return None
        promise = self.promise_of(event.group)
        group = complained(self.group(event.group), event.weight, promise)
        return replace(self, groups={**self.groups, event.group: group})

    def _rated(self, event: Rated) -> Groups | None:
        if not event.user or not 0 <= event.score <= 1:
            return None
        others = {user: dial for user, dial in self.dials.items() if user != event.user}
        dial = self.dials.get(event.user, 1.0) + _TURN * (2 * event.score - 1)
        if dial < 1:
            others[event.user] = max(dial, 0.0)
        if len(others) > _MOST_DIALS:
            del others[next(iter(others))]
        return replace(self, dials=others)

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
            groups[name] = felt(groups[name], loss, probability, self.promise_of(name))
        return replace(self, groups=groups)

    def _each(
        self, audit: UnderWay, move: Callable[[str, GroupState, Promise], GroupState]
    ) -> Groups:
        """Moves the groups of an audit, but not those that have begun a new epoch since.

        Args:
            audit: The audit.
            move: Returns a group's state after the move, from its name, the one before and its
                promise.
        """
        groups = dict(self.groups)
        for name, epoch in audit.epochs.items():
            if groups[name].epoch == epoch:
                groups[name] = move(name, groups[name], self.promise_of(name))
        return replace(self, groups=groups)

    def _corrected(self, audit: UnderWay, now: UnderWay | None) -> Groups:
        """Takes in what an audit has told, if it is among the evidence already.

        Args:
            audit: The audit as it was.
            now: As it is; None for one that is none, so that no bet is moved by it.
        """

        def move(name: str, group: GroupState, own: Promise) -> GroupState:
            before = audit.counts(name)
            if now is not None:
                return corrected(group, before, now.counts(name), own)
            nothing = np.full(self.num_prices, own.target)
            return corrected(group, before, replace(before, losses=nothing), own)

        return self._each(audit, move) if audit.counted else self

    def _keep(self, request: str, audit: UnderWay | None) -> Groups:
        """Keeps an audit in its place; None, or one of which nothing is left to say, is dropped."""
        under_way = {**self.under_way}
        if audit is None or (audit.counted and not audit.may_tell):
            under_way.pop(request, None)
        else:
            under_way[request] = audit
        return replace(self, under_way=under_way)

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
                request: UnderWay(**one | _tuples(one))
                for request, one in data["under_way"].items()
            }
            promise = Promise(**data["promise"])
            built = {"promise": promise, "groups": groups, "under_way": under_way}
            return cls(**{**data, **built})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"state of the groups is not readable ({error!r})") from None


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those fields of an audit that are tuples, of which JSON makes lists."""
    bets = {name: tuple(each) for name, each in data["stakes"].items()}
    return {"losses": tuple(data["losses"]), "due": tuple(data["due"]), "stakes": bets}
