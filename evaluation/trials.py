"""Tries a training out of fold, with several seeds and at several checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.frontier import swept_area
from evaluation.intervals import Resamples, interval
from evaluation.outcome import Outcome, average, em_delta, saving, sweep
from evaluation.protocol import GATES, operating_point
from evaluation.rows import Interval, to_json
from haltwise.policy.halting import Probing
from traces import Traces


@dataclass(frozen=True)
class TrialPoint:
    """What the protocol chooses on the decisions of one seed alone, at one gate."""

    price: float | None
    """The price that is chosen; None is never halting."""
    em_delta: float
    saving: float


@dataclass(frozen=True)
class Trial:
    """What the trainings of one seed come to at one checkpoint."""

    seed: int
    checkpoint: int
    """The number of the checkpoint, from 0."""
    balanced_return: float
    """The return, in the mean over prices that count alike; see `balanced_returns`."""
    area: float
    """The area under the frontier of all prices, see `frontier_area`."""
    points: dict[float, TrialPoint]
    """By gate, the point that is chosen."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "return": self.balanced_return,
            "area": self.area,
            "gates": to_json(self.points),
        }


@dataclass(frozen=True)
class Trials:
    """What some trainings came to on questions that they had not seen."""

    taken: int
    """The earliest checkpoint that is not told apart from the best one; see `earliest`."""
    outcomes: dict[float, Outcome]
    """By price, the outcome at the checkpoint that is taken, the mean over seeds."""
    each: list[Trial]
    """One trial for each seed and checkpoint."""


def try_checkpoints(
    traces: Traces,
    decided: Mapping[int, NDArray[np.bool_]],
    prices: Sequence[float],
    weights: NDArray[np.float64],
    probing: Probing,
) -> Trials:
    """Judges every seed and checkpoint, and takes the earliest that is as good as the best.

    Args:
        traces: N traces with P points.
        decided: By seed, the halting decisions (C, number of prices, P) at C checkpoints.
        prices: The prices of those decisions.
        weights: The weights of those prices in the balanced return, which is what training goes
            up; no gate hangs on it.
        probing: "always" or "at_halt", see `haltwise.Halting`.
    """
    swept = {
        seed: [sweep(traces, dict(zip(prices, halts, strict=True)), probing) for halts in each]
        for seed, each in decided.items()
    }
    trials = [
        Trial(
            seed,
            k,
            float(balanced_returns(outcomes, weights).mean()),
            swept_area(traces, outcomes),
            {gate: _chosen(traces, outcomes, gate) for gate in GATES},
        )
        for seed, each in swept.items()
        for k, outcomes in enumerate(each)
    ]
    returns = [
        [balanced_returns(outcomes, weights) for outcomes in each] for each in swept.values()
    ]
    taken = earliest(np.mean(returns, axis=0), traces.question_id)
    kept = [each[taken] for each in swept.values()]
    outcomes = {price: average([each[price] for each in kept]) for price in prices}
    return Trials(taken, outcomes, trials)


def balanced_returns(
    outcomes: Mapping[float, Outcome], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns (N,) of every trace the mean over prices of weight times EM - price * cost / 1000.

    Args:
        outcomes: By price, an outcome on N traces.
        weights: The weights of those prices, in the same order.
    """
    returns = [outcome.em - price * outcome.cost / 1000 for price, outcome in outcomes.items()]
    mean: NDArray[np.float64] = (weights[:, None] * returns).mean(axis=0)
    return mean


def compare_returns(
    question_id: NDArray[np.str_], returns: NDArray[np.float64], others: NDArray[np.float64]
) -> tuple[float, Interval]:
    """Returns how much larger some returns (N,) are in the mean than others, with an interval.

    Args:
        question_id: (N,) the question of each trace; questions are resampled.
        returns: (N,) those of one policy.
        others: (N,) those of another one, on the same traces.
    """
    more = returns - others
    sums = Resamples.draw(question_id).sums([np.ones(len(more)), more])
    return float(more.mean()), interval(sums[1] / sums[0])


def earliest(returns: NDArray[np.float64], question_id: NDArray[np.str_]) -> int:
    """Returns the first checkpoint whose lag behind the best is within its standard error.

    What wins among several by less than that has won by chance as a rule, and who has learned less
    has learned less by heart (the one-standard-error rule of Breiman et al., Classification and
    Regression Trees, 1984, with the error of the paired difference and questions as units).

    Args:
        returns: (C, N) the returns of N traces at C checkpoints.
        question_id: (N,) their questions.
    """
    mean = returns.mean(axis=1)
    lag = returns[mean.argmax()] - returns
    _, question = np.unique(question_id, return_inverse=True)
    by_question = [np.bincount(question, each - each.mean()) for each in lag]
    error = np.sqrt(np.square(by_question).sum(axis=1)) / len(question)
    return int(np.flatnonzero(lag.mean(axis=1) <= error)[0])


def _chosen(traces: Traces, outcomes: Mapping[float, Outcome], gate: float) -> TrialPoint:
    """Chooses the operating point of one seed, and tells what it comes to."""
    price = operating_point(traces, outcomes, gate)
    if price is None:
        return TrialPoint(None, 0.0, 0.0)
    at = outcomes[price]
    return TrialPoint(price, em_delta(traces, at), saving(traces, at))


def format_trials(trials: Trials, shares: Sequence[float]) -> str:
    """Returns a line for each checkpoint, with its balanced return and the savings at each gate.

    Args:
        trials: The trials.
        shares: The share of PPO's decisions at each checkpoint.
    """
    lines = ["Out of fold by seed, each with its own points: mean and standard deviation"]
    for k, share in enumerate(shares):
        here = [trial for trial in trials.each if trial.checkpoint == k]
        cells = [f"return {np.mean([trial.balanced_return for trial in here]):.4f}"]
        for gate in GATES:
            saved = [100 * trial.points[gate].saving for trial in here]
            spread = f" +- {np.std(saved, ddof=1):.1f}" if len(saved) > 1 else ""
            each = " ".join(f"{value:.1f}" for value in saved)
            cells.append(f"saves {np.mean(saved):.1f}{spread} at {gate:.0%} ({each})")
        mark = "  <- taken" if k == trials.taken else ""
        lines.append(f"  after {share:.0%} of PPO: {'; '.join(cells)}{mark}")
    return "\n".join(lines) + "\n"
