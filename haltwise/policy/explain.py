"""Why a head decides as it does: what each feature contributes, and at which price it would flip.

The contributions are integrated gradients (Sundararajan, Taly and Yan, "Axiomatic Attribution for
Deep Networks", 2017, section 3) along the straight line between two observations. The last number
of an observation is the log price. It is the same at both ends, so it contributes nothing.

Shapes: F features, O = F + 1 numbers in an observation, H hidden units, T places on the line.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.errors import InputError
from haltwise.policy.head import HaltHead, prob_of
from haltwise.policy.signals import Bools

Double = NDArray[np.float64]

# The nodes of Gauss-Legendre quadrature on [0, 1], and the share that each has in a mean.
_NODES, _SHARES = (np.polynomial.legendre.leggauss(16) + np.array([[1.0], [0.0]])) / 2
# A piece of the line is halved until its contributions sum to its change of the log-odds, to this
# precision. More pieces than these are never halved at once.
_TOLERANCE = 1e-8
_MOST_PIECES = 1024
# A unit of the first layer whose input moves by more than this flips where no node may be. The line
# is cut there, so that no two flips can hide each other.
_ABRUPT = 32.0

# So many prices are tried, and between two neighbours the decision is taken to flip at most once.
# So often is the interval of a flip halved: it is finer then than the float32 of an observed price.
_NUM_PRICES = 513
_NUM_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class Explanation:
    """One decision of a head, compared with its decision at a reference."""

    names: tuple[str, ...]
    """The names of the features, in order."""
    contributions: Double
    """(F,) what each feature adds to the log-odds of halting. The sum of all is
    `log_odds - reference_log_odds`."""
    log_odds: float
    """The log-odds of halting."""
    reference_log_odds: float
    """The log-odds of halting at the reference, at the same price."""
    prob_halt: float
    """The probability of halting."""
    price: float
    """The price at which the head decides, in exact match per 1,000 tokens."""
    indifference_price: float
    """The price at which the decision would flip, among the prices that the head was trained for.

    If there are several, it is the nearest one. It is 0 if the head halts at all of those prices,
    and infinite if it halts at none, as without an answer. As in Gittins' index, it is what 1,000
    more tokens are expected to buy: halting is best at every price above the largest ratio, over
    all later halts, of the expected gain in exact match to the expected tokens.
    """

    def drivers(self, num: int) -> list[tuple[str, float]]:
        """Returns the features that contribute most in magnitude, with their contributions."""
        order = np.argsort(-np.abs(self.contributions), kind="stable")[:num]
        return [(self.names[i], float(self.contributions[i])) for i in order]


def explain(
    head: HaltHead,
    features: ArrayLike,
    price: float | None = None,
    reference: ArrayLike | None = None,
) -> Explanation:
    """Explains the head's decision at one point.

    Args:
        head: The head.
        features: (F,) the features of the point, as listed in `head.config.features`.
        price: In exact match per 1,000 tokens; by default the head's own.
        reference: (F,) the features that the point is compared with, such as those of an earlier
            point; by default the mean of the training points.

    Raises:
        InputError: If the price is not positive and finite, or the features are not F finite
            numbers. A head continues at a NaN feature, whatever the other features are, so there
            would be nothing to explain.
    """
    config = head.config
    price = config.default_price if price is None else price
    if not 0 < price < np.inf:
        raise InputError(f"price is {price}, expected positive and finite")
    point = _observed(head, "features", features, price)
    reference = config.observing.mean if reference is None else reference
    origin = _observed(head, "reference", reference, price)
    may_halt = bool(head.may_halt(np.asarray(features, dtype=np.float32)[None])[0])
    reference_log_odds, log_odds = head.log_odds_of(np.stack([origin, point])).tolist()
    contributions = _integrated_gradients(head, origin, point)
    return Explanation(
        names=config.features,
        contributions=contributions[:-1],
        log_odds=log_odds,
        reference_log_odds=reference_log_odds,
        prob_halt=float(prob_of(np.array(log_odds))),
        price=price,
        indifference_price=_indifference_price(head, point, price) if may_halt else np.inf,
    )


def _observed(head: HaltHead, name: str, features: ArrayLike, price: float) -> Double:
    """Returns the observation (O,) of features (F,), by their name for messages."""
    names, row = head.config.features, np.asarray(features, dtype=np.float32)
    if row.shape != (len(names),):
        raise InputError(f"{name}: found shape {row.shape}, expected ({len(names)},)")
    unknown = np.flatnonzero(~np.isfinite(row))
    if len(unknown):
        raise InputError(
            f"{name}: {names[unknown[0]]} is {row[unknown[0]]}, expected a finite number: "
            "without it the head continues, and there is nothing to explain"
        )
    observed: Double = head.config.observing.observe(row[None], price)[0].astype(np.float64)
    return observed


def _slopes(head: HaltHead, obs: Double) -> Double:
    """Returns the gradient (T, O) of the log-odds at observations (T, O)."""
    w = head.weights
    first = np.tanh(obs @ w["w0"].T + w["b0"])
    second = np.tanh(first @ w["w1"].T + w["b1"])
    last = w["w2"][0]
    back = (1 - second**2) * last[: second.shape[1]]
    back = (1 - first**2) * (back @ w["w1"])
    slopes: Double = back @ w["w0"]
    straight = last[second.shape[1] :]
    return slopes + straight if straight.size else slopes


def _integrated_gradients(head: HaltHead, origin: Double, point: Double) -> Double:
    """Returns the contributions (O,) to the change of the log-odds between two observations (O,).

        contribution = (point - origin) * mean of the gradient over the line between them

    Raises:
        InputError: If the head is so steep that the contributions do not sum to the change.
    """
    line = point - origin
    contributions = np.zeros_like(line)
    cuts = np.concatenate([[0.0], _flips(head, origin, point), [1.0]])
    starts, ends = cuts[:-1], cuts[1:]
    while len(starts) <= _MOST_PIECES:
        widths = (ends - starts)[:, None]
        places = (starts[:, None] + widths * _NODES).ravel()
        slopes = _slopes(head, origin + places[:, None] * line)
        parts = line * widths * (_SHARES @ slopes.reshape(len(starts), len(_NODES), -1))
        before, after = (head.log_odds_of(origin + at[:, None] * line) for at in (starts, ends))
        wrong = np.abs(parts.sum(axis=1) - (after - before)) > _TOLERANCE
        contributions += parts[~wrong].sum(axis=0)
        if not wrong.any():
            return contributions
        starts, ends = starts[wrong], ends[wrong]
        middle = (starts + ends) / 2
        starts, ends = np.concatenate([starts, middle]), np.concatenate([middle, ends])
    raise InputError("head is too steep to explain: contributions do not sum to the change")


def _flips(head: HaltHead, origin: Double, point: Double) -> Double:
    """Returns the places in (0, 1), in order, where units flip abruptly between observations."""
    w = head.weights
    before, after = (obs @ w["w0"].T.astype(np.float64) + w["b0"] for obs in (origin, point))
    abrupt = (before * after < 0) & (np.abs(after - before) > _ABRUPT)
    places: Double = np.unique(before[abrupt] / (before - after)[abrupt])
    return places


def _indifference_price(head: HaltHead, point: Double, price: float) -> float:
    """Finds the price at which the decision at an observation (O,) flips.

    See `Explanation.indifference_price`.
    """
    lowest, highest = np.log(head.config.observing.price_range)
    logs = np.linspace(lowest, highest, _NUM_PRICES)
    halts = _halts_at(head, point, logs)
    flips = np.flatnonzero(halts[1:] != halts[:-1])
    if not len(flips):
        return 0.0 if halts[0] else np.inf
    low, high = logs[flips], logs[flips + 1]
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        before = _halts_at(head, point, middle) == halts[flips]
        low, high = np.where(before, middle, low), np.where(before, high, middle)
    nearest = np.argmin(np.abs(high - np.log(price)))
    return float(np.exp(high[nearest]))


def _halts_at(head: HaltHead, point: Double, log_prices: Double) -> Bools:
    """Tells at which of some log prices (T,) the head would halt at an observation (O,)."""
    obs = np.repeat(point[None], len(log_prices), axis=0)
    obs[:, -1] = head.config.observing.dial(np.exp(log_prices))
    threshold = head.config.threshold
    halts: Bools = head.log_odds_of(obs) >= np.log(threshold) - np.log1p(-threshold)
    return halts
