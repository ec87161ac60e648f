"""What a single episode looks like from outside: the form of `HaltEnv` and `TraceEnv`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from envs.series import check_price
from haltwise import InputError, Observing
from haltwise.policy.head import CLIP
from haltwise.policy.signals import Float

#: What is told of an episode that is over, by name.
Ended = dict[str, Any]


def spaces(observing: Observing) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    """The observation space and the action space of one episode."""
    low = np.full(observing.size, -CLIP, dtype=np.float32)
    high = np.full(observing.size, CLIP, dtype=np.float32)
    return gym.spaces.Box(low, high), gym.spaces.Discrete(2)


class SingleEnv(gym.Env[NDArray[Any], np.int64]):
    """One episode of halting at a time.

    The last step's info tells how the episode ended: em (bool), cost in tokens (int), halted
    (bool), price (float), question_id (str), seed (int, of the LM's sampling), answer (str, the
    one that counts), num_points (int, decision points seen) and position (int, thinking tokens
    at the last of them). All other infos are empty.

    Args:
        observing: How features become observations.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, observing: Observing) -> None:
        """Sets the spaces."""
        self.observation_space, self.action_space = spaces(observing)
        self._is_playing = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float, dict[str, Any]]:
        """Begins the next episode, at its first decision point.

        Args:
            seed: Begins the series of episodes that belongs to this seed; None goes on with the
                series.
            options: {"price": p} plays this one episode at the price p.

        Returns:
            The observation (F + 1,), and an empty info.

        Raises:
            InputError: If there is another option, or the price is not positive and finite.
        """
        super().reset(seed=seed)
        options = options or {}
        if options.keys() - {"price"}:
            raise InputError(f"reset options {sorted(options)}: expected 'price' or none")
        check_price(options.get("price"))
        if seed is not None:
            self._restart()
        self._is_playing = False
        obs = self._begin(options.get("price"))
        self._is_playing = True
        return obs, {}

    def step(self, action: np.int64) -> tuple[Float, float, bool, bool, dict[str, Any]]:
        """Continues (0) or halts (1) at the decision point that was observed.

        Returns:
            The observation (F + 1,), at the end once more that of the last decision point; the
            reward; whether the episode is over; False, since nothing is ever truncated; and what
            is told of an episode that is over.

        Raises:
            InputError: If no episode is being played, or the action is neither 0 nor 1.
        """
        if not self._is_playing:
            raise InputError("step without an episode: expected reset before, and after each end")
        if action not in (0, 1):
            raise InputError(f"action is {action}, expected 0 (continue) or 1 (halt)")
        obs, value, ended = self._act(halts=bool(action))
        self._is_playing = ended is None
        return obs, value, ended is not None, False, ended or {}

    @abstractmethod
    def _restart(self) -> None:
        """Begins the series of episodes anew, with a generator that was just seeded."""

    @abstractmethod
    def _begin(self, price: float | None) -> Float:
        """Begins the next episode, at some price if one is named; its first observation."""

    @abstractmethod
    def _act(self, halts: bool) -> tuple[Float, float, Ended | None]:
        """Continues or halts; observation, reward, and what is told if the episode is over."""
