"""The stopping rule in real algorithms of stable-baselines3, on a bandit."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import KVWriter, Logger

from haltwise import InputError
from haltwise.training import Returns, StoppingConfig
from haltwise.training.averaging import BestWeights
from haltwise.training.sb3 import StoppingCallback

CONTEXTS = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
POINTS = StoppingConfig(level=None, least_gain=0.01, patience=2)


class Bandit(gymnasium.Env[Any, Any]):
    """Pays 1 for the arm that a number calls for, its sign: the optimum is 1."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._seen = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self._seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._seen, float((self._seen[0] > 0) == action), True, False, {}


def returns_of(model: BaseAlgorithm) -> Returns:
    """The probability of the right arm, in 20 contexts."""
    policy: Any = model.policy
    with torch.no_grad():
        prob = policy.get_distribution(torch.from_numpy(CONTEXTS)).distribution.probs.numpy()
    found: Returns = np.where(CONTEXTS[:, 0] > 0, prob[:, 1], prob[:, 0])
    return found


def make_ppo(**settings: Any) -> PPO:
    torch.set_num_threads(1)
    usual: dict[str, Any] = {
        "n_steps": 64, "batch_size": 32, "n_epochs": 4, "learning_rate": 3e-3, "gamma": 0.0,
        "seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]},
    }  # fmt: skip
    return PPO("MlpPolicy", Bandit(), **usual | settings)


class Told(KVWriter):
    """What a logger is told."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        if "train/held_out_return" in key_values:
            self.curve.append(key_values["train/held_out_return"])

    def close(self) -> None:
        pass


@pytest.mark.whole
def test_it_stops_at_the_optimum_and_keeps_the_best_policy() -> None:
    config = StoppingConfig(least_gain=0.01, interval="normal")
    best = BestWeights(3)
    callback = StoppingCallback(config, returns_of, every=256, best=best)
    ppo, told = make_ppo(), Told()
    ppo.set_logger(Logger(None, [told]))
    ppo.learn(30_000, callback)
    curve = callback.rule.curve
    assert callback.rule.is_over and ppo.num_timesteps < 15_000
    assert curve.means[0] < 0.7 and max(curve.means) > 0.9
    assert np.mean(np.asarray(returns_of(ppo))) >= best.means[0] - 1e-6 and best.means[0] == max(
        curve.means
    )
    # The evaluation that stops it is in no rollout's log, as there is none after it.
    assert told.curve == pytest.approx(curve.means[: len(told.curve)]) and len(told.curve) > 5


def test_a_plateau_lowers_the_rate_of_its_own_schedule_and_cools_down() -> None:
    config = StoppingConfig(
        level=None, least_gain=10.0, patience=1, reductions=1, factor=0.5, cooldown_steps=128
    )
    callback = StoppingCallback(config, returns_of, every=64)
    ppo = make_ppo(learning_rate=lambda left: 1e-3 * left)
    rates = []
    update = ppo.train

    def train() -> None:
        update()
        rates.append(ppo.policy.optimizer.param_groups[0]["lr"])

    ppo.train = train  # type: ignore[method-assign]
    ppo.learn(640, callback)
    # It is evaluated at 0, 64 (reduces), 128 (cools down), and stops 128 later.
    assert rates == pytest.approx([0.9e-3, 0.4e-3, 0.035e-3, 0.03e-3])
    assert callback.rule.is_over and ppo.lr_schedule(0.5) == pytest.approx(0.5e-3)
    assert callback.rule.curve.steps[:4] == [0, 64, 128, 192]


def test_a_plateau_raises_the_batch_size() -> None:
    config = StoppingConfig(
        level=None, least_gain=10.0, patience=1, reductions=1, reduce="noise", most_steps=128
    )
    seen = []

    def noting(model: Any) -> Returns:
        seen.append(model.batch_size)
        return returns_of(model)

    ppo = make_ppo()
    ppo.learn(640, StoppingCallback(config, noting, every=64))
    assert seen == [32, 32, 64] and ppo.batch_size == 32
    with pytest.raises(InputError, match="A2C has no batch size, expected reduce to be rate"):
        A2C("MlpPolicy", Bandit()).learn(5, StoppingCallback(config, returns_of, every=64))


def test_a_budget_of_tokens_or_a_vanished_gradient_stops_it() -> None:
    ppo, budget = make_ppo(), StoppingConfig(patience=None, token_budget=150)
    callback = StoppingCallback(budget, returns_of, every=64, num_tokens=lambda: ppo.num_timesteps)
    ppo.learn(640, callback)
    assert callback.rule.latest.reason.startswith("at step 192 its 192 tokens have used up")
    ppo, floor = make_ppo(), StoppingConfig(patience=None, gradient_floor=1e9, gradient_steps=3)
    callback = StoppingCallback(floor, returns_of, every=64)
    ppo.learn(640, callback)
    assert callback.rule.is_over and ppo.num_timesteps == 3 * 64 + 1


def test_it_stops_algorithms_that_learn_off_policy() -> None:
    def greedy(model: BaseAlgorithm) -> Returns:
        actions, _ = model.predict(CONTEXTS, deterministic=True)
        return np.where(actions == (CONTEXTS[:, 0] > 0), 1.0, 0.0)

    dqn = DQN(
        "MlpPolicy", Bandit(), learning_starts=50, learning_rate=1e-2, gamma=0.0, seed=0,
        policy_kwargs={"net_arch": [8]}, device="cpu",
    )  # fmt: skip
    callback = StoppingCallback(POINTS, greedy, every=200, best=BestWeights(1))
    dqn.learn(4000, callback)
    assert callback.rule.is_over and dqn.num_timesteps < 4000
    assert np.mean(np.asarray(greedy(dqn))) == max(callback.rule.curve.means) > 0.9


def test_an_interrupted_training_is_saved_and_goes_on_at_its_own_rates(tmp_path: Path) -> None:
    config = StoppingConfig(level=None, least_gain=10.0, patience=1, reductions=9, factor=0.5)
    ppo = make_ppo(learning_rate=1e-3)

    def interrupting(model: BaseAlgorithm) -> Returns:
        if model.num_timesteps >= 192:
            raise KeyboardInterrupt
        return returns_of(model)

    saving = CheckpointCallback(100, str(tmp_path), "ppo")
    with pytest.raises(KeyboardInterrupt):
        ppo.learn(640, [StoppingCallback(config, interrupting, every=64), saving])
    again = PPO.load(tmp_path / "ppo_100_steps", Bandit())
    assert (ppo.lr_schedule(1.0), again.lr_schedule(1.0)) == pytest.approx((0.25e-3, 1e-3))
    ppo.learn(64, StoppingCallback(config, returns_of, every=64), reset_num_timesteps=False)
    assert ppo.lr_schedule(1.0) == 1e-3


def test_evaluations_need_some_decisions_between_them() -> None:
    with pytest.raises(InputError, match="every is 0, expected at least 1"):
        StoppingCallback(POINTS, returns_of, every=0)
