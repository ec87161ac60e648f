"""Traces that nobody has labelled: what counts as right in them, and how they become labelled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise import InputError
from lms.scorers import agreeing, scorer_of
from traces import TraceFiles, Traces, import_json_lines, read_traces, write_shard
from traces.soundness import check_sound
from traces.verdicts import agreement

Row = dict[str, Any]
MakeRow = Callable[..., Row]
MakeTraces = Callable[..., Traces]

UNLABELLED: Row = {"gold": None, "final_correct": None, "correct": None}
A, B = "0a" * 16, "0b" * 16
DIGESTS: Row = {"final_answer": A, "answer": [B, "", A]}


def version(path: Path) -> bytes:
    return bytes(pq.read_metadata(path).metadata[b"haltwise.schema"])


def test_an_answer_is_right_where_it_agrees_with_the_full_one(make_traces: MakeTraces) -> None:
    unread = {"final_answer": "", "answer": ["", "3", ""]}
    traces = make_traces([UNLABELLED | {"answer": ["3", "7", ""]}, {}, UNLABELLED | unread])
    assert traces.labelled.tolist() == [False, True, False]
    assert traces.final_correct.tolist() == [True, True, True]
    expected = [False, True, False, False, True, True, False, False, False]
    assert traces.correct.tolist() == expected
    assert traces.target.startswith("2 of 3 traces have no reference answer: there an answer")
    assert traces.select(np.array([1])).target == ""
    assert traces.select(np.array([0])).target.startswith("No trace has a reference answer: an ")


@given(st.lists(st.tuples(*[st.sampled_from(["", "1", "2", "3"])] * 3), min_size=1))
def test_no_exact_match_is_lost_that_does_not_count(answers: list[tuple[str, str, str]]) -> None:
    forced, full, gold = (np.array(each, dtype=object) for each in zip(*answers, strict=True))
    differs = ~agreement(forced, full)
    lost = ((full == gold) & (full != "")).astype(int) - ((forced == gold) & (forced != ""))
    assert (lost <= differs).all()


def test_a_file_is_of_the_oldest_version_that_can_hold_it(
    tmp_path: Path, make_row: MakeRow
) -> None:
    for changes, recorder, expected in [
        ({}, {}, b"1"),
        (UNLABELLED, {}, b"2"),
        ({"gold": A} | DIGESTS, {"answers": "digests"}, b"2"),
    ]:
        write_shard(tmp_path / "x.parquet", [make_row(**changes)], recorder)
        assert version(tmp_path / "x.parquet") == expected
        read_traces(tmp_path / "x.parquet")


def test_whoever_labels_a_trace_changes_its_digest(make_traces: MakeTraces) -> None:
    agreed = {"correct": [False, True, True]}
    digests = {make_traces([row]).digest for row in (agreed, UNLABELLED)}
    others = {"final_answer": "3"}, {"final_answer": "8"}, {"answer": ["3", "7", "8"]}
    digests |= {make_traces([UNLABELLED | other]).digest for other in others}
    assert len(digests) == 5


@pytest.mark.parametrize("rule", ["latex", "number"])
def test_formulas_agree_as_their_scorer_says(rule: str, tmp_path: Path, make_row: MakeRow) -> None:
    pytest.importorskip("math_verify")
    answers = {"final_answer": r"\frac{1}{2}", "answer": ["0.5", r"\frac{1}{2}", "0.4"]}
    write_shard(tmp_path / "x.parquet", [make_row(**UNLABELLED | answers)], {"answer_rule": rule})
    files = TraceFiles.open(tmp_path / "x.parquet", agreeing)
    assert files.read(files.rows()).correct.tolist() == [rule == "latex", True, False]
    plainly = read_traces(tmp_path / "x.parquet")
    assert plainly.correct.tolist() == [False, True, False]
    assert plainly.digest == files.digest(files.rows())  # whoever compares


def test_digests_agree_if_they_are_equal(make_traces: MakeTraces) -> None:
    traces = make_traces([UNLABELLED | DIGESTS], {"answers": "digests", "answer_rule": "latex"})
    assert traces.correct.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "recorder", "message"),
    [
        ({"gold": None}, {}, "'gold', row 0: found null, expected string, or null in each of gold"),
        ({"correct": None}, {}, "'correct', row 0: found null, expected list<.*>, or null in each"),
        (UNLABELLED | {"final_correct": True}, {}, "'gold', row 0: found null"),
        (UNLABELLED | {"final_answer": None}, {}, "'final_answer', row 0: found null"),
        (UNLABELLED | {"position": [1, 2]}, {}, "row 0: found 3 entries, expected 2"),
        ({}, {"answers": "digests"}, "'gold': found '7', expected digests of 32 hexadecimal"),
        (UNLABELLED, {"answers": "digests"}, "'final_answer': found '7', expected digests"),
        ({}, {"answers": "sha256"}, "answers 'sha256', expected text or digests"),
    ],
)
def test_verdicts_are_there_or_not_and_digests_are_digests(
    changes: Row, recorder: Row, message: str, tmp_path: Path, make_row: MakeRow
) -> None:
    with pytest.raises(InputError, match=message):
        write_shard(tmp_path / "x.parquet", [make_row(**changes)], recorder)
    assert not list(tmp_path.iterdir())


# Soundness


def recording(folder: Path, make_row: MakeRow, num_unlabelled: int, **changes: Any) -> TraceFiles:
    """200 questions, of which some are not labelled."""
    rows = [
        make_row(trace_id=f"t{n}", question_id=f"q{n}", split="train")
        | (UNLABELLED | changes if n < num_unlabelled else {})
        for n in range(200)
    ]
    write_shard(folder / "x.parquet", rows, {})
    return TraceFiles.open(folder)


def test_nobody_is_told_that_an_unknown_lm_is_right(tmp_path: Path, make_row: MakeRow) -> None:
    for num, begins in ((200, "No trace has a reference answer"), (150, "150 of 200 traces have")):
        (doubt,) = check_sound(recording(tmp_path, make_row, num))
        assert doubt.startswith(begins)
        assert doubt.endswith("Whether the LM is right by itself is not known.")


def test_unlabelled_traces_make_no_exact_match(tmp_path: Path, make_row: MakeRow) -> None:
    files = recording(tmp_path, make_row, 150)
    wrong = {"final_answer": "9", "final_correct": False, "correct": [False] * 3}
    rows = [make_row(trace_id=f"w{n}", question_id=f"w{n}", split="train") for n in range(400)]
    write_shard(tmp_path / "y.parquet", [row | wrong for row in rows], {})
    files = TraceFiles.open(tmp_path)
    assert check_sound(files)  # 50 of 450 labelled ones are right
    with pytest.raises(InputError, match="50 of 450 traces end with a right answer"):
        check_sound(files, min_em=0.2)


def test_answers_that_nobody_can_read_are_refused(tmp_path: Path, make_row: MakeRow) -> None:
    with pytest.raises(InputError, match="none of 200 full answers could be read"):
        check_sound(recording(tmp_path, make_row, 200, final_answer="", answer=[""] * 3))


# Labels that come later


def write(path: Path, *lines: Any, end: str = "\n") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, lines)) + end)
    return path


def label(trace_id: Any, gold: Any) -> Row:
    return {"haltwise.label": {"trace_id": trace_id, "gold": gold}}


def test_a_label_finds_its_trace_wherever_it_stands(tmp_path: Path, make_row: MakeRow) -> None:
    made = [
        make_row(**UNLABELLED, trace_id=f"t{n}", question_id=f"q{n}", answer=["3", "", "7"])
        for n in range(4)
    ]
    recorder = {"haltwise.recorder": {"answer_rule": "number"}}
    write(tmp_path / "in" / "1.jsonl", recorder, label("t3", "7"), made[0], made[1])
    write(tmp_path / "in" / "2.jsonl", recorder, made[2], label("t0", "8"), label("t1", "3.0"))
    write(tmp_path / "in" / "3.jsonl", recorder, made[3], label("t0", "7.0"), label("lost", "1"))
    assert import_json_lines(tmp_path / "in", tmp_path / "out", 3, scorer_of) == 4
    traces = read_traces(tmp_path / "out")
    assert traces.labelled.tolist() == [True, True, False, True]
    assert traces.final_correct.tolist() == [True, False, True, True]
    rows = [[False, False, True], [True, False, False], [False, False, True], [False, False, True]]
    assert traces.correct.reshape(4, 3).tolist() == rows


def test_a_label_of_digests_is_one(tmp_path: Path, make_row: MakeRow) -> None:
    made = [make_row(**UNLABELLED | DIGESTS, trace_id=name, question_id=name) for name in "ab"]
    recorder = {"haltwise.recorder": {"answers": "digests", "answer_rule": "latex"}}
    source = write(tmp_path / "x.jsonl", recorder, *made, label("a", B))
    import_json_lines(source, tmp_path / "out", 2, scorer_of)
    traces = read_traces(tmp_path / "out")
    assert traces.labelled.tolist() == [True, False]
    assert traces.final_correct.tolist() == [False, True]
    assert traces.correct.tolist() == [True, False, False, False, False, True]
    source = write(tmp_path / "y.jsonl", recorder, *made, label("a", "7"))
    with pytest.raises(InputError, match="line 2: column 'gold': found '7', expected digests"):
        import_json_lines(source, tmp_path / "none", 2, scorer_of)


def test_labels_of_a_question_do_not_contradict_each_other(
    tmp_path: Path, make_row: MakeRow
) -> None:
    made = [make_row(**UNLABELLED, trace_id=f"t{n}") for n in range(3)]
    source = write(tmp_path / "x.jsonl", *made, label("t1", "7"), label("t2", "8"))
    with pytest.raises(InputError, match="line 3: column 'gold': question 'q0' has '8', but '7'"):
        import_json_lines(source, tmp_path / "out", 9)


def test_a_line_that_is_still_written_is_left_out_of_a_folder(
    tmp_path: Path, make_row: MakeRow
) -> None:
    made = [make_row(trace_id=f"t{n}") for n in range(2)]
    whole = write(tmp_path / "in" / "x.jsonl", *made, end="")
    assert import_json_lines(tmp_path / "in", tmp_path / "out", 2) == 1
    assert import_json_lines(whole, tmp_path / "all", 2) == 2
    whole.write_text(whole.read_text()[:-5])
    assert import_json_lines(tmp_path / "in", tmp_path / "more", 2) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([label("a", 7)], "line 2: haltwise.label has .*, expected two texts"),
        ([label("a", "")], "line 2: haltwise.label has .*, expected two texts"),
        ([{"haltwise.label": {"trace_id": "a"}}], "line 2: expected haltwise.label alone, of a"),
        ([label("a", "7") | {"seed": 0}], "line 2: expected haltwise.label alone"),
        ([label("q0-0", "yes")], "line 2: gold answer 'yes' cannot be compared"),
    ],
)
def test_a_label_that_is_none_is_told(
    lines: list[Row], message: str, tmp_path: Path, make_row: MakeRow
) -> None:
    recorder = {"haltwise.recorder": {"answer_rule": "number"}}
    source = write(tmp_path / "x.jsonl", recorder, *lines, make_row(**UNLABELLED))
    with pytest.raises(InputError, match=message):
        import_json_lines(source, tmp_path / "out", 2, scorer_of)


def test_files_of_several_recordings_and_none_are_told(tmp_path: Path, make_row: MakeRow) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=r"folder without traces, expected \*\.jsonl"):
        import_json_lines(tmp_path / "in", tmp_path / "out", 2)
    write(tmp_path / "in" / "1.jsonl", {"haltwise.recorder": {"lm": "x"}}, make_row())
    write(tmp_path / "in" / "2.jsonl", make_row(trace_id="b"))
    with pytest.raises(InputError, match=r"2\.jsonl: haltwise\.recorder differs from 1\.jsonl's"):
        import_json_lines(tmp_path / "in", tmp_path / "out", 2)
    write(tmp_path / "in" / "2.jsonl", {"haltwise.recorder": {"lm": "x"}}, make_row())
    with pytest.raises(InputError, match=r"'q0-0' is in 1\.jsonl, line 2 too"):
        import_json_lines(tmp_path / "in", tmp_path / "out", 2)
