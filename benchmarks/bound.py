"""What could be saved at most by the signals of some traces, as far as models can tell.

Boosted trees learn, at each price, what halting at a point returns more than going on by the policy
of the round before (fitted policy iteration). Out of fold they say what such models reach on new
questions. In sample they are judged on what they have learned from, which flatters them: a hint at
what is out of reach, and no proof, as trees are not the best of their family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

from benchmarks.timing import BenchResult
from envs.replay import point_features
from envs.reward import halt_costs, never_costs
from evaluation.frontier import saving_at_em
from evaluation.outcome import em_delta, halt_outcome, saving
from evaluation.protocol import folds
from haltwise import InputError
from haltwise.policy.features import FEATURE_GROUPS
from haltwise.policy.halting import DecisionRule
from policies.baselines import Evidence
from policies.policy import decisions
from traces import Traces

Float = NDArray[np.float64]
Bools = NDArray[np.bool_]

_PART = "bound"
# Points of exact match that may be lost.
_DROPS = (0.0, 0.005, 0.01, 0.02, 0.03)
# How much more than going on halting has to return: 0 is best if the trees are right.
_MARGINS = (0.0, 0.003, 0.01, 0.02, 0.04)


@dataclass(frozen=True)
class BoundConfig:
    """What could be saved at most."""

    num_prices: int = 8
    """The number of prices, each with trees of its own."""
    rounds: int = 2
    """The number of rounds of policy iteration."""
    num_trees: int = 120
    """The number of trees."""
    groups: tuple[str, ...] = ("pace", "limit", "confidence", "tokens", "agreement")
    """The feature groups; "limit" counts where the decision rule has one."""


def measure(traces: Traces, config: BoundConfig) -> list[BenchResult]:
    """Measures the frontiers of boosted trees and of the evidence rule on some traces.

    Raises:
        InputError: If the traces lack what the groups need, or have no confidence.
    """
    if unknown := set(config.groups) - set(FEATURE_GROUPS):
        raise InputError(f"groups are {', '.join(sorted(unknown))}, expected feature groups")
    policy = Evidence()
    signal = policy.signal(traces)
    if signal is None:
        raise InputError("the traces have no confidence, expected some")
    features = np.nan_to_num(_features(traces, config), posinf=50, neginf=-50)
    fold = folds(traces.question_id)[traces.trace_of_point]
    learned = {
        "out of fold": _halts(traces, features, config, [fold == k for k in range(5)]),
        "in sample": _halts(traces, features, config, []),
    }
    results = _read("evidence in sample", traces, list(decisions(policy, signal).values()))
    for name, halts in learned.items():
        results += _read(f"boosted trees {name}", traces, halts)
    return results


def _features(traces: Traces, config: BoundConfig) -> Float:
    rule = traces.recorder.get("decision_rule")
    most = DecisionRule(rule).max_points if rule else None
    groups = tuple(name for name in config.groups if name != "limit" or most is not None)
    found: Float = point_features(traces, groups, most).astype(np.float64)
    return found


def _halts(
    traces: Traces, features: Float, config: BoundConfig, kept_back: Sequence[Bools]
) -> list[Bools]:
    """Returns where (P,) the trees halt, at each price and margin.

    Args:
        traces: N traces with P points.
        features: (P, F).
        config: The settings.
        kept_back: Masks (P,) of points, each decided about by trees that never saw them; none to
            decide about those that the trees have learned from.
    """
    # From a thousandth to a half of a right answer for a thought of the mean length.
    prices = np.geomspace(1e-3, 0.5, config.num_prices) / traces.num_tokens.mean() * 2
    found = []
    for price in prices.tolist():
        advantage = np.full(len(features), -np.inf)
        for _ in range(config.rounds):
            wanted = _advantage(traces, price, advantage > 0)
            advantage = _fitted(features, wanted, config, kept_back)
        found += [advantage > margin for margin in _MARGINS]
    return found


def _advantage(traces: Traces, price: float, halts: Bools) -> Float:
    """Returns what halting (P,) returns more than going on, if the points behind halt so."""
    here = traces.correct - price * halt_costs(traces, "always")
    behind = np.empty(len(here))
    goes_on = traces.final_correct - price * never_costs(traces, "always")
    for trace, (first, end) in enumerate(zip(traces.offsets, traces.offsets[1:], strict=False)):
        returned = float(goes_on[trace])
        for point in range(end - 1, first - 1, -1):
            behind[point] = returned
            returned = float(here[point]) if halts[point] else returned
    advantage: Float = here - behind
    return advantage


def _fitted(
    features: Float, wanted: Float, config: BoundConfig, kept_back: Sequence[Bools]
) -> Float:
    found = np.empty(len(wanted))
    for row in kept_back or [np.ones(len(wanted), dtype=bool)]:
        learns = ~row if kept_back else row
        trees = HistGradientBoostingRegressor(
            max_iter=config.num_trees,
            learning_rate=0.06,
            max_leaf_nodes=15,
            min_samples_leaf=200,
            l2_regularization=5.0,
        )
        found[row] = trees.fit(features[learns], wanted[learns]).predict(features[row])
    return found


def _read(name: str, traces: Traces, halts: Sequence[Bools]) -> list[BenchResult]:
    """Returns the largest saving at each drop."""
    outcomes = [halt_outcome(traces, one, "always") for one in halts]
    points = [(em_delta(traces, one), saving(traces, one)) for one in outcomes]
    return [
        BenchResult(
            _PART,
            f"{name}: saving at a drop of {100 * drop:g}",
            "%",
            (100 * (saving_at_em(points, -drop) or 0.0),),
        )
        for drop in _DROPS
    ]
