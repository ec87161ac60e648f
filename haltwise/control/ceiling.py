"""The largest certified price: one that loses at most the target, with a confidence told before.

Every audit tells the loss of every price. Prices are tested in order, the strictest first, each at
the whole level: the first one whose mean loss is above the target passes with a probability of at
most the level, at any time, and none behind it is certified before it is (fixed-sequence testing;
Angelopoulos et al., 2021, arXiv 2110.01052, with capital that may be looked at at any time). Prices
that calibrate.py has certified stand at the start of the sequence and are not tested again; what
its certificate may be wrong with comes on top.

Against each price two gamblers bet, and their capital counts together. The steady one has one stake
for all audits, and is the sooner certain where next to nothing is lost. The timed one bets so that
it has most likely won enough by a deadline (Browne, 1999, Reaching goals by a deadline, Advances in
Applied Probability 31, section 3): who has more left to win, or less time, bets more. That loses
least to who looks only once, at the deadline, and no look before costs anything. Behind a deadline
it goes on, with what it has, to one twice as far.

Audits count in the order of their draws, and where a label is due as lost until it comes. So the
capital is never above that of who knows at once what the audits so far have lost, and slow answers
and late labels can make it no larger than it will be. Stakes are chosen when an audit is drawn,
before anything is known of it, whatever they hang on.

Shapes: leading places (...) are anybody's; K prices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.control.betting import Float

Bool = NDArray[np.bool_]

#: The loss that an audit counts with until it tells more.
WORST = 1.0
# Of the level, what the first epoch has.
_FIRST = 0.9
# Of the capital, what the steady gambler has at first, and its stake, a share of the largest that
# cannot lose everything.
_STEADY_SHARE, _STEADY = 0.2, 0.5
# Shares between which the timed gambler's stake is kept: it never waits, and survives many losses.
_LEAST, _MOST = 0.1, 0.6
# How much more than enough it aims for, since who comes near to a goal bets next to nothing.
_BEYOND = 1.25
# Audits without news, each as lossy as the target, that its guess of the variance begins with.
_PRIOR = 50
# Of a standard normal variable: log P(below z) and the inverse Mills ratio at each z.
_Z: Float = np.linspace(-7.0, 7.0, 1_401)
_BELOW: Float = np.array([math.erfc(-z / math.sqrt(2)) / 2 for z in _Z])
_LOG_BELOW: Float = np.log(_BELOW)
_MILLS: Float = np.exp(-(_Z**2) / 2) / math.sqrt(2 * math.pi) / _BELOW


@dataclass(frozen=True, eq=False)
class Counted:
    """What one audit counts with, at every price."""

    stakes: Float
    """(..., K) of the timed gambler, see `Evidence.stakes`."""
    losses: Float
    """(..., K) in [-1, 1]; `WORST` where they are not known yet."""
    due: Bool
    """(..., K) where that is not known yet; the timed gambler does not go by it."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the audits of one epoch say against "price k loses more than the target"."""

    log_capital: Float
    """(..., K, 2) of the steady and the timed gambler."""
    supposed: Float
    """(..., K) the timed one's, without what is due: the stakes go by it."""
    squares: Float
    """(..., K) sum of the squares of the losses that are not due."""
    passed: Bool
    """(..., K) whether the price's capital has ever sufficed."""

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> Evidence:
        """Returns that of no audit, for (..., K)."""
        steady, timed = np.log(_STEADY_SHARE), np.log(1 - _STEADY_SHARE)
        return cls(
            np.full((*shape, 2), [steady, timed]),
            np.full(shape, timed),
            np.zeros(shape),
            np.zeros(shape, dtype=np.bool_),
        )

    @property
    def log_total(self) -> Float:
        """(..., K) the log of both capitals together."""
        total: Float = np.logaddexp(self.log_capital[..., 0], self.log_capital[..., 1])
        return total

    def stakes(self, num: ArrayLike, deadline: int, target: float, level: ArrayLike) -> Float:
        """Returns the timed gambler's stakes (..., K) on the next audit.

        Who has the share p of what is needed, and n audits left, bets

            pdf(z) / (p * standard deviation of a loss * sqrt(n)),  where p = P(normal < z)

        of its capital a unit of loss, which is the most likely way to win it all in time.

        Args:
            num: (...) the audits of the epoch that are drawn.
            deadline: The number of audits by which enough is to be won; at least 1.
            target: The mean loss that is promised, in (0, 1).
            level: (...) the probability of a wrong certificate, at most.
        """
        drawn = np.asarray(num, dtype=np.float64)[..., None]
        left = (
            deadline * 2.0 ** np.ceil(np.log2(np.maximum(drawn + 1, deadline) / deadline)) - drawn
        )
        goal = _BEYOND / np.asarray(level)[..., None] - np.exp(self.log_capital[..., 0])
        log_share = np.minimum(self.supposed - np.log(np.maximum(goal, 1.0)), 0.0)
        deviation = np.sqrt((self.squares + _PRIOR * target) / (drawn + _PRIOR))
        stakes = np.interp(log_share, _LOG_BELOW, _MILLS) / (deviation * np.sqrt(left))
        bounded: Float = np.clip(stakes * (1 - target), _LEAST, _MOST) / (1 - target)
        return bounded

    def after(self, audit: Counted, target: float, level: ArrayLike) -> Evidence:
        """Returns the evidence after one more audit.

        Args:
            audit: What it counts with.
            target: The mean loss that is promised, in (0, 1).
            level: (...) the probability of a wrong certificate, at most.
        """
        return self._moved(audit, 1, target)._looked_at(level)

    def corrected(self, before: Counted, now: Counted, target: float, level: ArrayLike) -> Evidence:
        """Returns the evidence after an audit has told more.

        Args:
            before: What it counted with.
            now: What it counts with from now on, with the same stakes; no loss is larger.
            target: As it was at the audit.
            level: (...) as it was at the audit.
        """
        return self._moved(before, -1, target)._moved(now, 1, target)._looked_at(level)

    def _moved(self, audit: Counted, sign: int, target: float) -> Evidence:
        """Takes an audit in, or out again."""
        gain = target - audit.losses
        grown = np.log1p(np.stack([_STEADY / (1 - target) * gain, audit.stakes * gain], axis=-1))
        return Evidence(
            self.log_capital + sign * grown,
            self.supposed + sign * np.where(audit.due, 0.0, grown[..., 1]),
            self.squares + sign * np.where(audit.due, 0.0, audit.losses**2),
            self.passed,
        )

    def _looked_at(self, level: ArrayLike) -> Evidence:
        enough = self.log_total >= -np.log(np.asarray(level))[..., None]
        return replace(self, passed=self.passed | enough)

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


@lru_cache(maxsize=1_024)
def fewest_audits(target: float, level: float, deadline: int) -> int:
    """Returns the fewest audits that can certify a price: so many if none of them has a loss.

    Args:
        target: The mean loss that is promised, in (0, 1).
        level: The probability of a wrong certificate, at most.
        deadline: See `Evidence.stakes`.
    """
    evidence, num, none = Evidence.none((1,)), 0, np.zeros(1)
    while not evidence.passed[0]:
        stakes = evidence.stakes(num, deadline, target, level)
        evidence = evidence.after(Counted(stakes, none, none > 0), target, level)
        num += 1
    return num
