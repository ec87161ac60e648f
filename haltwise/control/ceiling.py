"""The largest certified price: one that loses at most the target, with a confidence told before.

Every audit tells the loss of every price. Prices are tested in order, the strictest first, each at
the whole level: the first one whose mean loss is above the target passes with a probability of at
most the level, at any time, and none behind it is certified before it is (fixed-sequence testing;
Angelopoulos et al., 2021, arXiv 2110.01052, with capital that may be looked at at any time). Prices
that calibrate.py has certified stand at the start of the sequence and are not tested again; what
its certificate may be wrong with comes on top.

Audits count in the order of their draws, and where a label is due as lost until it comes. So the
capital is never above that of who knows at once what the audits so far have lost, and slow answers
and late labels can make it no larger than it will be.

Shapes: leading places (...) are anybody's; K prices, S stakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.control.betting import STAKES, Float, growth, log_mean_exp

#: The loss that an audit counts with until it tells more.
WORST = 1.0
# Of the level, what the first epoch has.
_FIRST = 0.8


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the audits of one epoch say against "price k loses more than the target"."""

    log_capital: Float
    """(..., K, S) of each stake."""
    passed: NDArray[np.bool_]
    """(..., K) whether the price's capital has ever sufficed."""

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Evidence:
        """Returns that of no audit, for (..., K)."""
        return cls(np.zeros((*shape, len(STAKES))), np.zeros(shape, dtype=np.bool_))

    def after(self, losses: ArrayLike, target: float, level: ArrayLike) -> Evidence:
        """Returns the evidence after one more audit.

        Args:
            losses: (..., K) of every price, in [-1, 1]; `WORST` where they are not known yet.
            target: The mean loss that is promised, in (0, 1).
            level: (...) the probability of a wrong certificate, at most.
        """
        return self._moved(growth(losses, target), level)

    def corrected(
        self, counted: ArrayLike, losses: ArrayLike, target: float, level: ArrayLike
    ) -> Evidence:
        """Returns the evidence after an audit has told more.

        Args:
            counted: (..., K) the losses that the audit counted with.
            losses: (..., K) the losses that it counts with from now on, nowhere larger.
            target: As it was at the audit.
            level: (...) as it was at the audit.
        """
        return self._moved(growth(losses, target) - growth(counted, target), level)

    def _moved(self, by: Float, level: ArrayLike) -> Evidence:
        log_capital = self.log_capital + by
        enough = log_mean_exp(log_capital) >= -np.log(np.asarray(level))[..., None]
        return Evidence(log_capital, self.passed | enough)

    def certified(self, first: ArrayLike) -> NDArray[np.int64]:
        """Returns how many prices (...) are certified, counted from the strictest.

        Args:
            first: (...) how many were certified before, by other data.
        """
        before = np.arange(self.passed.shape[-1]) < np.asarray(first)[..., None]
        run: NDArray[np.int64] = np.logical_and.accumulate(self.passed | before, axis=-1).sum(-1)
        return run


def level_of(level: ArrayLike, epoch: ArrayLike) -> Float:
    """Returns the share of a level that an epoch's certificate has; all of them sum to the level.

    Args:
        level: (...) the probability that any certificate is wrong, at most.
        epoch: (...) 0 for the first.
    """
    number = np.asarray(epoch, dtype=np.float64)
    later = (1 - _FIRST) / np.where(number > 0, number * (number + 1), 1)
    share: Float = np.asarray(level) * np.where(number > 0, later, _FIRST)
    return share


def fewest_audits(target: float, level: float) -> int:
    """Returns the fewest audits that can certify a price: so many if none of them has a loss.

    Args:
        target: The mean loss that is promised, in (0, 1).
        level: The probability of a wrong certificate, at most.
    """
    each = growth(0.0, target)
    low, high = 0, int(np.ceil((-np.log(level) + np.log(len(STAKES))) / each.max()))
    while low < high:
        middle = (low + high) // 2
        enough = log_mean_exp(middle * each) >= -np.log(level)
        low, high = (low, middle) if enough else (middle + 1, high)
    return low
