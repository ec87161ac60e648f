"""The whole path through the scripts' own `main`: train, export, evaluate."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
import train
from agents.fit import FitConfig
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig
from command import alone
from evaluation.results import Report
from evaluation.training_curve import THIRDS
from haltwise import HaltHead, InputError
from runs import Run
from tests.conftest import trace_row
from traces import read_traces, write_shard
from train import TrainConfig

ROOT = Path(__file__).parent.parent
SMALL = FitConfig(
    PathwiseConfig(steps=20, batch_size=32),
    PPOConfig(total_timesteps=512, num_envs=16, n_steps=16, batch_size=64, net_width=8),
)
LIVE = PPOConfig(total_timesteps=192, num_envs=8, n_steps=8, batch_size=32, net_width=8)


@pytest.fixture
def config(random_traces_path: Path, tmp_path: Path) -> TrainConfig:
    """Traces of all three splits, and a run folder that is not there yet."""
    return TrainConfig(
        traces=random_traces_path, run_dir=tmp_path / "run", folds=2, seeds=2, fit=SMALL
    )


@pytest.fixture(scope="module")
def run_dir(random_traces_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on those traces."""
    folder = tmp_path_factory.mktemp("train") / "run"
    return train.main(
        TrainConfig(traces=random_traces_path, run_dir=folder, folds=2, seeds=2, fit=SMALL)
    )


def curves(run_dir: Path, name: str) -> set[str]:
    """The names of TensorBoard's curves in a folder of a run."""
    events = EventAccumulator(str(run_dir / "tensorboard" / name))
    events.Reload()
    return set(events.Tags()["scalars"])


@pytest.mark.whole
def test_a_run_folder_is_complete(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.json",
        "head.json",
        "head.safetensors",
        "operating_points.json",
        "out_of_fold.json",
        "out_of_fold.png",
        "replay.safetensors",
        "tensorboard",
        "test.json",
        "test.png",
    }
    written = json.loads((run_dir / "config.json").read_text())
    assert written["versions"]["torch"] and written["command"] and written["traces"]
    head, learned = HaltHead.load(run_dir), read_traces(written["traces"])
    assert head.config.traces == learned.of_split("train", "dev").digest
    assert list(run_dir.glob("tensorboard/replay*/events*"))
    assert curves(run_dir, "start") == {"start/loss", "start/return"}
    of_gates = {f"folds/{name}_{gate}" for name in ("em_change", "saving") for gate in (0.0, 0.01)}
    by_price = {f"{of}_{third}_price" for of in ("em", "tokens") for third in THIRDS}
    over_training = {f"train/{name}" for name in {"return", "area"} | by_price}
    of_gates |= {"folds/return", "folds/area"}
    assert curves(run_dir, "folds") == of_gates | over_training
    assert curves(run_dir, "folds_start") == over_training


@pytest.mark.whole
def test_the_trade_off_over_the_training_is_in_the_results_and_on_the_page(run_dir: Path) -> None:
    content = Run(run_dir).out_of_fold()
    curve = content["curve"]
    assert [(at["ppo"], at["step"]) for at in curve] == [
        *((False, step) for step in (0, 2, 5, 10, 15, 20)),
        *((True, step) for step in (0, 128, 256, 512)),
    ]
    assert curve[5] | {"ppo": True, "step": 0} == curve[6]  # PPO begins where the start ends
    for k, at in enumerate(curve[6:]):
        areas = [trial["area"] for trial in content["trials"] if trial["checkpoint"] == k]
        assert at["area"] <= np.mean(areas)  # of a tenth of the prices
    assert sum(at["taken"] for at in curve[6:]) == 1
    written = json.loads((run_dir / "test.json").read_text())
    assert written["curve"] == curve
    assert "Over the training" in (run_dir / "test.html").read_text()


def test_points_are_chosen_on_train_and_dev_out_of_fold(run_dir: Path) -> None:
    content = json.loads((run_dir / "out_of_fold.json").read_text())
    heads = [row for row in content["rows"] if row["policy"] == "head"]
    assert len(heads) == 75  # prices
    points = json.loads((run_dir / "operating_points.json").read_text())["gates"]
    for gate, by_policy in points.items():
        allowed = [r for r in heads if r["em_delta"] >= -float(gate) - 1e-12 and r["saving"] > 0]
        best = max(allowed, key=lambda r: r["saving"], default={"parameter": None})
        assert by_policy["head"] == best["parameter"]


@pytest.mark.whole
def test_test_questions_change_nothing(config: TrainConfig, run_dir: Path, tmp_path: Path) -> None:
    assert config.traces is not None and config.run_dir is not None
    spoiled = tmp_path / "spoiled.parquet"
    _spoil_test_rows(config.traces, spoiled)
    first, second = (
        HaltHead.load(run_dir),
        HaltHead.load(train.main(replace(config, traces=spoiled))),
    )
    assert all((first.weights[k] == second.weights[k]).all() for k in first.weights)
    assert first.config.default_price == second.config.default_price
    names = ("operating_points.json", "out_of_fold.json")
    assert all((run_dir / n).read_bytes() == (config.run_dir / n).read_bytes() for n in names)


def _spoil_test_rows(source: Path, target: Path) -> None:
    table = pq.read_table(source)
    is_test = np.array(table["split"].to_pylist()) == "test"
    final = np.array(table["final_correct"].to_pylist()) ^ is_test
    at = table.schema.get_field_index("final_correct")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(final)), target)


@pytest.mark.whole
def test_an_interrupted_run_goes_on(config: TrainConfig, run_dir: Path) -> None:
    names = ("head.json", "operating_points.json", "out_of_fold.json", "head.safetensors")
    before = [(run_dir / name).read_bytes() for name in names]
    for name in (*names, "folds/0-1.npy"):
        (run_dir / name).unlink()
    train.main(replace(config, run_dir=run_dir, resume=True))
    assert [(run_dir / name).read_bytes() for name in names] == before


def test_a_run_that_was_begun_with_other_settings_says_with_which(
    config: TrainConfig, run_dir: Path
) -> None:
    asked = replace(config, run_dir=run_dir, resume=True, seeds=config.seeds + 1)
    with pytest.raises(InputError, match=r"with these settings .*the same; seeds differ$"):
        train.main(asked)


def test_a_run_is_trained_by_one_process_at_a_time(config: TrainConfig, run_dir: Path) -> None:
    with alone(Run(run_dir).tensorboard), pytest.raises(InputError, match="another process writes"):
        train.main(replace(config, run_dir=run_dir, resume=True))


def test_a_run_folder_is_not_overwritten(config: TrainConfig) -> None:
    assert config.run_dir is not None
    config.run_dir.mkdir()
    with pytest.raises(InputError, match="exists"):
        train.main(config)
    with pytest.raises(
        InputError, match=r"not begun with these settings and traces: expected the same$"
    ):
        train.main(replace(config, resume=True))
    assert not list(config.run_dir.iterdir())


def recorded_every(num_tokens: int, path: Path) -> Path:
    """Traces of 30 questions with a point every 50 tokens, or those of a coarser rule alone."""
    rng, rows = np.random.default_rng(0), []
    for n in range(30):
        right = rng.random(8) < np.linspace(0.2, 0.9, 8)
        at = {
            "position": [50 * (k + 1) for k in range(8)],
            "probe_tokens": [3] * 8,
            "answer": ["7" if is_right else "3" for is_right in right],
            "correct": right.tolist(),
            "confidence": np.where(right, 0.9, rng.random(8)).tolist(),
            "answer_logprobs": [[-0.1]] * 8,
        }
        coarse = slice(num_tokens // 50 - 1, None, num_tokens // 50)
        about = {"trace_id": f"t{n}", "question_id": f"q{n}", "split": ("train", "test")[n % 2]}
        rows.append(trace_row(**about, **{name: column[coarse] for name, column in at.items()}))
    write_shard(path, rows, {"decision_rule": f"every {num_tokens} tokens", "close_text": "so"})
    return path


@pytest.mark.whole
def test_a_coarser_rule_learns_and_is_judged_as_on_a_recording_of_its_own(
    config: TrainConfig, tmp_path: Path
) -> None:
    dense, coarse = (recorded_every(num, tmp_path / f"{num}.parquet") for num in (50, 100))
    config = replace(config, seeds=1)
    own = train.main(replace(config, traces=coarse, run_dir=tmp_path / "own"))
    ruled = train.main(replace(config, traces=dense, rule="every 100 tokens"))
    for name in ("head.safetensors", "operating_points.json"):
        assert (own / name).read_bytes() == (ruled / name).read_bytes()
    one, other = (
        evaluate.main(evaluate.EvaluateConfig(head=ruled, traces=path)) for path in (dense, coarse)
    )
    assert isinstance(one, Report) and isinstance(other, Report)
    assert one.rows == other.rows


def test_what_does_not_go_together_is_refused(config: TrainConfig) -> None:
    with pytest.raises(InputError, match="--live"):
        train.main(replace(config, live=True))
    with pytest.raises(InputError, match="--run-dir"):
        train.main(replace(config, resume=True, run_dir=None))
    with pytest.raises(InputError, match="--folds is 1, --max-traces is 0: expected at least 2, 1"):
        train.main(replace(config, folds=1, max_traces=0))
    with pytest.raises(InputError, match="--seed is 2147483647, expected 0 to 2147483645"):
        train.main(replace(config, seed=2**31 - 1, seeds=2))
    with pytest.raises(InputError, match="--every is 0, expected at least 1"):
        train.main(replace(config, traces=None, every=0))
    with pytest.raises(InputError, match=r"device 'abacus'.*; expected --device cpu, or"):
        train.main(replace(config, traces=None, device="abacus"))
    for change, told in (
        ({"batch_size": 1}, "--fit.ppo.batch-size is 1, expected at least 2"),
        ({"learning_rate": 0.0}, "--fit.ppo.learning-rate is 0.0, expected positive"),
        ({"ent_coef": float("nan")}, "--fit.ppo.ent-coef is nan, expected 0 or more"),
        ({"target_kl": -1.0}, "--fit.ppo.target-kl is -1.0, expected positive"),
        ({"gae_lambda": 1.5}, "--fit.ppo.gae-lambda is 1.5, expected between 0 and 1"),
    ):
        with pytest.raises(InputError, match=told):
            train.main(replace(config, fit=replace(SMALL, ppo=replace(SMALL.ppo, **change))))
    with pytest.raises(InputError, match=r"--fit\.pathwise\.batch-size is 0, expected at least 1"):
        pathwise = replace(SMALL.pathwise, batch_size=0)
        train.main(replace(config, fit=replace(SMALL, pathwise=pathwise)))
    with pytest.raises(InputError, match=r"--live-ppo\.net-width is 9, .*net-width 8"):
        train.main(replace(config, traces=None, live_ppo=replace(LIVE, net_width=9)))
    with pytest.raises(InputError, match="probing at_halt shows no forced answer"):
        train.main(replace(config, probing="at_halt", groups=("pace", "agreement")))
    with pytest.raises(InputError, match="mood"):
        train.main(replace(config, groups=("mood",)))
    with pytest.raises(InputError, match="expected at least 50"):
        train.main(replace(config, folds=50))
    with pytest.raises(InputError, match="recorded under '': expected 'every K tokens'"):
        train.main(replace(config, rule="every 7 tokens"))
    with pytest.raises(InputError, match="is none that can be run"):
        train.main(replace(config, rule="now and then"))
    with pytest.raises(InputError, match="--groups: feature groups: found mood, expected some of"):
        train.main(replace(config, groups=("mood",)))
    assert config.run_dir is not None and not config.run_dir.exists()


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (1.0, ""),
        (0.25, "In the folds, more of PPO made the head no better: PPO ends after 25% of it.\n"),
        (0.0, "In the folds, PPO made the head no better: the head stays as it was before PPO.\n"),
    ],
)
def test_a_training_that_ends_early_says_so(
    share: float, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "fit", MagicMock())
    train._train_replay(TrainConfig(), MagicMock(), MagicMock(), MagicMock(), share)
    assert capsys.readouterr().out == told


@pytest.mark.whole
@pytest.mark.parametrize("live", [False, True])
def test_the_embedded_lm_from_recording_to_running_beside_it(
    live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_CHECKPOINTS", tmp_path)
    config = TrainConfig(
        live=live, num_questions=10, max_tokens=200, folds=2, seeds=1, fit=SMALL, live_ppo=LIVE
    )
    run_dir = train.main(config)
    assert run_dir.parent == tmp_path
    recording = HaltHead.load(run_dir).config.recording
    assert [recording[name] for name in ("engine", "temperature", "max_tokens")] == [
        "hf",
        0.75,
        200,
    ]
    assert (run_dir / "live.safetensors").exists()
    assert list(run_dir.glob("tensorboard/live*/events*"))
    assert (run_dir / "replay.safetensors").exists() != live
    report = evaluate.main(evaluate.EvaluateConfig(head=run_dir))
    assert isinstance(report, Report) and report.traces.num == 10


@pytest.mark.whole
def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--traces", tmp_path / "no.parquet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no.parquet" in done.stderr
