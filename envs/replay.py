"""The replay environment: halting decisions on recorded traces, thousands of episodes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.batched import BatchedEnv
from envs.reward import reward, step_costs, step_ems
from haltwise import FeatureState, InputError, Observing, Signals, answer_keys, feature_names
from haltwise.features import Float, Index
from haltwise.halting import Probing
from traces import Traces


def point_features(traces: Traces, groups: tuple[str, ...]) -> Float:
    """Features (P, F) of every point of every trace, by the same code that serves.

    All traces are streamed side by side, one point a round.

    Raises:
        InputError: If the traces lack a signal that a group needs.
    """
    if "confidence" in groups and np.isnan(traces.confidence).any():
        raise InputError(
            "column 'confidence' has unknown values, but the head needs it: "
            "expected traces recorded with confidences, or a head without that group"
        )
    state = FeatureState(len(traces), groups)
    features = np.empty((traces.num_points, len(feature_names(groups))), dtype=np.float32)
    lengths = np.diff(traces.offsets)
    keys = answer_keys(traces.answer.tolist())
    for i in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > i)
        at = traces.offsets[rows] + i
        signals = Signals(traces.position[at], traces.confidence[at], keys[at])
        features[at] = state.update(signals, rows)
    return features


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
        probing: See `haltwise.Halting`.
        num_envs: Episodes in the batch.
        price: A fixed price for every episode instead of a random one.

    Raises:
        InputError: If no trace has a decision point.
    """

    def __init__(
        self,
        traces: Traces,
        observing: Observing,
        probing: Probing,
        num_envs: int,
        price: float | None = None,
    ) -> None:
        """Lays out every point's observation, costs and EM."""
        super().__init__(observing, num_envs)
        self._observing = observing
        self._fixed_price = price
        self._obs = observing.observe(point_features(traces, observing.groups), 1.0)
        self._costs = step_costs(traces, probing).astype(np.float64)
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
