"""Learns a scorecard from a head and from the traces that the head was trained on.

A card is fitted to two things at once: to what the head does, by cross-entropy, where the head gets
to; and to the exact expected return of the card itself, see `agents.pathwise`. Rules are chosen
greedily: the next one is that along which the loss falls steepest, after all before it were fitted
anew (orthogonal matching pursuit, Pati, Rezaiifar and Krishnaprasad, 1993, of a general loss).
Then the points are rounded, and moved by one as long as the return of the card as it is rises.

Shapes: N traces with points, P of those points where all is known and there is an answer, C
candidates, J prices, R rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from agents.balance import balance
from agents.pathwise import Batch, expected_return, lay_out
from agents.scorecard import Double, Rule, Scorecard, unit_of
from envs.replay import observed_features
from haltwise import FEATURE_GROUPS, HaltHead, InputError, Observing, feature_names
from haltwise.policy.head import CLIP
from haltwise.policy.signals import Float
from traces import Traces

# Prices that a card is learned at, thresholds that are tried for a feature, and the share of the
# points that are on either side of one at least.
_NUM_PRICES, _NUM_THRESHOLDS, _RAREST = 12, 40, 0.005
# What a person cannot measure.
_UNREADABLE = {feature.name for feature in FEATURE_GROUPS["hidden"].features}
# How much a point counts that the head never gets to, beside one that it always gets to.
_UNREACHED = 0.02
# Log-odds of the head beyond these are as good as certain.
_CERTAIN = 15.0
# Keeps the points finite where rules tell halting from going on without an error.
_DECAY = 1e-7
# Steps of L-BFGS after each rule, and at the end.
_STEPS, _LAST_STEPS = 15, 60
# What the largest points of a card are made, to see which rounding loses least; and by how much the
# bar and its fall are moved.
_LARGEST = range(5, 21)
_MOVES = (2.0, 1.0, 0.5, 0.25)
_ROUNDING = 1e-9


def learn_scorecard(head: HaltHead, traces: Traces, num_rules: int) -> Scorecard:
    """Learns a scorecard that stands for a head.

    Args:
        head: The head.
        traces: Traces to learn from, with the right answers.
        num_rules: The most rules, 1 or more.

    Raises:
        InputError: If the traces have no decision point or lack a signal, or no feature that a
            person can measure tells two of their points apart.
    """
    lesson = _Lesson.of(head, traces)
    chosen, fitted = _choose(lesson, num_rules)
    return _rounded(lesson, chosen, fitted)


@dataclass(frozen=True)
class _Lesson:
    """What a card is learned from."""

    candidates: list[tuple[str, float]]  # C features and thresholds
    holds: Tensor  # (P, C) 1 where a candidate holds
    halts: Tensor  # (P, J) the head's probability of halting
    counts: Tensor  # (P, J) how much that counts
    batches: list[Batch]  # J, the returns at each price
    dials: Tensor  # (J,) the log prices, as observed
    weights: Tensor  # (J,) how much each price counts, in the mean 1

    @classmethod
    def of(cls, head: HaltHead, traces: Traces) -> _Lesson:
        """Lays out the traces, and lets the head decide about them."""
        observing, halting = head.config.observing, head.config.halting
        returns = lay_out(traces, observing, halting)
        features = observed_features(traces, observing, halting)
        features = features[np.isfinite(features).all(axis=1)]
        # Where there is no answer a head goes on, whatever its points.
        answered = head.may_halt(features)
        features, real = features[answered], returns.real.clone()
        real[returns.real] = torch.from_numpy(answered)
        returns = replace(returns, real=real)
        candidates, holds = _candidates(features, observing)
        prices = np.geomspace(*observing.price_range, _NUM_PRICES)
        num = len(returns.em)
        batches = [
            Batch.of(returns, torch.arange(num), np.full(num, price), observing) for price in prices
        ]
        log_odds = torch.from_numpy(
            np.stack([head.log_odds(features, price) for price in prices], axis=1)
        ).clip(-_CERTAIN, _CERTAIN)
        weights = torch.from_numpy(balance(prices, observing)).float()
        weights /= weights.mean()
        reached = [_reached(log_odds[:, j], batch.real) for j, batch in enumerate(batches)]
        return cls(
            candidates,
            torch.from_numpy(holds).float(),
            torch.sigmoid(log_odds),
            weights * (torch.stack(reached, dim=1) + _UNREACHED),
            batches,
            torch.from_numpy(observing.dial(prices)),
            weights,
        )

    def loss(self, log_odds: Tensor) -> Tensor:
        """Returns what a card with log-odds of halting (P, J) loses, both teachers together."""
        unlike = binary_cross_entropy_with_logits(
            log_odds, self.halts, weight=self.counts, reduction="sum"
        )
        returns = [
            expected_return(log_odds[:, j], batch).mean() for j, batch in enumerate(self.batches)
        ]
        return unlike / log_odds.numel() - (self.weights * torch.stack(returns)).mean()


def _candidates(
    features: Float, observing: Observing
) -> tuple[list[tuple[str, float]], NDArray[np.bool_]]:
    """Returns features with thresholds that a person can say, and where they hold (P, C).

    Raises:
        InputError: If there is none.
    """
    levels = np.linspace(0, 1, _NUM_THRESHOLDS + 2)[1:-1]
    candidates, holds = [], []
    names = feature_names(observing.groups)
    for name, column, mean, scale in zip(
        names, features.T, observing.mean, observing.scale, strict=True
    ):
        if name in _UNREADABLE:
            continue
        near = {unit_of(name).near(level) for level in np.quantile(column, levels).tolist()}
        for at_least in sorted(filter(np.isfinite, near)):
            above = column >= at_least
            is_seen = abs(at_least - mean) < CLIP * scale  # else a head cannot tell what is above
            if is_seen and _RAREST <= above.mean() <= 1 - _RAREST:
                candidates.append((name, at_least))
                holds.append(above)
    if not candidates:
        raise InputError(
            "found no feature that a person can measure and that tells points apart, expected some "
            "in the groups that the head reads"
        )
    return candidates, np.stack(holds, axis=1)


def _reached(log_odds: Tensor, real: Tensor) -> Tensor:
    """Returns how probably each point (P,) is got to, of those in a mask (N, T)."""
    padded = log_odds.new_full(real.shape, -30.0)
    padded[real] = log_odds
    log_continue = logsigmoid(-padded)
    return torch.exp(torch.cumsum(log_continue, dim=1) - log_continue)[real]


def _choose(lesson: _Lesson, num_rules: int) -> tuple[list[int], Double]:
    """Chooses rules, with points that are not rounded.

    Returns:
        The chosen of the candidates (R,), and (2 + R,) the bar, its fall, and the points.
    """
    share = lesson.holds.mean(dim=0)
    spread = (share * (1 - share)).sqrt()
    chosen: list[int] = []
    fitted = torch.tensor([0.0, 1.0])
    for _ in range(min(num_rules, len(lesson.candidates))):
        fitted = _fit(lesson, chosen, fitted, _STEPS)
        log_odds = _log_odds(lesson, chosen, fitted).requires_grad_()
        (slope,) = torch.autograd.grad(lesson.loss(log_odds), log_odds)
        steepness = (lesson.holds.T @ slope.sum(dim=1)).abs() / spread
        steepness[chosen] = -1.0
        chosen.append(int(steepness.argmax()))
        fitted = torch.cat([fitted, torch.zeros(1)])
    return chosen, _fit(lesson, chosen, fitted, _LAST_STEPS).double().numpy()


def _log_odds(lesson: _Lesson, chosen: list[int], fitted: Tensor) -> Tensor:
    """Returns the log-odds of halting (P, J): the points, less the bar at each price."""
    return (lesson.holds[:, chosen] @ fitted[2:])[:, None] - fitted[0] + fitted[1] * lesson.dials


def _fit(lesson: _Lesson, chosen: list[int], start: Tensor, steps: int) -> Tensor:
    """Returns bar, fall and points (2 + R,) that lose less than those to start from."""
    fitted = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([fitted], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = lesson.loss(_log_odds(lesson, chosen, fitted))
        loss = loss + _DECAY * fitted[2:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return fitted.detach()


def _rounded(lesson: _Lesson, chosen: list[int], fitted: Double) -> Scorecard:
    """Rounds the points of chosen rules in the way that loses least, and moves all by small steps.

    Rules that are left without points are dropped.
    """
    returned = _Returned.of(lesson, chosen)
    steps = np.eye(len(fitted))
    bars = [sign * move * step for step in steps[:2] for move in _MOVES for sign in (1, -1)]
    points = [sign * step for step in steps[2:] for sign in (1, -1)]
    sizes = np.array(_LARGEST) / max(np.abs(fitted[2:]).max(), _ROUNDING)
    starts = [
        np.concatenate([np.round(4 * size * fitted[:2]) / 4, np.round(size * fitted[2:])])
        for size in sizes
    ]
    best = max((_climb(returned, start, bars) for start in starts), key=lambda found: found[0])[1]
    (bar, fall), whole = np.split(_climb(returned, best, bars + points)[1], [2])
    rules = [
        Rule(*lesson.candidates[c], int(num))
        for c, num in sorted(zip(chosen, whole, strict=True))  # in the order of the features
        if num or not whole.any()
    ]
    return Scorecard(tuple(rules), float(bar), float(fall))


def _climb(
    returned: Callable[[Double], float], start: Double, moves: Sequence[Double]
) -> tuple[float, Double]:
    """Makes moves that raise the return, until none does; returns the return, and where it is."""
    best, at, goes_on = returned(start), start, True
    while goes_on:
        goes_on = False
        for move in moves:
            if (found := returned(at + move)) > best + _ROUNDING:
                best, at, goes_on = found, at + move, True
    return best, at


@dataclass(frozen=True)
class _Returned:
    """Tells what cards with some rules return, as they are: each halts or does not."""

    holds: Double  # (P, R)
    dials: Double  # (J,)
    weights: Double  # (J,)
    real: NDArray[np.bool_]  # (N, T) whether a point exists
    values: list[Double]  # J of (N, T + 1), see `Batch`

    @classmethod
    def of(cls, lesson: _Lesson, chosen: list[int]) -> _Returned:
        """Takes the chosen of the candidates."""
        holds = lesson.holds[:, chosen].double().numpy()
        values = [batch.value.double().numpy() for batch in lesson.batches]
        dials, weights = lesson.dials.double().numpy(), lesson.weights.double().numpy()
        return cls(holds, dials, weights, lesson.batches[0].real.numpy(), values)

    def __call__(self, card: Double) -> float:
        """Returns the mean return of a card: bar, fall and points (2 + R,)."""
        points = np.full(self.real.shape, -np.inf)
        points[self.real] = self.holds @ card[2:]
        most = np.maximum.accumulate(points, axis=1)
        rows = np.arange(len(most))
        # The number of points before the first halt is the column of its return.
        returns = [
            value[rows, (most < bar).sum(axis=1)].mean()
            for value, bar in zip(self.values, card[0] - card[1] * self.dials, strict=True)
        ]
        return float((self.weights * returns).mean())
