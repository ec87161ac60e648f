"""Makes a batched environment a VecEnv, which is what stable-baselines3 trains on."""

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
    """Passes whole batches on to an environment that restarts episodes in the same step.

    The agent is paid the environment's rewards times the episode's weight, see `balance`.

    The info of a finished episode holds "halt", which is what the environment tells of it, and
    two entries that stable-baselines3 expects: "episode", with its return before any weight and
    its length in decisions, and "terminal_observation", its last observation.
    """

    def __init__(self, env: BatchedEnv, observing: Observing, seed: int | None = None) -> None:
        """Wraps an environment.

        Args:
            env: The environment.
            observing: The environment's observing, whose price range the weights depend on.
            seed: The seed that the environment is reset with for the first time; None resets it
                without one.
        """
        self.env = env
        self._observing = observing
        self._seed = seed
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._return = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, dtype=np.int64)

    def reset(self) -> VecEnvObs:
        """Drops all episodes and begins new ones; returns their first observations (B, F + 1)."""
        obs: VecEnvObs = self.env.reset(seed=self._seed)[0]
        self._seed = None
        self._return[:] = 0
        self._length[:] = 0
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions (B,), 0 to continue and 1 to halt, for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Takes the actions that were kept.

        Returns:
            Observations (B, F + 1), of the next episode where one is over; weighted rewards (B,);
            which episodes are over (B,); and an info for each, empty unless it is over.
        """
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
        """Returns an attribute of the environment, once for each episode asked for."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the environment, which all episodes share."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        """Calls a method of the environment, which all episodes share.

        Returns:
            What the method returned, once for each episode asked for.
        """
        result = getattr(self.env, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        """Returns False for each episode asked for: a batch has no wrappers of single episodes."""
        return [False] * len(list(self._get_indices(indices)))
