"""A head beside a running batch: which rows halt now."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.features import FeatureState, signals_of
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index, Signals
from haltwise.session.terms import Terms

Bools = NDArray[np.bool_]


class HaltMonitor:
    """Per-row halting state of a batch; the caller owns the loop.

    Rows are independent. They join (`reset`) and move about; a row that nobody looks at any more
    needs no goodbye. A signal that is missing or not finite never halts a row: the row goes on,
    and it is counted.

    Args:
        head: The policy.
        num_rows: R, rows in the batch.
        price: In exact match per 1,000 tokens: one, or one a row (R,); default the head's own. A
            row at a price of 0 is never halted by the head.

    Raises:
        InputError: If a price is negative or not finite, or there are not as many as rows.
    """

    def __init__(
        self, head: HaltHead, num_rows: int, price: float | NDArray[np.float64] | None = None
    ) -> None:
        """Starts every row before its first point."""
        self.head = head
        observing = head.config.observing
        self._signals = signals_of(observing.groups)
        self._state = FeatureState(num_rows, observing.groups, observing.projection)
        # Features of row r are kept at _place[r], so that rows can move and their features not.
        self._place: Index = np.arange(num_rows)
        price = head.config.default_price if price is None else price
        if np.shape(price) not in ((), (num_rows,)):
            raise InputError(
                f"{np.size(price)} prices for {num_rows} rows, expected one, or one each"
            )
        #: (R,) in exact match per 1,000 tokens.
        self.price = np.array(np.broadcast_to(price, num_rows), dtype=np.float64)
        for value in self.price:
            Terms(float(value))
        self._min_tokens: Index = np.zeros(num_rows, dtype=np.int64)
        self._max_tokens = np.full(num_rows, np.inf)
        #: (R,) rows that were halted, by the head or by their cap.
        self.halted: Bools = np.zeros(num_rows, dtype=np.bool_)
        #: (R,) decision points with a signal that was missing or not finite.
        self.num_bad_signals: Index = np.zeros(num_rows, dtype=np.int64)

    def reset(self, rows: Index, terms: Terms | None = None) -> None:
        """Gives rows to new questions, on new terms if they are named."""
        self._state.reset(self._place[rows])
        self.halted[rows] = False
        self.num_bad_signals[rows] = 0
        if terms is not None:
            self.price[rows] = terms.price
            self._min_tokens[rows] = terms.min_tokens
            self._max_tokens[rows] = np.inf if terms.max_tokens is None else terms.max_tokens

    def move(self, sources: Index, targets: Index) -> None:
        """Moves rows, all at once; what was in the targets is gone unless it moves too.

        Rows that move away and are not moved to start anew. `move([a, b], [b, a])` swaps.

        Args:
            sources: (B,) rows, each at most once.
            targets: (B,) where each goes, each at most once.
        """
        left = np.setdiff1d(sources, targets)
        spare = np.setdiff1d(self._place[targets], self._place[sources])
        for column in (self.price, self._min_tokens, self._max_tokens):
            column[targets] = column[sources]
        for column in (self._place, self.halted, self.num_bad_signals):
            column[targets] = column[sources]
        self._place[left] = spare
        self.reset(left)

    def observe(self, signals: Signals, rows: Index) -> Bools:
        """Takes in a decision point of some rows.

        Args:
            signals: Of those rows, in the same order.
            rows: (B,) which rows; each at most once.

        Returns:
            (B,) which of them are halted now. A halted row stays halted, whatever it shows.
        """
        if all(getattr(signals, name) is not None for name in self._signals):
            features = self._state.update(signals, self._place[rows])
            bad = ~np.isfinite(features).all(axis=1)
            halts = self.head.halts(features, self.price[rows]) & ~bad
        else:
            bad = np.ones(len(rows), dtype=np.bool_)
            halts = ~bad
        running = ~self.halted[rows]
        self.num_bad_signals[rows] += bad & running
        self.halted[rows] |= halts & (signals.position >= self._min_tokens[rows])
        return self.cap(rows, signals.position)

    def cap(self, rows: Index, position: Index) -> Bools:
        """Halts rows (B,) that have reached their cap, at any token.

        Args:
            rows: Each at most once.
            position: (B,) thinking tokens so far.

        Returns:
            (B,) which of them are halted now.
        """
        self.halted[rows] |= position >= self._max_tokens[rows]
        return self.halted[rows]
