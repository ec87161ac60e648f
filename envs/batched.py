"""What all environments share, and the form of those that play many episodes at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from haltwise import Observing
from haltwise.policy.head import CLIP
from haltwise.policy.signals import Float, Index


def spaces(observing: Observing) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    """The observation and action space of one episode."""
    low = np.full(observing.size, -CLIP, dtype=np.float32)
    high = np.full(observing.size, CLIP, dtype=np.float32)
    return gym.spaces.Box(low, high), gym.spaces.Discrete(2)


class BatchedEnv(VectorEnv[Float, Index, NDArray[Any]]):
    """Many episodes of halting, stepped together.

    A finished episode starts anew in the same step; `infos["final_info"]` then holds arrays (B,)
    about the finished ones, which `infos["_final_info"]` marks: em, cost, halted, price and more.

    Args:
        observing: How features become observations.
        num_envs: Episodes in the batch.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, observing: Observing, num_envs: int) -> None:
        """Sets the spaces."""
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spaces(observing)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    @abstractmethod
    def price(self) -> NDArray[np.float64]:
        """Of the episodes that are being played (B,), in exact match per 1,000 tokens."""
