from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from haltwise import InputError
from recording.collect import CollectConfig
from recording.collect import collect as main
from traces import import_json_lines, read_traces, write_shard

Row = dict[str, Any]
MakeRow = Callable[..., Row]
ROOT = Path(__file__).parents[2]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(make_row: MakeRow, num: int, **changes: Any) -> list[Row]:
    return [make_row(trace_id=f"t{n}", **changes) for n in range(num)]


def test_lines_become_shards(tmp_path: Path, make_row: MakeRow) -> None:
    hidden = [[0.5, 1.0]] * 3
    made = rows(make_row, 5, entropy=[0.5, float("nan"), 1], hidden=hidden, segment=None)
    source = write(tmp_path / "x.jsonl", {"haltwise.recorder": {"lm": "x"}}, *made)
    source.write_text(source.read_text() + "\n")
    assert import_json_lines(source, tmp_path / "out", 2) == 5
    shards = sorted((tmp_path / "out").iterdir())
    assert [pq.read_metadata(path).num_rows for path in shards] == [2, 2, 1]
    write_shard(tmp_path / "expected.parquet", made, {})
    traces = read_traces(tmp_path / "out")
    assert traces.digest == read_traces(tmp_path / "expected.parquet").digest
    assert traces.recorder == {"lm": "x"}
    np.testing.assert_array_equal(traces.signals["entropy"][:3], [0.5, np.nan, 1])


def test_null_is_an_unknown_number(tmp_path: Path, make_row: MakeRow) -> None:
    source = write(tmp_path / "x.jsonl", make_row(confidence=[0.5, None, 1.0]))
    import_json_lines(source, tmp_path / "out", 2)
    np.testing.assert_array_equal(read_traces(tmp_path / "out").confidence, [0.5, np.nan, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "train"}, "column 'split': question 'q0' has 'train', but 'test' in line 1"),
        ({"gold": "8"}, "column 'gold': question 'q0' has '8', but '7' in line 1"),
    ],
)
def test_a_question_is_one_question(
    tmp_path: Path, make_row: MakeRow, change: Row, message: str
) -> None:
    source = write(tmp_path / "x.jsonl", make_row(), make_row(trace_id="b") | change)
    with pytest.raises(InputError, match=f"line 2: {message}"):
        import_json_lines(source, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("answr_rule", "answer_rule"),
        ("max_answer_token", "max_answer_tokens"),
        ("anwers", "answers"),
    ],
)
def test_a_misspelt_condition_is_refused(
    tmp_path: Path, make_row: MakeRow, name: str, meant: str
) -> None:
    recorder = {"close_tokens": 1, "max_tokens": 9, "version": "1", name: "x"}
    source = write(tmp_path / "x.jsonl", {"haltwise.recorder": recorder}, make_row())
    with pytest.raises(InputError, match=f"line 1: .* has '{name}', expected '{meant}', or"):
        import_json_lines(source, tmp_path / "out", 1)


RUNNABLE = {
    "decision_rule": "every 16 tokens",
    "close_text": "</think>",
    "confidence_rule": "exp of the mean of answer_logprobs",
}


@pytest.mark.parametrize(
    ("recorder", "told"),
    [
        ({}, "haltwise.recorder states no decision_rule and no close_text"),
        (RUNNABLE | {"close_text": ""}, "haltwise.recorder states no close_text"),
        (
            RUNNABLE | {"decision_rule": "by hand"},
            "decision rule 'by hand' is none that can be run",
        ),
        (RUNNABLE | {"confidence_rule": ""}, "confidence rule '' is none that can be run"),
        (RUNNABLE | {"confidence_rule": "", "probing": "at_halt"}, ""),
        (RUNNABLE, ""),
        (RUNNABLE | {"decision_rule": "every 7 tokens"}, "1 of 1 traces contradict the decision"),
    ],
)
def test_an_import_says_whether_a_head_could_be_run(
    tmp_path: Path, make_row: MakeRow, recorder: Row, told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = make_row(position=[64, 128, 192], answer_logprobs=[[], [], []])
    source = write(tmp_path / "x.jsonl", {"haltwise.recorder": recorder}, row)
    main(CollectConfig(out=tmp_path / "out", json_lines=source))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {told}") if told else not error


def test_answers_with_two_verdicts_are_told(
    tmp_path: Path, make_row: MakeRow, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = make_row(trace_id="b", final_correct=False)
    source = write(tmp_path / "x.jsonl", make_row(trace_id="a"), wrong, make_row(trace_id="c"))
    main(CollectConfig(out=tmp_path / "out", json_lines=source))
    told = "the first is '7' to 'q0'. They are in 3 of 3 traces (100.0%): 'a', 'b', 'c'."
    assert told in capsys.readouterr().err


def test_the_command_imports_too(tmp_path: Path, make_row: MakeRow) -> None:
    source = write(tmp_path / "x.jsonl", *rows(make_row, 3), [])
    arguments = ["--json-lines", str(source), "--out", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "collect.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr == f"error: {source}, line 4: [] is not a JSON object\n"
    write(source, *rows(make_row, 3))
    main(CollectConfig(out=tmp_path / "out", json_lines=source, shard_size=2))
    assert read_traces(tmp_path / "out").recorder == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": "many"}, "column 'num_tokens' does not fit int32: .*'many'"),
        ({"position": [1, 1, 2]}, "column 'position': found 1, expected strictly"),
        ({"correct": [True]}, "column 'correct': found 1 entries, expected 3"),
        ({"gold": None}, "column 'gold': found null"),
        ({"model": "\ud800"}, "column 'model' does not fit string: .*surrogates"),
        ({"anwser": []}, "column 'anwser': there, but missing in line 1"),
        ({"trace_id": "t1"}, "column 'trace_id': 't1' is in line 2 too"),
        ({"hidden": [[0.0]] * 3}, "column 'hidden': vector of 1, expected 2 as in line 1"),
        ({"hidden": [["a", "b"]] * 3}, "column 'hidden' does not fit"),
        (
            {"confidence": [True, 0.5, 0.5]},
            "column 'confidence': found a truth value, expected num",
        ),
        ({"question_id": ""}, "column 'question_id': found , expected a name"),
    ],
)
@pytest.mark.parametrize("shard_size", [2, 10])
def test_a_bad_line_is_told_and_leaves_nothing(
    tmp_path: Path, make_row: MakeRow, change: Row, message: str, shard_size: int
) -> None:
    made = rows(make_row, 6, hidden=[[0.0, 1.0]] * 3)
    source = write(tmp_path / "x.jsonl", *made[:4], made[4] | change, made[5])
    with pytest.raises(InputError, match=rf"x\.jsonl, line 5: {message}"):
        import_json_lines(source, tmp_path / "out", shard_size)
    assert list(tmp_path.iterdir()) == [source]


def test_verdicts_that_are_all_unknown_are_a_null(tmp_path: Path, make_row: MakeRow) -> None:
    nobody_knows = {"gold": None, "final_correct": None}
    made = [make_row(trace_id=f"t{n}", question_id=f"q{n}") | nobody_knows for n in range(2)]
    source = write(
        tmp_path / "x.jsonl", made[0] | {"correct": None}, made[1] | {"correct": [None] * 3}
    )
    import_json_lines(source, tmp_path / "out", 2)
    assert pq.read_table(tmp_path / "out" / "00000.parquet")["correct"].to_pylist() == [None, None]
    write(source, made[0] | {"correct": [True, None, None]})
    with pytest.raises(InputError, match="column 'gold': found null"):
        import_json_lines(source, tmp_path / "other", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no traces, expected one JSON object a line"),
        ('{"haltwise.recorder": {}}\n', "no traces"),
        ('{"haltwise.recorder": 1}\n', "line 1: expected haltwise.recorder alone, an object"),
        ('{"haltwise.recorder": {}, "seed": 0}\n', "line 1: expected haltwise.recorder alone"),
        (
            '{"haltwise.recorder": {"answer_rule": "numbers"}}\n',
            "line 1: haltwise.recorder: answer_rule is 'numbers'",
        ),
        (
            '{"trace_id": "t"}\n{"haltwise.recorder": {}}\n',
            "line 2: expected haltwise.recorder in line 1 alone",
        ),
        (
            '\n{"seed": 0\n}',
            "line 2: no JSON, Expecting .* at character 12: expected one object a line",
        ),
        ("[" * 100_000, "line 1: no JSON, maximum recursion depth"),
        ('{"gold": "7", "gold": "8"}', "line 1: no JSON, 'gold' is there twice, expected once"),
        (
            '{"trace_id": "a", "hidden": [[], []]}',
            r"line 1: column 'hidden': found \[\], expected a l",
        ),
        ('{"seed": 0}\n{"seed": 0}\n', "line 1: column 'trace_id': missing"),
        ('{"trace_id": null}\n', "line 1: column 'trace_id': missing"),
        ("{}\n", "line 1: column 'trace_id': missing"),
    ],
)
def test_a_file_that_holds_no_traces_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"x\.jsonl.*{message}"):
        import_json_lines(tmp_path / "x.jsonl", tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("content", [b'{"model": "\xff"}\n', '{"model": 1}\n'.encode("utf-16")])
def test_bytes_that_are_no_text_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"line 1: .* in byte \d+: expected text in UTF-8"):
        import_json_lines(tmp_path / "x.jsonl", tmp_path / "out", 2)


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(
    tmp_path: Path, make_row: MakeRow
) -> None:
    source = write(tmp_path / "x.jsonl", make_row())
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.part").mkdir()  # of a killed import
    (tmp_path / ".out.part" / "00007.parquet").touch()
    import_json_lines(source, tmp_path / "out", 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.parquet"]
    for used in (tmp_path / "out", source):
        with pytest.raises(InputError, match="is in use, expected a new or empty folder"):
            import_json_lines(source, used, 2)
