"""From signals to features: one definition, streamed in serving and swept over files in training.

    signals of a decision point  ->  FeatureState.update  ->  features (B, F)

Everything is causal: the features of a point depend on that point and on earlier points of the
same row only. Features come in groups. A head names the groups that it reads, and a group names
the signals that it is made from. `FEATURE_GROUPS` has them all.

Shapes: R rows in a batch, B of them in a call, F features, P points.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.projection import NUM_DIRECTIONS, Projection
from haltwise.policy.signals import SHOWN_BY, Bools, Float, Index, Signals, signals_from

# Log-odds of confidences. 12 is 1 - 6e-6; float32 lies no closer to 1 than 6e-8. Guesses below
# 27 % are not told apart: there LMs differ most (docs/FEATURES.md has the figures).
_LOWEST_LOGIT, _HIGHEST_LOGIT = -1.0, 12.0
_LOWEST_CONFIDENCE = 1 / (1 + np.exp(-_LOWEST_LOGIT))
# Probabilities that a token is wrong are told apart down to this.
_LEAST_DOUBT = 1e-6
_MEAN_DECAY = 0.7

#: The feature that tells whether a forced answer could be read.
ANSWERED = "answered"

Columns = Sequence[NDArray[Any]]


class Feature(NamedTuple):
    """A number that a head is fed, and the words for a person who asks why it halted.

    Features of a group that have the same words are told as one.
    """

    name: str
    higher: str
    """What a person would say if it is higher than before."""
    lower: str
    """What a person would say if it is lower than before."""


class _RowState:
    """What is remembered of R rows: arrays whose last axis is R, and further states like this."""

    def reset(self, rows: Index) -> None:
        """Puts rows (B,) back before their first point, by setting what is remembered to 0."""
        for part in vars(self).values():
            if isinstance(part, np.ndarray):
                part[..., rows] = 0
            elif isinstance(part, _RowState):
                part.reset(rows)


class FeatureGroup(_RowState):
    """Some features of R rows, with all that they remember of earlier points.

    A subclass keeps what it remembers in arrays whose last axis is R, so that `reset` forgets it.

    Args:
        num_rows: R.
        projection: What the head sees of hidden states, if it sees them.
    """

    features: tuple[Feature, ...]
    """The features, in order."""
    signals: tuple[str, ...]
    """The names of the signals that they are made from."""
    version: int = 3
    """A group raises its own whenever one of its features could have another value for the same
    signals, or one of its signals for the same LM: then only heads that read this group are
    refused. All begin with 3, the last version that the groups had in common."""

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        """Starts every row before its first point."""

    def update(self, signals: Any, rows: Index) -> Columns:
        """Takes in the newest point of some rows.

        Args:
            signals: Those of the rows, in the same order.
            rows: (B,) which rows; each at most once.

        Returns:
            An array (B,) for each feature. A signal that is not finite changes the features of
            its own point only.
        """
        raise NotImplementedError


class _Trend(_RowState):
    """The largest value and the moving mean of a number; NaN before the first point.

    A value that is not finite has such a trend, and leaves what is remembered as it was.
    """

    def __init__(self, num_rows: int) -> None:
        # (3, R) the newest value, the largest one, and the moving mean
        self._state = np.full((3, num_rows), np.nan, dtype=np.float32)

    def reset(self, rows: Index) -> None:
        """Puts rows (B,) back before their first point."""
        self._state[:, rows] = np.nan

    def update(self, value: NDArray[Any], rows: Index) -> tuple[Float, Float, Float, Float]:
        """Takes in values (B,); returns them, the largest so far, moving mean and change."""
        value = value.astype(np.float32)
        state = self._state[:, rows]
        before, largest, mean = np.where(np.isnan(state), value, state)
        largest = np.maximum(largest, value)
        mean = _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * value
        self._state[:, rows] = np.where(np.isfinite(value), (value, largest, mean), state)
        return value, largest, mean, value - before


class _AnswerHistory(_RowState):
    """Every forced answer so far, with a number beside each."""

    def __init__(self, num_rows: int) -> None:
        self.num_points = np.zeros(num_rows, dtype=np.int64)
        # (P, R), with room for more points than there are
        self._keys = np.zeros((8, num_rows), dtype=np.int64)
        self._values = np.zeros((8, num_rows), dtype=np.float32)

    def add(self, keys: Index, rows: Index, values: Float | float = 0.0) -> None:
        """Takes in the newest answers (B,) and their numbers."""
        room, num = len(self._keys), self.num_points[rows]
        if num.max(initial=0) >= room:
            self._keys = np.pad(self._keys, ((0, room), (0, 0)))
            self._values = np.pad(self._values, ((0, room), (0, 0)))
        self._keys[num, rows] = keys
        self._values[num, rows] = values
        self.num_points[rows] += 1

    def same(self, rows: Index) -> Bools:
        """Tells which points so far had the newest answer (P, B); none if that is empty."""
        newest = self._keys[self.num_points[rows] - 1, rows]
        same: Bools = (self._keys[:, rows] == newest) & (newest != 0)
        return same

    def smallest(self, rows: Index) -> Float:
        """Returns the smallest number that the newest answer ever had, 0 at most (B,).

        NaN counts as 0.
        """
        values = np.nan_to_num(self._values[:, rows])
        least: Float = np.where(self.same(rows), values, 0.0).min(axis=0)
        return least


class _Pace(FeatureGroup):
    """How far the thought has come."""

    features = (
        Feature("log_position", "later in the thought", "early in the thought"),
        Feature("log_point", "later in the thought", "early in the thought"),
        Feature("log_gap", "a longer step", "a shorter step"),
    )
    signals = ("position",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._num_points = np.zeros(num_rows, dtype=np.int64)
        self._position = np.zeros(num_rows, dtype=np.int64)

    def update(self, signals: Any, rows: Index) -> Columns:
        gap = signals.position - self._position[rows]
        self._num_points[rows] += 1
        self._position[rows] = signals.position
        return np.log1p(signals.position), np.log(self._num_points[rows]), np.log1p(gap)


class _Limit(FeatureGroup):
    """What continuing may still show: at the last point it is the whole rest or nothing."""

    features = (
        Feature("last_point", "last chance to halt", "chances left to halt"),
        Feature("log_points_left", "more chances left", "fewer chances left"),
    )
    signals = ("points_left",)

    def update(self, signals: Any, rows: Index) -> Columns:
        return signals.points_left == 0, np.log1p(signals.points_left)


class _Confidence(FeatureGroup):
    """How confident the LM is of the forced answer as a whole."""

    features = (
        Feature("confidence_logit", "surer answer", "less sure answer"),
        Feature("confidence_max", "a sure answer was seen", "no sure answer so far"),
        Feature("confidence_mean", "surer answers of late", "unsure answers of late"),
        Feature("confidence_change", "confidence rose more", "confidence rose less"),
        Feature("confidence_low", "surer answer", "less sure answer"),
    )
    signals = ("confidence",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._trend = _Trend(num_rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        confidence = signals.confidence.astype(np.float64)
        with np.errstate(divide="ignore"):
            logit = np.log(confidence) - np.log1p(-confidence)
        trend = self._trend.update(np.clip(logit, _LOWEST_LOGIT, _HIGHEST_LOGIT), rows)
        return *trend, np.log(np.maximum(confidence, _LOWEST_CONFIDENCE))


class _AnswerTokens(FeatureGroup):
    """The worst token of the forced answer, and how many tokens there are."""

    features = (
        Feature("doubt", "its weakest word shakier", "its weakest word firmer"),
        Feature("least_doubt", "less proven answer", "better proven answer"),
        Feature("log_probe", "longer answer", "shorter answer"),
    )
    signals = ("worst_logprob", "answer", "probe_tokens")

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._answers = _AnswerHistory(num_rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        worst = signals.worst_logprob.astype(np.float64)
        doubt = np.log(np.clip(-np.expm1(worst), _LEAST_DOUBT, 1.0))
        # An answer without tokens is doubted as much as can be.
        doubt = np.where((signals.answer == 0) & np.isnan(doubt), 0.0, doubt)
        self._answers.add(signals.answer, rows, doubt)
        return doubt, self._answers.smallest(rows), np.log1p(signals.probe_tokens)


class _Agreement(FeatureGroup):
    """How far the forced answers agree with each other."""

    features = (
        Feature(ANSWERED, "there is an answer", "there is no answer"),
        Feature("log_run", "repeated more in a row", "repeated less in a row"),
        Feature("run_share", "settled for longer", "settled for less long"),
        Feature("top_share", "answers agree more", "answers agree less"),
        Feature("leads", "its commonest answer", "not its commonest answer"),
        Feature("log_distinct", "more answers tried", "fewer answers tried"),
        Feature("returned", "back to an old answer", "no old answer is back"),
    )
    signals = ("answer",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._answers = _AnswerHistory(num_rows)
        # (4, R) the previous answer; how often in a row it has been given; how often the commonest
        # answer has been given; how many different answers there are
        self._state = np.zeros((4, num_rows), dtype=np.int64)

    def update(self, signals: Any, rows: Index) -> Columns:
        answer = signals.answer
        previous, run, top, distinct = self._state[:, rows]
        self._answers.add(answer, rows)
        total = self._answers.num_points[rows]
        seen = self._answers.same(rows).sum(axis=0)
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


class _Distribution(FeatureGroup):
    """How sure the LM has been of its next tokens since the previous point."""

    features = (
        Feature("entropy", "less certain thinking", "more certain thinking"),
        Feature("entropy_mean", "uncertain thinking lately", "certain thinking lately"),
        Feature("max_entropy", "a harder choice of word", "no hard choice of word"),
        Feature("logprob", "likelier words", "less likely words"),
        Feature("min_logprob", "no surprising word", "a surprising word"),
        Feature("margin", "clearer choice of words", "closer choice of words"),
        Feature("margin_mean", "clear words lately", "unclear words lately"),
    )
    signals = ("entropy", "max_entropy", "logprob", "min_logprob", "margin")

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._entropy, self._margin = _Trend(num_rows), _Trend(num_rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        entropy, _, entropy_mean, _ = self._entropy.update(signals.entropy, rows)
        margin, _, margin_mean, _ = self._margin.update(signals.margin, rows)
        largest, surprise = np.log1p(signals.max_entropy), -np.log1p(-signals.min_logprob)
        return entropy, entropy_mean, largest, signals.logprob, surprise, margin, margin_mean


class _Ending(FeatureGroup):
    """How near the LM is to ending its thought by itself."""

    features = (
        Feature("end_think", "nearer its own end", "further from its own end"),
        Feature("end_think_max", "was near its own end", "never near its own end"),
        Feature("end_think_mean", "near its end lately", "far from its end lately"),
    )
    signals = ("end_think_logprob",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._trend = _Trend(num_rows)

    def update(self, signals: Any, rows: Index) -> Columns:
        return self._trend.update(signals.end_think_logprob, rows)[:3]


class _Reflection(FeatureGroup):
    """How often the LM uses words of doubt and of checking."""

    features = (
        Feature("log_reflections", "more second thoughts", "fewer second thoughts"),
        Feature("reflections_mean", "second thoughts lately", "few second thoughts lately"),
        Feature("log_reflections_all", "more doubts in all", "fewer doubts in all"),
    )
    signals = ("num_reflections",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._trend = _Trend(num_rows)
        self._all = np.zeros(num_rows, dtype=np.float32)

    def update(self, signals: Any, rows: Index) -> Columns:
        num, _, mean, _ = self._trend.update(np.log1p(signals.num_reflections), rows)
        self._all[rows] += np.nan_to_num(signals.num_reflections, posinf=0.0)
        return num, mean, np.log1p(self._all[rows])


class _Hidden(FeatureGroup):
    """The last-layer state, along the directions in which the training traces' states spread."""

    features = tuple(
        Feature(f"hidden_{i}", f"inner state {i} higher", f"inner state {i} lower")
        for i in range(NUM_DIRECTIONS)
    )
    signals = ("hidden",)

    def __init__(self, num_rows: int, projection: Projection | None) -> None:
        self._projection = projection

    def update(self, signals: Any, rows: Index) -> Columns:
        assert self._projection is not None  # see `check_projection`
        return tuple(self._projection.features(signals.hidden).T)


#: Every group by its name, in the order in which a head is fed. A new group is one entry here.
FEATURE_GROUPS: dict[str, type[FeatureGroup]] = {
    "pace": _Pace,
    "limit": _Limit,
    "confidence": _Confidence,
    "tokens": _AnswerTokens,
    "agreement": _Agreement,
    "distribution": _Distribution,
    "ending": _Ending,
    "reflection": _Reflection,
    "hidden": _Hidden,
}


def features_of(groups: Iterable[str]) -> tuple[Feature, ...]:
    """Returns the features of some groups, in order.

    Raises:
        InputError: If a group is unknown or there twice, or there is none.
    """
    groups = tuple(groups)
    if twice := sorted({group for group in groups if groups.count(group) > 1}):
        raise InputError(f"feature groups: found {', '.join(twice)} twice, expected each once")
    unknown = sorted(set(groups) - set(FEATURE_GROUPS))
    if unknown or not groups:
        found, known = ", ".join(unknown) or "none", ", ".join(FEATURE_GROUPS)
        raise InputError(f"feature groups: found {found}, expected some of {known}")
    return tuple(feature for group in groups for feature in FEATURE_GROUPS[group].features)


def feature_names(groups: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the features of some groups, in order.

    Raises:
        InputError: As `features_of`.
    """
    return tuple(feature.name for feature in features_of(groups))


def signals_of(groups: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the signals that some groups are made from, each once."""
    return tuple({name: None for group in groups for name in FEATURE_GROUPS[group].signals})


def unshown_groups(groups: Iterable[str], server: str) -> list[str]:
    """Returns those of some groups that need a signal which a server does not show to a head.

    Args:
        groups: Names of feature groups.
        server: A key of `haltwise.policy.signals.SHOWN_BY`.
    """
    shown = set(signals_from(*SHOWN_BY[server]))
    return [group for group in groups if not shown.issuperset(signals_of([group]))]


def check_projection(groups: Iterable[str], projection: Projection | None) -> None:
    """Refuses a projection that no group uses, and the group "hidden" without a projection.

    Raises:
        InputError: If the groups and the projection do not fit each other.
    """
    if "hidden" in groups and projection is None:
        raise InputError("found no projection: feature group 'hidden' expects one")
    if "hidden" not in groups and projection is not None:
        raise InputError("found a projection without feature group 'hidden': expected both or none")


class FeatureState:
    """What is remembered of a batch of rows, and the features of their newest points.

    Rows are independent: what one row sees never changes another row's features.

    Args:
        num_rows: R.
        groups: The names of the feature groups to compute.
        projection: What is seen of hidden states; expected exactly if "hidden" is among the groups.

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
        self._groups = [FEATURE_GROUPS[group](num_rows, projection) for group in groups]

    def reset(self, rows: Index) -> None:
        """Puts rows (B,) back before their first point."""
        for group in self._groups:
            group.reset(rows)

    def update(self, signals: Signals, rows: Index) -> Float:
        """Takes in the newest point of some rows.

        Args:
            signals: Those of the rows, in the same order.
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
