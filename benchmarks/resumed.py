"""What is lost where a forced answer cannot be read, and what it takes to let the thought go on.

Rules that look at no answers halt recorded traces, at the parameter that saves most at a drop. Then
a share of the forced answers is spoilt. Where one of these would be given, exact match is lost;
where the thought goes on to its end instead, its tokens are paid besides those of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import BenchResult
from evaluation.outcome import Outcome, em_delta, halt_outcome, saving
from policies.baselines import Budget, Entropy
from policies.policy import decisions, first_halts
from traces import Traces

_PART = "resumed"


@dataclass(frozen=True)
class ResumedConfig:
    """What is lost where a forced answer cannot be read."""

    share: float = 0.02
    """The share of the forced answers that cannot be read."""
    drop: float = 0.02
    """The exact match that may be lost where all of them can."""
    draws: int = 20
    """How often the share is drawn."""


def measure(traces: Traces, config: ResumedConfig) -> list[BenchResult]:
    """Measures exact match and saving where spoilt answers are given, and where thoughts go on."""
    results = []
    for policy in (Budget(), Entropy()):
        signal = policy.signal(traces)
        if signal is None:
            continue
        halts = _halts(traces, list(decisions(policy, signal).values()), config.drop)
        told = [_figures(traces, halt_outcome(traces, halts, "at_halt"))]
        for seed in range(config.draws):
            spoilt = _spoilt(traces, config.share, np.random.default_rng(seed))
            given = halt_outcome(spoilt, halts, "at_halt")
            told += [_figures(spoilt, one) for one in (given, resumed(spoilt, halts, given))]
        whole, given_ones, resumed_ones = told[:1], told[1::2], told[2::2]
        for name, each in (("as recorded", whole), ("given", given_ones), ("go on", resumed_ones)):
            for what, values in zip(("EM change", "saving"), zip(*each, strict=True), strict=True):
                results.append(BenchResult(_PART, f"{policy.name}, {name}: {what}", "%", values))
    return results


def resumed(traces: Traces, halts: NDArray[np.bool_], given: Outcome) -> Outcome:
    """Returns an outcome in which thoughts go on to their end behind answers that are not read.

    Args:
        traces: N traces with P points.
        halts: (P,) whether a policy would halt at each point.
        given: Its outcome if every answer is given, where nothing is looked at.
    """
    first = first_halts(traces, halts)
    unread = (first >= 0) & (traces.answer[first] == "")
    cost = traces.num_tokens + traces.probe_tokens[first]
    return Outcome(
        np.where(unread, traces.final_correct, given.em),
        np.where(unread, cost, given.cost),
        given.halted & ~unread,
    )


def _halts(traces: Traces, tried: list[NDArray[np.bool_]], drop: float) -> NDArray[np.bool_]:
    """Returns those decisions that save most at a drop of exact match."""
    outcomes = [halt_outcome(traces, halts, "at_halt") for halts in tried]
    kept = [i for i, one in enumerate(outcomes) if em_delta(traces, one) >= -drop]
    best = max(kept, key=lambda i: saving(traces, outcomes[i]), default=None)
    return np.zeros(traces.num_points, dtype=np.bool_) if best is None else tried[best]


def _spoilt(traces: Traces, share: float, rng: np.random.Generator) -> Traces:
    """Returns traces in which a share of the forced answers cannot be read."""
    spoilt = rng.random(traces.num_points) < share
    answer = np.where(spoilt, "", traces.answer)
    return replace(traces, answer=answer, correct=traces.correct & ~spoilt)


def _figures(traces: Traces, outcome: Outcome) -> tuple[float, float]:
    return 100 * em_delta(traces, outcome), 100 * saving(traces, outcome)
