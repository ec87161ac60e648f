"""What became of the groups since a process began; what is remembered of that does not grow.

The history watches the books. Now and then it measures what every group loses and saves; where that
is more than it may keep, it forgets the measurement that is missed least, so that the last minutes
are there in full and the last weeks in outline. And it notes when the governor has done something.
Nothing of this is in the store: every process has the history of its own life.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from haltwise.control.betting import Float
from haltwise.control.books import Books
from haltwise.control.canary import Canary
from haltwise.control.estimates import Sums
from haltwise.control.governor import GroupState, Promise, is_open, on_alert
from haltwise.control.group_names import usual_price
from haltwise.control.groups import EVERYTHING, Groups
from haltwise.control.library import Library
from haltwise.control.status import breaker_of, price_of
from haltwise.session.request import Terms

# Seconds between two measurements of a group.
_BETWEEN = 10.0
# Measurements of a group, and moves of all, that are remembered.
_MOST_MEASURED = 240
_MOST_MOVES = 100
# Seconds within which a ceiling that goes on as it did is one move.
_ONE_MOVE = 60.0
_ENDS = ("low", "estimate", "high")


@dataclass(frozen=True)
class Measured:
    """What a group was served at a time, and what that lost and saved."""

    at: float
    """Seconds since 1970, by this machine's clock."""
    price: float
    """What requests that name no price are served."""
    ceiling: float
    """The largest price that is certified."""
    loss: tuple[float, ...]
    """The lower end of the interval, the estimate, the upper end."""
    saving: tuple[float, ...]
    """The same."""

    @property
    def row(self) -> Float:
        """(9,) all numbers."""
        return np.array([self.at, self.price, self.ceiling, *self.loss, *self.saving])

    @classmethod
    def of_row(cls, row: Float) -> Measured:
        """Rebuilds a measurement from its numbers (9,)."""
        at, price, ceiling, *ends = row.tolist()
        return cls(at, price, ceiling, tuple(ends[:3]), tuple(ends[3:]))


@dataclass(frozen=True)
class Move:
    """Something that the governor has done with a group."""

    at: float
    """When this process has seen it: seconds since 1970."""
    group: str
    what: str
    """Such as "breaker opened"; see `_moves`."""
    before: float
    """The group's ceiling before, as a price."""
    after: float
    """The same after."""


@dataclass(eq=False)
class History:
    """Watches the books by `note`, which one thread calls; all else may be called by any."""

    kind: int
    """The kind of loss that is measured, as in `LOSSES`."""
    usual: Terms | None = None
    """Those of requests that ask for no others, if they are served so; None if the governor says
    what is served."""
    clock: Callable[[], float] = time.time
    moves: tuple[Move, ...] = ()
    """The newest first."""
    began: float = field(init=False)
    """When it began to watch: seconds since 1970."""

    def __post_init__(self) -> None:
        """Has seen nothing yet."""
        self.began = self.clock()
        self._last = -np.inf
        self._series: dict[str, Float] = {}
        self._groups: Groups | None = None
        self._champion = ""
        self._canary: Canary | None = None
        #: (K,) that steps stand for.
        self.prices: Float = np.zeros(0)
        # By group, of what the newest measurement is.
        self._measured: dict[str, tuple[int, int, Sums]] = {}
        # By request that is among the differing ones, when it came to be.
        self._differed: dict[str, float | None] = {}

    def note(self, library: Library) -> None:
        """Takes in the books as they are now."""
        books, now = library.books, self.clock()
        self._note_canary(library.canary, library, now)
        if library.champion != self._champion:
            self._exchange(library, now)
        groups, before = books.groups, self._groups
        if before is not None and groups is not before:
            self._note_moves(before, groups, now)
        since = None if before is None else now
        self._differed = {
            one.request: self._differed.get(one.request, since) for one in books.differing
        }
        self._groups = groups
        if not 0 <= now - self._last < _BETWEEN:
            self._last = now
            for name in groups.groups:
                self._measure(name, books, now)

    def _exchange(self, library: Library, now: float) -> None:
        """Goes on with the books of another head."""
        if self._champion:
            self._add(Move(now, EVERYTHING, "head promoted", 0.0, 0.0))
        self._champion, self._groups, self._measured = library.champion, None, {}
        self.prices, self._last = np.array(library.shelf[library.champion].prices), -np.inf

    def _note_canary(self, canary: Canary | None, library: Library, now: float) -> None:
        """Notes where a challenger begins to serve a share, goes on to another, or stops."""
        before, self._canary = self._canary, canary
        if canary is not None and (before is None or before.share != canary.share):
            what = f"head {canary.head[:12]} serves {100 * canary.share:g} %"
            self._add(Move(now, EVERYTHING, what, 0.0, 0.0))
        elif canary is None and before is not None and before.head != library.champion:
            why = library.shelf[before.head].stopped
            what = f"head {before.head[:12]} stopped: {why}"
            self._add(Move(now, EVERYTHING, what, 0.0, 0.0))

    def newest(self, name: str) -> Measured | None:
        """Returns the newest measurement of a group; None if there is none."""
        rows = self._series.get(name)
        return None if rows is None else Measured.of_row(rows[-1])

    def told(self, books: Books, group: str | None) -> dict[str, Any]:
        """Returns, as a JSON object, what is known beside what groups lose and save now.

        Args:
            books: The newest books.
            group: The group that is asked about; None for all.
        """
        return {
            "at": self.clock(),
            "since": self.began,
            "breakers": {n: breaker_of(state) for n, state in books.groups.groups.items()},
            "moves": [asdict(one) for one in self.moves if group in (None, one.group)],
            "disagreements": [
                {
                    "request": one.request,
                    "at": self._differed.get(one.request),
                    "groups": list(one.groups),
                    "price": price_of(self.prices, one.step),
                    "label_until": books.awaited[one.request][1].until
                    if one.request in books.awaited
                    else None,
                }
                for one in books.differing
                if group is None or group in one.groups
            ],
        }

    def series(self, name: str) -> dict[str, Any]:
        """Returns a group's measurements as a JSON object of lists, the oldest first."""
        at, price, ceiling, *ends = self._series.get(name, np.zeros((0, 9))).T
        parts = np.array(ends).round(6).tolist()
        return {
            "at": at.tolist(),
            "price": price.tolist(),
            "ceiling": ceiling.tolist(),
            "loss": dict(zip(_ENDS, parts[:3], strict=True)),
            "saving": dict(zip(_ENDS, parts[3:], strict=True)),
        }

    def _measure(self, name: str, books: Books, now: float) -> None:
        groups, sums = books.groups, books.sum_of(name)
        step = groups.step([name])
        if self.usual is not None:
            served = usual_price(name, self.usual)
            step = int(np.searchsorted(self.prices, served, side="right"))
        measured = step, groups.ceiling([name]), sums
        if self._measured.get(name) == measured:
            return
        self._measured[name] = measured
        loss, saving = self._losing_and_saving(sums, step)
        price, ceiling = (price_of(self.prices, one) for one in measured[:2])
        rows = self._series.get(name, np.zeros((0, 9)))
        rows = rows[rows[:, 0] < now]  # a clock may be set back
        added = np.vstack([rows, Measured(now, price, ceiling, loss, saving).row])
        self._series[name] = _thinned(added) if len(added) > _MOST_MEASURED else added

    def _losing_and_saving(
        self, sums: Sums, step: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the ends of both intervals at a step; step 0 halts, loses and saves nothing."""
        if not step:
            return (0.0,) * 3, (0.0,) * 3
        one = sums.at(step)
        losses, savings = one.losses(), one.savings()
        return (
            tuple(float(getattr(losses, end)[self.kind, 0]) for end in _ENDS),
            tuple(float(getattr(savings, end)[0]) for end in _ENDS),
        )

    def _note_moves(self, before: Groups, after: Groups, now: float) -> None:
        for name, state in after.groups.items():
            known = before.groups.get(name)
            if known is not state:
                steps = [one.ceiling([name]) for one in (before if known else after, after)]
                ceilings = [price_of(self.prices, step) for step in steps]
                for what in _moves(known, state, after.promise):
                    self._add(Move(now, name, what, *ceilings))

    def _add(self, move: Move) -> None:
        """Adds a move; a ceiling that goes on as it did a moment ago goes on in the same one."""
        newest = next((one for one in self.moves if one.group == move.group), None)
        others = self.moves
        goes_on = newest is not None and newest.what == move.what and "ceiling" in move.what
        if newest is not None and goes_on and 0 <= move.at - newest.at < _ONE_MOVE:
            others = tuple(one for one in self.moves if one is not newest)
            move = Move(move.at, move.group, move.what, newest.before, move.after)
        self.moves = (move, *others)[:_MOST_MOVES]


def _moves(before: GroupState | None, after: GroupState, promise: Promise) -> Iterator[str]:
    """Tells what the governor has done between two states of a group, of which one may be none."""
    if before is None:
        yield "group begun"
        return
    if after.epoch > before.epoch:
        yield "breaker opened" if before.ceiling > 0 else "epoch begun"
    elif after.ceiling > before.ceiling:
        yield "breaker closed" if is_open(before) else "ceiling raised"
    elif after.ceiling < before.ceiling:
        yield "ceiling lowered"
    if after.epoch == before.epoch and on_alert(after, promise) != on_alert(before, promise):
        yield "alert begun" if on_alert(after, promise) else "alert ended"


def _thinned(rows: Float) -> Float:
    """Returns measurements (N, 9) without the one whose neighbours are closest for their age."""
    at = rows[:, 0]
    gaps, ages = at[2:] - at[:-2], at[-1] - at[1:-1]
    return np.delete(rows, 1 + int(np.argmin(gaps / ages)), axis=0)
