"""The replay environment as one writes it first: one episode at a time, in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.replay import point_features
from envs.single import spaces
from haltwise import Observing
from traces import Traces

Float = NDArray[np.float32]


@dataclass(frozen=True)
class PlainEpisode:
    """A trace with L decision points, L at least 1."""

    obs: Float
    """(L, F + 1) the observations; the log price in the last column is yet to be filled in."""
    position: list[int]
    """The number of thinking tokens up to each point."""
    probe_tokens: list[int]
    """The number of tokens of each forced answer."""
    correct: list[bool]
    """The EM of each forced answer."""
    num_tokens: int
    """The number of tokens when never halted."""
    final_correct: bool
    """The EM when never halted."""


def episodes_of(traces: Traces, observing: Observing) -> list[PlainEpisode]:
    """Returns an episode of every trace that has decision points."""
    features = point_features(traces, observing.groups, projection=observing.projection)
    obs = observing.observe(features, 1.0)
    episodes = []
    for n, (first, end) in enumerate(zip(traces.offsets[:-1], traces.offsets[1:], strict=True)):
        if first < end:
            episodes.append(
                PlainEpisode(
                    obs[first:end],
                    traces.position[first:end].tolist(),
                    traces.probe_tokens[first:end].tolist(),
                    traces.correct[first:end].tolist(),
                    int(traces.num_tokens[n]),
                    bool(traces.final_correct[n]),
                )
            )
    return episodes


class PlainReplayEnv(gym.Env[Any, Any]):
    """The same MDP as `ReplayEnv` when probing is "always", and the same episodes for a seed.

    Args:
        episodes: The episodes to replay.
        observing: How features become observations, and prices are drawn.
    """

    def __init__(self, episodes: list[PlainEpisode], observing: Observing) -> None:
        """Sets the spaces of observations and actions."""
        self.observation_space, self.action_space = spaces(observing)
        self._episodes = episodes
        self._observing = observing
        self._waiting: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float, dict[str, Any]]:
        """Starts the next episode.

        Args:
            seed: The series of episodes that belongs to this seed begins; None goes on with the
                series that is being played.
            options: There are none, and they are ignored.

        Returns:
            The first observation (F + 1,), and an empty info.
        """
        super().reset(seed=seed)
        if seed is not None or not self._waiting:
            self._waiting = self.np_random.permutation(len(self._episodes)).tolist()[::-1]
        self._episode = self._episodes[self._waiting.pop()]
        self._point = 0
        self._price = float(self._observing.draw_price(self.np_random, 1)[0])
        self._dial = float(self._observing.dial(self._price))
        return self._observe(), {}

    def step(self, action: int) -> tuple[Float, float, bool, bool, dict[str, Any]]:
        """Continues (0) or halts (1).

        Returns:
            The next observation (F + 1,), the reward, whether the episode has ended, False, and an
            empty info.
        """
        episode, i = self._episode, self._point
        before = episode.position[i - 1] if i else 0
        cost = episode.position[i] - before + episode.probe_tokens[i]
        em = False
        is_last = i == len(episode.position) - 1
        if action == 1:
            em = episode.correct[i]
        elif is_last:
            em = episode.final_correct
            cost += episode.num_tokens - episode.position[i]
        ended = action == 1 or is_last
        self._point = i if ended else i + 1
        return self._observe(), em - self._price * cost / 1000, bool(ended), False, {}

    def _observe(self) -> Float:
        obs: Float = self._episode.obs[self._point].copy()
        obs[-1] = self._dial
        return obs
