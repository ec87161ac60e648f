"""A head beside a running batch: which rows halt now."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.features import FeatureState
from haltwise.head import HaltHead
from haltwise.signals import Index, Signals


class HaltMonitor:
    """Per-row halting state of a batch; the caller owns the loop.

    Rows are independent. A signal that is not finite never halts a row: the row continues and
    `num_bad_signals` counts it.

    Args:
        head: The policy.
        num_rows: Rows in the batch.
        price: In exact match per 1,000 tokens: one, or one a row; default the head's own. A row
            at a price of 0 is never halted.

    Raises:
        InputError: If a price is negative or not finite.
    """

    def __init__(
        self, head: HaltHead, num_rows: int, price: float | NDArray[np.float64] | None = None
    ) -> None:
        """Starts every row before its first point."""
        self.head = head
        self.num_bad_signals = 0
        observing = head.config.observing
        self._state = FeatureState(num_rows, observing.groups, observing.projection)
        price = head.config.default_price if price is None else price
        self.price = np.array(np.broadcast_to(price, num_rows), dtype=np.float64)
        if not (np.isfinite(self.price) & (self.price >= 0)).all():
            raise InputError(f"price is {price}, expected 0 or more, and finite")

    def reset(self, rows: Index, price: float | None = None) -> None:
        """Gives rows to new questions, at a new price if one is named."""
        self._state.reset(rows)
        if price is not None:
            self.price[rows] = price

    def observe(self, signals: Signals, rows: Index) -> NDArray[np.bool_]:
        """Takes in a decision point of some rows.

        Args:
            signals: Of those rows, in the same order.
            rows: (B,) which rows; each at most once.

        Returns:
            (B,) which of them halt now.
        """
        features = self._state.update(signals, rows)
        bad = ~np.isfinite(features).all(axis=1)
        self.num_bad_signals += int(bad.sum())
        return self.head.halts(features, self.price[rows]) & ~bad
