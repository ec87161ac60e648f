"""Adapting a head to another LM, through the script's own `main`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import adapt
from adapt import AdaptConfig, tighten
from evaluate import EvaluateConfig
from evaluate import main as evaluate
from evaluation.outcome import Outcome
from evaluation.results import Report
from evaluation.rows import to_json
from haltwise import Certificate, HaltHead, InputError, Observing, feature_names
from haltwise.policy.head import told_by
from runs import Learned, Run
from tests.projections import some_projection
from traces import Traces, read_traces, write_shard

MakeTraces = Callable[..., Traces]
Row = dict[str, Any]

LOOSE = {"head": 10.0, "stability": 1.0, "confidence": 0.4, "budget": None}
STRICT = {"head": 1.0, "stability": 2.0, "confidence": 0.6, "budget": None}


@pytest.fixture
def run(run_head: HaltHead, tmp_path: Path) -> Path:
    """A run whose looser points halt at the first answer, and whose stricter ones do not."""
    certificate = Certificate(
        risk="net-em-loss",
        max_em_drop=0.02,
        confidence=0.9,
        price=1.0,
        saving=0.3,
        observed_loss=0.0,
        num_questions=300,
        num_traces=300,
        traces="",
        lm="lm",
        head=run_head.digest,
        smallest_em_drop=0.01,
        command="",
    )
    certified = replace(run_head.config, certificate=certificate)
    HaltHead(certified, run_head.weights).save(tmp_path / "run")
    Run(tmp_path / "run").save_operating_points({0.0: LOOSE, 0.01: STRICT})
    Run(tmp_path / "run").save_learned(Learned(frozenset({"old"})))
    return tmp_path / "run"


@pytest.fixture
def config(run: Path, make_row: Callable[..., Row], tmp_path: Path) -> AdaptConfig:
    """32 questions of another LM, each the worked example: forced answers 3, 7, 7; 7 is right."""
    rows = [
        make_row(trace_id=f"t{n}", question_id=f"q{n}", model="other", split="train")
        for n in range(32)
    ]
    write(tmp_path / "traces.parquet", rows)
    return AdaptConfig(head=run, traces=tmp_path / "traces.parquet", run_dir=tmp_path / "new")


def write(path: Path, rows: list[Row], **recorder: Any) -> Path:
    write_shard(path, rows, recorder)
    return path


def test_features_are_standardised_by_the_new_lms_traces(config: AdaptConfig) -> None:
    head = HaltHead.load(adapt.main(config))
    column = feature_names(["agreement"]).index("log_run")
    runs = np.log1p([1, 1, 2])  # the answers are 3, 7, 7
    assert head.config.observing.mean[column] == pytest.approx(runs.mean())
    assert head.config.observing.scale[column] == pytest.approx(runs.std())


def test_weights_prices_and_points_are_the_runs_own(config: AdaptConfig, run: Path) -> None:
    head, source = HaltHead.load(adapt.main(config)), HaltHead.load(run)
    assert all((head.weights[name] == source.weights[name]).all() for name in source.weights)
    assert Run(config.run_dir).operating_points() == Run(run).operating_points()
    kept = replace(
        source.config,
        observing=head.config.observing,
        lm="other",
        traces=read_traces(config.traces).digest,
        command=head.config.command,
        certificate=None,
    )
    assert head.config == kept
    assert head.config.observing.price_range == source.config.observing.price_range


def test_another_lm_is_expected_and_another_temperature_is_not(
    config: AdaptConfig, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, recorder = HaltHead.load(run), {"lm": "lm", "dtype": "float32", "temperature": 0.75}
    HaltHead(replace(source.config, lm="lm", **told_by(recorder)), source.weights).save(run)
    now = {"lm": "other", "dtype": "bfloat16", "temperature": 0.6}
    write(config.traces, pq.read_table(config.traces).to_pylist(), **now)
    head = HaltHead.load(adapt.main(config))
    told = f"{config.traces}: the head learned from other traces: temperature 0.75, here 0.6"
    assert capsys.readouterr().err == f"warning: {told}\n"
    assert head.config.recording == {"dtype": "bfloat16", "temperature": 0.6}


def test_without_the_flag_labels_have_no_influence(
    config: AdaptConfig, make_row: Callable[..., Row], tmp_path: Path
) -> None:
    rows = [
        make_row(
            trace_id=f"t{n}",
            question_id=f"q{n}",
            model="other",
            split="train",
            correct=[n % 2 == 0, n % 3 == 0, n % 5 == 0],
            final_correct=n % 7 == 0,
            gold=str(n),
        )
        for n in range(32)
    ]
    scrambled = write(tmp_path / "scrambled.parquet", rows)
    adapt.main(config)
    adapt.main(replace(config, traces=scrambled, run_dir=tmp_path / "scrambled"))
    for name in ("head.safetensors", "operating_points.json"):
        assert (tmp_path / "scrambled" / name).read_bytes() == (config.run_dir / name).read_bytes()
    first, second = (HaltHead.load(tmp_path / name).config for name in ("new", "scrambled"))
    assert replace(second, traces=first.traces) == first


def test_a_head_adapted_to_its_own_traces_stays_as_it_is(
    config: AdaptConfig, tmp_path: Path
) -> None:
    adapt.main(config)
    again = adapt.main(replace(config, head=config.run_dir, run_dir=tmp_path / "again"))
    for name in ("head.safetensors", "head.json", "operating_points.json"):
        assert (again / name).read_bytes() == (config.run_dir / name).read_bytes()


def test_test_questions_are_not_used(
    config: AdaptConfig, make_row: Callable[..., Row], tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(config.traces.read_bytes())
    write(folder / "test.parquet", [make_row(question_id="q99", answer=["1", "2", "3"])])
    adapt.main(config)
    adapt.main(replace(config, traces=folder, run_dir=tmp_path / "more", labelled=False))
    assert HaltHead.load(tmp_path / "more").config == HaltHead.load(config.run_dir).config


def test_points_that_labels_refute_become_stricter_and_the_others_stay(config: AdaptConfig) -> None:
    gates = Run(adapt.main(replace(config, labelled=True))).operating_points()
    # The first answer is always wrong and the second right, like the last: EM falls by 1 or 0.
    assert gates[0.0]["stability"] == 2.0
    assert gates[0.0]["confidence"] is not None
    assert 0.5 <= gates[0.0]["confidence"] < 0.75
    assert gates[0.0]["budget"] is None
    assert {name: gates[0.01][name] for name in ("stability", "confidence")} == {
        "stability": 2.0,
        "confidence": 0.6,
    }
    head = HaltHead.load(config.run_dir)
    assert head.config.default_price == gates[0.0]["head"]


def test_the_adapted_run_is_evaluated_like_any_other(config: AdaptConfig) -> None:
    adapt.main(replace(config, labelled=True))
    report = evaluate(EvaluateConfig(head=config.run_dir, split="all"))
    assert isinstance(report, Report) and report.traces.path == str(config.traces)
    rows = [row for row in report.frozen if row.policy in ("head", "stability")]
    assert [row["em_delta"] for row in to_json(rows)] == [0.0] * 4


@pytest.mark.parametrize(
    ("point", "gate", "expected"),
    [
        (4.0, 0.0, 2.0),  # every EM change is -1: refuted; the next one has lost one of four
        (4.0, 1.0, 4.0),  # within the gate
        (2.0, 0.0, 2.0),  # with that question left out of a resample nothing is lost
        (1.0, 0.0, 1.0),
    ],
)
def test_a_point_is_left_where_labels_do_not_refute_it(
    make_traces: MakeTraces, point: float, gate: float, expected: float
) -> None:
    traces = make_traces([{}] * 4)  # all end right, after 600 tokens
    outcomes = {
        parameter: Outcome(np.array(em), np.full(4, cost), np.ones(4, dtype=bool))
        for parameter, em, cost in [
            (1.0, [True] * 4, 500),
            (2.0, [True, True, True, False], 300),
            (3.0, [False] * 4, 200),
            (4.0, [False] * 4, 100),
        ]
    }
    assert tighten(traces, outcomes, point, gate) == expected
    worst = {at: outcomes[at] for at in (3.0, 4.0)}
    assert tighten(traces, worst, 4.0, 0.0) is None


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    config: AdaptConfig, make_row: Callable[..., Row], tmp_path: Path
) -> None:
    def rows(**changes: Any) -> list[Row]:
        return [
            make_row(trace_id=f"t{n}", question_id=f"q{n}", split="dev") | changes
            for n in range(40)
        ]

    few = write(tmp_path / "few.parquet", rows()[:29])
    other = write(tmp_path / "other.parquet", rows(), close_text="<answer>")
    mixed = write(tmp_path / "mixed.parquet", [*rows(), make_row(model="b", split="dev")])
    test = write(tmp_path / "test.parquet", rows(split="test"))
    for traces, message in [
        (few, "29 questions .* expected at least 30"),
        (test, "0 questions .* expected at least 30"),
        (other, "close_text is '<answer>', the head expects '</think>'"),
        (mixed, "traces of b, lm, expected one LM"),
    ]:
        with pytest.raises(InputError, match=message):
            adapt.main(replace(config, traces=traces, labelled=True))
    with pytest.raises(InputError, match=r"no head\.json in .*nowhere"):
        adapt.main(replace(config, head=tmp_path / "nowhere"))
    assert not config.run_dir.exists()
    config.run_dir.mkdir()
    with pytest.raises(InputError, match="new exists: expected a new folder"):
        adapt.main(config)


def test_a_head_that_sees_hidden_states_is_refused(config: AdaptConfig, run_head: HaltHead) -> None:
    observing = Observing(("hidden",), (0.0,) * 16, (1.0,) * 16, (0.1, 10.0), some_projection(16))
    weights = run_head.weights | {"w0": np.ones((1, 17), dtype=np.float32)}
    HaltHead(replace(run_head.config, observing=observing), weights).save(config.head)
    with pytest.raises(InputError, match="every LM has its own"):
        adapt.main(config)
    assert not config.run_dir.exists()


def test_folds_are_adapted_too_and_no_question_is_forgotten(
    config: AdaptConfig, run_head: HaltHead
) -> None:
    Run(config.head).save_learned(Learned(frozenset({"old", "q0"}), {0: {"old": 1, "q0": 1}}))
    Run(config.head).save_kept_back({(0, 1): run_head})
    adapt.main(config)
    learned = Run(config.run_dir).learned()
    assert {"old", "q0", "q31"} <= learned.questions and learned.folds == {0: {"old": 1}}
    adapted, whole = (
        HaltHead.load(folder).config.observing
        for folder in (config.run_dir / "kept_back" / "0-1", config.run_dir)
    )
    assert adapted == whole != run_head.config.observing


def test_points_of_what_is_fitted_to_one_lm_stay_behind(config: AdaptConfig) -> None:
    Run(config.head).save_operating_points({0.0: LOOSE | {"logistic": 0.9}})
    adapt.main(config)
    assert Run(config.run_dir).operating_points() == {0.0: LOOSE}


def test_the_run_folder_says_what_was_done(config: AdaptConfig) -> None:
    adapt.main(config)
    written = json.loads((config.run_dir / "config.json").read_text())
    assert written["traces"] == str(config.traces)
    assert written["config"]["head"] == str(config.head)
    assert written["config"]["labelled"] is False
