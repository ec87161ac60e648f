"""Paired bootstrap by question: intervals for EM change, saving, and what is computed from them.

They are percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13). The unit is the question: traces of one question are not independent. Every policy sees the
same resamples, so that a difference of two is paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.outcome import Outcome
from evaluation.rows import Interval
from traces import Traces

Float = NDArray[np.float64]
_Key = TypeVar("_Key", bound=Hashable)

# The ends of an interval need many resamples; for very many questions, time allows fewer.
_FEWEST_RESAMPLES = 1_000
_MOST_COUNTS = 10**8
# So many counts are handled at a time: they are drawn as int64 and multiplied as float64, which
# take eight times their own size.
_PART_COUNTS = 10**6


@dataclass(frozen=True, eq=False)
class Resampled:
    """What a policy's outcome, or K outcomes, come to in each of R resamples of the questions."""

    em_delta: Float
    """(R,) or (K, R) the mean EM minus that of never halting."""
    saving: Float
    """(R,) or (K, R) the share of the tokens that is not spent."""

    def __getitem__(self, k: int) -> Resampled:
        """Returns the k-th of K outcomes."""
        return Resampled(self.em_delta[k], self.saving[k])


@dataclass(frozen=True, eq=False)
class Resamples:
    """R resamples: in each, Q questions drawn with replacement from the Q that N traces are of."""

    question: NDArray[np.int64]
    """(N,) the number of every trace's question, from 0."""
    counts: NDArray[np.uint8]
    """(R, Q) how often each question was drawn."""

    @property
    def num_questions(self) -> int:
        """Q, the number of questions."""
        return int(self.counts.shape[1])

    @classmethod
    def draw(
        cls, question_id: NDArray[np.str_], num_resamples: int = 10_000, seed: int = 0
    ) -> Resamples:
        """Draws resamples of the questions of N traces.

        Args:
            question_id: (N,) the question of each trace.
            num_resamples: R, the number of resamples. If 10^8 / Q is less, so many are drawn, but
                1,000 at least.
            seed: The seed of the draws.
        """
        names, question = np.unique(question_id, return_inverse=True)
        num = len(names)
        num_resamples = min(num_resamples, max(_FEWEST_RESAMPLES, _MOST_COUNTS // num))
        rng, share = np.random.default_rng(seed), np.full(num, 1 / num)
        # A question is drawn once in the mean; more often than 255 times, 1 in 256 factorial.
        counts = np.empty((num_resamples, num), dtype=np.uint8)
        for part in _parts(counts):
            part[:] = rng.multinomial(num, share, len(part))
        return cls(question, counts)

    def sums(self, values: Iterable[NDArray[Any]]) -> Float:
        """Returns the sums (K, R) of K times N values over the traces of the questions drawn."""
        of_question = np.stack([np.bincount(self.question, each) for each in values])
        parts = [of_question @ part.T.astype(float) for part in _parts(self.counts)]
        return np.concatenate(parts, axis=1)

    def of(self, traces: Traces, outcomes: Sequence[Outcome]) -> Resampled:
        """Resamples K outcomes on the traces that the questions are of."""
        gained = [outcome.em.astype(float) - traces.final_correct for outcome in outcomes]
        saved = [traces.num_tokens - outcome.cost for outcome in outcomes]
        sums = self.sums([np.ones(len(traces)), traces.num_tokens, *gained, *saved])
        em_delta, saving = np.split(sums[2:], 2)
        return Resampled(em_delta / sums[0], saving / sums[1])


def _parts(counts: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yields views of some resamples at a time, until all were seen."""
    step = max(1, _PART_COUNTS // counts.shape[1])
    for start in range(0, len(counts), step):
        yield counts[start : start + step]


def resample(
    traces: Traces, outcomes: Mapping[_Key, Outcome], num_resamples: int = 10_000, seed: int = 0
) -> dict[_Key, Resampled]:
    """Resamples questions, the same ones for every policy.

    Args:
        traces: N traces.
        outcomes: By policy, the outcome on those traces.
        num_resamples: R, the number of resamples, see `Resamples.draw`.
        seed: The seed of the draws.

    Returns:
        By policy, what its outcome comes to in each resample.
    """
    resamples = Resamples.draw(traces.question_id, num_resamples, seed)
    found = resamples.of(traces, list(outcomes.values()))
    return {name: found[k] for k, name in enumerate(outcomes)}


def interval(samples: Float) -> Interval:
    """Returns the 95 % percentile interval of samples (R,)."""
    return intervals(samples[None])[0]


def intervals(samples: Float) -> list[Interval]:
    """Returns the 95 % percentile intervals of K times R samples (K, R)."""
    ends: list[Interval] = np.quantile(samples, [0.025, 0.975], axis=1).T.tolist()
    return ends
