"""Benchmarks measure what they say; how fast anything is, is no test."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.ppo import PPOConfig
from benchmarks import memory, overhead, wall_clock
from benchmarks.environment import GROUPS, EnvironmentConfig, benchmark_observing, replay_env
from benchmarks.memory import MemoryConfig
from benchmarks.overhead import OverheadConfig
from benchmarks.plain_env import PlainReplayEnv, episodes_of
from benchmarks.ppo import PPOBenchConfig
from benchmarks.recorder import RecorderConfig, long_questions
from benchmarks.run import BenchConfig, main
from benchmarks.synthetic import synthetic_rows, synthetic_traces
from benchmarks.timing import rate, take_turns
from benchmarks.wall_clock import WallClockConfig
from command import run
from envs.replay import point_features
from haltwise import MEAN_LOGPROB, Halting
from haltwise.engine.decoder import Decoder
from lms.embedded import EMBEDDED, prompt_of
from lms.language_model import LanguageModel
from recording.hf_engine import record
from traces import Traces, read_traces

TINY = BenchConfig(
    parts=("environment", "ppo", "recorder"),
    repeats=2,
    environment=EnvironmentConfig(num_envs=(2, 4), seconds=0.001),
    ppo=PPOBenchConfig(
        PPOConfig(total_timesteps=32, num_envs=4, n_steps=4, batch_size=8, n_epochs=1), 1, 1
    ),
    recorder=RecorderConfig(num_batches=2, batch_size=2, every=8, max_tokens=17),
)
STEPPING = [
    "gymnasium.Env in a loop",
    "DummyVecEnv of 8",
    "ReplayEnv of 2",
    "ReplayEnv of 4",
    "ReplayEnv of 4 / gymnasium.Env in a loop",
    "ReplayEnv of 4 / DummyVecEnv of 8",
]
TRAINING = [
    "ReplayEnv of 4, our settings",
    "DummyVecEnv of 4, our settings",
    "DummyVecEnv of 1, SB3's settings",
    "ReplayEnv of 4, our settings / DummyVecEnv of 4, our settings",
    "ReplayEnv of 4, our settings / DummyVecEnv of 1, SB3's settings",
]
RECORDING = [
    "transformers generate",
    "Decoder without probes",
    "record, probes only",
    "record, probes and signals",
    "time: record, probes only / transformers generate",
    "time: record, probes only / Decoder without probes",
    "time: record, probes and signals / transformers generate",
    "time: record, probes and signals / Decoder without probes",
]


@pytest.fixture(scope="module")
def synthetic() -> Traces:
    return synthetic_traces(300)


def test_synthetic_traces_look_like_recorded_ones(synthetic: Traces) -> None:
    lengths = np.diff(synthetic.offsets)
    assert len(synthetic) == 300 and lengths.min() == 0 and lengths.max() == 30
    assert 11 < lengths.mean() < 16
    assert synthetic.confidence[synthetic.correct].mean() > 0.8
    assert np.isfinite(point_features(synthetic, GROUPS)).all()


def test_synthetic_traces_are_the_same_every_time() -> None:
    assert list(synthetic_rows(20)) == list(synthetic_rows(30))[:20]


def test_the_plain_environment_plays_the_same_episodes(synthetic: Traces) -> None:
    observing = benchmark_observing(synthetic)
    batched = replay_env(synthetic, observing, 1)
    plain = PlainReplayEnv(episodes_of(synthetic, observing), observing)
    expected, obs = batched.reset(seed=3)[0][0], plain.reset(seed=3)[0]
    assert plain.observation_space.contains(obs)
    num_ended = {0: 0, 1: 0}
    for action in (np.random.default_rng(0).random(4000) < 0.1).astype(int).tolist():
        assert (obs == expected).all()
        rows, rewards, done, _, _ = batched.step(np.array([action]))
        obs, reward, terminated, truncated, _ = plain.step(action)
        assert reward == pytest.approx(rewards[0], abs=1e-12)
        assert terminated == done[0] and not truncated
        if terminated:
            num_ended[action] += 1
            obs, _ = plain.reset()
        expected = rows[0]
    # All traces with points have been played at least once.
    assert sum(num_ended.values()) > 300 and min(num_ended.values()) > 50


def test_a_seed_begins_the_same_series_of_plain_episodes_again(synthetic: Traces) -> None:
    observing = benchmark_observing(synthetic)
    plain = PlainReplayEnv(episodes_of(synthetic, observing), observing)
    series = [[plain.reset(seed=seed)[0].tolist() for seed in (3, None, None)] for _ in range(2)]
    assert series[0] == series[1] and series[0][0] != series[0][1]


@pytest.mark.whole
def test_questions_of_the_recorder_fill_the_budget_with_the_tokens_of_generate() -> None:
    lm = LanguageModel.load(EMBEDDED)
    model: Any = lm.model
    halting = Halting("always", "every 16 tokens", "</think>", MEAN_LOGPROB)
    decoder = Decoder(lm.model, lm.tokenizer, halting, 4, 65)
    asked = long_questions(lm, decoder, 6)
    rows = {row["question_id"]: row for row in record(lm, decoder, [(q, 0) for q in asked])}
    assert len(rows) == 6
    for question in asked:
        row = rows[question.question_id]
        assert (row["num_tokens"], row["position"]) == (65, [16, 32, 48, 64])
        prompt = torch.tensor([lm.tokenizer.encode(prompt_of(question), add_special_tokens=False)])
        ids = model.generate(prompt, do_sample=False, max_new_tokens=65)
        assert lm.tokenizer.decode(ids[0, prompt.shape[1] :]) == row["text"]


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str, value: float) -> float:
        order.append(name)
        return value + len(order)

    found = take_turns(
        "part", "s", {"a": lambda: contestant("a", 10), "b": lambda: contestant("b", 20)}, 3
    )
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found["a"].values == (11, 14, 15) and found["b"].values == (22, 23, 26)
    assert found["a"].median == 14
    ratio = found["b"].over(found["a"])
    assert (ratio.name, ratio.unit, ratio.values) == ("b / a", "x", (22 / 11, 23 / 14, 26 / 15))


def test_a_rate_is_work_over_time() -> None:
    clock = iter([10.0, 10.5, 11.0, 12.0])
    assert rate(lambda: 3, seconds=1.5, clock=lambda: next(clock)) == 9 / 2.0


def test_a_head_that_never_halts_is_timed_beside_the_same_tokens() -> None:
    config = OverheadConfig(lms=("embedded",), batch_sizes=(1, 2), num_tokens=20, every=8)
    results = overhead.measure(config, repeats=2)
    assert [result.name for result in results] == [
        f"{prefix}embedded, batch {size}: {what}"
        for size in (1, 2)
        for prefix, what in (
            ("", "generate"),
            ("", "with a head"),
            ("time: ", "with a head / without"),
        )
    ]
    assert min(value for result in results for value in result.values) > 0


@pytest.mark.whole
def test_tokens_saved_do_not_depend_on_how_many_run_at_once() -> None:
    config = WallClockConfig(num_questions=4, num_slots=2, batch_sizes=(2,), max_tokens=120)
    results = wall_clock.measure(config, repeats=1)
    for head in ("probing head", "head that does not probe"):
        saved = [r.median for r in results if r.name.endswith(f"{head}: tokens saved")]
        assert len(saved) == 3 and 20 < saved[0] < 90
        assert saved == pytest.approx([saved[0]] * 3, abs=1e-9)


@pytest.mark.whole
def test_parts_yield_their_lines_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.json"
    main(BenchConfig(**vars(TINY) | {"json": path}))
    report = json.loads(path.read_text())
    assert report["traces"] == "synthetic"
    assert [result["name"] for result in report["results"]] == [
        *STEPPING, *STEPPING, *TRAINING, *RECORDING
    ]  # fmt: skip
    for result in report["results"]:
        assert len(result["values"]) == 2
        assert np.isfinite(result["values"]).all() and min(result["values"]) > 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name}  " in printed for name in (*STEPPING, *TRAINING, *RECORDING))
    for heading in ("environment, never halting", "environment, halting at 0.1", "ppo", "recorder"):
        assert f"\n{heading}\n" in printed


def test_memory_is_a_peak_by_number_and_a_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {"load": 50.0, "write": 100.0, "record": 200.0, "read": 300.0}
    monkeypatch.setattr(memory, "peak", lambda job, num, folder: fake[job] + num / 10)
    results = memory.measure(MemoryConfig(num_traces=(10, 1_010), num_questions=(20, 30)))
    assert {result.name: result.median for result in results} == {
        "libraries loaded, nothing done": 50,
        "write synthetic traces: 10": 101,
        "write synthetic traces: 1,010": 201,
        "write synthetic traces: each 1,000 more": 100,
        "record the embedded LM: 20": 202,
        "record the embedded LM: 30": 203,
        "read synthetic traces and train: 10": 301,
        "read synthetic traces and train: 1,010": 401,
        "read synthetic traces and train: each 1,000 more": 100,
    }


def test_memory_jobs_do_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = PPOConfig(num_envs=4, n_steps=4, batch_size=8, n_epochs=1)
    monkeypatch.setattr(memory, "PPOConfig", lambda: tiny)
    memory.write(20, tmp_path / "synthetic")
    memory.read(20, tmp_path / "synthetic")
    memory.record_embedded(2, tmp_path / "embedded")
    assert len(read_traces(tmp_path / "embedded")) == 2


@pytest.mark.whole
def test_a_peak_is_that_of_the_job_alone(tmp_path: Path) -> None:
    ballast = np.ones(125_000_000)  # 1,000 MB that a job must not be charged for
    found = memory.peak("write", 5, tmp_path)
    assert 50 < found < ballast.nbytes / 1e6
    assert len(read_traces(tmp_path)) == 5


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--repeats", "0"], "repeats"),
        (["--traces", "missing.parquet"], "missing.parquet"),
        (["--json", "missing/bench.json"], "missing/bench.json"),
        (["--recorder.batch-size", "0"], "recorder.batch_size is 0"),
        (["--environment.num-envs", "8", "-1"], "environment.num_envs"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(
    flags: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run(main, BenchConfig)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


def test_an_unknown_part_ends_with_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--parts", "disk"])
    with pytest.raises(SystemExit) as ended:
        run(main, BenchConfig)
    assert ended.value.code == 2
