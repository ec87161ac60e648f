from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.halt_env import HaltEnv
from envs.live import LiveEnv
from envs.replay import RecordedSteps, point_features
from envs.reward import reward, step_costs, step_ems
from haltwise import FEATURE_GROUPS, InputError, feature_names
from haltwise.engine.decoder import Decoder
from haltwise.policy.features import signals_of
from haltwise.policy.halting import Probing
from haltwise.policy.signals import Float
from lms.language_model import LanguageModel
from lms.questions import Question
from recording.hf_engine import record
from tests.envs.live_cases import MAX_POINTS, PROJECTION, QUESTIONS, arguments, halting, observing
from tests.tiny_lm import IDS, ScriptedLM, tiny_lm, tiny_tokenizer
from traces import TraceFiles, write_shard

# Which observations are hidden states; the last one is the price.
HIDDEN = np.array([name.startswith("hidden_") for name in (*feature_names(FEATURE_GROUPS), "")])


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
    question = Question("q", "toy", "easy", "5", "7", "train")
    env = HaltEnv(
        worked_example(),
        [question],
        halting(probing, "after wait", max_answer_tokens=20),
        # The scripted LM's states are too small for "hidden".
        observing(tuple(FEATURE_GROUPS)[:-1] if probing == "always" else ("pace",)),
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


@dataclass
class Played:
    """A finished episode of a batch."""

    info: dict[str, Any]
    obs: list[Float]
    rewards: list[float]


def play(env: LiveEnv, num_steps: int, seed: int, halt_rate: float = 0.3) -> list[Played]:
    """Halts at random."""
    rng, finished = np.random.default_rng(seed), []
    obs, _ = env.reset(seed=seed)
    playing = [Played({}, [row], []) for row in obs]
    for _ in range(num_steps):
        actions = (rng.random(env.num_envs) < halt_rate).astype(np.int64)
        price = env.price
        obs, rewards, over, truncated, infos = env.step(actions)
        assert obs in env.observation_space
        assert not truncated.any()
        assert bool(infos) == over.any()
        for i in range(env.num_envs):
            playing[i].rewards.append(rewards[i])
            if over[i]:
                final = {name: values[i] for name, values in infos["final_info"].items()}
                assert final["price"] == price[i]
                assert final["halted"] == actions[i]
                np.testing.assert_array_equal(infos["final_obs"][i], playing[i].obs[-1])
                playing[i].info = final
                finished.append(playing[i])
                playing[i] = Played({}, [], [])
            playing[i].obs.append(obs[i])
    return finished


@pytest.mark.whole
@pytest.mark.parametrize("probing", ["always", "at_halt"])
def test_returns_are_exact_match_minus_price_times_cost(probing: Probing) -> None:
    groups = tuple(FEATURE_GROUPS) if probing == "always" else ("pace", "hidden")
    changes = arguments(halting=halting(probing), observing=observing(groups))
    finished = play(LiveEnv(**changes, num_envs=9), 40, seed=0)
    assert len(finished) > 50
    infos = [episode.info for episode in finished]
    assert {info["halted"] for info in infos} == {info["em"] for info in infos} == {True, False}
    for episode in finished:
        info = episode.info
        value = info["em"] - info["price"] * info["cost"] / 1000
        assert sum(episode.rewards) == pytest.approx(value, abs=1e-12)
        assert 0.1 <= info["price"] <= 10
        assert len(episode.rewards) == info["num_points"]


@pytest.mark.whole
def test_one_seed_decides_everything() -> None:
    runs = [play(LiveEnv(**arguments(), num_envs=5), 15, seed) for seed in (7, 7, 8)]
    assert [episode.info for episode in runs[0]] != [episode.info for episode in runs[2]]
    for first, second in zip(runs[0], runs[1], strict=True):
        assert first.info == second.info
        np.testing.assert_array_equal(first.obs, second.obs)


@pytest.mark.parametrize(
    ("temperature", "rule"),
    [
        (0.0, "every 4 tokens"),
        (0.9, "every 4 tokens"),
        (0.9, "every 8 tokens, every 2 while the answer repeats"),
    ],
)
@pytest.mark.whole
def test_live_and_replay_agree(temperature: float, rule: str, tmp_path: Path) -> None:
    """The same questions and seeds, recorded alone: the same observations and rewards."""
    lm = LanguageModel("tiny", tiny_lm(seed=2), tiny_tokenizer())
    conditions = halting(rule=rule)
    asking = arguments(lm=lm, temperature=temperature, halting=conditions)
    finished = play(LiveEnv(**asking, num_envs=9), 30, 1, halt_rate=0.1)
    asked = {q.question_id: q for q in QUESTIONS}
    work = {(e.info["question_id"], e.info["seed"]): e for e in finished}
    dense = replace(conditions, decision_rule="every 2 tokens")
    decoder = Decoder(
        lm.model, lm.tokenizer, dense, 4, 40, temperature, signals=signals_of(FEATURE_GROUPS)
    )
    jobs = [(asked[question_id], int(seed)) for question_id, seed in work]
    recorder = {"decision_rule": "every 2 tokens"}
    write_shard(tmp_path / "0.parquet", list(record(lm, decoder, jobs)), recorder)
    files = TraceFiles.open(tmp_path).under(conditions.decision_rule)
    traces = files.read(files.rows())
    assert np.diff(traces.offsets).max() == MAX_POINTS
    gaps = {2, 8} if "repeats" in rule else {4}
    assert set(np.diff(traces.position)[np.diff(traces.trace_of_point) == 0]) == gaps
    features = point_features(traces, tuple(FEATURE_GROUPS), MAX_POINTS, PROJECTION)
    steps = RecordedSteps(traces, observing(), conditions)
    costs, ems = step_costs(traces, "always"), step_ems(traces)
    assert len(traces) > 20
    for n in range(len(traces)):
        episode = work[traces.question_id[n], traces.seed[n]]
        num, price = len(episode.obs), episode.info["price"]
        at = traces.offsets[n] + np.arange(num)
        expected = observing().observe(features[at], price)
        # Hidden states are rounded to half precision: a last bit of the LM's can move them by one.
        for columns, atol in ((~HIDDEN, 1e-5), (HIDDEN, 1e-3)):
            obs = np.array(episode.obs)[:, columns]
            np.testing.assert_allclose(obs, expected[:, columns], atol=atol)
        actions = np.zeros(num, dtype=np.int64)
        actions[-1] = episode.info["halted"]
        np.testing.assert_allclose(
            episode.rewards, reward(ems[at, actions], costs[at, actions], price), atol=1e-5
        )
        if not actions[-1]:
            assert traces.offsets[n] + num == traces.offsets[n + 1]
        told = steps.told(np.array([n]), at[-1:], actions[-1:] == 1)
        unknown = {"trace"} if actions[-1] else {"trace", "answer"}
        assert told["trace"] == [n]
        for name in told.keys() - unknown:
            assert told[name] == [episode.info[name]]


def test_one_env_plays_the_episodes_of_a_batch() -> None:
    batch = LiveEnv(**arguments(), num_envs=1)
    (first, *_) = play(batch, 30, seed=4, halt_rate=0.0)
    env = HaltEnv(**arguments())
    obs, _ = env.reset(seed=4)
    for i, value in enumerate(first.rewards):
        np.testing.assert_array_equal(obs, first.obs[i])
        obs, step_reward, over, _, info = env.step(np.int64(0))
        assert step_reward == value
    assert over
    assert info == first.info


def test_a_reset_without_a_seed_goes_on_with_the_questions() -> None:
    """Within one pass no question is asked twice."""
    for seed in range(9):
        env = LiveEnv(**arguments(), num_envs=1)
        env.reset(seed=seed)
        asked = [env._playing()[0].question.question_id]
        for _ in range(2):
            env.reset()
            asked.append(env._playing()[0].question.question_id)
        assert len(set(asked)) == 3


def test_bad_input_is_refused() -> None:
    empty_gold = [Question("q9", "toy", "easy", "1", " ", "train")]
    for changes, message in (
        ({"questions": []}, "no questions"),
        ({"questions": empty_gold}, "question q9: gold answer ' ' is empty"),
        ({"price": 0.0}, "price is 0.0"),
        (
            {"halting": halting("at_halt")},
            "shows no forced answer: .* no feature group confidence, tokens, agreement",
        ),
    ):
        with pytest.raises(InputError, match=message):
            HaltEnv(**arguments(**changes))
    with pytest.raises(InputError, match=r"expected 'price' or none"):
        HaltEnv(**arguments()).reset(options={"prize": 1.0})
    with pytest.raises(InputError, match="price is -1"):
        HaltEnv(**arguments()).reset(options={"price": -1.0})


@pytest.mark.whole
def test_questions_without_a_point_are_skipped_but_not_for_ever() -> None:
    with pytest.raises(InputError, match="questions in a row ended before their first"):
        HaltEnv(**arguments(halting=halting(rule="after never"), max_tokens=2)).reset(seed=0)
    with pytest.raises(InputError, match="questions in a row ended before their first"):
        LiveEnv(**arguments(halting=halting(rule="after never"), max_tokens=2), num_envs=9).reset()
    env = HaltEnv(**arguments(halting=halting(rule="every 12 tokens")))
    assert all(env.reset(seed=seed)[0].shape == (observing().size,) for seed in range(5))


def test_the_price_can_be_chosen_for_one_episode() -> None:
    env = HaltEnv(**arguments())
    assert env.reset(seed=0, options={"price": 10.0})[0][-1] == pytest.approx(1.0)
    assert env.step(np.int64(1))[4]["price"] == 10.0
    assert env.reset()[0][-1] != pytest.approx(1.0)
