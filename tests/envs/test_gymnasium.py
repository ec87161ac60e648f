"""The environments are what users of Gymnasium and stable-baselines3 expect."""

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as check_env_by_sb3

import envs  # noqa: F401
from envs.halt_env import HaltEnv
from envs.live import LiveEnv
from envs.replay import ReplayEnv
from envs.trace_env import TraceEnv
from haltwise import InputError
from tests.envs.live_cases import arguments, halting, observing
from traces import Traces

LIVE, REPLAY = "haltwise/Halt-v0", "haltwise/Replay-v0"
SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}
Arguments = dict[str, dict[str, Any]]


@pytest.fixture
def of_env(random_traces: Traces) -> Arguments:
    """By environment, what it is made with."""
    seen = {"observing": observing(("pace", "confidence")), "halting": halting()}
    return {LIVE: arguments(**seen), REPLAY: {"traces": random_traces, **seen}}


@pytest.mark.parametrize("name", [LIVE, REPLAY])
def test_the_checkers_pass(name: str, of_env: Arguments) -> None:
    env = gym.make(name, **of_env[name])
    assert type(env.unwrapped) is {LIVE: HaltEnv, REPLAY: TraceEnv}[name]
    check_env(env.unwrapped)
    check_env_by_sb3(env.unwrapped)


def ended(env: VectorEnv[Any, Any, Any]) -> dict[str, Any]:
    """The infos of the first step in which some of the episodes are over, and not all."""
    env.reset(seed=1)
    for step in range(20):
        halts = np.zeros(env.num_envs, dtype=np.int64)
        halts[0] = step == 1
        _, _, over, _, infos = env.step(halts)
        assert ("final_info" in infos) == over.any()
        if over.any() and not over.all():
            assert (infos["_final_obs"] == over).all() and (infos["_final_info"] == over).all()
            return infos
    raise AssertionError("no such step")


@pytest.mark.parametrize("name", [LIVE, REPLAY])
def test_a_batch_tells_what_gymnasiums_own_batch_of_the_single_environment_tells(
    name: str, of_env: Arguments
) -> None:
    """Names, types and values; Gymnasium packs each last observation into an object."""
    batch = gym.make_vec(name, num_envs=3, **of_env[name])
    assert type(batch.unwrapped) is {LIVE: LiveEnv, REPLAY: ReplayEnv}[name]
    assert batch.spec is not None and batch.spec.id == name
    plain = gym.make_vec(
        name, num_envs=3, vectorization_mode="sync", vector_kwargs=SAME_STEP, **of_env[name]
    )
    assert batch.observation_space == plain.observation_space
    assert batch.action_space == plain.action_space
    ours, theirs = ended(batch), ended(plain)
    assert ours.keys() == theirs.keys()
    masks = {f"_{key}" for key in ours["final_info"]}
    assert ours["final_info"].keys() == theirs["final_info"].keys() - masks
    for key, column in ours["final_info"].items():
        assert column.shape == (3,) and column.dtype == theirs["final_info"][key].dtype
        assert not column[~ours["_final_info"]].any()
    assert ours["final_obs"].shape == batch.observation_space.shape
    batch.close()


def test_replay_and_live_tell_the_same(of_env: Arguments) -> None:
    live, replay = (
        ended(gym.make_vec(name, num_envs=3, **of_env[name])) for name in (LIVE, REPLAY)
    )
    assert live.keys() == replay.keys()
    assert replay["final_info"].keys() - live["final_info"].keys() == {"trace"}
    for key, column in live["final_info"].items():
        assert column.dtype == replay["final_info"][key].dtype


@pytest.mark.parametrize("name", [LIVE, REPLAY])
def test_gymnasiums_wrappers_of_batches_run(name: str, of_env: Arguments) -> None:
    env = DictInfoToList(RecordEpisodeStatistics(gym.make_vec(name, num_envs=3, **of_env[name])))
    env.reset(seed=0)
    totals, lengths, seen = np.zeros(3), np.zeros(3), 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        _, rewards, over, _, infos = env.step(rng.integers(2, size=3))
        totals, lengths = totals + rewards, lengths + 1
        for i in range(3):
            assert bool(infos[i]) == over[i]
            if over[i]:
                assert infos[i]["episode"]["r"] == pytest.approx(totals[i])
                assert infos[i]["episode"]["l"] == infos[i]["final_info"]["num_points"]
                assert infos[i]["final_obs"] in env.single_observation_space
                totals[i] = lengths[i] = 0
                seen += 1
    assert seen > 10


def test_a_step_needs_an_episode(of_env: Arguments) -> None:
    for env in (HaltEnv(**of_env[LIVE]), TraceEnv(**of_env[REPLAY])):
        with pytest.raises(InputError, match="step without an episode: expected reset before"):
            env.step(np.int64(0))
        env.reset(seed=0)
        env.step(np.int64(1))
        with pytest.raises(InputError, match="step without an episode"):
            env.step(np.int64(0))
    for batch in (LiveEnv(**of_env[LIVE], num_envs=2), ReplayEnv(**of_env[REPLAY], num_envs=2)):
        with pytest.raises(InputError, match="step without episodes: expected reset before"):
            batch.step(np.zeros(2, dtype=np.int64))


@pytest.mark.parametrize("name", [LIVE, REPLAY])
def test_bad_arguments_are_told_in_one_line(name: str, of_env: Arguments) -> None:
    env, batch = gym.make(name, **of_env[name]), gym.make_vec(name, num_envs=2, **of_env[name])
    env.reset(seed=0)
    batch.reset(seed=0)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("num_envs is 0", lambda: gym.make_vec(name, num_envs=0, **of_env[name])),
        ("price is -1.0", lambda: gym.make(name, **of_env[name], price=-1.0)),
        ("price is -1.0", lambda: gym.make_vec(name, num_envs=2, **of_env[name], price=-1.0)),
        ("price is 0.0", lambda: env.reset(options={"price": 0.0})),
        (r"options \['prize'\]: expected 'price'", lambda: env.reset(options={"prize": 1.0})),
        (r"options \['price'\]: expected none", lambda: batch.reset(options={"price": 1.0})),
        ("action is 2, expected 0", lambda: env.unwrapped.step(np.int64(2))),
        ("an action is -1, expected 0", lambda: batch.step(np.array([1, -1]))),
        (r"actions have shape \(3,\), expected \(2,\)", lambda: batch.step(np.zeros(3))),
    ]
    for message, call in refused:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_every_environment_has_gymnasiums_sections() -> None:
    sections = ["Description", "Action space", "Observation space", "Rewards", "Starting state"]
    for env in (HaltEnv, TraceEnv):
        assert env.__doc__ is not None
        found = re.findall(r"^    ## (.*)$", env.__doc__, re.MULTILINE)
        assert found == [*sections, "Episode end", "Arguments"]
