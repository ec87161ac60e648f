"""The replay environment, which plays thousands of recorded traces as episodes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.batched import BatchedEnv, Mask
from envs.reward import reward, step_costs, step_ems
from envs.series import ShuffledPasses, check_price, draw_prices
from haltwise import (
    FEATURE_GROUPS,
    FeatureState,
    Halting,
    InputError,
    Observing,
    Projection,
    Signals,
    answer_keys,
    feature_names,
)
from haltwise.policy.features import signals_of
from haltwise.policy.projection import check_size
from haltwise.policy.signals import Float, Index
from traces import Traces

# Points to standardise at a time: it takes several copies of what it is given.
_AT_A_TIME = 1 << 16
# A column of which a larger share is unknown is as good as missing.
_MOSTLY = 0.5


def point_features(
    traces: Traces,
    groups: tuple[str, ...],
    max_points: int | None = None,
    projection: Projection | None = None,
) -> Float:
    """Returns the features (P, F) of every point of every trace, made by the code that serves.

    All traces are streamed side by side, one point a round. A point with an unknown signal has
    features that are NaN: there a head goes on, in serving as in replay.

    Args:
        traces: N traces with P points.
        groups: The names of the feature groups.
        max_points: The most decision points that the decision rule allows; None is no limit.
        projection: The projection of hidden states, if the group "hidden" is there.

    Raises:
        InputError: If the traces lack a signal that a group needs altogether, have more points, or
            do not fit the projection.
    """
    lengths = np.diff(traces.offsets)
    if max_points is not None and lengths.max(initial=0) > max_points:
        raise InputError(
            f"a trace has {lengths.max()} decision points: expected at most {max_points}, "
            "as the decision rule says"
        )
    columns = {name: _column(traces, name, max_points) for name in signals_of(groups)}
    columns["position"] = traces.position
    state = FeatureState(len(traces), groups, projection)
    features = np.empty((traces.num_points, len(feature_names(groups))), dtype=np.float32)
    for i in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > i)
        at = traces.offsets[rows] + i
        signals = Signals(**{name: column[at] for name, column in columns.items()})
        features[at] = state.update(signals, rows)
    return features


def observed_features(traces: Traces, observing: Observing, halting: Halting) -> Float:
    """Returns the features (P, F) of every decision point that an observing asks for.

    The conditions of halting say how many points there can be.

    Raises:
        InputError: See `point_features`.
    """
    return point_features(traces, observing.groups, halting.max_points, observing.projection)


def observations(
    traces: Traces, observing: Observing, halting: Halting
) -> tuple[Float, NDArray[np.bool_]]:
    """Returns the observations (P, F + 1) of every decision point at a price of 1.

    Returns:
        The observations, and whether all signals of a point are known (P,). What is not known is
        observed as the mean; whoever acts must go on there.

    Raises:
        InputError: See `point_features`.
    """
    features = observed_features(traces, observing, halting)
    obs = np.empty((len(features), observing.size), dtype=np.float32)
    for start in range(0, len(obs), _AT_A_TIME):
        some = slice(start, start + _AT_A_TIME)
        obs[some] = observing.observe(features[some], 1.0)
    sound: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(features), axis=1)
    return np.nan_to_num(obs, copy=False), sound


def projection_of(traces: Traces, groups: tuple[str, ...]) -> Projection | None:
    """Fits a projection to the hidden states of some traces; None if no group needs one.

    Raises:
        InputError: If no point has a hidden state.
    """
    if "hidden" not in groups:
        return None
    states = _column(traces, "hidden", None)
    unknown = _unknown(states)
    return Projection.fit(states[~unknown] if unknown.any() else states)


@dataclass(frozen=True)
class Availability:
    """Which feature groups a head can read on some traces, and what is wrong with the others."""

    groups: tuple[str, ...]
    """The groups whose signals are there, in order."""
    left_out: dict[str, str]
    """By group that is left out, why."""
    gaps: list[str]
    """The columns of the groups that are there that have unknown values, a sentence each."""


def availability(traces: Traces, halting: Halting) -> Availability:
    """Finds the feature groups that some traces have the signals for, under some conditions.

    A column with some unknown values is there; one that is mostly unknown is not.
    """
    left_out: dict[str, str] = {}
    gaps: dict[str, str] = {}
    for group in FEATURE_GROUPS:
        try:
            halting.check_groups([group])
            found = {name: _gap(traces, name, halting.max_points) for name in signals_of([group])}
        except InputError as error:
            left_out[group] = str(error)
        else:
            gaps |= {name: gap for name, gap in found.items() if gap}
    groups = tuple(group for group in FEATURE_GROUPS if group not in left_out)
    return Availability(groups, left_out, list(gaps.values()))


def _gap(traces: Traces, name: str, max_points: int | None) -> str:
    """Says where a signal is unknown; no text if it is known everywhere.

    Raises:
        InputError: If it is missing, or unknown at most points.
    """
    unknown = _unknown(_column(traces, name, max_points))
    if name == "worst_logprob":
        unknown &= traces.answer != ""  # an answer without tokens has no worst one
    if not unknown.any():
        return ""
    first = int(unknown.argmax())
    n = traces.trace_of_point[first]
    told = (
        f"column {_recorded_as(name)!r} is unknown at {unknown.sum():,} of {len(unknown):,} "
        f"points, first at point {first - traces.offsets[n] + 1} of trace "
        f"{str(traces.trace_id[n])!r}"
    )
    if unknown.mean() > _MOSTLY:
        raise InputError(told)
    return f"{told}: there a head that reads it goes on"


def _recorded_as(name: str) -> str:
    """Returns the name of the column that a signal is read from."""
    return "answer_logprobs" if name == "worst_logprob" else name


def _column(traces: Traces, name: str, max_points: int | None) -> NDArray[Any]:
    """Returns a signal at every point, (P,) or for hidden states (P, D), NaN where unknown.

    Raises:
        InputError: If the traces do not have it anywhere.
    """
    if name == "answer":
        return answer_keys(traces.answer.tolist())
    if name == "points_left" and max_points is not None:
        index = np.arange(traces.num_points) - traces.offsets[:-1][traces.trace_of_point]
        left: Index = max_points - 1 - index
        return left
    own: NDArray[Any] | None = getattr(traces, name, None)
    column = traces.signals.get(name, own)
    if name == "hidden" and column is not None:
        check_size(column.shape[1])
    if column is None or (len(column) and _unknown(column).all()):
        raise InputError(
            f"column {_recorded_as(name)!r} is missing or unknown everywhere: expected traces "
            "recorded with it, or a head without the feature groups that need it"
        )
    return column


def _unknown(column: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns which points (P,) have a NaN in a column (P,) or (P, D)."""
    unknown: NDArray[np.bool_] = np.isnan(column if column.ndim == 1 else column.max(axis=1))
    return unknown


class RecordedSteps:
    """Holds every step that can be taken on some traces: what is seen, paid, gained and told.

    The LM's tokens do not depend on the halting decision, so a trace holds the reward of every
    halting time and replay is exact.

    Args:
        traces: N traces with P points.
        observing: How features become observations.
        halting: The conditions: how probing is paid for, how many points there can be.

    Raises:
        InputError: If no trace has a decision point, or a signal or limit does not fit, or the
            features need forced answers that are not paid for.
    """

    def __init__(self, traces: Traces, observing: Observing, halting: Halting) -> None:
        """Lays out the traces."""
        halting.check_groups(observing.groups)
        #: (N,) the first point of each trace.
        self.first = traces.offsets[:-1]
        last = traces.offsets[1:] - 1
        #: The indices of the traces that have points.
        self.playable = np.flatnonzero(last >= self.first)
        if not len(self.playable):
            raise InputError("no trace has a decision point: there is nothing to decide")
        #: (P,) whether a point is the last one of its trace.
        self.is_last = np.zeros(traces.num_points, dtype=bool)
        self.is_last[last[self.playable]] = True
        self._obs, sound = observations(traces, observing, halting)
        # (P,) whether a point is passed whatever anybody decides, as in serving; None if none is.
        self._passed = None if sound.all() else ~sound
        # (2 P,) what it costs and gains to continue at point 0, to halt there, to continue at
        # point 1, ...
        self._costs = step_costs(traces, halting.probing).astype(np.float64).ravel()
        self._ems = step_ems(traces).ravel()
        self._question_id = traces.question_id.astype(object)
        self._seed, self._position, self._answer = traces.seed, traces.position, traces.answer

    def observe(self, points: Index, dial: Float) -> Float:
        """Returns the observations (B, F + 1) at points (B,), with log prices as observed (B,)."""
        obs = self._obs.take(points, axis=0)
        obs[:, -1] = dial
        return obs

    def obeyed(self, points: Index, halts: Mask) -> Mask:
        """Returns which of some decisions to halt (B,) at points (B,) are obeyed.

        Where a signal is unknown the LM goes on, as it does in serving.
        """
        return halts if self._passed is None else halts & ~self._passed.take(points)

    def take(self, points: Index, halts: Mask) -> tuple[NDArray[np.float64], Mask]:
        """Returns what halting, or else continuing, at points (B,) costs and gains.

        Returns:
            The cost in tokens (B,), and the EM gained (B,).
        """
        steps = 2 * points + halts
        return self._costs.take(steps), self._ems.take(steps)

    def told(self, trace: Index, points: Index, halted: Mask) -> dict[str, NDArray[Any]]:
        """Returns, by name, what traces tell of episodes that ended on them.

        Traces in memory do not hold the answers that LMs give by themselves: None stands for one.

        Args:
            trace: (B,) the trace of each episode.
            points: (B,) the point that each ended at.
            halted: (B,) whether each was halted there.
        """
        answer = self._answer[points]
        answer[~halted] = None
        return {
            "question_id": self._question_id[trace],
            "seed": self._seed[trace].astype(np.int64),
            "answer": answer,
            "num_points": points - self.first[trace] + 1,
            "position": self._position[points].astype(np.int64),
            "trace": trace,
        }


class ReplayEnv(BatchedEnv):
    """Many episodes of halting recorded traces, stepped together: `TraceEnv` in batches.

    Description, spaces, rewards, starting state and episode end are those of `TraceEnv`.

    Args:
        traces: The traces to replay.
        observing: How features become observations.
        halting: The conditions: how probing is paid for, how many points there can be.
        num_envs: B, the number of episodes that are played at once.
        price: A fixed price for every episode; None draws one for each.

    Raises:
        InputError: If no trace has a decision point, or a signal, limit or price does not fit.
    """

    def __init__(
        self,
        traces: Traces,
        observing: Observing,
        halting: Halting,
        num_envs: int,
        price: float | None = None,
    ) -> None:
        """Lays out the traces."""
        super().__init__(observing, num_envs)
        check_price(price)
        self._observing = observing
        self._halting = halting
        self._fixed_price = price
        self.load(traces)

    def load(self, traces: Traces) -> None:
        """Takes other traces, to be replayed from the next reset on.

        Raises:
            InputError: If no trace has a decision point, or a signal or limit does not fit.
        """
        self._steps = RecordedSteps(traces, self._observing, self._halting)
        self._passes = ShuffledPasses(self._steps.playable)
        self._is_playing = False

    @property
    def price(self) -> NDArray[np.float64]:
        """The prices of the episodes that are being played (B,), in EM per 1,000 tokens."""
        return self._price

    def _restart(self) -> None:
        """Begins a new pass over the traces."""
        self._passes.restart()

    def _begin(self) -> Float:
        """Begins B episodes at the first points of their traces.

        Returns:
            The observations (B, F + 1) there.
        """
        self._trace = np.empty(self.num_envs, dtype=np.int64)
        self._point = np.empty(self.num_envs, dtype=np.int64)
        self._price = np.empty(self.num_envs)
        self._dial = np.empty(self.num_envs, dtype=np.float32)
        self._spent = np.zeros(self.num_envs)
        self._start(np.arange(self.num_envs))
        return self._steps.observe(self._point, self._dial)

    def _act(self, halts: Mask) -> tuple[Float, NDArray[np.float64], Mask, dict[str, Any]]:
        """Halts some episodes (B,), moves the others to their next points, and replaces the ended.

        Returns:
            Observations (B, F + 1), of the next episode where one is over; rewards (B,); which
            episodes are over (B,); and infos.
        """
        at = self._point
        halts = self._steps.obeyed(at, halts)
        cost, em = self._steps.take(at, halts)
        rewards = reward(em, cost, self._price)
        self._spent += cost
        over = halts | self._steps.is_last.take(at)
        self._point = at + 1
        infos: dict[str, Any] = {}
        rows = np.flatnonzero(over)
        if len(rows):
            last_obs = self._steps.observe(at[rows], self._dial[rows])
            infos = self._infos(rows, last_obs, self._told(rows, at[rows], em[rows], halts[rows]))
            self._start(rows)
        return self._steps.observe(self._point, self._dial), rewards, over, infos

    def _told(self, rows: Index, points: Index, em: Mask, halted: Mask) -> dict[str, NDArray[Any]]:
        """Returns, by name, what is told (N,) of the episodes of rows (N,), which are over."""
        return {
            "em": em,
            "cost": self._spent[rows].astype(np.int64),
            "halted": halted,
            "price": self._price[rows],
            **self._steps.told(self._trace[rows], points, halted),
        }

    def _start(self, rows: Index) -> None:
        """Begins new episodes in rows (N,) of the batch."""
        self._trace[rows] = self._passes.draw(self.np_random, len(rows))
        self._point[rows] = self._steps.first[self._trace[rows]]
        self._spent[rows] = 0
        price = draw_prices(self._observing, self._fixed_price, self.np_random, len(rows))
        self._price[rows] = price
        self._dial[rows] = self._observing.dial(price)
