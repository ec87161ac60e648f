"""The replay environment: halting decisions on recorded traces, thousands of episodes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.batched import BatchedEnv
from envs.reward import reward, step_costs, step_ems
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

# Points: standardising takes several copies of what it is given.
_AT_A_TIME = 1 << 16


def point_features(
    traces: Traces,
    groups: tuple[str, ...],
    max_points: int | None = None,
    projection: Projection | None = None,
) -> Float:
    """Features (P, F) of every point of every trace, by the same code that serves.

    All traces are streamed side by side, one point a round.

    Args:
        traces: N traces with P points.
        groups: Of features.
        max_points: Decision points that the decision rule allows, if it has a limit.
        projection: Of hidden states, if the group "hidden" is there.

    Raises:
        InputError: If the traces lack a signal that a group needs, have more points, or do not
            fit the projection.
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
    """Features (P, F) of every decision point, as an observing and its conditions want them.

    Raises:
        InputError: See `point_features`.
    """
    return point_features(traces, observing.groups, halting.max_points, observing.projection)


def observations(traces: Traces, observing: Observing, halting: Halting) -> Float:
    """Observations (P, F + 1) of every decision point at a price of 1.

    Raises:
        InputError: See `point_features`.
    """
    features = observed_features(traces, observing, halting)
    obs = np.empty((len(features), observing.size), dtype=np.float32)
    for start in range(0, len(obs), _AT_A_TIME):
        some = slice(start, start + _AT_A_TIME)
        obs[some] = observing.observe(features[some], 1.0)
    return obs


def projection_of(traces: Traces, groups: tuple[str, ...]) -> Projection | None:
    """A projection learned from the hidden states of some traces; None if no group needs one.

    Raises:
        InputError: If the traces do not have them everywhere, or there is no point.
    """
    return Projection.fit(_column(traces, "hidden", None)) if "hidden" in groups else None


def available_groups(traces: Traces, halting: Halting) -> tuple[str, ...]:
    """The feature groups that some traces have all signals for, under some conditions."""
    return tuple(group for group in FEATURE_GROUPS if _has(traces, group, halting))


def _has(traces: Traces, group: str, halting: Halting) -> bool:
    try:
        halting.check_groups([group])
        for name in signals_of([group]):
            _column(traces, name, halting.max_points)
    except InputError:
        return False
    return True


def _column(traces: Traces, name: str, max_points: int | None) -> NDArray[Any]:
    """A signal of every point (P,).

    Raises:
        InputError: If the traces do not have it everywhere.
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
    # A forced answer without tokens has no worst one.
    excused = (traces.answer == "") & (name == "worst_logprob")
    if column is None or (_unknown(column) & ~excused).any():
        raise InputError(
            f"column {name!r} is missing or has unknown values, but the head needs it: "
            "expected traces recorded with it, or a head without that feature group"
        )
    return column


def _unknown(column: NDArray[Any]) -> NDArray[np.bool_]:
    """Which points (P,) have a NaN in a column (P,) or (P, D)."""
    unknown: NDArray[np.bool_] = np.isnan(column if column.ndim == 1 else column.max(axis=1))
    return unknown


class ReplayEnv(BatchedEnv):
    """Many episodes of halting recorded traces, stepped together.

    ## Description
    An episode is one trace at one price. The LM's tokens do not depend on the halting decision,
    so a trace holds the reward of every halting time and replay is exact.

    ## Action space
    `Discrete(2)`: 0 continue, 1 halt.

    ## Observation space
    `Box`, float32: the standardised features of the point and the log price, see
    `haltwise.Observing`.

    ## Rewards
    A step pays price / 1000 for each token generated since the previous point (the probe
    included when probing is "always"); halting gains the EM of the forced answer; continuing at
    the last point pays for the rest and gains the final EM. No discount.

    ## Starting state
    The first point of a trace drawn from a shuffled pass over all traces that have points, at a
    price drawn log-uniformly from the observing's range.

    ## Episode end
    Terminated by halting or by continuing at the last point. Never truncated. The final info also
    holds the index of the trace.

    Args:
        traces: What to replay.
        observing: How features become observations.
        halting: The conditions: how probing is paid for, how many points there can be.
        num_envs: Episodes in the batch.
        price: A fixed price for every episode instead of a random one.

    Raises:
        InputError: If no trace has a decision point, or a signal or limit does not fit.
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
        self._observing = observing
        self._halting = halting
        self._fixed_price = price
        self.load(traces)

    def load(self, traces: Traces) -> None:
        """Lays out every point's observation, costs and EM, to replay these traces from a reset on.

        Raises:
            InputError: If no trace has a decision point, or a signal or limit does not fit.
        """
        self._obs = observations(traces, self._observing, self._halting)
        self._costs = step_costs(traces, self._halting.probing).astype(np.float64)
        self._ems = step_ems(traces)
        self._first = traces.offsets[:-1]
        self._last = traces.offsets[1:] - 1
        self._playable = np.flatnonzero(self._last >= self._first)
        if not len(self._playable):
            raise InputError("no trace has a decision point: there is nothing to decide")
        self._queue: Index = np.empty(0, dtype=np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float, dict[str, Any]]:
        """Starts every episode anew; observations (B, F + 1)."""
        super().reset(seed=seed)
        everyone = np.arange(self.num_envs)
        self._trace = np.empty(self.num_envs, dtype=np.int64)
        self._point = np.empty(self.num_envs, dtype=np.int64)
        self._price = np.empty(self.num_envs)
        self._dial = np.empty(self.num_envs, dtype=np.float32)
        self._spent = np.zeros(self.num_envs)
        self._start(everyone)
        return self._observe(), {}

    def step(
        self, actions: Index
    ) -> tuple[Float, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Continues (0) or halts (1) every episode; actions (B,)."""
        at = self._point
        cost = self._costs[at, actions]
        em = self._ems[at, actions]
        rewards = reward(em, cost, self._price)
        self._spent += cost
        done = (actions == 1) | (at == self._last[self._trace])
        infos: dict[str, Any] = {}
        self._point = at + 1
        rows = np.flatnonzero(done)
        if len(rows):
            final = {
                "em": em,
                "cost": self._spent.copy(),
                "halted": actions == 1,
                "price": self._price.copy(),
                "trace": self._trace.copy(),
            }
            infos = {"final_info": final, "_final_info": done}
            self._start(rows)
        return self._observe(), rewards, done, np.zeros_like(done), infos

    @property
    def price(self) -> NDArray[np.float64]:
        """Of the episodes that are being played (B,), in exact match per 1,000 tokens."""
        return self._price

    def _observe(self) -> Float:
        obs = self._obs[self._point]
        obs[:, -1] = self._dial
        return obs

    def _start(self, rows: Index) -> None:
        self._trace[rows] = self._draw(len(rows))
        self._point[rows] = self._first[self._trace[rows]]
        self._spent[rows] = 0
        if self._fixed_price is not None:
            price = np.full(len(rows), self._fixed_price)
        else:
            price = self._observing.draw_price(self.np_random, len(rows))
        self._price[rows] = price
        self._dial[rows] = self._observing.dial(price)

    def _draw(self, num: int) -> Index:
        """The next traces of an endless series of shuffled passes."""
        while len(self._queue) < num:
            self._queue = np.append(self._queue, self.np_random.permutation(self._playable))
        drawn, self._queue = np.split(self._queue, [num])
        return drawn
