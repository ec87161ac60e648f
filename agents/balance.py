"""Weighing prices alike: at a low price tokens move the return little, and would be ignored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haltwise import Observing

# Keeps the chance of exact match, which weighs the same at every price, from drowning the rest.
_FLOOR = 0.1


def balance(price: NDArray[np.float64], observing: Observing) -> NDArray[np.float64]:
    """Positive weights (B,) of episodes at prices (B,).

        weight = 1 / (0.1 + 2 * price / highest price)

    An episode keeps one price, so multiplying its rewards by its weight leaves its best policy
    as it is; what changes is how much each price counts in one network that serves them all.
    """
    return 1 / (_FLOOR + 2 * price / observing.price_range[1])
