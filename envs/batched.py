"""What the environments that step many episodes together have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from envs.single import spaces
from haltwise import InputError, Observing
from haltwise.policy.signals import Float, Index

Mask = NDArray[np.bool_]


class BatchedEnv(VectorEnv[Float, Index, NDArray[Any]]):
    """Many episodes of halting, stepped together: Gymnasium's `VectorEnv`, B episodes wide.

    An episode that ends is replaced by the next one in the same step (`AutoresetMode.SAME_STEP`).
    The infos of such a step tell of the episodes that are over:

    - `final_obs` (B, F + 1) float32 holds their last observations, `_final_obs` (B,) which
      episodes those are;
    - `final_info` holds, by name, arrays (B,) of what `SingleEnv` tells of an episode that is
      over, `_final_info` (B,) which episodes those are. Texts are in arrays of objects.

    The rows of the episodes that go on are zeros, and None for texts. The infos of a step in which
    no episode ends are empty. `LiveEnv` and `ReplayEnv` are the two environments of this form.

    Args:
        observing: How features become observations.
        num_envs: B, the number of episodes that are played at once.

    Raises:
        InputError: If `num_envs` is below 1.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, observing: Observing, num_envs: int) -> None:
        """Sets the spaces."""
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}, expected at least 1")
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = spaces(observing)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._is_playing = False

    @property
    @abstractmethod
    def price(self) -> NDArray[np.float64]:
        """The prices of the episodes that are being played (B,), in EM per 1,000 tokens."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float, dict[str, Any]]:
        """Drops all episodes and begins the next ones.

        Args:
            seed: Begins the series of episodes that belongs to this seed; None goes on with the
                series.
            options: Must be empty or None: a batch has no options.

        Returns:
            The observations (B, F + 1) at the first decision points, and an empty info.

        Raises:
            InputError: If there is an option.
        """
        super().reset(seed=seed)
        if options:
            raise InputError(f"reset options {sorted(options)}: expected none")
        if seed is not None:
            self._restart()
        self._is_playing = False
        obs = self._begin()
        self._is_playing = True
        return obs, {}

    def step(self, actions: Index) -> tuple[Float, NDArray[np.float64], Mask, Mask, dict[str, Any]]:
        """Continues (0) or halts (1) every episode.

        Args:
            actions: (B,) 0 to continue, 1 to halt.

        Returns:
            Observations (B, F + 1), of the next episode where one is over; rewards (B,); which
            episodes are over (B,); False (B,), since nothing is ever truncated; and infos.

        Raises:
            InputError: If there was no reset, or there are not B actions, each 0 or 1.
        """
        if not self._is_playing:
            raise InputError("step without episodes: expected reset before")
        halts = _halts(np.asarray(actions), self.num_envs)
        obs, rewards, over, infos = self._act(halts)
        return obs, rewards, over, np.zeros_like(over), infos

    @abstractmethod
    def _restart(self) -> None:
        """Begins the series of episodes anew, with a generator that was just seeded."""

    @abstractmethod
    def _begin(self) -> Float:
        """Begins the next B episodes; returns their first observations (B, F + 1)."""

    @abstractmethod
    def _act(self, halts: Mask) -> tuple[Float, NDArray[np.float64], Mask, dict[str, Any]]:
        """Halts some episodes (B,), continues the others, and replaces those that are over.

        Returns:
            Observations (B, F + 1), of the next episode where one is over; rewards (B,); which
            episodes are over (B,); and infos.
        """

    def _infos(self, rows: Index, obs: Float, told: Mapping[str, ArrayLike]) -> dict[str, Any]:
        """Returns the infos of a step in which the episodes of some rows ended.

        Args:
            rows: (N,) the indices of those rows.
            obs: (N, F + 1) the last observations of those episodes.
            told: By name, what is told of those episodes, each (N,).
        """
        over = np.zeros(self.num_envs, dtype=bool)
        over[rows] = True
        final = {name: self._spread(rows, np.asarray(of)) for name, of in told.items()}
        return {
            "final_obs": self._spread(rows, obs),
            "_final_obs": over,
            "final_info": final,
            "_final_info": over.copy(),
        }

    def _spread(self, rows: Index, values: NDArray[Any]) -> NDArray[Any]:
        """Returns an array (B, ...) with values (N, ...) in some rows (N,), and nothing elsewhere.

        Nothing is 0, or None for texts and objects.
        """
        shape = (self.num_envs, *values.shape[1:])
        if values.dtype.kind in "UO":
            spread = np.empty(shape, dtype=object)  # an empty array of objects is full of None
        else:
            spread = np.zeros(shape, dtype=values.dtype)
        spread[rows] = values
        return spread


def _halts(actions: NDArray[Any], num_envs: int) -> Mask:
    """Returns which episodes (B,) are halted by actions (B,).

    Raises:
        InputError: If there are not B actions, each 0 or 1.
    """
    if actions.shape != (num_envs,):
        raise InputError(f"actions have shape {actions.shape}, expected ({num_envs},)")
    halts: Mask = actions == 1
    known = halts | (actions == 0)
    if not known.all():
        raise InputError(f"an action is {actions[~known][0]}, expected 0 (continue) or 1 (halt)")
    return halts
