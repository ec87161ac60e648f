"""Why a head decides as it does: what each feature contributes, and at which price it would flip.

Contributions are integrated gradients (Sundararajan, Taly and Yan, "Axiomatic Attribution for
Deep Networks", 2017, section 3) along the straight line between two observations. The last number
of an observation is the price; it is the same at both ends, so it contributes nothing.

Shapes: F features, O = F + 1 numbers in an observation, H hidden units, T places on the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.errors import InputError
from haltwise.policy.head import HaltHead, prob_of

Double = NDArray[np.float64]

# Gauss-Legendre nodes and weights on [0, 1].
_NODES, _SHARES = (np.polynomial.legendre.leggauss(16) + np.array([[1.0], [0.0]])) / 2
# The line is cut into 1, 2, 4, ... equal pieces until the contributions sum up to this precision.
_TOLERANCE = 1e-9
_MOST_PIECES = 1024

# Prices between which the decision is taken to flip at most once, and halvings of such an interval:
# together finer than the float32 of an observed price.
_NUM_PRICES = 513
_NUM_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class Explanation:
    """One decision of a head, against a reference."""

    names: tuple[str, ...]
    """Of the features, in order."""
    contributions: Double
    """(F,) in log-odds of halting; they sum to `log_odds - reference_log_odds`."""
    log_odds: float
    """Of halting."""
    reference_log_odds: float
    """Of halting at the reference, at the same price."""
    prob_halt: float
    """Probability of halting."""
    price: float
    """Of the decision, in exact match per 1,000 tokens."""
    indifference_price: float
    """The price at which the decision would flip, among those trained on; of several the nearest.

    0 if it halts at every price trained on, infinite if at none. As in Gittins' index, it is what
    1,000 more tokens are expected to buy: halting is best from the price on that equals the
    largest ratio, over later halts, of expected gain in exact match to expected tokens.
    """

    def drivers(self, num: int) -> list[tuple[str, float]]:
        """The features that contribute most in magnitude, and their contributions."""
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
        features: (F,) of the point, the columns of `head.config.features`.
        price: In exact match per 1,000 tokens; default the head's own.
        reference: (F,) what the point is compared with, such as an earlier point; default the
            mean of the training points.

    Raises:
        InputError: If a price is not positive and finite; or if features are not F finite
            numbers: a row with a NaN feature continues whatever its other features are, so there
            is nothing to explain.
    """
    config = head.config
    price = config.default_price if price is None else price
    if not 0 < price < np.inf:
        raise InputError(f"price is {price}, expected positive and finite")
    point = _observed(head, "features", features, price)
    origin = _observed(
        head, "reference", config.observing.mean if reference is None else reference, price
    )
    reference_log_odds, log_odds = _log_odds(head, np.stack([origin, point])).tolist()
    contributions = _integrated_gradients(head, origin, point, log_odds - reference_log_odds)
    return Explanation(
        names=config.features,
        contributions=contributions[:-1],
        log_odds=log_odds,
        reference_log_odds=reference_log_odds,
        prob_halt=float(prob_of(np.array(log_odds))),
        price=price,
        indifference_price=_indifference_price(head, point, price),
    )


def _observed(head: HaltHead, name: str, features: ArrayLike, price: float) -> Double:
    """The observation (O,) of features (F,)."""
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


def _log_odds(head: HaltHead, obs: NDArray[Any]) -> Double:
    """The head's own log-odds (T,) at observations (T, O); in float64, as those are."""
    return np.asarray(head.log_odds_of(obs), dtype=np.float64)


def _slopes(head: HaltHead, obs: Double) -> Double:
    """Gradient (T, O) of the log-odds at observations (T, O)."""
    w = head.weights
    first = np.tanh(obs @ w["w0"].T + w["b0"])
    second = np.tanh(first @ w["w1"].T + w["b1"])
    back = (1 - second**2) * w["w2"]
    back = (1 - first**2) * (back @ w["w1"])
    slopes: Double = back @ w["w0"]
    return slopes


def _integrated_gradients(head: HaltHead, origin: Double, point: Double, change: float) -> Double:
    """Contributions (O,) to a change of the log-odds between two observations (O,).

        contribution = (point - origin) * mean of the gradient over the line between them

    Raises:
        InputError: If the head is too steep for them to sum to the change.
    """
    pieces = 1
    while pieces <= _MOST_PIECES:
        places = ((np.arange(pieces)[:, None] + _NODES) / pieces).ravel()
        slopes = _slopes(head, origin + places[:, None] * (point - origin))
        contributions: Double = (point - origin) * (np.tile(_SHARES, pieces) @ slopes / pieces)
        if abs(contributions.sum() - change) <= _TOLERANCE * (1 + np.abs(contributions).sum()):
            return contributions
        pieces *= 2
    raise InputError(
        f"head is too steep to explain: contributions sum to {contributions.sum():.6g}, "
        f"expected {change:.6g}"
    )


def _indifference_price(head: HaltHead, point: Double, price: float) -> float:
    """See `Explanation.indifference_price`; point (O,)."""
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


def _halts_at(head: HaltHead, point: Double, log_prices: Double) -> NDArray[np.bool_]:
    """Whether the head would halt a point (O,) at some log prices (T,)."""
    obs = np.repeat(point[None], len(log_prices), axis=0)
    obs[:, -1] = head.config.observing.dial(np.exp(log_prices))
    threshold = head.config.threshold
    halts: NDArray[np.bool_] = _log_odds(head, obs) >= np.log(threshold) - np.log1p(-threshold)
    return halts
