"""Evidence by betting: capital that a gambler wins if a claim about a mean is false.

If the claim holds, the capital grows in no mean, and P(it ever reaches 1 / level) <= level (Ville,
1939), so that it may be looked at at any time. A finite mixture of constant bets is one gambler,
whose bets hang on the past alone (Waudby-Smith and Ramdas, 2024, Estimating means of bounded random
variables by betting).

Shapes: leading places (...) are anybody's; S stakes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]

#: (S,) shares of the largest bet that cannot lose everything. Losses of a few percent under a
#: target of a few percent are told best by these; more of them dilute the capital.
STAKES: Float = np.array([0.2, 0.45])
# Bets of confidence sequences, from one that needs some 100,000 audits to one that needs a few.
_TILTS: Float = np.geomspace(1e-3, 0.9, 14)
# How much an observation's square takes from a bet's gain, see `log_wealth`.
_TOLLS: Float = -np.log1p(-_TILTS) - _TILTS
_HALVINGS = 30
#: Observations from which on a sum of what has no small bound is taken for normal.
FEWEST = 100
# Those for which its interval is best.
_BEST = 1_000.0


def growth(losses: ArrayLike, target: ArrayLike) -> Float:
    """Returns by how much a loss lets the log capital (..., S) of each stake grow.

    The claim bet against is "the mean loss is above `target`".

    Args:
        losses: (...) in [-1, 1].
        target: In (0, 1); one, or one for each loss.
    """
    loss, aim = np.asarray(losses, dtype=np.float64)[..., None], np.asarray(target)[..., None]
    grown: Float = np.log1p(STAKES / (1 - aim) * (aim - loss))
    return grown


def log_mean_exp(logs: Float) -> Float:
    """Returns the log of the mean capital (...) of gamblers with log capitals (..., S)."""
    top = logs.max(axis=-1)
    mean: Float = top + np.log(np.exp(logs - top[..., None]).mean(axis=-1))
    return mean


def log_wealth(excess: ArrayLike, squares: ArrayLike) -> Float:
    """Returns the log capital (...) of who bets that observations are larger than claimed.

    An observation x is at least -1, its claimed mean m may hang on the past in any way. A bet b
    gains exp(b (x - m) + (log(1 - b) + b) x^2), which is at most 1 in the mean (Fan, Grama and
    Liu, 2015, Exponential inequalities for martingales, section 4: exp(b x + (log(1 - b) + b) x^2)
    <= 1 + b x, and 1 + b m <= exp(b m)). Sums tell the product.

    Args:
        excess: (...) sum of x - m.
        squares: (...) sum of x^2.
    """
    gains = np.asarray(excess)[..., None] * _TILTS - np.asarray(squares)[..., None] * _TOLLS
    return log_mean_exp(gains)


def half_width(squares: ArrayLike, level: float) -> Float:
    """Returns how far (...) a sum of observations can be above the sum of their means.

    It is further at some time with a probability of at most `level`.

    Args:
        squares: (...) sum of the squares of the observations, each of which is at least -1.
        level: In (0, 1).
    """
    seen, needed = np.asarray(squares, dtype=np.float64), -np.log(level)
    low = np.zeros_like(seen)
    # One gambler alone with an equal share of the capital: the mixture is never further.
    high = np.min((needed + np.log(len(_TILTS)) + seen[..., None] * _TOLLS) / _TILTS, axis=-1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = log_wealth(middle, seen) >= needed
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    width: Float = high
    return width


def normal_half_width(num: int, deviation: ArrayLike, level: float) -> Float:
    """Returns how far (...) a sum of `num` observations may be from that of their means.

    By the time-uniform central limit theorem (Waudby-Smith et al., 2021, arXiv 2103.06476, theorem
    2.2) it is further at some time from `FEWEST` observations on with a probability of about
    `level`; below, it is infinite. For what has no small bound, such as tokens.

    Args:
        num: The number of observations.
        deviation: (...) their standard deviation.
        level: In (0, 1).
    """
    deviations = np.asarray(deviation, dtype=np.float64)
    if num < FEWEST:
        return np.full_like(deviations, np.inf)
    over = -2 * np.log(level)
    ratio = num * (over + np.log(over) + 1) / _BEST
    width: Float = deviations * np.sqrt(
        2 * num * (1 + 1 / ratio) * np.log(np.sqrt(ratio + 1) / level)
    )
    return width
