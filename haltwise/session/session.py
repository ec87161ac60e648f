"""Halting: the one place where it is decided, whatever runs the LM.

    join  ->  Thought.add (every token)  ->  decide (where the thought waits)  ->  finish

An adapter delivers tokens and signals, and forces what closes a thought; all else is here.

Shapes: R rows, B of them in a call.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.features import FeatureState
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Bools, Index, Signals
from haltwise.session.control import ConstantControl, Control, check_control
from haltwise.session.request import RunningRequest, Terms, ThoughtReport, ThoughtRequest
from haltwise.session.thought import NEVER, Reason, Thought

log = logging.getLogger("haltwise")

T = TypeVar("T")

#: Why a halted thought went on: its answer could not be read, or was refused.
UNGIVEN = "answer refused"

#: Given rows (B,) at decision points and their thoughts, returns their signals in that order.
ReadSignals = Callable[[Index, list[Thought]], Signals]


class Session:
    """Decides about the thoughts of R rows.

    Rows are independent. A request joins a row and runs until it is finished. Where its thought
    waits, `decide` tells whether it is halted. The head halts no request at a price of 0, before
    `min_tokens`, or on signals that are missing or not finite; the cap halts any thought that has
    begun.

    Args:
        head: The policy.
        num_rows: R.
        control: Sets terms and prices; by default each request's own are constant.

    Raises:
        InputError: If the control is none.
    """

    def __init__(self, head: HaltHead, num_rows: int, control: Control | None = None) -> None:
        """Starts without a request."""
        self.head = head
        self.control = check_control(control or ConstantControl())
        #: The requests that run, by row.
        self.running: dict[int, RunningRequest] = {}
        #: (R,) whether the head may still halt the row.
        self.watched: Bools = np.zeros(num_rows, dtype=np.bool_)
        #: (R,) whether the head or the cap may still halt the row.
        self.open: Bools = np.zeros(num_rows, dtype=np.bool_)
        #: (R,) tokens of the row before which there is nothing to decide.
        self.next_look: Index = np.full(num_rows, NEVER)
        #: Decision points so far with signals that were missing or not finite.
        self.num_bad_signals = 0
        self._monitor = HaltMonitor(head, num_rows, price=0.0)  # each row has its own once it joins

    def join(self, row: int, request: ThoughtRequest, thought: Thought) -> bool:
        """Gives a row to a request; returns whether anything can halt it.

        Args:
            row: If another request runs there, that one is finished.
            request: What is asked.
            thought: Without a token so far.
        """
        if row in self.running:
            self.finish(row)
        given = _guarded(None, lambda: replace(self.control.terms(request)))
        terms = given or replace(request.terms, price=0.0)
        thought.cap = terms.max_tokens
        self._monitor.reset(np.array([row]))
        looked_at = terms.price > 0 or terms.looked_at or self.control.moves_prices
        report = ThoughtReport(request, terms.price)
        self.running[row] = RunningRequest(terms, thought, report, given is not None and looked_at)
        self.look(row)
        return bool(self.open[row])

    def look(self, row: int) -> None:
        """Takes in that a row's thought has come further than at the latest look."""
        running = self.running[row]
        thought = running.thought
        goes_on = not (running.report.decided or running.released or thought.is_over)
        self.watched[row] = goes_on and running.watched
        self.open[row] = goes_on and (running.watched or thought.cap is not None)
        look = thought.next_look(bool(self.watched[row]))
        self.next_look[row] = look if self.open[row] else NEVER

    def points(self, rows: Iterable[int]) -> Index:
        """Returns those of some rows that are at a decision point of which the head is asked."""
        running = self.running
        at_point = [r for r in rows if self.watched[r] and running[r].thought.at_point]
        return np.array(at_point, dtype=np.int64)

    def waiting(self, rows: Iterable[int]) -> list[int]:
        """Returns those of some rows that `decide` is to be asked about."""
        return [row for row in rows if self.open[row] and self._waits(row)]

    def _waits(self, row: int) -> bool:
        thought = self.running[row].thought
        return bool(thought.at_cap or (thought.at_point and self.watched[row]))

    def decide(self, rows: Sequence[int], read: ReadSignals) -> list[int]:
        """Decides about rows whose thoughts wait.

        Args:
            rows: Each at most once; the others among them are left as they are.
            read: Returns the signals of rows at decision points, if there are any.

        Returns:
            Those that are halted now: the caller closes their thoughts, or calls `release`.
        """
        points = self.points(rows)
        halts = set()
        if len(points):
            signals = read(points, [self.running[row].thought for row in points.tolist()])
            halts = self._ask_head(points, signals)
        halted = []
        for row in rows:
            running = self.running[row]
            position, capped = running.thought.position, self.open[row] and running.thought.at_cap
            if capped or (row in halts and position >= running.terms.min_tokens):
                self.note_halted(row, "capped" if capped else "halted")
                halted.append(row)
            self.look(row)
        return halted

    def decide_late(self, row: int, signals: Signals) -> bool:
        """Decides about a decision point of a row whose thought has gone on since.

        Args:
            row: Its points have to come in order, and `decide` leaves them out.
            signals: (1,) as they were at the point, and what was learned of it afterwards.

        Returns:
            Whether it is halted now, where its thought is: as by `decide`. What was over or decided
            meanwhile is not.
        """
        self.look(row)
        if not self.watched[row]:
            return False
        position = int(signals.position[0])
        halts = self._ask_head(np.array([row]), signals)
        self.look(row)
        if row not in halts or position < self.running[row].terms.min_tokens:
            return False
        self.note_halted(row, "halted", position)
        self.look(row)
        return True

    def _ask_head(self, points: Index, signals: Signals) -> set[int]:
        """Returns those rows of some (B,) that the head halts on these signals."""
        for place, row in enumerate(points.tolist()):
            self.running[row].point = signals, place
            if signals.answer is not None:
                self.running[row].thought.answered(int(signals.answer[place]))
        self._monitor.price[points] = [self._price(row) for row in points.tolist()]
        num_before = self._monitor.num_bad_signals[points].sum()
        halts = set(points[self._monitor.observe(signals, points)].tolist())
        num_now = self._monitor.num_bad_signals[points].sum()
        self.num_bad_signals += int(num_now - num_before)
        return halts

    def note_halted(self, row: int, reason: Reason, position: int | None = None) -> None:
        """Notes that a row's thought is closed; `decide` does it by itself.

        Args:
            row: The row.
            reason: Why.
            position: Where it was decided, by default where the thought is.
        """
        running = self.running[row]
        decided_at = running.thought.position if position is None else position
        running.report.decided, running.report.decided_at = reason, decided_at

    def _price(self, row: int) -> float:
        """Returns the price of a row at its decision point, 0 if the control fails."""
        running = self.running[row]
        running.report.price = _guarded(0.0, lambda: Terms(self.control.price(running)).price)
        return running.report.price

    def skip(self, row: int) -> None:
        """Passes a decision point of a row, since what was seen there makes no sense."""
        running = self.running[row]
        running.report.num_bad_signals += 1
        running.thought.at_point = False

    def lose(self, row: int) -> None:
        """Leaves a row to its LM and its cap: the head has not seen all of it."""
        self.running[row].watched = False
        self.look(row)

    def undo(self, row: int) -> None:
        """Takes back that a row is halted, which is tried again where its thought waits next."""
        report = self.running[row].report
        report.decided = report.decided_at = None
        self.look(row)

    def resume(self, row: int) -> None:
        """Lets the thought of a halted row go on, whose answer cannot be given; its cap holds."""
        self.undo(row)
        self.running[row].report.fallback = UNGIVEN
        self.lose(row)

    def release(self, row: int, fallback: str = "") -> None:
        """Leaves a row to its LM for good, even one that was to be halted.

        Args:
            row: Nobody decides about it any more.
            fallback: Why; empty if halting was never meant.
        """
        running = self.running[row]
        running.released, running.report.fallback = True, fallback
        self.look(row)

    def report(self, row: int) -> ThoughtReport:
        """Returns what has happened to a row so far."""
        running = self.running[row]
        thought, report = running.thought, running.report
        reason, position = thought.why_ended(), thought.position
        if report.decided and report.decided_at is not None and not running.released:
            reason, position = report.decided, report.decided_at
        return replace(
            report,
            reason=reason,
            position=position,
            num_points=thought.num_points,
            num_bad_signals=report.num_bad_signals + int(self._monitor.num_bad_signals[row]),
        )

    def finish(self, row: int) -> ThoughtReport:
        """Frees a row; returns what has happened, after the control has been told."""
        report = self.report(row)
        del self.running[row]
        self.watched[row] = self.open[row] = False
        self.next_look[row] = NEVER
        _guarded(None, self.control.finished, report)
        return report


class HaltMonitor:
    """What the head has seen of each row of a batch; the caller owns the loop.

    Rows are independent. A row joins by `reset`; one that nobody looks at any more needs no
    goodbye. A signal that is missing or not finite never halts a row, and it is counted. Caps,
    least thoughts and what follows a decision are the caller's: `haltwise.Session` has them.

    Args:
        head: The policy.
        num_rows: R, rows in the batch.
        price: In exact match per 1,000 tokens: one, or one a row (R,); default the head's own. At
            a price of 0 the head never halts a row.

    Raises:
        InputError: If a price is negative or not finite, or there are not as many as rows.
    """

    def __init__(
        self, head: HaltHead, num_rows: int, price: float | NDArray[np.float64] | None = None
    ) -> None:
        """Starts every row before its first point."""
        self.head = head
        observing = head.config.observing
        self._state = FeatureState(num_rows, observing.groups, observing.projection)
        price = head.price_or_own(price)
        if np.shape(price) not in ((), (num_rows,)):
            raise InputError(
                f"{np.size(price)} prices for {num_rows} rows, expected one, or one each"
            )
        #: (R,) in exact match per 1,000 tokens.
        self.price = np.array(np.broadcast_to(price, num_rows), dtype=np.float64)
        for value in self.price:
            Terms(float(value))
        #: (R,) decision points with a signal that was missing or not finite.
        self.num_bad_signals: Index = np.zeros(num_rows, dtype=np.int64)

    def reset(self, rows: Index) -> None:
        """Gives rows (B,) to new questions, at the prices that they have."""
        self._state.reset(rows)
        self.num_bad_signals[rows] = 0

    def observe(self, signals: Signals, rows: Index) -> Bools:
        """Takes in a decision point of some rows; returns which of them the head halts (B,).

        Args:
            signals: Those of the rows, in the same order.
            rows: (B,) each at most once.
        """
        read = self.head.config.observing.signals
        if missing := [name for name in read if getattr(signals, name) is None]:
            told = f"the head reads {', '.join(missing)}, which nobody measures: it halts nothing"
            warnings.warn(told, stacklevel=2)
            self.num_bad_signals[rows] += 1
            return np.zeros(len(rows), dtype=np.bool_)
        features = self._state.update(signals, rows)
        sound = np.isfinite(features).all(axis=1)
        self.num_bad_signals[rows] += ~sound
        return self.head.halts(features, self.price[rows]) & sound


def requests_of(
    head: HaltHead, num_rows: int, price: Any, min_tokens: Any, max_tokens: Any
) -> list[ThoughtRequest]:
    """Returns the requests of the rows of a batch.

    Args:
        head: Its default price stands for a price of None.
        num_rows: R.
        price: One, or one a row; the others too.
        min_tokens: See `Terms`.
        max_tokens: See `Terms`.

    Raises:
        InputError: If there are more or fewer than rows, or a value makes no sense.
    """
    price = head.price_or_own(price)
    columns = []
    for name, value in (("price", price), ("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        column = np.asarray(value, dtype=object)
        if column.shape not in ((), (num_rows,)):
            raise InputError(
                f"{column.size} values of {name} for {num_rows} rows, expected one, or one a row"
            )
        columns.append(np.broadcast_to(column, num_rows).tolist())
    terms = [Terms(*values) for values in zip(*columns, strict=True)]
    return [ThoughtRequest(term, {"row": row}) for row, term in enumerate(terms)]


def check_asked(head: HaltHead, price: Any, min_tokens: Any, max_tokens: Any) -> None:
    """Refuses what makes no sense, whatever the number of rows; arguments as of `requests_of`.

    Raises:
        InputError: If a value makes no sense, or there are more of one setting than of another.
    """
    num_rows = max(np.asarray(one, dtype=object).size for one in (price, min_tokens, max_tokens))
    requests_of(head, num_rows, price, min_tokens, max_tokens)


def _guarded(otherwise: T, call: Callable[..., T], *about: Any) -> T:
    """Returns what a control says, or something else if it fails."""
    try:
        return call(*about)
    except Exception:
        log.exception("the control failed: nothing is halted")
        return otherwise
