"""What it takes and costs to end the head's start from traces by held-out questions.

Of each draw of questions the start learns from some and is judged by the others: once with all
steps, learning from all questions that it may, and once until the stopping rule ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student

from agents.balance import balance
from agents.pathwise import PathwiseConfig
from benchmarks.started import started_head
from benchmarks.timing import BenchResult
from evaluation.compare import swept
from evaluation.trials import balanced_returns
from policies.head import HeadPolicy, price_grid
from traces import Traces

_PART = "stopping"


@dataclass(frozen=True)
class StoppingBenchConfig:
    """What it takes and costs to stop early."""

    num_draws: int = 8
    """The number of draws of questions, each with a seed of its own."""
    judged: float = 0.3
    """The share of the questions that neither learns from."""
    held_out: float = 0.2
    """The share of the others that the rule goes by."""
    steps: int = 300
    """The most gradient steps."""
    learning_rates: tuple[float, ...] = (3e-3, 5e-3)
    """The learning rates to try, each for both."""


def measure(traces: Traces, config: StoppingBenchConfig) -> list[BenchResult]:
    """Measures both at each learning rate, and their difference over the draws."""
    results = []
    for learning_rate in config.learning_rates:
        whole = PathwiseConfig(steps=config.steps, learning_rate=learning_rate)
        ended = replace(whole, held_out=config.held_out)
        pairs = [
            (_judged(traces, whole, config, draw), _judged(traces, ended, config, draw))
            for draw in range(config.num_draws)
        ]
        steps = [after[0] / before[0] - 1 for before, after in pairs]
        gained = [after[1] - before[1] for before, after in pairs]
        name = f"rate {learning_rate:g}, held-out questions beside all steps:"
        results += _told(f"{name} steps", "%", 100 * np.array(steps))
        results += _told(f"{name} balanced return", "", gained)
    return results


def _judged(
    traces: Traces, pathwise: PathwiseConfig, config: StoppingBenchConfig, draw: int
) -> tuple[int, float]:
    """Returns the steps of a start, and its mean return over all prices on unseen questions."""
    question = np.unique(traces.question_id)
    order = np.random.default_rng([draw, 7]).permutation(question)
    unseen = np.isin(traces.question_id, order[: round(config.judged * len(order))])
    learns, judges = traces.select(~unseen), traces.select(unseen)
    head, num_steps = started_head(learns, pathwise, draw)
    observing = head.config.observing
    outcomes = swept([HeadPolicy(head)], judges, head.config.halting.probing)
    assert outcomes is not None
    weights = balance(np.array(price_grid(observing)), observing)
    return num_steps, float(balanced_returns(outcomes, weights).mean())


def _told(name: str, unit: str, values: Sequence[float] | np.ndarray) -> list[BenchResult]:
    """Returns all draws, their mean, and the ends of its 95 % interval."""
    mean, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    half = student.ppf(0.975, len(values) - 1) * error
    found = {"mean": mean, "lower end": mean - half, "upper end": mean + half}
    return [
        BenchResult(_PART, f"{name}, each", unit, tuple(map(float, values))),
        *(BenchResult(_PART, f"{name}, {of}", unit, (float(one),)) for of, one in found.items()),
    ]
