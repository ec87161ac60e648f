"""Makes every price count alike: at a low one, tokens move the return too little to be learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haltwise import Observing

# Bounds the weights at low prices: there the return is nearly exact match alone, which would
# drown the rest.
_FLOOR = 0.1


def balance(price: NDArray[np.float64], observing: Observing) -> NDArray[np.float64]:
    """Returns the positive weights (B,) that the rewards of episodes at prices (B,) get.

        weight = 1 / (0.1 + 2 * price / highest price)

    An episode keeps one price, so multiplying its rewards by its weight leaves its best policy
    as it is; what changes is how much each price counts in one network that serves them all.
    """
    return 1 / (_FLOOR + 2 * price / observing.price_range[1])
