"""Where each price would have halted a thought that runs to its end."""

from __future__ import annotations

import numpy as np

from haltwise.control.betting import Float
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index, Signals
from haltwise.session.session import HaltMonitor
from haltwise.session.thought import NEVER

# Prices of a grid: fewer miss the best one, more cost time and tell little.
_NUM_PRICES = 24


def prices_of(head: HaltHead) -> Float:
    """Returns the prices (K,) that a head is governed by, the strictest first.

    They are spaced evenly in their log over the range that the head is trained for; the one that
    its certificate names is among them.
    """
    grid = np.geomspace(*head.config.observing.price_range, _NUM_PRICES)
    certificate = head.config.certificate
    if certificate is None or certificate.price is None:
        return grid
    return np.unique(np.append(grid, certificate.price))


class Replay:
    """Shows the decision points of one thought to a head at K prices at once.

    Args:
        head: The policy.
        prices: (K,) in exact match per 1,000 tokens.
        min_tokens: Thinking tokens before which nothing is halted.
    """

    def __init__(self, head: HaltHead, prices: Float, min_tokens: int) -> None:
        """Stands before the first decision point."""
        self._monitor = HaltMonitor(head, len(prices), prices)
        self._rows, self._min_tokens = np.arange(len(prices)), min_tokens
        #: (K,) tokens at which each price halts; `NEVER` where it has not.
        self.positions: Index = np.full(len(prices), NEVER)

    def add(self, signals: Signals, place: int) -> None:
        """Takes in the next decision point.

        Args:
            signals: Those of some rows.
            place: Of this thought among them.
        """
        halts = self._monitor.observe(signals.rows(np.full(len(self._rows), place)), self._rows)
        position = int(signals.position[place])
        if position >= self._min_tokens:
            self.positions[halts & (self.positions == NEVER)] = position
