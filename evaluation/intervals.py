"""Paired bootstrap by question: intervals for EM change, saving, and what is computed from them.

Percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
The unit is the question: traces of one question are not independent. Every policy sees the same
resamples, so that a difference of two is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.outcome import Outcome
from traces import Traces

Interval = list[float]
Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Resampled:
    """A policy's outcome over R resamples of the questions, or K outcomes."""

    em_delta: Float
    """(R,) or (K, R) mean EM minus that of never halting."""
    saving: Float
    """(R,) or (K, R) share of the tokens not spent."""

    def __getitem__(self, k: int) -> Resampled:
        """One of K outcomes."""
        return Resampled(self.em_delta[k], self.saving[k])


@dataclass(frozen=True, eq=False)
class Resamples:
    """R times as many questions as the N traces have, Q, drawn with replacement."""

    question: NDArray[np.int64]
    """(N,) the question of every trace, counted from 0."""
    counts: Float
    """(Q, R) how often each question was drawn."""

    @classmethod
    def draw(
        cls, question_id: NDArray[np.str_], num_resamples: int = 10_000, seed: int = 0
    ) -> Resamples:
        """Draws the questions of N traces."""
        names, question = np.unique(question_id, return_inverse=True)
        share = np.full(len(names), 1 / len(names))
        counts = np.random.default_rng(seed).multinomial(len(names), share, num_resamples)
        return cls(question, counts.T.astype(np.float64, order="C"))

    def sums(self, values: NDArray[Any]) -> Float:
        """Sums (K, R) of values (K, N) over the traces of the questions drawn."""
        of_question = [np.bincount(self.question, row) for row in values]
        sums: Float = np.stack(of_question) @ self.counts
        return sums

    def of(self, traces: Traces, outcomes: Sequence[Outcome]) -> Resampled:
        """K outcomes on the traces that the questions are of."""
        num, tokens = self.sums(np.stack([np.ones(len(traces)), traces.num_tokens]))
        em_delta = self.sums(
            np.stack([outcome.em.astype(float) - traces.final_correct for outcome in outcomes])
        )
        saving = self.sums(np.stack([traces.num_tokens - outcome.cost for outcome in outcomes]))
        em_delta /= num
        saving /= tokens
        return Resampled(em_delta, saving)


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
    resamples = Resamples.draw(traces.question_id, num_resamples, seed)
    found = resamples.of(traces, list(outcomes.values()))
    return {name: found[k] for k, name in enumerate(outcomes)}


def interval(samples: Float) -> Interval:
    """The 95 % percentile interval of samples (R,)."""
    return intervals(samples[None])[0]


def intervals(samples: Float) -> list[Interval]:
    """The 95 % percentile intervals of K times R samples (K, R)."""
    ends: list[Interval] = np.quantile(samples, [0.025, 0.975], axis=1).T.tolist()
    return ends
