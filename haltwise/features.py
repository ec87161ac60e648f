"""From signals to features: one definition, streamed in serving and swept over files in training.

    signals of a decision point  ->  FeatureState.update  ->  features (B, F)

Everything is causal: a row of features depends on its own points up to the newest one only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError

#: Rises whenever a feature's value could change for the same signals.
FEATURES_VERSION = 1

Float = NDArray[np.float32]
Index = NDArray[np.int64]

#: Features by group, in order. A head names the groups that it needs.
FEATURE_GROUPS: dict[str, tuple[str, ...]] = {
    "pace": ("log_position", "log_point", "log_gap"),
    "confidence": (
        "confidence_logit",
        "confidence_max",
        "confidence_mean",
        "confidence_change",
        "confidence_low",
    ),
    "agreement": (
        "answered",
        "log_run",
        "run_share",
        "top_share",
        "leads",
        "log_distinct",
        "returned",
    ),
}

#: The signals that each group is made from; columns of a trace under the same names.
GROUP_SIGNALS: dict[str, tuple[str, ...]] = {
    "pace": ("position",),
    "confidence": ("confidence",),
    "agreement": ("answer",),
}

# float32 confidences lie no closer to 1 than 6e-8; a logit of 12 is 1 - 6e-6.
_LOGIT_BOUND = 12.0
_MEAN_DECAY = 0.7


@dataclass(frozen=True)
class Signals:
    """What is seen at one decision point by each of B rows; None is what nobody looked at.

    All but the answer's key are (B,) numbers under their column's name in the trace schema, NaN
    where unknown; `hidden` is (B, D). "Since" is since the previous point, or the start.
    """

    position: Index
    """Thinking tokens so far."""
    confidence: Float | None = None
    """Of the forced answer, in [0, 1]."""
    answer: Index | None = None
    """Keys of the forced answers, see `answer_keys`; 0 for no answer."""
    worst_logprob: Float | None = None
    """Smallest log probability of a token of the forced answer, nats."""
    entropy: Float | None = None
    """Mean entropy of the next-token distribution since, nats."""
    max_entropy: Float | None = None
    """Largest entropy since, nats."""
    logprob: Float | None = None
    """Mean log probability of the generated tokens since, nats."""
    min_logprob: Float | None = None
    """Smallest log probability of a generated token since, nats."""
    margin: Float | None = None
    """Mean difference of the two largest probabilities since."""
    end_think_logprob: Float | None = None
    """Log probability of the end-of-thinking token at the point, nats."""
    num_reflections: Float | None = None
    """Reflection words since."""
    hidden: Float | None = None
    """(B, D) last-layer state at the point."""


def feature_names(groups: Iterable[str]) -> tuple[str, ...]:
    """The features of some groups, in order.

    Raises:
        InputError: If a group is unknown or there is none.
    """
    groups = tuple(groups)
    unknown = sorted(set(groups) - set(FEATURE_GROUPS))
    if unknown or not groups:
        raise InputError(f"feature groups {unknown or 'empty'}: expected {list(FEATURE_GROUPS)}")
    return tuple(name for group in groups for name in FEATURE_GROUPS[group])


def answer_keys(answers: Sequence[str]) -> Index:
    """Keys (B,) that are equal exactly when the answers are; 0 for an empty answer.

    Two different answers share a key with probability 2**-63.
    """
    keys = {text: _answer_key(text) for text in set(answers)}
    return np.array([keys[text] for text in answers], dtype=np.int64)


def _answer_key(text: str) -> int:
    if not text:
        return 0
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1


class FeatureState:
    """The running state of a batch of rows, and the features of their newest points.

    Rows are independent: what one row sees never changes another row's features.

    Args:
        num_rows: Rows in the batch.
        groups: The feature groups to compute.
    """

    def __init__(self, num_rows: int, groups: Sequence[str]) -> None:
        """Starts every row before its first point."""
        self.names = feature_names(groups)
        self._groups = tuple(groups)
        self._num_points = np.zeros(num_rows, dtype=np.int64)
        self._position = np.zeros(num_rows, dtype=np.int64)
        self._answers = np.zeros((num_rows, 8), dtype=np.int64)
        self._run = np.zeros(num_rows, dtype=np.int64)
        self._top = np.zeros(num_rows, dtype=np.int64)
        self._distinct = np.zeros(num_rows, dtype=np.int64)
        # newest, largest, moving mean; NaN before the first
        self._logit = np.full((3, num_rows), np.nan, dtype=np.float32)

    def reset(self, rows: Index) -> None:
        """Puts rows back before their first point."""
        for state in (self._num_points, self._position, self._run, self._top, self._distinct):
            state[rows] = 0
        self._answers[rows] = 0
        self._logit[:, rows] = np.nan

    def update(self, signals: Signals, rows: Index) -> Float:
        """Takes in the newest point of some rows.

        Args:
            signals: Of those rows, in the same order.
            rows: (B,) which rows; each at most once.

        Returns:
            (B, F) float32, the columns of `names`. A NaN signal gives NaN features.
        """
        parts = {
            "pace": self._pace,
            "confidence": self._confidence,
            "agreement": self._agreement,
        }
        columns = [column for group in self._groups for column in parts[group](signals, rows)]
        self._num_points[rows] += 1
        self._position[rows] = signals.position
        return np.stack(columns, axis=1).astype(np.float32)

    def _pace(self, signals: Signals, rows: Index) -> Sequence[NDArray[np.floating]]:
        gap = signals.position - self._position[rows]
        return np.log1p(signals.position), np.log1p(self._num_points[rows]), np.log1p(gap)

    def _confidence(self, signals: Signals, rows: Index) -> Sequence[NDArray[np.floating]]:
        confidence = signals.confidence.astype(np.float64)
        with np.errstate(divide="ignore"):
            logit = np.log(confidence) - np.log1p(-confidence)
        logit = np.clip(logit, -_LOGIT_BOUND, _LOGIT_BOUND).astype(np.float32)
        state = self._logit[:, rows]
        before, largest, mean = np.where(np.isnan(state), logit, state)
        largest = np.maximum(largest, logit)
        mean = _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * logit
        # A missing confidence spoils its own point only.
        self._logit[:, rows] = np.where(np.isnan(logit), state, (logit, largest, mean))
        return logit, largest, mean, logit - before, np.log(np.maximum(confidence, 1e-4))

    def _agreement(self, signals: Signals, rows: Index) -> Sequence[NDArray[np.floating]]:
        answer, num_points = signals.answer, self._num_points[rows]
        answered = answer != 0
        previous = self._answers[rows, np.maximum(num_points - 1, 0)]
        self._remember(answer, rows)
        seen = (self._answers[rows] == answer[:, None]).sum(axis=1) * answered
        repeated = answered & (answer == previous)
        run = np.where(repeated, self._run[rows] + 1, answered)
        self._run[rows] = run
        self._distinct[rows] += answered & (seen == 1)
        top = np.maximum(self._top[rows], seen)
        self._top[rows] = top
        total = num_points + 1
        return (
            answered,
            np.log1p(run),
            run / total,
            top / total,
            answered & (seen == top),
            np.log1p(self._distinct[rows]),
            answered & (seen > 1) & ~repeated,
        )

    def _remember(self, answer: Index, rows: Index) -> None:
        width = self._answers.shape[1]
        if self._num_points[rows].max(initial=0) >= width:
            self._answers = np.pad(self._answers, ((0, 0), (0, width)))
        self._answers[rows, self._num_points[rows]] = answer
