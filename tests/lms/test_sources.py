"""Questions from a person's own data."""

from __future__ import annotations

import csv
import heapq
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants

from haltwise import InputError
from lms.questions import SPLITS, Question, question_digest, split_of
from lms.scorers import SCORERS
from lms.sources import DataConfig, QuestionTask, open_task
from lms.sources.data_rows import rows_of_hub

Row = dict[str, Any]
ROWS: list[Row] = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(60)]


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Writes rows in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(path: Path, **flags: Any) -> QuestionTask:
    return open_task(DataConfig(task=str(path), **flags))


def everything(task: QuestionTask, num: int = 1000) -> list[Question]:
    """All questions, of splits that have some."""
    found = []
    for split in SPLITS:
        if f"{split} 0" not in task.describe():
            found += list(task.questions(split, num, 0))
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".CSV"])
def test_every_format_gives_the_same_questions(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"sums{suffix.lower()}", ROWS)
    found = everything(own(path.rename(path.with_suffix(suffix))))
    assert {question.text.partition("\n")[0]: question.gold for question in found} == {
        row["question"]: row["answer"] for row in ROWS
    }
    instruction = SCORERS["short"].instruction
    for question in found:
        text = question.text.removesuffix(f"\n\n{instruction}")
        assert question.split == split_of(question_digest(text))
        assert question.question_id == f"sums-{question_digest(text)[:16]}"
        assert (question.task, question.segment, question.scorer) == ("sums", "", "short")
    assert len({question.question_id for question in found}) == 60


def test_lines_may_be_named_json_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "sums.json"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8-sig")
    assert len(everything(own(path))) == 60


def test_columns_are_named_by_flags(tmp_path: Path) -> None:
    row = {"ask": " How old?", "age": 71, "about": "She was born in 1931.", "kind": 3, "answer": ""}
    path = write(tmp_path / "ages.jsonl", [row])
    flags = {"question_column": "ask", "answer_column": "age", "context_column": "about"}
    task = own(path, scorer="number", instruction="Be brief.", segment_column="kind", **flags)
    (question,) = everything(task)
    assert question.text == "She was born in 1931.\n\nHow old?\n\nBe brief."
    assert (question.gold, question.segment, question.scorer) == ("71", "3", "number")
    assert task.cue.endswith(r"\boxed{")
    assert task.answer_end == "}"


@pytest.mark.parametrize("answer", ["B", 1, "Rome"])
def test_choices_get_letters(tmp_path: Path, answer: str | int) -> None:
    row = {"question": "Capital?", "answer": answer, "options": ["Paris", "Rome"]}
    path = write(tmp_path / "choices.jsonl", [row])
    (question,) = everything(own(path, choices_column="options", instruction=""))
    assert question.text == "Capital?\n\nA. Paris\nB. Rome"
    assert question.gold == "B"
    assert question.scorer == "choice"
    assert question.is_right("B")


@pytest.mark.parametrize(
    ("answer", "options", "gold"),
    [
        (0, [1, 2, 3, 4], "A"),
        (4, [1, 2, 3, 4], "D"),
        (2, [1, 2, 3, 4], None),
        (3, [1, 2, 3, 4], None),
        (5, [1, 2, 3, 4], None),
        (1.0, [1, 2], None),
        ("B", ["A", "B"], "B"),
        ("A", ["B", "A"], None),
        ("x", ["x", "x"], None),
    ],
)
def test_an_answer_names_one_choice(
    tmp_path: Path, answer: float | str, options: list[Any], gold: str | None
) -> None:
    row = {"question": "2 + 2?", "answer": answer, "options": options}
    task = own(write(tmp_path / "choices.jsonl", [row]), choices_column="options")
    if gold:
        assert everything(task)[0].gold == gold
        return
    with pytest.raises(InputError, match=rf"the answer (is )?{answer!r}.* expected a letter"):
        task.describe()


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("1.0", "1.0"),
        ("1e22", "10000000000000000000000"),
        ("1e-7", "0.0000001"),
        ("1e-1000000000", "1E-1000000000"),
    ],
)
def test_a_number_keeps_its_digits(tmp_path: Path, written: str, gold: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "?", "answer": {written}}}')
    assert everything(own(path))[0].gold == gold


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.decimal128(5, 1)])
def test_numbers_of_parquet_are_those_that_were_written(tmp_path: Path, kind: pa.DataType) -> None:
    answer = pa.array([0.1]).cast(kind)
    pq.write_table(pa.table({"question": ["?"], "answer": answer}), tmp_path / "a.parquet")
    assert everything(own(tmp_path / "a.parquet"))[0].gold == "0.1"


def test_alternatives_stand_one_a_line(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": ["Ada", "Ada\nL."]}
    (question,) = everything(own(write(tmp_path / "a.jsonl", [row]), scorer="text"))
    assert question.gold == "Ada\nAda L."
    assert question.is_right("ada l")
    (question,) = everything(
        own(write(tmp_path / "b.csv", [row | {"answer": "Ada\nL."}]), scorer="text")
    )
    assert question.gold == "Ada L."


def test_the_seed_decides_which_are_taken_and_more_include_fewer(tmp_path: Path) -> None:
    task = own(write(tmp_path / "sums.csv", ROWS))
    ten = list(task.questions("train", 10, 0))
    assert list(task.questions("train", 10, 0)) == ten
    assert list(task.questions("train", 20, 0))[:10] == ten
    other = list(task.questions("train", 10, 1))
    assert set(other) != set(ten)
    assert len(set(other)) == 10


def test_the_order_of_the_rows_and_repeats_do_not_matter(tmp_path: Path) -> None:
    task = own(write(tmp_path / "one" / "sums.csv", ROWS))
    turned = own(write(tmp_path / "two" / "sums.csv", [*ROWS[::-1], *ROWS]))
    for num in (5, 1000):
        drawn = list(task.questions("train", num, 3))
        assert list(turned.questions("train", num, 3)) == drawn


@pytest.mark.parametrize(("again", "is_same"), [(" 14.", True), ("15", False)])
def test_a_question_has_one_answer_however_often_it_is_there(
    tmp_path: Path, again: str, is_same: bool
) -> None:
    task = own(write(tmp_path / "sums.jsonl", [*ROWS, ROWS[7] | {"answer": again}]))
    if is_same:
        assert len(everything(task)) == 60
    else:
        told = r"sums\.jsonl, line 61: 'What is 7 \+ 7\?' has the answer '15', and '14' in a row"
        with pytest.raises(InputError, match=told):
            everything(task)


def test_a_question_has_one_answer_in_all_splits(tmp_path: Path) -> None:
    write(tmp_path / "test.csv", ROWS[:30])
    write(tmp_path / "train.csv", [*ROWS[30:], ROWS[7] | {"answer": "15"}])
    told = r"train\.csv, line 32: 'What is 7 \+ 7\?' has the answer '15', and '14' in another split"
    for split in SPLITS:
        with pytest.raises(InputError, match=told):
            list(own(tmp_path).questions(split, 1, 0))


def test_an_instruction_moves_no_question_to_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.csv", ROWS)
    plain, told = (everything(own(path, instruction=text)) for text in ("", "Think hard."))
    assert [q.question_id for q in plain] == [q.question_id for q in told]
    assert [q.split for q in plain] == [q.split for q in told]


def test_own_splits_are_kept_and_dev_is_a_tenth_of_train(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", ROWS[:40])
    write(tmp_path / "more" / "train_1.jsonl", ROWS[40:50])
    write(tmp_path / "test.jsonl", [*ROWS[45:], {"question": " What is 3  + 3?", "answer": 6}])
    write(tmp_path / ".copies" / "train.jsonl", [{"question": "Old?", "answer": "1"}])
    (tmp_path / "infos.json").write_text('{"rows": 60}')
    found = everything(own(tmp_path, instruction=""))
    splits = {question.text: question.split for question in found}
    for n, row in enumerate(ROWS):
        text = " ".join(row["question"].split())
        hashed = split_of(question_digest(text))
        expected = "test" if n == 3 or n >= 45 else "dev" if hashed == "dev" else "train"
        assert {" ".join(key.split()): split for key, split in splits.items()}[text] == expected
    assert len(found) == 60


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("train.csv", "eval.jsonl"), "not read: eval.jsonl: expected names that begin with train"),
        (("train.csv", "test.jsonl.gz"), "not read: test.jsonl.gz: expected"),
        (
            ("my_train.csv", "x.csv"),
            "a hash divides .*, whatever split the name 'my_train.csv' tel",
        ),
        (("test/a.csv",), "whatever split the name 'test/a.csv' tells: expected a folder of files"),
        (("latest.csv", "trains.csv", "infos.txt"), ""),
        (("train.csv", "test.csv", "infos.txt"), ""),
    ],
)
def test_files_and_splits_that_are_passed_over_are_told(
    tmp_path: Path, names: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        write(tmp_path / name, ROWS)
    own(tmp_path)
    assert re.search(told, capsys.readouterr().err) if told else not capsys.readouterr().err
    own(tmp_path, split_column="part")
    assert "hash" not in capsys.readouterr().err


def test_a_split_column_may_use_other_names(tmp_path: Path) -> None:
    names = ["train", "validation", "Test"]
    rows = [row | {"part": names[n % 3]} for n, row in enumerate(ROWS)]
    task = own(write(tmp_path / "sums.csv", rows), split_column="part", scorer="number")
    for n, split in enumerate(SPLITS):
        found = {question.gold for question in task.questions(split, 100, 0)}
        assert found == {row["answer"] for row in ROWS[n::3]}
    assert task.describe().startswith("sums: train 20, dev 20, test 20 rows; scorer number; instr")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_fresh_questions_of_one_split_keep_it_if_a_column_says_so(
    tmp_path: Path, split: str
) -> None:
    rows = [row | {"part": split} for row in ROWS]
    task = own(write(tmp_path / "fresh.csv", rows), split_column="part")
    assert {question.split for question in task.questions(split, 100, 0)} == {split}
    assert sum(1 for _ in task.questions(split, 100, 0)) == len(ROWS)
    told = f"no question of split train, found rows: .*{split} 60.*rows, no --split-column, so"
    with pytest.raises(InputError, match=told):
        next(task.questions("train", 100, 0))


def test_a_split_that_is_divided_is_told(tmp_path: Path) -> None:
    write(tmp_path / "test-1.csv", ROWS)
    task = own(tmp_path)
    assert ", all of them named test, which is divided by a hash; scorer" in task.describe()
    path = write(tmp_path / "own.csv", [row | {"split": "Test"} for row in ROWS])
    told = ", divided by a hash whatever column 'split' says: --split-column split keeps that; "
    assert told in own(path).describe()
    late = [ROWS[0] | {"Split": "fold"}, *(row | {"Split": "Test"} for row in ROWS[1:])]
    assert "--split-column Split keeps" in own(write(tmp_path / "late.csv", late)).describe()
    assert told not in own(path, split_column="split").describe()
    assert (
        told not in own(write(tmp_path / "a.csv", [row | {"split": 3} for row in ROWS])).describe()
    )
    assert {question.split for question in everything(task)} == set(SPLITS)


def test_rows_that_repeat_a_question_are_counted(tmp_path: Path) -> None:
    spaced = {"question": " What is 1  + 1?", "answer": "2"}
    task = own(write(tmp_path / "sums.csv", [*ROWS, spaced, ROWS[1], ROWS[2]]))
    assert ", 3 repeat a question, which is asked once; scorer short" in task.describe()
    assert len(everything(task)) == 60
    assert "repeat" not in own(write(tmp_path / "once.csv", ROWS)).describe()


def test_answers_that_look_like_none_are_counted(tmp_path: Path) -> None:
    unknown = [{"question": f"What is {word}?", "answer": "nan"} for word in ("it", "this")]
    told = own(write(tmp_path / "own.csv", [*ROWS, *unknown])).describe()
    assert "rows, 2 answered 'nan', which is to be left empty where it means none; scorer" in told
    assert "answered" not in own(write(tmp_path / "whole.csv", ROWS)).describe()


@pytest.mark.parametrize("flag", ["segment_column", "split_column", "answer_column"])
def test_a_table_lacks_a_column_where_it_names_them(tmp_path: Path, flag: str) -> None:
    told = (
        r"no column 'no', found question, answer(: expected it in .*, or --answer-column COLUMN)?$"
    )
    for name, line in [("a.csv", ", line 1"), ("a.parquet", ""), ("a.jsonl", ", line 1")]:
        with pytest.raises(InputError, match=f"{name}{line}: {told}"):
            own(write(tmp_path / name, ROWS), **{flag: "no"}).describe()


def test_only_what_is_taken_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    task = own(write(tmp_path / "sums.csv", ROWS))

    def push(heap: list[int], place: int) -> None:
        heapq.heappush(heap, place)
        sizes.append(len(heap))

    monkeypatch.setattr("lms.sources.table_task.heappush", push)
    assert len(list(task.questions("train", 3, 0))) == 3
    assert max(sizes) == 3


def test_the_hub_is_read_by_its_own_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, rows in (("train", ROWS[:40]), ("validation", ROWS[40:50]), ("test", ROWS[50:])):
        write(tmp_path / "sums" / f"{name}.jsonl", rows)
    # The package reads a folder as it reads the hub.
    found = list(rows_of_hub(str(tmp_path / "sums"))())
    assert [row for _, _, row in found] == ROWS
    assert [split for split, _, _ in found] == ["train"] * 40 + ["dev"] * 10 + ["test"] * 10
    assert found[41][1].endswith("sums, validation, row 2")


def test_splits_of_the_hub_with_other_names_are_one_or_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = {"corpus": ROWS}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: loaded)
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: None)
    assert {split for split, _, _ in rows_of_hub("a/b")()} == {""}
    loaded["queries"] = ROWS
    with pytest.raises(InputError, match="found splits corpus, queries, expected train"):
        rows_of_hub("a/b")


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*args: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: None)
    # Another test may have found the hub out of reach.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    told = r"^cannot load 'a/b:c' from the hub: no route to the hub: expected"
    with pytest.raises(InputError, match=told):
        open_task(DataConfig(task="a/b:c"))


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"datasets is not installed.*-e '\.\[data\]'"):
        open_task(DataConfig(task="owner/absent"))


def test_rows_of_a_hub_name_may_lie_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROWS)
    task = open_task(DataConfig(task="owner/sums", data_file=path))
    assert {question.task for question in everything(task)} == {"owner/sums"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"question_column": "q"},
            "no column 'q', found .*: expected it in every row, or --question-column COLUMN",
        ),
        (
            {"answer_column": "a"},
            "no column 'a', found .*: expected it in every row, or --answer-column COLUMN",
        ),
        ({"answer_column": "list"}, r"list is \['a', 'b'\], expected one answer, or --scorer text"),
        ({"answer_column": "none"}, "none is None, expected a text or a number"),
        ({"answer_column": "blank"}, "gold answer '' is empty"),
        ({"question_column": "blank"}, "blank is ' ', expected a text that is not blank"),
        ({"question_column": "list"}, "expected a text that is not blank"),
        ({"choices_column": "answer"}, "answer is 'x', expected a list of texts"),
        ({"choices_column": "list"}, "the answer is 'x', expected a letter up to B"),
        ({"segment_column": "list"}, "expected a text or a number"),
        ({"segment_column": "long"}, "long is a+ ..., of 1,001 characters, expected at most 1,000"),
        ({"split_column": "part"}, "part is 'holdout', expected train, dev or test"),
        ({"split_column": "fold"}, "no column 'fold'"),
        ({"scorer": "number"}, "gold answer 'x' cannot be compared: expected a number"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(
    tmp_path: Path, flags: dict[str, str], message: str
) -> None:
    row = {"question": "Why?", "answer": "x", "part": "holdout", "list": ["a", "b"], "none": None}
    path = write(tmp_path / "rows.jsonl", [row | {"blank": " ", "long": "a" * 1001}])
    with pytest.raises(InputError, match=rf"rows.jsonl, line 1: .*{message}"):
        own(path, **flags).describe()


@pytest.mark.parametrize("name", ["a.jsonl, line 2", "a.json, row 2", "a.csv, line 3", "a.parquet"])
def test_an_answer_that_the_scorer_cannot_read_is_named_in_every_format(
    tmp_path: Path, name: str
) -> None:
    rows = [{"question": "2 + 3", "answer": "five"}, {"question": "1 + 3", "answer": "a lot"}]
    path = tmp_path / name.partition(",")[0]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("question,answer\n2 + 3,five\n1 + 3,a lot\n")
    else:
        lines = "\n".join(map(json.dumps, rows))
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    told = "gold answer 'a lot' cannot be compared: expected a number, as --scorer number reads it"
    with pytest.raises(InputError, match=f"{name}.*: {told}"):
        own(path, scorer="number").describe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "?"}\n{oops\n', r"a.jsonl, line 1: no column 'answer'"),
        (
            "a.jsonl",
            b"\n{oops\n",
            r"a.jsonl, line 2: Expecting .* at character 2: expected a JSON object",
        ),
        ("a.jsonl", b"[1]\n", r"a.jsonl, line 1: found list, expected an object"),
        ("a.json", b"[1]\n", r"a.json, row 1: found int, expected an object"),
        ("a.json", b'{\n"question": "?"\n}', r"a.json, found one object over many lines, expected"),
        ("a.jsonl", b'{"question": "?", "answer": NaN}', r"answer is nan, expected a text or a"),
        ("a.json", b"[{]\n", r"a.json, Expecting .*: expected a list of JSON objects"),
        ("a.csv", b"question,answer\n1,2,3\n", r"line 2: found 3 fields, expected 2, as in line 1"),
        (
            "a.csv",
            b"question,gold\n1,2\n",
            r"a.csv, line 1: no column 'answer', found",
        ),
        ("a.csv", b"question,answer\n1\n", r"a.csv, line 2: found 1 fields, expected 2"),
        ("a.csv", b"question;answer\n1;2\n", r"a.csv, line 1: found ';' between columns"),
        ("a.csv", b"question,answer,answer\n1,2,3\n", r"a.csv, column 'answer' is there twice"),
        ("a.csv", b'question,answer\n"1"x,2\n', r"a.csv, line 2: "),
        (
            "a.csv",
            b'question,answer\n1,2\n"3,4\n5,6\n',
            r"line 3: unexp.*, in a row that goes on to line 4: is a quote not closed",
        ),
        ("a.csv", b'question,answer\n"1\n2",\n', r"a.csv, line 2: gold answer '' is empty"),
        (
            "a.csv",
            b"question,answer\n1,\xff\n",
            r"cannot read .*a.csv, line 2, byte 3: .*: expected text in UTF-8",
        ),
        (
            "a.jsonl",
            b'{"question": "?", "answer": "1", "answer": "2"}',
            r"a.jsonl, line 1: 'answer' is there twice, expected once",
        ),
        ("a.json", b'[{"question": "?", "answer": 1, "answer": 2}]', r"'answer' is there twice"),
        ("folder/test.csv", b"question,answer\n", r"folder: no rows of split test, expected que"),
        ("a.jsonl", rb'{"question": "\ud800", "answer": "1"}', "line 1: .*no half of a character"),
        ("a.jsonl", rb'{"question": "?", "answer": "\udfff"}', "line 1: .*no half of a character"),
        ("a.parquet", b"no parquet at all", r"cannot read .*a.parquet: "),
        ("a.txt", b"", r"a.txt does not end with one of .jsonl, .json, .csv, .parquet, expected q"),
        ("folder/a.txt", b"", r"folder has no file that ends with one of .jsonl"),
        ("\udcff.jsonl", b"", r"--task is '\\udcff', expected no half of a character"),
        ("a.jsonl", b"\n", r"a.jsonl: no rows, expected questions with their answers"),
        ("a.csv", b"question,answer\n", r"a.csv: no rows, expected questions with their answers"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(own(path.parent if "/" in name else path).questions("train", 1, 0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "absent.csv"}, "absent.csv: no such file"),
        ({"task": "./absent"}, "unknown task './absent': choose from .* a file or folder, or OWN"),
        ({"task": "/absent/too"}, "unknown task '/absent/too': choose from"),
        ({"task": " "}, "--task names no task, expected"),
        ({"task": "gsm9k"}, "unknown task 'gsm9k': choose from all, sum, let, leap, gsm8k"),
        ({"task": "sum", "scorer": "number"}, "--scorer is not for task sum"),
        ({"task": "gsm8k", "answer_column": "a"}, "--answer-column is not for task gsm8k"),
        ({"task": "gsm8k", "scorer": "exact"}, "--scorer is 'exact', expected one of short"),
        ({"task": "absent.csv", "data_file": Path("x.csv")}, "--data-file is not for task"),
        ({"task": "gsm8k", "data_file": Path("absent.csv")}, "absent.csv: no such file"),
    ],
)
def test_a_flag_that_cannot_be_used_is_an_error(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_task(DataConfig(**flags))


@pytest.mark.parametrize(("split", "num"), [("validation", 1), ("test", 0)])
def test_a_draw_that_makes_no_sense_is_an_error(tmp_path: Path, split: str, num: int) -> None:
    task = own(write(tmp_path / "sums.csv", ROWS))
    with pytest.raises(InputError, match=r"choose from train, dev, test|at least 1"):
        list(task.questions(split, num, 0))
