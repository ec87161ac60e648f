"""The scripts on traces that nobody has labelled: they learn agreement, and say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import adapt
import calibrate
import evaluate
import train
from adapt import AdaptConfig
from calibrate import CalibrateConfig
from evaluate import EvaluateConfig
from haltwise import HaltHead, InputError
from haltwise.policy.certificate import Certificate
from runs import Learned, Run
from tests.conftest import random_rows
from tests.test_train import SMALL
from traces import write_shard
from train import TrainConfig

Row = dict[str, Any]
UNLABELLED: Row = {"gold": None, "final_correct": None, "correct": None}
SAID = "No trace has a reference answer: an answer counts as right where it agrees"


def recorded(path: Path, rows: list[Row], labelled: bool) -> Path:
    write_shard(path, [row if labelled else row | UNLABELLED for row in rows], {})
    return path


@pytest.mark.whole
def test_agreement_is_what_labels_say_where_every_full_answer_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"final_correct": True} for row in random_rows()]
    heads, found = [], []
    for labelled in (True, False):
        traces = recorded(tmp_path / f"{labelled}.parquet", rows, labelled)
        folder = tmp_path / str(labelled)
        train.main(TrainConfig(traces=traces, run_dir=folder, folds=2, seeds=1, fit=SMALL))
        told = capsys.readouterr()
        assert (SAID in told.out) is (SAID in told.err) is not labelled
        heads.append(HaltHead.load(folder))
        content = json.loads((folder / "out_of_fold.json").read_text())
        assert content.pop("target").startswith(SAID) is not labelled
        target = json.loads((folder / "test.json").read_text())["traces"]["target"]
        assert target.startswith(SAID) is not labelled
        assert (SAID in (folder / "test.html").read_text()) is not labelled
        found.append(content)
    assert found[0] == found[1]
    assert all((heads[0].weights[n] == heads[1].weights[n]).all() for n in heads[0].weights)
    assert heads[0].config.traces != heads[1].config.traces


@pytest.fixture
def run(run_head: HaltHead, tmp_path: Path) -> Path:
    run_head.save(tmp_path / "run")
    Run(tmp_path / "run").save_learned(Learned(frozenset({"elsewhere"})))
    Run(tmp_path / "run").save_operating_points({0.0: {"head": 1.0}})
    return tmp_path / "run"


@pytest.fixture
def rows(make_row: Callable[..., Row]) -> list[Row]:
    """The worked example: the forced answers 3, 7, 7 and the full answer 7, which is right."""
    return [make_row(trace_id=f"t{n}", question_id=f"q{n}", split="dev") for n in range(280)]


def test_a_certificate_bounds_what_differs(
    run: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for labelled in (True, False):
        traces = recorded(tmp_path / f"{labelled}.parquet", rows, labelled)
        found.append(calibrate.main(CalibrateConfig(run, traces, max_em_drop=0.05, apply=True)))
        assert (SAID in capsys.readouterr().out) is not labelled
    assert found[0].price is not None and found[0].num_unlabelled == 0
    assert replace(found[1], traces=found[0].traces, num_unlabelled=0) == found[0]
    assert HaltHead.load(run).config.certificate == found[1]
    assert found[1].num_unlabelled == 280
    with pytest.raises(InputError, match="280 traces, 281 of them without"):
        replace(found[1], num_unlabelled=281)
    old = json.loads(json.dumps(asdict(found[0])))
    del old["num_unlabelled"]
    assert Certificate.from_json(old) == found[0]


def test_adapting_to_them_says_what_is_looked_at(
    run: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces, points = recorded(tmp_path / "x.parquet", rows, labelled=False), []
    for looks in (True, False):
        folder = adapt.main(AdaptConfig(run, traces, tmp_path / str(looks), labelled=looks))
        assert (SAID in capsys.readouterr().out) is looks
        content = json.loads((folder / "config.json").read_text())
        assert content["target"].startswith(SAID) is looks
        points.append(Run(folder).operating_points())
    assert points[0] == points[1]


def test_a_decision_path_knows_no_reference_answer(
    run: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = recorded(tmp_path / "x.parquet", rows, labelled=False)
    evaluate.main(EvaluateConfig(run, traces, explain="t3", price=1.0))
    told = capsys.readouterr().out
    assert "with a final answer.\nThe LM ends with '7'.\nNo trace has a reference answer:" in told
