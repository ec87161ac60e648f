"""Recordings side by side, by hand: the head halts at a run of 2 equal answers at its own price."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import evaluate
from evaluate import EvaluateConfig
from evaluation.rows import RecordingRow
from evaluation.verdict import side_by_side
from haltwise import HaltHead, InputError
from runs import Learned, Run
from tests.conftest import trace_row
from traces import write_shard

RECORDER = {"decision_rule": "every 50 tokens", "probing": "always"}


@pytest.fixture
def run_folder(run_head: HaltHead, tmp_path: Path) -> Path:
    run_head.save(tmp_path / "run")
    run = Run(tmp_path / "run")
    run.save_learned(Learned(frozenset({"elsewhere"})))
    run.save_operating_points({0.0: {"head": 1.0}})
    return run.folder


def recorded(path: Path, changes: Sequence[dict[str, Any]]) -> Path:
    """Writes the worked example with changes, a trace each."""
    rows = [
        trace_row(**{"trace_id": f"t{n}", "question_id": f"q{n}", "split": "test"} | change)
        for n, change in enumerate(changes)
    ]
    path.mkdir()
    write_shard(path / "a.parquet", rows, RECORDER)
    return path


WRONG = {"final_correct": False, "final_answer": "41"}


@pytest.fixture
def recordings(tmp_path: Path) -> tuple[Path, Path]:
    """One with both questions right, one with the second wrong and the questions turned round."""
    first = recorded(tmp_path / "first", [{}, {}])
    turned: list[dict[str, Any]] = [{"question_id": "q1", **WRONG}, {"question_id": "q0"}]
    return first, recorded(tmp_path / "second", turned)


def compared(config: EvaluateConfig) -> list[RecordingRow]:
    rows = evaluate.main(config)
    assert isinstance(rows, list)
    return [row for row in rows if isinstance(row, RecordingRow)]


def test_recordings_by_hand(
    run_folder: Path, recordings: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = recordings
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    config = EvaluateConfig(head=run_folder, traces=first, beside=(second,), json=out, plot=plot)
    one, other = compared(config)
    assert plot.read_bytes().startswith(b"\x89PNG")
    # The head halts at 400 of 600 tokens and has looked for 33; all forced answers there are right.
    assert [one.saving, other.saving] == pytest.approx([167 / 600] * 2)
    assert (one.em, one.halted_em, one.em_delta) == (1.0, 1.0, 0.0)
    assert (one.em_lead, one.halted_em_lead, one.saving_lead) == (0.0, 0.0, 0.0)
    assert (other.em, other.halted_em, other.em_delta) == (0.5, 1.0, 0.5)
    assert (other.em_lead, other.halted_em_lead, other.saving_lead) == (-0.5, 0.0, 0.0)
    # Of two questions drawn, the lost one is drawn never or twice in a quarter of the cases each.
    assert (other.em_lead_interval, other.em_delta_interval) == ([-1.0, 0.0], [0.0, 1.0])
    assert other.halted_em_lead_interval == [0.0, 0.0]
    assert (other.num_questions, other.tokens, other.price, other.evidence) == (2, 600, 1.0, True)
    assert (other.tokens_lead, other.tokens_lead_interval) == (0.0, [0.0, 0.0])
    # At the lowest price of the range the run of 4 that the head waits for never comes.
    own, lowest = other.sweep[0], other.sweep[15 + 1]
    assert [own.price, own.em, own.tokens] == pytest.approx([1.0, 1.0, 433])
    assert [lowest.price, lowest.em, lowest.tokens] == pytest.approx([0.1, 0.5, 633])
    assert lowest.em_interval == [0.0, 1.0] and len(other.sweep) == 1 + 75
    found = json.loads(out.read_text())
    expected = json.loads(json.dumps([asdict(one), asdict(other)]))
    assert found == {"split": "test", "recordings": expected}


def test_tokens_are_told_beside_the_first(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = recorded(tmp_path / "first", [{}, {}])
    longer = [{"num_tokens": 700}, {"num_tokens": 800}]
    second = recorded(tmp_path / "second", longer)
    _, other = compared(EvaluateConfig(head=run_folder, traces=first, beside=(second,)))
    assert (other.tokens, other.tokens_lead, other.tokens_interval) == (750, 150, [700, 800])
    assert "+150 [+100, +200]" in capsys.readouterr().out


def test_differences_are_paired_by_question(run_folder: Path, tmp_path: Path) -> None:
    rows = [{"question_id": f"q{n}"} | (WRONG if n % 2 else {}) for n in range(20)]
    first, turned = recorded(tmp_path / "first", rows), recorded(tmp_path / "turned", rows[::-1])
    twice = [row | {"trace_id": f"t{n}"} for n, row in enumerate([*rows, *rows])]
    beside = (turned, recorded(tmp_path / "twice", twice))
    one, *others = compared(EvaluateConfig(head=run_folder, traces=first, beside=beside))
    assert [row.num_traces for row in others] == [20, 40]
    for row in others:
        assert row.em_delta_interval == one.em_delta_interval != [0.0, 0.0]
        assert row.em_lead_interval == row.halted_em_lead_interval == [0.0, 0.0]


def test_each_recording_may_have_a_head_of_its_own(
    run_folder: Path, recordings: tuple[Path, Path], run_head: HaltHead, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first, second = recordings
    never, knowing = (copytree(run_folder, tmp_path / name) for name in ("never", "knowing"))
    HaltHead(replace(run_head.config, default_price=0.0), run_head.weights).save(never)
    Run(knowing).save_learned(Learned(frozenset({"q0"})))
    config = EvaluateConfig(
        head=run_folder, traces=first, beside=(second, first), beside_heads=(never, knowing)
    )
    _, one, other = compared(config)
    assert (one.price, one.saving, one.em_delta, one.halted_em) == (0.0, 0.0, 0.0, 0.5)
    assert one.saving_lead == pytest.approx(-167 / 600)
    assert (one.evidence, other.evidence) == (True, False)
    told = capsys.readouterr().out
    assert "never        50.00" in told and "no evidence: learned from these questions" in told
    assert told.endswith(f"{first}: none, since {knowing} learned from these questions.\n")


def test_a_recording_without_a_decision_point_is_told_too(
    run_folder: Path, recordings: tuple[Path, Path], tmp_path: Path
) -> None:
    columns = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    empty: dict[str, Any] = {name: [] for name in columns}
    bare = recorded(tmp_path / "bare", [empty, {"question_id": "q1"} | empty])
    _, row = compared(EvaluateConfig(head=run_folder, traces=recordings[0], beside=(bare,)))
    assert (row.em, row.halted_em, row.saving) == (1.0, 1.0, 0.0)


def test_one_question_has_no_intervals(run_folder: Path, tmp_path: Path) -> None:
    first, second = (recorded(tmp_path / name, [{}]) for name in ("first", "second"))
    rows = compared(EvaluateConfig(head=run_folder, traces=first, beside=(second,)))
    assert {row.em_lead_interval for row in rows} == {row.saving_interval for row in rows} == {None}
    assert {point.em_interval for row in rows for point in row.sweep} == {None}


def test_a_sample_is_of_the_same_questions(run_folder: Path, tmp_path: Path) -> None:
    rows = [{"question_id": f"q{n}"} for n in range(9)]
    paths = [recorded(tmp_path / str(k), rows[::k]) for k in (1, -1)]
    config = EvaluateConfig(head=run_folder, traces=paths[0], beside=(paths[1],), max_traces=4)
    assert {row.num_questions for row in compared(config)} == {4}


@pytest.mark.parametrize(
    ("lead", "interval", "expected"),
    [
        (0.02, [0.01, 0.03], "is ahead (+2.00 [+1.00, +3.00] points)"),
        (-0.02, [-0.03, -0.01], "is behind (-2.00 [-3.00, -1.00] points)"),
        (0.02, [-0.01, 0.03], "is a tie (+2.00 [-1.00, +3.00] points)"),
        (0.0, [0.0, 0.0], "is the same (+0.00 points)"),
        (0.02, None, "differs (+2.00 points)"),
    ],
)
def test_a_lead_in_words(
    run_folder: Path, recordings: tuple[Path, Path], lead: float, interval: Any, expected: str
) -> None:
    rows = compared(EvaluateConfig(head=run_folder, traces=recordings[0], beside=recordings[1:]))
    changed = replace(rows[1], em_lead=lead, em_lead_interval=interval)
    told = side_by_side([rows[0], changed]).replace("\N{MINUS SIGN}", "-")
    assert f"alone its EM {expected}. Halted" in told


def test_other_questions_are_refused(run_folder: Path, tmp_path: Path) -> None:
    first = recorded(tmp_path / "first", [{}, {}, {}])
    other = recorded(tmp_path / "other", [{}, {"question_id": "q9"}])
    with pytest.raises(
        InputError,
        match=r"other: 1 of its 2 questions are not in .*first, which has 2 others, such as 'q1'",
    ):
        evaluate.main(EvaluateConfig(head=run_folder, traces=first, beside=(other,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beside_heads": (Path("a"), Path("b"))}, "names 2 runs, expected 1, as in --beside"),
        ({"beside": (), "beside_heads": (Path("a"),)}, "names 1 runs, expected 0"),
        ({"explain": "t0"}, "--beside compares recordings: expected no --report, --explain"),
        ({"report": Path("x.html")}, "--beside compares recordings"),
        ({"live": True}, "--beside compares recordings"),
        ({"verbose": True}, "--beside compares recordings"),
        ({"json": Path("nowhere/x.json")}, "found no folder nowhere"),
        ({"beside": (Path("nowhere"),)}, "nowhere: no such file or folder"),
        ({"beside_heads": (Path("nowhere"),)}, "no head.json in nowhere"),
        ({"split": "dev"}, "no trace has split 'dev': found 'test'"),
    ],
)
def test_what_does_not_fit_a_comparison_is_refused(
    run_folder: Path, recordings: tuple[Path, Path], changes: dict[str, Any], message: str
) -> None:
    config = EvaluateConfig(head=run_folder, traces=recordings[0], beside=recordings[1:])
    with pytest.raises(InputError, match=message):
        evaluate.main(replace(config, **changes))
