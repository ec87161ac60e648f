"""Paired bootstrap by question: intervals for EM change, saving, and differences of policies.

Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
The unit is the question: traces of one question are not independent. Every policy sees the same
resamples, so that a difference of two is paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.outcome import Outcome
from traces import Traces

Interval = list[float]
Float = NDArray[np.float64]

_CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Resampled:
    """One policy over R resamples of the questions."""

    em_delta: Float
    """(R,) mean EM minus that of never halting."""
    saving: Float
    """(R,) share of the tokens not spent."""


def resample(
    traces: Traces, outcomes: Mapping[str, Outcome], num_resamples: int = 10_000, seed: int = 0
) -> dict[str, Resampled]:
    """Resamples questions, the same ones for every policy.

    Args:
        traces: N traces.
        outcomes: By policy, on those traces.
        num_resamples: R.
        seed: Of the resampling.
    """
    columns = [np.ones(len(traces)), traces.num_tokens]
    for outcome in outcomes.values():
        columns += [outcome.em.astype(np.float64) - traces.final_correct, outcome.cost]
    values = np.stack(columns, axis=1).astype(np.float64)
    sums = resampled_sums(traces.question_id, values, num_resamples, seed)
    num, tokens = sums[:, 0], sums[:, 1]
    return {
        name: Resampled(sums[:, 2 + 2 * k] / num, 1 - sums[:, 3 + 2 * k] / tokens)
        for k, name in enumerate(outcomes)
    }


def resampled_sums(
    question_id: NDArray[np.str_], values: Float, num_resamples: int, seed: int
) -> Float:
    """Sums (R, K) of values (N, K) over as many questions as there are, drawn with replacement."""
    _, question = np.unique(question_id, return_inverse=True)
    num_questions = int(question.max()) + 1
    sums = np.stack([np.bincount(question, column) for column in values.T], axis=1)
    rng = np.random.default_rng(seed)
    share = np.full(num_questions, 1 / num_questions)
    chunks = [
        rng.multinomial(num_questions, share, min(_CHUNK, num_resamples - start)) @ sums
        for start in range(0, num_resamples, _CHUNK)
    ]
    return np.concatenate(chunks)


def interval(samples: Float) -> Interval:
    """The 95 % percentile interval of samples (R,)."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return [float(low), float(high)]
