"""The speed of the replay environment, beside a plain environment that takes one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.plain_env import PlainReplayEnv, episodes_of
from benchmarks.timing import BenchResult, TimedWork, rate, take_turns
from envs.replay import ReplayEnv
from haltwise import Halting, Observing
from policies.observing import observing_of
from traces import Traces

#: The feature groups that every recording has the signals for.
GROUPS = ("pace", "confidence", "agreement")

# Replay needs to know how probing is paid for, and no more.
_HALTING = Halting("always", decision_rule="", close_text="", confidence_rule="")
_HALT_RATES = {"never halting": 0.0, "halting at 0.1": 0.1}
_NUM_DUMMY = 8
# The steps of every episode in one piece of work; drawing the actions is not measured.
_NUM_STEPS = 64


@dataclass(frozen=True)
class EnvironmentConfig:
    """How fast environments take steps, on one core."""

    num_envs: tuple[int, ...] = (256, 1024, 4096)
    """The batch sizes of ReplayEnv; ratios are for the middle one."""
    seconds: float = 0.5
    """The time of one measurement in seconds."""


def benchmark_observing(traces: Traces) -> Observing:
    """Returns what every benchmark observes of some traces."""
    return observing_of(traces, GROUPS, _HALTING)


def replay_env(traces: Traces, observing: Observing, num_envs: int) -> ReplayEnv:
    """Returns the replay environment that every benchmark plays."""
    return ReplayEnv(traces, observing, _HALTING, num_envs)


def measure(traces: Traces, config: EnvironmentConfig, repeats: int) -> list[BenchResult]:
    """Measures steps a second, for each way to act."""
    results = []
    for acting, halt_rate in _HALT_RATES.items():
        works = {
            "gymnasium.Env in a loop": _loop(traces, halt_rate),
            f"DummyVecEnv of {_NUM_DUMMY}": _dummy(traces, halt_rate),
        }
        plain = list(works)
        works |= {f"ReplayEnv of {n}": _replay(traces, n, halt_rate) for n in config.num_envs}
        contestants: dict[str, Callable[[], float]] = {
            name: partial(rate, work, config.seconds) for name, work in works.items()
        }
        found = take_turns(f"environment, {acting}", "steps/s", contestants, repeats)
        batched = found[f"ReplayEnv of {config.num_envs[len(config.num_envs) // 2]}"]
        results += [*found.values(), *(batched.over(found[name]) for name in plain)]
    return results


def _replay(traces: Traces, num_envs: int, halt_rate: float) -> TimedWork:
    env = replay_env(traces, benchmark_observing(traces), num_envs)
    env.reset(seed=0)
    actions = _actions(num_envs, halt_rate)

    def work() -> int:
        for batch in actions:
            env.step(batch)
        return actions.size

    return work


def _loop(traces: Traces, halt_rate: float) -> TimedWork:
    observing = benchmark_observing(traces)
    env = PlainReplayEnv(episodes_of(traces, observing), observing)
    env.reset(seed=0)
    actions = _actions(_NUM_DUMMY, halt_rate).ravel().tolist()

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(actions)

    return work


def _dummy(traces: Traces, halt_rate: float) -> TimedWork:
    observing = benchmark_observing(traces)
    episodes = episodes_of(traces, observing)
    env = DummyVecEnv([partial(PlainReplayEnv, episodes, observing)] * _NUM_DUMMY)
    env.seed(0)
    env.reset()
    actions = _actions(_NUM_DUMMY, halt_rate)

    def work() -> int:
        for batch in actions:
            env.step(batch)
        return actions.size

    return work


def _actions(num_envs: int, halt_rate: float) -> NDArray[np.int64]:
    """Returns actions (steps, B) that halt at random."""
    rng = np.random.default_rng(0)
    return (rng.random((_NUM_STEPS, num_envs)) < halt_rate).astype(np.int64)
