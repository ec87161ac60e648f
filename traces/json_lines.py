"""Traces imported from JSON lines, which any program can write, such as a server of its audits.

What is known of a trace only later is a line of its own, {"haltwise.label": {"trace_id": ...,
"gold": ...}}, so that nothing that was written has ever to be changed.
"""

from __future__ import annotations

import json
import math
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from haltwise import Halting, InputError
from haltwise.errors import each_once, json_fault
from traces.schema import SCHEMA
from traces.store import table_of, write_shard
from traces.verdicts import are_digests

_RECORDER, _LABEL = "haltwise.recorder", "haltwise.label"
# How alike a misspelt name is to the one that is meant, of 1.
_ALIKE = 0.85
# The columns with one number a point that may be unknown.
_NUMBERS = {field.name for field in SCHEMA if field.type == pa.list_(pa.float32())}

_NULL = {type(None)}

#: Says whether an answer, as the answer rule has read it, is right by a reference answer.
IsRight = Callable[[str, str], bool]


class Line(NamedTuple):
    """A line of a file."""

    file: Path
    number: int
    """From 1."""
    row: dict[str, Any]

    @property
    def place(self) -> str:
        """Where it stands, with which messages begin."""
        return f"{self.file}, line {self.number}"

    def seen_from(self, other: Line) -> str:
        """Where it stands, for a message about another line."""
        beside = f"line {self.number}"
        return beside if self.file == other.file else f"{self.file.name}, {beside}"


def same_text(answer_rule: str) -> IsRight:
    """Returns what says that answers are right if they are the reference answer."""
    return operator.eq


def import_json_lines(
    source: Path, out: Path, shard_size: int, scorer: Callable[[str], IsRight] = same_text
) -> int:
    """Writes the traces in a file as shards into a folder, which appears whole or not at all.

    Args:
        source: A file with one JSON object a line, by column name, with the same columns in every
            line; NaN or null is an unknown number. A first line {"haltwise.recorder": {...}} may
            tell how the traces were recorded. Or a folder of such *.jsonl files, to which somebody
            may still be writing: a line at their end that is not ended is left out.
        out: A folder that is new or empty.
        shard_size: The number of traces in a shard.
        scorer: Given the recording's answer rule, tells what is right by a label.

    Returns:
        The number of traces.

    Raises:
        InputError: If a line is wrong, with file, line and column, or if the folder is in use.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is in use, expected a new or empty folder")
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        num_traces = _write(source, temporary, shard_size, scorer)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return num_traces


def _write(source: Path, folder: Path, shard_size: int, scorer: Callable[[str], IsRight]) -> int:
    recorder, lines = _all_lines(source)
    labels = _labels(source)
    digested = are_digests(recorder, str(source))
    is_right = operator.eq if digested else scorer(recorder.get("answer_rule", "short"))
    together, num_shards, num_traces = _LineChecks(), 0, 0
    traces = (_labelled(line, labels, is_right) for line in lines if _LABEL not in line.row)
    while batch := list(islice(traces, shard_size)):
        for line in batch:
            together.check(line)
        try:
            rows = [line.row for line in batch]
            write_shard(folder / f"{num_shards:05d}.parquet", rows, recorder)
        except InputError:
            for line in batch:  # finds the line, so that the message can name it
                _check_alone(line, recorder)
            raise
        num_shards, num_traces = num_shards + 1, num_traces + len(batch)
    if not num_traces:
        raise InputError(f"{source}: no traces, expected one JSON object a line")
    return num_traces


def _check_alone(line: Line, recorder: dict[str, Any]) -> None:
    """Refuses a line that makes no table by itself.

    Raises:
        InputError: If it is one.
    """
    try:
        table_of([line.row], line.place, recorder)
    except InputError as error:
        # The line says which row it is; of its points, the row is not the number.
        raise InputError(str(error).replace(", row 0: ", ": ", 1)) from None


def _all_lines(source: Path) -> tuple[dict[str, Any], Iterator[Line]]:
    """Returns what the first lines tell of the recorder, and the lines of traces and labels.

    Raises:
        InputError: If files tell of several recorders, or there is none.
    """
    begun = []
    for file in _files(source):
        lines = _lines(file, may_be_cut=source.is_dir())
        first = next(lines, None)
        if first is not None:
            begun.append((file, *_recorder(first, lines)))
    recorder = begun[0][1] if begun else {}
    for file, other, _ in begun:
        if other != recorder:
            raise InputError(
                f"{file}: {_RECORDER} differs from {begun[0][0].name}'s, expected files of one "
                "recording"
            )
    return recorder, chain.from_iterable(lines for _, _, lines in begun)


def _files(source: Path) -> Sequence[Path]:
    """Returns a file, or those of a folder in the order of their names.

    Raises:
        InputError: If there is none in the folder.
    """
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{source}: folder without traces, expected *.jsonl files")
    return files


def _recorder(first: Line, others: Iterator[Line]) -> tuple[dict[str, Any], Iterator[Line]]:
    """Returns what the first line of a file tells of the recorder, and the lines that do not."""
    if _RECORDER not in first.row:
        return {}, chain([first], others)
    recorder = first.row.pop(_RECORDER)
    if first.row or not isinstance(recorder, dict):
        raise InputError(f"{first.place}: expected {_RECORDER} alone, an object")
    try:
        _check_spelling(recorder)
        Halting.of_recorder(recorder)
    except InputError as error:
        raise InputError(f"{first.place}: {_RECORDER}: {error}") from None
    return recorder, others


def _check_spelling(recorder: dict[str, Any]) -> None:
    """Refuses what looks like a condition of halting, and is kept without a word if it is none.

    Raises:
        InputError: If a name is nearly that of a condition.
    """
    known = [*(field.name for field in fields(Halting)), "answers"]
    for name in recorder.keys() - {*known}:
        if meant := get_close_matches(name, known, 1, _ALIKE):
            raise InputError(f"has {name!r}, expected {meant[0]!r}, or another name if not that")


def _lines(file: Path, may_be_cut: bool, having: bytes = b"") -> Iterator[Line]:
    """Yields the lines that are not blank.

    Args:
        file: The file.
        may_be_cut: Whether a last line that is not ended is left out.
        having: What a line has to contain.

    Raises:
        InputError: If a line is no JSON object.
    """
    with file.open("rb") as content:
        for number, text in enumerate(content, 1):
            if not text.strip() or having not in text or (may_be_cut and text[-1:] != b"\n"):
                continue
            try:
                row = json.loads(text.decode("utf-8-sig"), object_pairs_hook=each_once)
            except UnicodeDecodeError as error:
                told = f"{error.reason} in byte {error.start}: expected text in UTF-8"
                raise InputError(f"{file}, line {number}: {told}") from None
            except (ValueError, RecursionError) as error:
                told = f"no JSON, {json_fault(error)}: expected one object a line"
                raise InputError(f"{file}, line {number}: {told}") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: {row!r:.40} is not a JSON object")
            yield Line(file, number, {name: _with_nulls(name, row[name]) for name in row})


def _with_nulls(name: str, value: Any) -> Any:
    """Returns a column's value with its nulls as the schema has them.

    JSON has no NaN, so that null is how most programs write an unknown number in a list. And a list
    of verdicts that are all null says what one null in its place does.
    """
    if name == "correct" and isinstance(value, list) and value and set(map(type, value)) == _NULL:
        return None
    if name not in _NUMBERS or not isinstance(value, list):
        return value
    return [math.nan if number is None else number for number in value]


def _labels(source: Path) -> dict[str, Line]:
    """Returns the newest label of each trace that has one, by trace id.

    Raises:
        InputError: If a line that is to be a label is none.
    """
    found: dict[str, Line] = {}
    for file in _files(source):
        for line in _lines(file, source.is_dir(), _LABEL.encode()):
            if _LABEL not in line.row:
                continue
            label = line.row[_LABEL]
            is_label = len(line.row) == 1 and isinstance(label, dict)
            if not is_label or label.keys() != {"trace_id", "gold"}:
                raise InputError(f"{line.place}: expected {_LABEL} alone, of a trace_id and a gold")
            if not all(isinstance(text, str) and text for text in label.values()):
                raise InputError(f"{line.place}: {_LABEL} has {label!r:.80}, expected two texts")
            found[label["trace_id"]] = line
    return found


def _labelled(line: Line, labels: dict[str, Line], is_right: IsRight) -> Line:
    """Returns the line of a trace with the verdicts of its label, if it has one.

    Raises:
        InputError: If no answer can be compared with the label.
    """
    label, row = labels.get(str(line.row.get("trace_id"))), line.row
    if label is None:
        return line
    gold = label.row[_LABEL]["gold"]

    def right(answer: Any) -> bool:
        return isinstance(answer, str) and answer != "" and is_right(answer, gold)

    try:
        answers = row["answer"] if isinstance(row.get("answer"), list) else []
        correct = [right(answer) for answer in answers]
        verdicts = {"gold": gold, "correct": correct, "final_correct": right(row["final_answer"])}
    except InputError as error:
        raise InputError(f"{label.place}: {error}") from None
    except KeyError as missing:
        raise InputError(f"{line.place}: column {missing}: missing") from None
    return line._replace(row=row | verdicts)


class _LineChecks:
    """Checks that lines go together: columns, size of hidden states, ids, and each question."""

    def __init__(self) -> None:
        self._columns: tuple[Line, set[str]] | None = None
        self._size: tuple[Line, int] | None = None
        self._ids: dict[str, Line] = {}
        self._questions: dict[tuple[str, str], tuple[Line, Any]] = {}

    def check(self, line: Line) -> None:
        """Refuses a line that does not go together with those before.

        Raises:
            InputError: If it tells of the recorder, a column is missing or new, a hidden state has
                another size, a truth value stands for a number, the trace id is missing or was
                there before, or its question had another split or reference answer before.
        """
        row, here = line.row, line._replace(row={})  # what is remembered of it is where it stands
        if _RECORDER in row:
            raise InputError(f"{line.place}: expected {_RECORDER} in line 1 alone")
        self._columns = self._columns or (here, set(row))
        first, columns = self._columns
        for name in sorted(columns ^ set(row)):
            told = "missing, but there" if name in columns else "there, but missing"
            raise _error(line, name, f"{told} in {first.seen_from(line)}")
        hidden = row.get("hidden")
        for vector in hidden if isinstance(hidden, list) else ():
            size = len(vector) if isinstance(vector, list) else 0
            self._size = self._size or (here, size)
            if not size:
                raise _error(line, "hidden", f"found {vector!r:.40}, expected a list of numbers")
            if size != self._size[1]:
                expected = f"expected {self._size[1]} as in {self._size[0].seen_from(line)}"
                raise _error(line, "hidden", f"vector of {size}, {expected}")
        for name in _NUMBERS & row.keys():
            if isinstance(row[name], list) and bool in map(type, row[name]):
                raise _error(line, name, "found a truth value, expected numbers")
        if row.get("trace_id") is None:
            raise _error(line, "trace_id", "missing")
        first = self._ids.setdefault(str(row["trace_id"]), here)
        if first != here:
            told = f"{row['trace_id']!r} is in {first.seen_from(line)} too"
            raise _error(line, "trace_id", told)
        self._check_question(line, here)

    def _check_question(self, line: Line, here: Line) -> None:
        question = str(line.row.get("question_id"))
        for name in ("split", "gold"):
            value = line.row.get(name)
            if value is None:
                continue
            first, before = self._questions.setdefault((question, name), (here, value))
            if value != before:
                told = f"{value!r:.40}, but {before!r:.40} in {first.seen_from(line)}"
                raise _error(line, name, f"question {question!r:.40} has {told}")


def _error(line: Line, name: str, text: str) -> InputError:
    return InputError(f"{line.place}: column {name!r}: {text}")
