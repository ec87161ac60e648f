"""What the environments that play one episode at a time have in common."""

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

#: By name, what is told of an episode that is over.
Ended = dict[str, Any]


def spaces(observing: Observing) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    """Returns the observation space and the action space of one episode."""
    low = np.full(observing.size, -CLIP, dtype=np.float32)
    high = np.full(observing.size, CLIP, dtype=np.float32)
    return gym.spaces.Box(low, high), gym.spaces.Discrete(2)


class SingleEnv(gym.Env[NDArray[Any], np.int64]):
    """One episode of halting at a time: the form of `HaltEnv` and `TraceEnv`.

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
            The observation (F + 1,) at the next decision point, or once more at the last one if
            the episode is over; the reward; whether the episode is over; False, since nothing is
            ever truncated; and an info, empty unless the episode is over.

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
        """Begins the next episode, at the price that is named, if one is.

        Returns:
            The observation (F + 1,) at its first decision point.
        """

    @abstractmethod
    def _act(self, halts: bool) -> tuple[Float, float, Ended | None]:
        """Halts or continues.

        Returns:
            The observation (F + 1,), the reward, and what is told of the episode if it is over.
        """
