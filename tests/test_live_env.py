from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_by_sb3

import envs  # noqa: F401
from envs.live import Episode, HaltEnv, LiveEnv
from haltwise import FEATURE_GROUPS, MEAN_LOGPROB, Halting, InputError, Observing, feature_names
from haltwise.halting import Probing
from lms.language_model import LanguageModel
from lms.tasks import Question
from tests.tiny_lm import IDS, ScriptedLM, tiny_lm, tiny_tokenizer

QUESTIONS = [
    Question(f"q{i}", "toy", "easy", f"{i} so {i + 1} <think>", str(i), "train") for i in range(6)
]


def observing(groups: tuple[str, ...] = tuple(FEATURE_GROUPS)) -> Observing:
    size = len(feature_names(groups))
    return Observing(groups, (0.0,) * size, (1.0,) * size, (0.1, 10.0))


def halting(
    probing: Probing = "always", rule: str = "every 4 tokens", max_answer_tokens: int = 2
) -> Halting:
    return Halting(probing, rule, "</think>", MEAN_LOGPROB, max_answer_tokens)


def tiny() -> LanguageModel:
    return LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "lm": tiny(),
        "questions": QUESTIONS,
        "halting": halting(),
        "observing": observing(),
        "max_tokens": 40,
        "temperature": 0.9,
    } | changes


def worked_example() -> LanguageModel:
    """Thinks until 550, with points at 100, 250 and 400, and answers 7; at 100 still 3."""
    prompt, probe_tokens = 2, {100: 10, 250: 12, 400: 11}

    def next_token(token: int, position: int) -> int:
        generated = position + 2 - prompt  # with the next token
        if token == IDS["</think>"]:
            return IDS["3"] if generated < 110 else IDS["7"]
        if token in (IDS["3"], IDS["7"], IDS["so"]):
            # One token more than the probe: the close text is no part of it.
            ends = {at + num + 1 for at, num in probe_tokens.items()} | {600}
            return IDS["<eos>"] if generated in ends else IDS["so"]
        return IDS["wait" if generated in probe_tokens else "</think>" if generated == 550 else "."]

    return LanguageModel("scripted", ScriptedLM(next_token), tiny_tokenizer())


@pytest.mark.parametrize(
    ("probing", "halt_at", "cost", "value"),
    [
        ("always", 0, 110, -0.055),
        ("always", 1, 272, 0.864),
        ("always", 2, 433, 0.7835),
        ("always", None, 633, 0.6835),
        ("at_halt", 0, 110, -0.055),
        ("at_halt", 1, 262, 0.869),
        ("at_halt", 2, 411, 0.7945),
        ("at_halt", None, 600, 0.7),
    ],
)
def test_the_worked_example(probing: Probing, halt_at: int | None, cost: int, value: float) -> None:
    question = Question("q", "toy", "easy", "5 <think>", "7", "train")
    env = HaltEnv(
        worked_example(),
        [question],
        halting(probing, "after wait", max_answer_tokens=20),
        observing(tuple(FEATURE_GROUPS) if probing == "always" else ("pace",)),
        max_tokens=700,
        price=0.5,
    )
    env.reset(seed=0)
    rewards, over, i = [], False, 0
    while not over:
        _, step_reward, over, truncated, info = env.step(np.int64(i == halt_at))
        assert not truncated
        rewards.append(step_reward)
        i += 1
    assert sum(rewards) == pytest.approx(value)
    assert (info["cost"], info["halted"]) == (cost, halt_at is not None)
    assert info["em"] == (halt_at != 0)
    if probing == "always":
        paid = [-0.055, -0.081, -0.0805][: len(rewards)]
        paid[-1] += {0: 0.0, None: -0.1 + 1}.get(halt_at, 1.0)
        assert rewards == pytest.approx(paid)


def test_the_checkers_pass() -> None:
    env = gym.make("haltwise/Halt-v0", **arguments())
    check_env(env.unwrapped)
    check_env_by_sb3(env.unwrapped)


def play(env: LiveEnv, num_steps: int, seed: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """Random halting: all that the env returned, and the finished episodes with their rewards."""
    rng, seen, finished = np.random.default_rng(seed), [env.reset()], []
    returns = np.zeros(env.num_envs)
    for _ in range(num_steps):
        obs, rewards, over, infos = env.step((rng.random(env.num_envs) < 0.3).astype(np.int64))
        seen += [obs, rewards, over]
        returns += rewards
        for i in np.flatnonzero(over):
            finished.append(infos[i] | {"return": returns[i]})
        returns[over] = 0
        assert obs.dtype == np.float32 and np.isfinite(obs).all()
        assert [bool(info) for info in infos] == over.tolist()
    return seen, finished


@pytest.mark.parametrize("probing", ["always", "at_halt"])
def test_returns_are_exact_match_minus_price_times_cost(probing: Probing) -> None:
    groups = tuple(FEATURE_GROUPS) if probing == "always" else ("pace",)
    env = LiveEnv(
        **arguments(halting=halting(probing), observing=observing(groups)), num_envs=9, seed=3
    )
    _, finished = play(env, 40, seed=0)
    assert len(finished) > 50
    assert {info["halted"] for info in finished} == {True, False}
    assert {info["em"] for info in finished} == {True, False}
    for info in finished:
        assert info["return"] == pytest.approx(info["em"] - info["price"] * info["cost"] / 1000)
        assert 0.1 <= info["price"] <= 10
        assert info["cost"] > 0


def test_one_seed_decides_everything() -> None:
    first, _ = play(LiveEnv(**arguments(), num_envs=5, seed=7), 15, seed=1)
    second, _ = play(LiveEnv(**arguments(), num_envs=5, seed=7), 15, seed=1)
    other, _ = play(LiveEnv(**arguments(), num_envs=5, seed=8), 15, seed=1)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_batch_plays_the_same_episodes_as_one_env() -> None:
    """The same draws and actions give the same observations and rewards, alone or together."""
    batch = LiveEnv(**arguments(), num_envs=4, seed=2)
    obs = batch.reset()
    seen: list[tuple[list[Any], float]] = []
    histories: list[list[Any]] = [[row] for row in obs]
    returns = np.zeros(4)
    infos_seen = []
    for step in range(12):
        actions = (np.arange(4) + step) % 3 == 0
        obs, rewards, over, infos = batch.step(actions.astype(np.int64))
        returns += rewards
        for i in range(4):
            if over[i]:
                np.testing.assert_array_equal(infos[i]["terminal_observation"], histories[i][-1])
                seen.append((histories[i], returns[i]))
                infos_seen.append(infos[i])
                histories[i], returns[i] = [], 0
            histories[i].append(obs[i])
    assert len(seen) > 10
    env = HaltEnv(**arguments())
    for (history, value), info in zip(seen, infos_seen, strict=True):
        (question,) = (q for q in QUESTIONS if q.question_id == info["question_id"])
        obs_alone, total = replayed(env, question, info, len(history))
        np.testing.assert_allclose(obs_alone, history, atol=1e-5)
        assert total == pytest.approx(value, abs=1e-9)


def replayed(
    env: HaltEnv, question: Question, info: dict[str, Any], num_points: int
) -> tuple[list[Any], float]:
    """Plays one known episode alone, through the env's own table."""

    class Known:
        def next(self, price: float | None) -> Episode:
            return Episode(question, info["seed"], info["price"])

    env._draws = Known()  # type: ignore[assignment]
    obs, _ = env.reset()
    history, total, over = [obs], 0.0, False
    while not over:
        action = info["halted"] and len(history) == num_points
        obs, value, over, _, _ = env.step(np.int64(action))
        total += value
        if not over:
            history.append(obs)
    return history, total


def test_bad_input_is_refused() -> None:
    empty_gold = [Question("q9", "toy", "easy", "1 <think>", " ", "train")]
    for changes, message in (
        ({"questions": []}, "no questions"),
        ({"questions": empty_gold}, "question q9: gold answer ' ' is empty"),
        ({"price": 0.0}, "price is 0.0"),
        ({"halting": halting("at_halt")}, r"features \['confidence', 'agreement'\] need"),
    ):
        with pytest.raises(InputError, match=message):
            HaltEnv(**arguments(**changes))
    with pytest.raises(InputError, match=r"expected 'price' or none"):
        HaltEnv(**arguments()).reset(options={"prize": 1.0})
    with pytest.raises(InputError, match="price is -1"):
        HaltEnv(**arguments()).reset(options={"price": -1.0})


def test_questions_without_a_point_are_skipped_but_not_for_ever() -> None:
    with pytest.raises(InputError, match="questions in a row ended before their first"):
        HaltEnv(**arguments(halting=halting(rule="after never"), max_tokens=2)).reset(seed=0)
    with pytest.raises(InputError, match="questions in a row ended before their first"):
        LiveEnv(**arguments(halting=halting(rule="after never"), max_tokens=2), num_envs=9).reset()
    env = HaltEnv(**arguments(halting=halting(rule="every 12 tokens")))
    assert all(env.reset(seed=seed)[0].shape == (16,) for seed in range(5))


def test_the_price_can_be_chosen_for_one_episode() -> None:
    env = HaltEnv(**arguments())
    assert env.reset(seed=0, options={"price": 10.0})[0][-1] == pytest.approx(1.0)
    assert env.step(np.int64(1))[4]["price"] == 10.0
    assert env.reset()[0][-1] != pytest.approx(1.0)
