"""Certifying a run's head, through the script's own `main`.

The head halts at a run of 1, 2 or 4 equal answers: in the worked example, whose forced answers are
3, 7, 7 and whose gold is 7, at the wrong first one, at the right third one, or never.
"""

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import calibrate
from calibrate import CalibrateConfig
from evaluation.certify import fewest_questions
from haltwise import HaltHead, InputError
from haltwise.policy.head import NEVER_HALTS
from runs import Learned, Run
from traces import TraceFiles, read_traces, write_shard

Row = dict[str, Any]

# Price where the head halts at 2 and at 1 equal answers: log1p(run) - log1p(1.5) + log10(p) / 2.
TWICE, ONCE = 0.4325, 2.795
SAVING = 1 - 433 / 600


def row(n: int, make_row: Callable[..., Row], **changes: Any) -> Row:
    return make_row(**{"trace_id": f"t{n}", "question_id": f"q{n}"} | changes)


@pytest.fixture
def config(run_head: HaltHead, make_row: Callable[..., Row], tmp_path: Path) -> CalibrateConfig:
    """300 questions, of which the head learned from 20; 70 of the others are of a segment."""
    run_head.save(tmp_path / "run")
    learned = Learned(frozenset(f"q{n}" for n in range(20)))
    Run(tmp_path / "run").save_learned(learned)
    rows = [row(n, make_row, segment="easy" if n < 90 else None) for n in range(300)]
    # All that the head learned from ends right, and is wrong where it is halted.
    wrong = [row(n, make_row, answer=["3"] * 3, correct=[False] * 3) for n in range(20)]
    write_shard(tmp_path / "traces.parquet", wrong + rows[20:], {})
    return CalibrateConfig(
        tmp_path / "run", tmp_path / "traces.parquet", max_em_drop=0.05, apply=True
    )


def test_the_most_saving_price_without_too_much_loss_is_certified(config: CalibrateConfig) -> None:
    certificate = calibrate.main(config)
    assert certificate.price is not None
    assert TWICE < certificate.price < ONCE
    assert certificate.saving == pytest.approx(SAVING)
    assert certificate.observed_loss == 0
    assert (certificate.num_questions, certificate.num_traces) == (280, 280)
    assert certificate.smallest_em_drop is not None
    assert fewest_questions(certificate.smallest_em_drop, 0.1) <= 280
    assert fewest_questions(certificate.smallest_em_drop - 1e-4, 0.1) > 280
    head = HaltHead.load(config.head)
    assert head.config.certificate == certificate
    assert head.config.default_price == certificate.price


def test_without_apply_nothing_is_written(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (config.head / "head.json").read_bytes()
    certificate = calibrate.main(replace(config, apply=False))
    assert certificate.price is not None
    assert (config.head / "head.json").read_bytes() == before
    told = capsys.readouterr().out
    # At its own price, 1, the head halts at two equal answers.
    assert "The head's own price, 1, saves 27.8% here and loses 0 points, uncertified." in told
    assert "What training has told is an estimate from its own questions" in told
    assert f"--apply would make {certificate.price:.6g} its own price." in told
    assert told.endswith("each segment the price that the table above has for it.\n")


def test_what_apply_has_replaced_is_told_and_can_be_undone(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HaltHead.load(config.head)
    changed = replace(head.config, segment_prices={"easy": 2.0, "gone": 3.0})
    HaltHead(changed, head.weights).save(config.head)
    certificate = calibrate.main(config)
    assert certificate.price is not None
    own, segments, undo = capsys.readouterr().out.splitlines()[-3:]
    now = f"{certificate.price:.6g}"
    assert own == f"{now} is the head's own price now. It was 1."
    assert segments == (
        f"Prices of segments were replaced too: easy 2 -> {now}, gone 3 -> none of its own, "
        f"toy none of its own -> {now}."
    )
    calibrate.main(replace(config, apply=True))  # once more by mistake
    assert "has this certificate and its prices already" in capsys.readouterr().out
    subprocess.run(shlex.split(undo.removeprefix("To have the former prices back: ")), check=True)
    assert HaltHead.load(config.head).config == changed


def test_traces_of_another_temperature_are_warned_of(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HaltHead.load(config.head)
    HaltHead(replace(head.config, recording={"temperature": 0.75}), head.weights).save(config.head)
    rows = pq.read_table(config.traces).to_pylist()
    for temperature, told in [(0.75, ""), (0.0, "temperature 0.75, here 0.0\n")]:
        write_shard(config.traces, rows, {"temperature": temperature})
        calibrate.main(replace(config, apply=False))
        warned = f"warning: {config.traces}: the head learned from other traces: {told}"
        assert capsys.readouterr().err == (warned if told else "")


def test_a_certificate_of_no_price_would_never_halt(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate.main(replace(config, apply=False, max_em_drop=1e-9)).price is None
    assert "make 0 its own price, at which it never halts." in capsys.readouterr().out


def test_a_loss_below_zero_is_called_a_gain() -> None:
    told = [calibrate._lost(lost) for lost in (0.03, 0.0, -0.0125)]
    assert told == ["loses 3 points", "loses 0 points", "gains 1.25 points"]


def test_an_own_price_of_zero_costs_nothing(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HaltHead.load(config.head)
    HaltHead(replace(head.config, default_price=0.0), head.weights).save(config.head)
    calibrate.main(replace(config, apply=False))
    told = capsys.readouterr().out
    assert "own price, 0, halts nothing: it saves nothing and loses nothing." in told


def test_each_segment_has_its_own_certificate(config: CalibrateConfig) -> None:
    easy, toy = calibrate.main(config).segments
    assert (easy.segment, easy.num_questions) == ("easy", 70)
    assert (toy.segment, toy.num_questions) == ("toy", 210)  # the task where there is no segment
    assert easy.price == toy.price is not None
    # At half of the error 2 points take 149 questions.
    easy, toy = calibrate.main(replace(config, max_em_drop=0.02)).segments
    assert easy.price is None and easy.saving == 0
    assert toy.price is not None and toy.saving == pytest.approx(SAVING)


def test_nothing_certifiable_is_to_never_halt(
    config: CalibrateConfig, make_row: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(n, make_row, answer=["3"] * 3, correct=[False] * 3) for n in range(20, 320)]
    write_shard(config.traces, rows, {})
    certificate = calibrate.main(config)
    assert certificate.price is certificate.smallest_em_drop is None
    assert (certificate.saving, certificate.observed_loss) == (0, 0)
    assert json.loads((config.head / "head.json").read_text())["certificate"]["price"] is None
    head = HaltHead.load(config.head)
    assert head.config.default_price == 0.0
    features = np.zeros((3, len(head.config.features)), dtype=np.float32)
    assert not head.halts(features).any()
    told = capsys.readouterr().out
    assert "Certified: no price that saves anything." in told
    assert f"{NEVER_HALTS} It was 1.\n" in told
    assert "No drop would be certified with some saving." in told
    assert "45 without a single loss; if losses stay as observed, no number would do" in told


def test_too_few_questions_are_told_how_many_it_takes(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate.main(replace(config, max_em_drop=0.005)).price is None
    told = capsys.readouterr().out
    assert "Left out 20 questions" in told
    assert "Questions needed for 0.5 points: 460 without a single loss; " in told
    # 4.508 (0.005 - 0.005^2) / 0.005^2 = 897.
    assert "if losses stay as observed, about 898 for some saving in 4 of 5 cases." in told
    # Of both segments together: 0.995^598 < 0.1 / 2.
    assert "too few: 528 more needed" in told and "too few: 388 more needed" in told


def test_what_is_printed(config: CalibrateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = calibrate.main(config)
    told = capsys.readouterr().out
    assert f"Certified: price {certificate.price:.6g}. On these traces it saves 27.8%" in told
    assert "not over those of one segment" in told
    assert "nothing below is certified" in told
    planned = [line.split() for line in told[told.index("drop %") :].splitlines()]
    assert planned[1] == ["0.5", "never", "halt"]
    assert planned[2] == ["1", f"{certificate.price:.6g}", "27.8", "0.00"]
    assert "Smallest drop with some saving: 0.82 points" in told
    assert "45 without a single loss; with losses as observed, these 280 were enough" in told


def test_the_two_risks_differ_by_what_halting_wins(
    config: CalibrateConfig, make_row: Callable[..., Row]
) -> None:
    """A third of the questions turns wrong at the second point, another third turns right."""
    kinds: list[Row] = [{}, {"correct": [False] * 3}, {"final_correct": False}]
    rows = [row(n, make_row, **kinds[n % 3]) for n in range(20, 320)]
    write_shard(config.traces, rows, {})
    net = calibrate.main(replace(config, max_em_drop=0.3))
    assert net.price is not None and net.observed_loss == pytest.approx(0, abs=1e-12)
    assert calibrate.main(replace(config, max_em_drop=0.3, risk="right-to-wrong")).price is None
    lost = calibrate.main(replace(config, max_em_drop=0.5, risk="right-to-wrong"))
    assert lost.price is not None and lost.observed_loss == pytest.approx(1 / 3)


def test_asking_the_same_questions_again_is_pointed_out(
    config: CalibrateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate.main(config)
    calibrate.main(config)
    assert "before" not in capsys.readouterr().out
    calibrate.main(replace(config, max_em_drop=0.06))
    assert "of this run have been asked for before (2), otherwise" in capsys.readouterr().out
    calibrate.main(replace(config, apply=False))  # to look is to ask, too
    assert "of this run have been asked for before (1), otherwise" in capsys.readouterr().out
    assert sorted(Run(config.head).asked().values()) == [1, 3]


def test_a_question_is_the_same_under_another_id(
    config: CalibrateConfig, make_row: Callable[..., Row], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row(n, make_row, question_id=f"new{n}", question=f"What is  {n % 12}?") for n in range(360)
    ]
    write_shard(config.traces, rows, {})
    assert calibrate.main(config).num_questions == 12
    # The head has learned from four of them, under other ids and in another spelling.
    write_shard(
        config.head / "old.parquet",
        [row(n, make_row, question=f"what is {n}?") for n in range(4)],
        {},
    )
    old = TraceFiles.open(config.head / "old.parquet")
    Run(config.head).save_learned(Learned(frozenset({"q0"}), texts=old.texts(old.rows())))
    assert calibrate.main(config).num_questions == 8


def test_what_cannot_be_used_is_refused_and_nothing_is_written(
    config: CalibrateConfig, make_row: Callable[..., Row], tmp_path: Path
) -> None:
    other, learned = tmp_path / "other.parquet", tmp_path / "learned.parquet"
    write_shard(other, [row(50, make_row)], {"decision_rule": "every 60 tokens"})
    write_shard(learned, [row(n, make_row) for n in range(5)], {})
    bare = tmp_path / "bare"
    HaltHead.load(config.head).save(bare)
    before = (config.head / "head.json").read_bytes()
    changes: list[tuple[Row, str]] = [
        ({"max_em_drop": 0.0}, "--max-em-drop is 0.0, expected between 0 and 1"),
        ({"max_em_drop": float("nan")}, "--max-em-drop is nan"),
        ({"confidence": 1.0}, "--confidence is 1.0, expected between 0 and 1"),
        ({"split": "nope"}, "no trace has split 'nope': found 'test'"),
        ({"traces": other}, "decision_rule is 'every 60 tokens', the head expects"),
        ({"traces": learned}, "learned from all 5 questions, expected others"),
        ({"traces": tmp_path / "no.parquet"}, "no.parquet"),
        ({"head": tmp_path / "nowhere"}, r"no head\.json in .*nowhere"),
        ({"head": bare}, r"no questions\.json in .*bare"),
    ]
    for change, told in changes:
        with pytest.raises(InputError, match=told):
            calibrate.main(replace(config, **change))
    assert (config.head / "head.json").read_bytes() == before


def test_a_split_is_certified_by_its_own_questions(
    config: CalibrateConfig, make_row: Callable[..., Row]
) -> None:
    rows = [row(n, make_row, split="dev" if n < 120 else "train") for n in range(20, 320)]
    write_shard(config.traces, rows, {})
    certificate = calibrate.main(replace(config, split="dev"))
    assert certificate.num_questions == 100
    assert certificate.traces == read_traces(config.traces).of_split("dev").digest
