"""From signals to features: one definition, streamed in serving and swept over files in training.

    signals of a decision point  ->  FeatureState.update  ->  features (B, F)

Everything is causal: a row of features depends on its own points up to the newest one only.
Features come in groups; a head names the groups that it needs, and a group the signals.

Shapes: R rows in a batch, B of them in a call, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.projection import NUM_DIRECTIONS, Projection
from haltwise.policy.signals import Float, Index, Signals

#: Rises whenever a feature's value could change for the same signals, or a signal for the same LM.
FEATURES_VERSION = 3

# Log-odds of confidences. 12 is 1 - 6e-6; float32 lies no closer to 1 than 6e-8. Guesses below
# 27 % are not told apart: there LMs differ most (docs/FEATURES.md has the figures).
_LOWEST_LOGIT, _HIGHEST_LOGIT = -1.0, 12.0
_LOWEST_CONFIDENCE = 1 / (1 + np.exp(-_LOWEST_LOGIT))
# Probabilities that a token is wrong are told apart down to this.
_LEAST_DOUBT = 1e-6
_MEAN_DECAY = 0.7

Columns = Sequence[NDArray[Any]]


class _Group:
    """Some features of R rows, and the state that they need."""

    names: tuple[str, ...]
    """Of the features, in order."""
    signals: tuple[str, ...]
    """What they are made from."""

    def __init__(self, num_rows: int) -> None:
        """Starts every row before its first point."""

    def reset(self, rows: Index) -> None:
        """Puts rows back before their first point."""

    def update(self, signals: Any, rows: Index) -> Columns:
        """Takes in the newest point of rows (B,); the features, each (B,)."""
        raise NotImplementedError


class _Trend:
    """Largest value and moving mean of a number; NaN before the first.

    A value that is not finite gives such values, and leaves the state as it was.
    """

    def __init__(self, num_rows: int) -> None:
        self._state = np.full((3, num_rows), np.nan, dtype=np.float32)

    def reset(self, rows: Index) -> None:
        self._state[:, rows] = np.nan

    def update(self, value: NDArray[Any], rows: Index) -> tuple[Float, Float, Float, Float]:
        """The value, the largest so far, the moving mean, and the change, each (B,)."""
        value = value.astype(np.float32)
        state = self._state[:, rows]
        before, largest, mean = np.where(np.isnan(state), value, state)
        largest = np.maximum(largest, value)
        mean = _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * value
        self._state[:, rows] = np.where(np.isfinite(value), (value, largest, mean), state)
        return value, largest, mean, value - before


class _Answers:
    """Every forced answer so far, with a number beside each."""

    def __init__(self, num_rows: int) -> None:
        self._num_points = np.zeros(num_rows, dtype=np.int64)
        self._keys = np.zeros((num_rows, 8), dtype=np.int64)
        self._values = np.zeros((num_rows, 8), dtype=np.float32)

    def reset(self, rows: Index) -> None:
        self._num_points[rows] = 0
        self._keys[rows] = 0

    def add(self, keys: Index, rows: Index, values: Float | float = 0.0) -> None:
        """Takes in the newest answers (B,) and their numbers."""
        width, num = self._keys.shape[1], self._num_points[rows]
        if num.max(initial=0) >= width:
            self._keys = np.pad(self._keys, ((0, 0), (0, width)))
            self._values = np.pad(self._values, ((0, 0), (0, width)))
        self._keys[rows, num] = keys
        self._values[rows, num] = values
        self._num_points[rows] += 1

    def same(self, rows: Index) -> NDArray[np.bool_]:
        """Which points so far had the newest answer (B, points); none if that is empty."""
        newest = self._keys[rows, self._num_points[rows] - 1]
        same: NDArray[np.bool_] = (self._keys[rows] == newest[:, None]) & (newest != 0)[:, None]
        return same

    def smallest(self, rows: Index) -> Float:
        """The smallest number that the newest answer ever had, 0 at most (B,); NaN counts as 0."""
        values = np.nan_to_num(self._values[rows])
        least: Float = np.where(self.same(rows), values, 0.0).min(axis=1)
        return least


class _Pace(_Group):
    names = ("log_position", "log_point", "log_gap")
    signals = ("position",)

    def __init__(self, num_rows: int) -> None:
        self._num_points = np.zeros(num_rows, dtype=np.int64)
        self._position = np.zeros(num_rows, dtype=np.int64)

    def reset(self, rows: Index) -> None:
        self._num_points[rows] = 0
        self._position[rows] = 0

    def update(self, signals: Any, rows: Index) -> Columns:
        gap = signals.position - self._position[rows]
        self._num_points[rows] += 1
        self._position[rows] = signals.position
        return np.log1p(signals.position), np.log(self._num_points[rows]), np.log1p(gap)


class _Limit(_Group):
    """What continuing may still show: at the last point it is the whole rest or nothing."""

    names = ("last_point", "log_points_left")
    signals = ("points_left",)

    def update(self, signals: Any, rows: Index) -> Columns:
        return signals.points_left == 0, np.log1p(signals.points_left)


class _Confidence(_Group):
    """Of the forced answer as a whole."""

    names = (
        "confidence_logit",
        "confidence_max",
        "confidence_mean",
        "confidence_change",
        "confidence_low",
    )
    signals = ("confidence",)

    def __init__(self, num_rows: int) -> None:
        self._trend = _Trend(num_rows)

    def reset(self, rows: Index) -> None:
        self._trend.reset(rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        confidence = signals.confidence.astype(np.float64)
        with np.errstate(divide="ignore"):
            logit = np.log(confidence) - np.log1p(-confidence)
        trend = self._trend.update(np.clip(logit, _LOWEST_LOGIT, _HIGHEST_LOGIT), rows)
        return *trend, np.log(np.maximum(confidence, _LOWEST_CONFIDENCE))


class _Tokens(_Group):
    """The forced answer's tokens: the worst of them, and how many there are."""

    names = ("doubt", "least_doubt", "log_probe")
    signals = ("worst_logprob", "answer", "probe_tokens")

    def __init__(self, num_rows: int) -> None:
        self._answers = _Answers(num_rows)

    def reset(self, rows: Index) -> None:
        self._answers.reset(rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        worst = signals.worst_logprob.astype(np.float64)
        doubt = np.log(np.clip(-np.expm1(worst), _LEAST_DOUBT, 1.0))
        # An answer without tokens is doubted as much as can be.
        doubt = np.where((signals.answer == 0) & np.isnan(doubt), 0.0, doubt)
        self._answers.add(signals.answer, rows, doubt)
        return doubt, self._answers.smallest(rows), np.log1p(signals.probe_tokens)


class _Agreement(_Group):
    """Of the forced answers with each other."""

    names = (
        "answered",
        "log_run",
        "run_share",
        "top_share",
        "leads",
        "log_distinct",
        "returned",
    )
    signals = ("answer",)

    def __init__(self, num_rows: int) -> None:
        self._answers = _Answers(num_rows)
        # (4, R) the previous answer; its run so far; the most that any was given; the distinct
        self._state = np.zeros((4, num_rows), dtype=np.int64)
        self._num_points = np.zeros(num_rows, dtype=np.int64)

    def reset(self, rows: Index) -> None:
        self._answers.reset(rows)
        self._state[:, rows] = 0
        self._num_points[rows] = 0

    def update(self, signals: Any, rows: Index) -> Columns:
        answer = signals.answer
        previous, run, top, distinct = self._state[:, rows]
        self._num_points[rows] += 1
        total = self._num_points[rows]
        self._answers.add(answer, rows)
        seen = self._answers.same(rows).sum(axis=1)
        answered = answer != 0
        repeated = answered & (answer == previous)
        run = np.where(repeated, run + 1, answered)
        top = np.maximum(top, seen)
        distinct = distinct + (seen == 1)
        self._state[:, rows] = answer, run, top, distinct
        return (
            answered,
            np.log1p(run),
            run / total,
            top / total,
            answered & (seen == top),
            np.log1p(distinct),
            (seen > 1) & ~repeated,
        )


class _Distribution(_Group):
    """Of the next token, over the tokens since the previous point."""

    names = (
        "entropy",
        "entropy_mean",
        "max_entropy",
        "logprob",
        "min_logprob",
        "margin",
        "margin_mean",
    )
    signals = ("entropy", "max_entropy", "logprob", "min_logprob", "margin")

    def __init__(self, num_rows: int) -> None:
        self._entropy, self._margin = _Trend(num_rows), _Trend(num_rows)

    def reset(self, rows: Index) -> None:
        self._entropy.reset(rows)
        self._margin.reset(rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        entropy, _, entropy_mean, _ = self._entropy.update(signals.entropy, rows)
        margin, _, margin_mean, _ = self._margin.update(signals.margin, rows)
        largest, surprise = np.log1p(signals.max_entropy), -np.log1p(-signals.min_logprob)
        return entropy, entropy_mean, largest, signals.logprob, surprise, margin, margin_mean


class _Ending(_Group):
    """How near the LM is to ending its thought by itself."""

    names = ("end_think", "end_think_max", "end_think_mean")
    signals = ("end_think_logprob",)

    def __init__(self, num_rows: int) -> None:
        self._trend = _Trend(num_rows)

    def reset(self, rows: Index) -> None:
        self._trend.reset(rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        return self._trend.update(signals.end_think_logprob, rows)[:3]


class _Reflection(_Group):
    """Words of doubt and of checking."""

    names = ("log_reflections", "reflections_mean", "log_reflections_all")
    signals = ("num_reflections",)

    def __init__(self, num_rows: int) -> None:
        self._trend = _Trend(num_rows)
        self._all = np.zeros(num_rows, dtype=np.float32)

    def reset(self, rows: Index) -> None:
        self._trend.reset(rows)
        self._all[rows] = 0

    def update(self, signals: Any, rows: Index) -> Columns:
        num, _, mean, _ = self._trend.update(np.log1p(signals.num_reflections), rows)
        self._all[rows] += np.nan_to_num(signals.num_reflections, posinf=0.0)
        return num, mean, np.log1p(self._all[rows])


class _Hidden(_Group):
    """The last-layer state, along the directions in which the training traces' states spread."""

    names = tuple(f"hidden_{i}" for i in range(NUM_DIRECTIONS))
    signals = ("hidden",)

    def __init__(self, num_rows: int, projection: Projection) -> None:
        self._projection = projection

    def update(self, signals: Any, rows: Index) -> Columns:
        return tuple(self._projection.features(signals.hidden).T)


_GROUPS: dict[str, type[_Group]] = {
    "pace": _Pace,
    "limit": _Limit,
    "confidence": _Confidence,
    "tokens": _Tokens,
    "agreement": _Agreement,
    "distribution": _Distribution,
    "ending": _Ending,
    "reflection": _Reflection,
    "hidden": _Hidden,
}

#: Features by group, in order. A head names the groups that it needs.
FEATURE_GROUPS = {name: group.names for name, group in _GROUPS.items()}

#: The signals that each group is made from: fields of `haltwise.Signals`.
GROUP_SIGNALS = {name: group.signals for name, group in _GROUPS.items()}


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


def signals_of(groups: Iterable[str]) -> tuple[str, ...]:
    """The signals that some groups are made from, each once."""
    return tuple({name: None for group in groups for name in GROUP_SIGNALS[group]})


def check_projection(groups: Iterable[str], projection: Projection | None) -> None:
    """Refuses a projection that no group uses, and the group "hidden" without one.

    Raises:
        InputError: If the two do not fit each other.
    """
    if "hidden" in groups and projection is None:
        raise InputError("no projection: feature group 'hidden' expects one")
    if "hidden" not in groups and projection is not None:
        raise InputError("a projection, but no feature group 'hidden': expected both or none")


def _start(group: str, num_rows: int, projection: Projection | None) -> _Group:
    if group == "hidden" and projection is not None:
        return _Hidden(num_rows, projection)
    return _GROUPS[group](num_rows)


class FeatureState:
    """The running state of a batch of rows, and the features of their newest points.

    Rows are independent: what one row sees never changes another row's features.

    Args:
        num_rows: R.
        groups: The feature groups to compute.
        projection: Of hidden states; needed exactly if "hidden" is among the groups.

    Raises:
        InputError: If a group is unknown, there is none, or the projection does not fit them.
    """

    def __init__(
        self, num_rows: int, groups: Sequence[str], projection: Projection | None = None
    ) -> None:
        """Starts every row before its first point."""
        self.names = feature_names(groups)
        check_projection(groups, projection)
        self._signals = signals_of(groups)
        self._groups = [_start(group, num_rows, projection) for group in groups]

    def reset(self, rows: Index) -> None:
        """Puts rows back before their first point."""
        for group in self._groups:
            group.reset(rows)

    def update(self, signals: Signals, rows: Index) -> Float:
        """Takes in the newest point of some rows.

        Args:
            signals: Of those rows, in the same order.
            rows: (B,) which rows; each at most once.

        Returns:
            (B, F) float32, the columns of `names`. A NaN signal gives NaN features.

        Raises:
            InputError: If a signal that a group needs is not there, or a hidden state is of
                another size than those that the projection was learned from.
        """
        missing = [name for name in self._signals if getattr(signals, name) is None]
        if missing:
            raise InputError(f"signal {missing[0]!r} is missing, but the features need it")
        columns = [column for group in self._groups for column in group.update(signals, rows)]
        return np.stack(columns, axis=1).astype(np.float32)
