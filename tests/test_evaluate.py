import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import command
import evaluate
import evaluation.evaluate_run
from evaluate import EvaluateConfig
from evaluation.outcome import halt_outcome
from evaluation.plot import plot_frontiers
from evaluation.report import render
from evaluation.results import Report
from evaluation.table import format_table
from evaluation.wording import percent
from haltwise import HaltHead, InputError
from policies.baselines import BASELINES
from policies.head import HeadPolicy
from runs import Learned, Points, Run
from tests.conftest import random_rows
from tests.evaluation.reports import known, made, made_row
from traces import TraceFiles, Traces, write_shard

MakeTraces = Callable[..., Traces]
Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
POLICIES = {"head", *(policy.name for policy in BASELINES)}
RULES = {"never", "hindsight", "hindsight_give_up"}
KEYS = ["policy", "parameter", "split", "em", "em_delta", "tokens", "saving", "halt_rate"]
KEYS += ["right_to_wrong", "wrong_to_right", "hopeless_saving", "gave_up"]
KEYS += ["em_delta_interval", "saving_interval"]
FROZEN_KEYS = ["gate", "head_em_lead", "head_em_lead_interval", "head_saving_lead"]
FROZEN_KEYS += ["head_saving_lead_interval", "saving_at_head_em", "head_lead_at_equal_em"]
FROZEN_KEYS += ["head_lead_at_equal_em_interval", "hindsight_share", "hindsight_share_interval"]
FROZEN_KEYS += ["area"]


@pytest.fixture
def traces_path(random_traces_path: Path) -> Path:
    return random_traces_path


@pytest.fixture
def run_folder(run_head: HaltHead, tmp_path: Path) -> Path:
    """A run whose head, at its points, is stability with 2 and 1 equal answers."""
    run = tmp_path / "run"
    run_head.save(run)
    Run(run).save_learned(Learned(frozenset({"elsewhere"})))
    loose: Points = {
        "head": 10.0,
        "stability": 1.0,
        "evidence": 0.0,
        "confidence": 0.5,
        "answer_entropy": 0.6,
        "entropy": 0.5,
        "entropy_variance": 0.01,
        "budget": 100.0,
        "random": 0.5,
    }
    strict: Points = dict.fromkeys(loose) | {"head": 1.0, "stability": 2.0}
    Run(run).save_operating_points({0.0: strict, 0.01: loose})
    return run


def evaluated(config: EvaluateConfig) -> Row:
    """What the script finds, as it is written."""
    report = evaluate.main(config)
    assert isinstance(report, Report)
    return report.to_json()


def frozen_row(report: Row, gate: float, policy: str) -> Row:
    rows = [r for r in report["frozen"] if r["gate"] == gate and r["policy"] == policy]
    assert len(rows) == 1
    found: Row = rows[0]
    return found


def test_report_holds_every_policy_and_freezes_the_runs_points(
    run_folder: Path, traces_path: Path, random_traces: Traces
) -> None:
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="all"))
    assert report["head"] == str(run_folder)
    assert report["traces"] == {
        "path": str(traces_path),
        "digest": random_traces.digest,
        "num": 60,
        "num_questions": 20,
        "target": "",
    }
    assert {row["policy"] for row in report["rows"]} == POLICIES | RULES
    assert all(list(row) == KEYS for row in report["rows"])
    assert all(list(row) == KEYS + FROZEN_KEYS for row in report["frozen"])
    for gate, price, times in [(0.0, 1.0, 2.0), (0.01, 10.0, 1.0)]:
        head, stability = (frozen_row(report, gate, name) for name in ("head", "stability"))
        assert (head["parameter"], stability["parameter"]) == (price, times)
        same = ("em", "tokens", "saving", "halt_rate", "saving_interval", "em_delta_interval")
        assert [head[name] for name in same] == [stability[name] for name in same]
        assert stability["head_saving_lead"] == 0.0
        assert stability["head_saving_lead_interval"] == [0.0, 0.0]


def test_traces_of_another_engine_are_warned_of(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HaltHead.load(run_folder)
    HaltHead(replace(head.config, recording={"engine": "hf"}), head.weights).save(run_folder)
    write_shard(tmp_path / "vllm.parquet", random_rows(), {"engine": "vllm"})
    evaluate.main(EvaluateConfig(head=run_folder, traces=tmp_path / "vllm.parquet", split="all"))
    told = "the head learned from other traces: engine 'hf', here 'vllm'"
    assert capsys.readouterr().err == f"warning: {tmp_path / 'vllm.parquet'}: {told}\n"


@pytest.mark.whole
def test_a_head_with_another_price_by_now_is_told_below_the_verdict(
    run_folder: Path, traces_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(head=run_folder, traces=traces_path, split="all")
    found = evaluated(config)
    *_, verdict, advice = capsys.readouterr().out.splitlines()
    assert verdict.startswith("Verdict") and "judge it on 100 or more" in advice
    head = Run(run_folder).head()
    HaltHead(replace(head.config, default_price=10.0), head.weights).save(run_folder)
    evaluate.main(config)
    told = capsys.readouterr().out.splitlines()[-1]
    saving = percent(frozen_row(found, 0.01, "head")["saving"])
    assert told.startswith(
        f"By now the head's own price is another one, 10, which here saves {saving}"
    )


def test_frozen_comparisons_add_up(run_folder: Path, traces_path: Path) -> None:
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="all"))
    head = frozen_row(report, 0.01, "head")
    possible = frozen_row(report, 0.01, "hindsight")["saving"]
    for policy in POLICIES | RULES:
        row = frozen_row(report, 0.01, policy)
        low, high = row["saving_interval"]
        assert low <= row["saving"] <= high
        assert row["head_em_lead"] == pytest.approx(head["em"] - row["em"])
        assert row["head_saving_lead"] == pytest.approx(head["saving"] - row["saving"])
        assert row["hindsight_share"] == pytest.approx(row["saving"] / possible)
        assert (row["saving_at_head_em"] is None) or policy in POLICIES
    assert head["saving_at_head_em"] >= head["saving"]
    assert frozen_row(report, 0.0, "confidence")["saving"] == 0.0  # null: it never halts
    assert frozen_row(report, 0.01, "never")["saving"] == 0.0


def test_a_split_is_evaluated_alone(run_folder: Path, traces_path: Path) -> None:
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path))
    assert report["traces"]["num"] == 18
    assert {row["split"] for row in report["rows"]} == {"test"}
    with pytest.raises(InputError, match="no trace has split 'tset': found 'dev', 'test', 'train'"):
        evaluate.main(EvaluateConfig(head=run_folder, traces=traces_path, split="tset"))


@pytest.mark.whole
def test_files_are_written_and_hold_what_was_returned(
    run_folder: Path, traces_path: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        head=run_folder,
        traces=traces_path,
        split="all",
        json=tmp_path / "out.json",
        plot=tmp_path / "out.png",
    )
    report = evaluated(config)
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.whole
def test_the_report_and_its_figures_are_written(
    run_folder: Path, traces_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.html"
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, report=out))
    assert out.read_text() == render(made(report))
    assert list((run_folder / "tensorboard" / "report-test").glob("events.*"))
    assert [found["gate"] for found in report["behaviour"]] == [0.0, 0.01]
    assert report["strongest"]["0.01"] in POLICIES - {"head"}
    names = {(row["by"], row["group"]) for row in report["groups"]}
    assert names == set()  # one segment, one task, one LM


def test_questions_that_were_learned_from_are_judged_by_heads_that_never_saw_them(
    run_folder: Path, run_head: HaltHead, traces_path: Path, random_traces: Traces
) -> None:
    fold = {f"q{n}": n % 2 for n in range(20)}
    Run(run_folder).save_learned(Learned(frozenset(fold), {0: fold, 1: fold}))
    never = HaltHead(run_head.config, run_head.weights | {"b2": np.full(1, -9, dtype=np.float32)})
    for seed, k, head in ((0, 0, never), (0, 1, run_head), (1, 0, never), (1, 1, never)):
        Run(run_folder).save_kept_back({(seed, k): head})
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="all"))
    assert report["evidence"] and report["num_trainings"] == 2
    assert "judged out of fold" in report["judged"] and "by choice" in report["judged"]
    odd = np.array([int(q[1:]) % 2 for q in random_traces.question_id.tolist()])
    alone = halt_outcome(
        random_traces,
        HeadPolicy(run_head).halts(HeadPolicy(run_head).signal(random_traces), 10.0),
        "always",
    )
    expected = (
        alone.halted & (odd == 1)
    ).mean() / 2  # one of the two trainings, half the questions
    assert frozen_row(report, 0.01, "head")["halt_rate"] == pytest.approx(expected)


@pytest.mark.whole
def test_what_the_head_learned_from_is_no_evidence(run_folder: Path, traces_path: Path) -> None:
    Run(run_folder).save_learned(Learned(frozenset({"q0", "q3"})))
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="all"))
    assert not report["evidence"]
    assert report["judged"].startswith("2 of the 20 questions were learned from")
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="dev"))
    assert report["evidence"] and report["judged"].startswith("None of the 7 questions")


def test_what_the_head_learned_from_under_another_id_is_left_out(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "asked.parquet"
    rows = [row | {"question": f"What is {row['question_id']}?"} for row in random_rows()]
    write_shard(path, rows, {})
    files = TraceFiles.open(path)
    config = EvaluateConfig(head=run_folder, traces=path, split="all")
    for asked in (config, replace(config, beside=(path,))):
        texts = files.texts(files.rows_of_questions(["q0", "q3"]))
        Run(run_folder).save_learned(Learned(frozenset({"elsewhere"}), texts=texts))
        found = evaluate.main(asked)
        told = "Left out 2 questions that the head learned from, under other ids.\n"
        assert told in capsys.readouterr().out
        if isinstance(found, Report):
            assert found.judged == "None of the 18 questions was learned from." and found.evidence
        texts = files.texts(files.rows())
        Run(run_folder).save_learned(Learned(frozenset({"elsewhere"}), texts=texts))
        with pytest.raises(InputError, match="learned from all 20 questions, under other ids"):
            evaluate.main(asked)
    trace_id = str(rows[0]["trace_id"])
    evaluate.main(replace(config, explain=trace_id, price=1.0))
    assert capsys.readouterr().out.startswith("The head learned from this question")


@pytest.mark.whole
def test_supervised_baselines_are_fitted_again_from_the_runs_own_traces(
    run_folder: Path, traces_path: Path, random_traces: Traces, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def rows_of(digest: str, traces: str) -> Row:
        head = HaltHead.load(run_folder)
        HaltHead(replace(head.config, traces=digest), head.weights).save(run_folder)
        (run_folder / "config.json").write_text(json.dumps({"traces": traces}))
        report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="all"))
        return frozen_row(report, 0.0, "logistic")

    Run(run_folder).save_operating_points({0.0: {"head": 1.0, "logistic": 0.5}})
    Run(run_folder).save_learned(Learned(frozenset(random_traces.question_id.tolist())))
    fitted = rows_of(random_traces.digest, str(traces_path))
    assert fitted["parameter"] == 0.5 and fitted["halt_rate"] > 0
    assert rows_of("another", str(traces_path))["em"] is None
    assert "the run's own traces have changed" in capsys.readouterr().out
    assert rows_of(random_traces.digest, str(tmp_path / "gone"))["em"] is None
    assert "not available, the run's own traces cannot be read" in capsys.readouterr().out


def test_one_trace_is_explained(
    run_folder: Path, traces_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(head=run_folder, traces=traces_path, explain="t5")
    assert evaluate.main(config) is None
    assert capsys.readouterr().out.startswith("Trace t5")
    with pytest.raises(InputError, match="no trace 'x' among these 60, the first is 't0'"):
        evaluate.main(replace(config, explain="x"))


def test_the_runs_own_traces_are_the_default(run_folder: Path, traces_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"config\.json names no traces: expected a run, or --traces"
    ):
        evaluate.main(EvaluateConfig(head=run_folder))
    (run_folder / "config.json").write_text(json.dumps({"traces": str(traces_path)}))
    assert evaluated(EvaluateConfig(head=run_folder))["traces"]["path"] == str(traces_path)
    (run_folder / "config.json").write_text(json.dumps({"traces": None}))
    with pytest.raises(InputError, match="names no traces"):
        evaluate.main(EvaluateConfig(head=run_folder))


def test_a_baseline_without_its_signal_is_listed_as_not_available(
    run_folder: Path, make_traces: MakeTraces, tmp_path: Path
) -> None:
    make_traces([{"question_id": f"q{n}", "confidence": [float("nan")] * 3} for n in range(4)])
    config = EvaluateConfig(
        head=run_folder, traces=tmp_path / "made.parquet", plot=tmp_path / "out.png"
    )
    report = evaluated(config)
    swept = [row for row in report["rows"] if row["policy"] == "confidence"]
    assert [row["em"] for row in swept] == [None]
    row = frozen_row(report, 0.01, "confidence")
    assert row["saving"] is None and row["saving_interval"] is None
    assert "not available" in format_table(made(report).frozen)
    json.dumps(report, allow_nan=False)


def test_a_baseline_without_a_point_is_not_available(run_folder: Path, traces_path: Path) -> None:
    Run(run_folder).save_operating_points({0.0: {"head": 1.0}})
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path))
    assert frozen_row(report, 0.0, "budget")["em"] is None
    assert frozen_row(report, 0.0, "head")["em"] is not None


def test_points_of_an_unknown_policy_are_refused(run_folder: Path, traces_path: Path) -> None:
    Run(run_folder).save_operating_points({0.0: {"head": 1.0, "oracle": 1.0}})
    with pytest.raises(InputError, match=r"unknown policies \['oracle'\]"):
        evaluate.main(EvaluateConfig(head=run_folder, traces=traces_path))


@pytest.mark.parametrize(
    ("recorder", "message"),
    [
        ({"decision_rule": "every 64 tokens"}, "decision_rule is 'every 64 tokens', .*'every 50"),
        ({"confidence_rule": "mean"}, "confidence_rule is 'mean', the head expects 'source'"),
        ({"probing": "at_halt"}, "recorded without probes"),
    ],
)
def test_traces_recorded_under_other_conditions_are_refused(
    run_folder: Path, make_traces: MakeTraces, tmp_path: Path, recorder: Row, message: str
) -> None:
    make_traces([{}], recorder)
    with pytest.raises(InputError, match=rf"made\.parquet: {message}"):
        evaluate.main(EvaluateConfig(head=run_folder, traces=tmp_path / "made.parquet"))


def test_traces_with_no_decision_point_at_all_are_refused(
    run_folder: Path, make_traces: MakeTraces, tmp_path: Path
) -> None:
    columns = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    make_traces([{name: [] for name in columns}] * 2)
    with pytest.raises(InputError, match="no decision point in these 2 traces"):
        evaluate.main(EvaluateConfig(head=run_folder, traces=tmp_path / "made.parquet"))


def test_traces_without_a_decision_point_count_as_never_halted(
    run_folder: Path, make_traces: MakeTraces, tmp_path: Path
) -> None:
    columns = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    empty: dict[str, list[Any]] = {name: [] for name in columns}
    make_traces([empty, {}])
    report = evaluated(EvaluateConfig(head=run_folder, traces=tmp_path / "made.parquet"))
    assert frozen_row(report, 0.01, "head")["halt_rate"] == 0.5


def test_outputs_are_checked_before_the_work(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a name that ends in \.png"):
        evaluate.main(EvaluateConfig(head=run_folder, plot=tmp_path / "x.pdf"))
    with pytest.raises(InputError, match=r"expected a name that ends in \.html"):
        evaluate.main(EvaluateConfig(head=run_folder, report=tmp_path / "x.pdf"))
    with pytest.raises(InputError, match="found no folder"):
        evaluate.main(EvaluateConfig(head=run_folder, json=tmp_path / "none" / "x.json"))
    with pytest.raises(InputError, match=r"head\.json is a part of the run"):
        evaluate.main(EvaluateConfig(head=run_folder, json=run_folder / "head.json"))
    with pytest.raises(InputError, match="under the same name"):
        same = tmp_path / "x.html"
        evaluate.main(EvaluateConfig(head=run_folder, json=same, report=same))
    with pytest.raises(InputError, match="--price is that of --explain"):
        evaluate.main(EvaluateConfig(head=run_folder, price=0.5))
    with pytest.raises(InputError, match=r"--price is -1\.0, expected above 0, and finite"):
        evaluate.main(EvaluateConfig(head=run_folder, explain="t5", price=-1.0))
    with pytest.raises(InputError, match="--explain prints one trace"):
        evaluate.main(EvaluateConfig(head=run_folder, explain="t5", json=tmp_path / "x.json"))


def test_nothing_is_written_when_the_picture_fails(
    run_folder: Path, traces_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(evaluation.evaluate_run, "plot_frontiers", fail)
    out = tmp_path / "out.json"
    with pytest.raises(OSError, match="disk full"):
        evaluate.main(
            EvaluateConfig(head=run_folder, traces=traces_path, json=out, plot=tmp_path / "x.png")
        )
    assert not out.exists()


def test_table_has_a_line_a_policy_and_gate(run_folder: Path, traces_path: Path) -> None:
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path, split="all"))
    strict, loose = format_table(made(report).frozen).split("\n\n")
    assert "at most 0.0%" in strict and "at most 1.0%" in loose
    for part in (strict, loose):
        title, header, *lines = part.splitlines()
        assert header.startswith("policy")
        assert {line.split()[0] for line in lines} == POLICIES | RULES
        assert title.startswith("Points chosen")
    head = next(line for line in loose.splitlines() if line.startswith("head"))
    assert f"{100 * frozen_row(report, 0.01, 'head')['em']:.2f}" in head


def test_the_picture_survives_policies_that_agree(tmp_path: Path) -> None:
    plot_frontiers([made_row(known("never", None, 0.0, 0.0))], [], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "error", [InputError("no\nhead"), FileNotFoundError(2, "No such file", "x")]
)
def test_a_persons_mistake_is_one_line_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: EvaluateConfig) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--head", "x"])
    with pytest.raises(SystemExit) as stopped:
        command.run(main, EvaluateConfig)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: EvaluateConfig) -> None:
        raise ValueError("defect")

    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--head", "x"])
    with pytest.raises(ValueError, match="defect"):
        command.run(main, EvaluateConfig)


@pytest.mark.whole
def test_the_script_runs_from_another_folder(
    run_folder: Path, traces_path: Path, tmp_path: Path
) -> None:
    script = [sys.executable, str(ROOT / "evaluate.py")]
    done = subprocess.run(
        [*script, "--head", str(run_folder), "--traces", str(traces_path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "\nVerdict: " in done.stdout
    failed = subprocess.run(
        [*script, "--head", "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: no head.json in nowhere")
    assert failed.stderr.count("\n") == 1


@pytest.mark.whole
def test_a_head_that_never_halts_is_still_reported(run_folder: Path, traces_path: Path) -> None:
    Run(run_folder).save_operating_points({0.0: {"head": None, "confidence": 0.5}})
    report = evaluated(EvaluateConfig(head=run_folder, traces=traces_path))
    head = frozen_row(report, 0.0, "head")
    assert head["saving"] == 0.0 and head["parameter"] is None
    assert np.isfinite(frozen_row(report, 0.0, "confidence")["saving_at_head_em"])
