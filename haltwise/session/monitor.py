"""A head beside a running batch: which rows it would halt now."""

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.features import FeatureState
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Bools, Index, Signals
from haltwise.session.request import Terms


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
        price = head.config.default_price if price is None else price
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
        if any(getattr(signals, name) is None for name in self.head.config.observing.signals):
            self.num_bad_signals[rows] += 1
            return np.zeros(len(rows), dtype=np.bool_)
        features = self._state.update(signals, rows)
        sound = np.isfinite(features).all(axis=1)
        self.num_bad_signals[rows] += ~sound
        return self.head.halts(features, self.price[rows]) & sound
