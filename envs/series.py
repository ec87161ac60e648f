"""Says in which order episodes are played, and at which prices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haltwise import InputError, Observing
from haltwise.policy.signals import Index


class ShuffledPasses:
    """An endless series of items: shuffled passes over all of them, one after the other.

    Args:
        items: (N,) the items, at least one.
    """

    def __init__(self, items: Index) -> None:
        """Starts before the first pass."""
        self._items = items
        self.restart()

    def restart(self) -> None:
        """Drops what is left of the current pass: the next draw begins a new one."""
        self._left = self._items[:0]

    def draw(self, rng: np.random.Generator, num: int) -> Index:
        """Returns the next items (num,) of the series; when a pass runs out, a new one begins."""
        while len(self._left) < num:
            self._left = np.append(self._left, rng.permutation(self._items))
        drawn, self._left = np.split(self._left, [num])
        return drawn


def draw_prices(
    observing: Observing, fixed: float | None, rng: np.random.Generator, num: int
) -> NDArray[np.float64]:
    """Returns the prices (num,) of new episodes.

    They are the fixed price, or drawn log-uniformly from the observing's range if it is None.
    """
    return observing.draw_price(rng, num) if fixed is None else np.full(num, float(fixed))


def check_price(price: float | None) -> None:
    """Refuses a price that is not positive and finite; None stands for no price.

    Raises:
        InputError: If the price cannot be used.
    """
    if price is not None and not 0 < price < np.inf:
        raise InputError(f"price is {price}, expected positive and finite")
