"""A batched environment as stable-baselines3's VecEnv."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from agents.balance import balance
from envs.batched import BatchedEnv
from haltwise import Observing


class BalancedVecEnv(VecEnv):
    """Passes whole batches through; for environments that restart episodes in the same step.

    The agent is paid the environment's rewards times the episode's weight, see `balance`.

    The info of a finished episode holds "halt" (what the environment tells of it), "episode" and
    "terminal_observation" (stable-baselines3's own: its return before any weight and its length
    in decisions; and its last observation).
    """

    def __init__(self, env: BatchedEnv, observing: Observing, seed: int | None = None) -> None:
        """Wraps an environment; the seed is used at the first reset."""
        self.env = env
        self._observing = observing
        self._seed = seed
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._return = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, dtype=np.int64)

    def reset(self) -> VecEnvObs:
        """Starts every episode anew."""
        obs: VecEnvObs = self.env.reset(seed=self._seed)[0]
        self._seed = None
        self._return[:] = 0
        self._length[:] = 0
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Steps the whole batch."""
        weight = balance(self.env.price, self._observing)
        obs, rewards, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        self._return += rewards
        self._length += 1
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(done):
            final = {name: values[row] for name, values in infos["final_info"].items()}
            episode = {"r": float(self._return[row]), "l": int(self._length[row]), "t": 0.0}
            last = infos["final_obs"][row]
            rows[row] = {"halt": final, "episode": episode, "terminal_observation": last}
        self._return[done] = 0
        self._length[done] = 0
        return obs, (rewards * weight).astype(np.float32), done, rows

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The environment's attribute, once for each episode asked for."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the environment, which all episodes share."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        """Calls a method of the environment, which all episodes share."""
        result = getattr(self.env, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """Never: wrappers of single episodes do not apply to a batch."""
        return [False] * len(list(self._get_indices(indices)))
