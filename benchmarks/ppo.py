"""The speed of PPO on replay, beside PPO on plain environments that take one step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.fit import learn
from agents.ppo import PPOConfig, make_ppo
from benchmarks.environment import benchmark_observing, replay_env
from benchmarks.plain_env import PlainEpisode, PlainReplayEnv, episodes_of
from benchmarks.timing import BenchResult, rate, take_turns
from haltwise import Observing
from traces import Traces


@dataclass(frozen=True)
class PPOBenchConfig:
    """How fast PPO trains, on one core."""

    settings: PPOConfig = field(default_factory=lambda: PPOConfig(total_timesteps=262_144))
    """The settings of our agent, on ReplayEnv and on plain environments."""
    default_num_envs: int = 8
    """The number of plain environments for stable-baselines3 with its own settings."""
    default_timesteps: int = 32_768
    """The number of decisions that stable-baselines3 with its own settings learns from."""


def measure(traces: Traces, config: PPOBenchConfig, repeats: int) -> list[BenchResult]:
    """Measures environment steps a second, updates included; each time a new agent begins."""
    observing = benchmark_observing(traces)
    episodes = episodes_of(traces, observing)
    num_envs, num_default = config.settings.num_envs, config.default_num_envs
    ours = f"ReplayEnv of {num_envs}, our settings"
    same = f"DummyVecEnv of {num_envs}, our settings"
    default = f"DummyVecEnv of {num_default}, SB3's settings"
    contestants = {
        ours: partial(_ours, traces, observing, config.settings, None),
        same: partial(_ours, traces, observing, config.settings, episodes),
        default: partial(_default, episodes, observing, num_default, config.default_timesteps),
    }
    found = take_turns("ppo", "steps/s", contestants, repeats)
    ratios = [found[ours].over(found[other]) for other in (same, default)]
    return [*found.values(), *ratios]


def _ours(
    traces: Traces, observing: Observing, settings: PPOConfig, episodes: list[PlainEpisode] | None
) -> float:
    """Measures our agent on ReplayEnv, or on plain environments if there are episodes for them."""
    env = replay_env(traces, observing, settings.num_envs)
    mean_points = traces.num_points / len(traces)
    ppo = make_ppo(env, observing, settings, mean_points=mean_points, seed=0)
    if episodes is not None:
        ppo.set_env(_plain(episodes, observing, settings.num_envs))

    def train() -> int:
        learn(ppo, settings.total_timesteps, "benchmark", None, progress_bar=False)
        return ppo.num_timesteps

    return rate(train)


def _default(
    episodes: list[PlainEpisode], observing: Observing, num_envs: int, total_timesteps: int
) -> float:
    ppo = PPO("MlpPolicy", _plain(episodes, observing, num_envs), seed=0, device="cpu")
    return rate(lambda: ppo.learn(total_timesteps).num_timesteps)


def _plain(episodes: list[PlainEpisode], observing: Observing, num_envs: int) -> DummyVecEnv:
    env = DummyVecEnv([partial(PlainReplayEnv, episodes, observing)] * num_envs)
    env.seed(0)
    return env
