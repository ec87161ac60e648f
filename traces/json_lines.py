"""Traces imported from JSON lines, which any program can write."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from haltwise import Halting, InputError
from traces.schema import SCHEMA
from traces.store import table_of, write_shard

_RECORDER = "haltwise.recorder"
# The columns with one number a point that may be unknown.
_NUMBERS = {field.name for field in SCHEMA if field.type == pa.list_(pa.float32())}

#: The number of a line, from 1, and the object that stands there.
NumberedLine = tuple[int, dict[str, Any]]


def import_json_lines(source: Path, out: Path, shard_size: int) -> int:
    """Writes the traces in a file as shards into a folder, which appears whole or not at all.

    Args:
        source: A file with one JSON object a line, by column name, with the same columns in every
            line; NaN or null is an unknown number. A first line {"haltwise.recorder": {...}} may
            tell how the traces were recorded.
        out: A folder that is new or empty.
        shard_size: The number of traces in a shard.

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
        num_traces = _write(source, temporary, shard_size)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return num_traces


def _write(source: Path, folder: Path, shard_size: int) -> int:
    recorder, lines = _recorder(source)
    together, num_shards, num_traces = _LineChecks(source), 0, 0
    while batch := list(islice(lines, shard_size)):
        for line in batch:
            together.check(*line)
        try:
            rows = [row for _, row in batch]
            write_shard(folder / f"{num_shards:05d}.parquet", rows, recorder)
        except InputError:
            for number, row in batch:  # finds the line, so that the message can name it
                table_of([row], f"{source}, line {number}")
            raise
        num_shards, num_traces = num_shards + 1, num_traces + len(batch)
    if not num_traces:
        raise InputError(f"{source}: no traces, expected one JSON object a line")
    return num_traces


def _recorder(source: Path) -> tuple[dict[str, Any], Iterator[NumberedLine]]:
    """Returns what a first line tells of the recorder, and the lines of traces."""
    lines = _lines(source)
    first = list(islice(lines, 1))
    for number, row in first:
        if _RECORDER in row:
            recorder = row.pop(_RECORDER)
            if row or not isinstance(recorder, dict):
                raise InputError(f"{source}, line {number}: expected {_RECORDER} alone, an object")
            try:
                Halting.of_recorder(recorder)
            except InputError as error:
                raise InputError(f"{source}, line {number}: {_RECORDER}: {error}") from None
            return recorder, lines
    return {}, chain(first, lines)


def _lines(source: Path) -> Iterator[NumberedLine]:
    """Yields the lines that are not blank.

    Raises:
        InputError: If a line is no JSON object.
    """
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}, line {number}: no JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{source}, line {number}: {row!r:.40} is not a JSON object")
            yield number, {name: _with_nan(name, value) for name, value in row.items()}


def _with_nan(name: str, value: Any) -> Any:
    """Returns a column's value with NaN for each null in a list of numbers.

    JSON has no NaN, so that null is how most programs write an unknown number.
    """
    if name not in _NUMBERS or not isinstance(value, list):
        return value
    return [math.nan if number is None else number for number in value]


class _LineChecks:
    """Checks that lines go together: columns, size of hidden states, ids, and each question."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._columns: tuple[int, set[str]] | None = None
        self._size: tuple[int, int] | None = None
        self._ids: dict[str, int] = {}
        self._questions: dict[Any, tuple[int, Any]] = {}

    def check(self, number: int, row: dict[str, Any]) -> None:
        """Refuses a line that does not go together with those before.

        Raises:
            InputError: If it tells of the recorder, a column is missing or new, a hidden state has
                another size, the trace id is missing or was there before, or its question had
                another split or reference answer before.
        """
        if _RECORDER in row:
            raise InputError(f"{self._source}, line {number}: expected {_RECORDER} in line 1 alone")
        self._columns = self._columns or (number, set(row))
        first, columns = self._columns
        for name in sorted(columns ^ set(row)):
            told = "missing, but there" if name in columns else "there, but missing"
            raise self._error(number, name, f"{told} in line {first}")
        hidden = row.get("hidden")
        for vector in hidden if isinstance(hidden, list) else ():
            size = len(vector) if isinstance(vector, list) else 0
            self._size = self._size or (number, size)
            if size != self._size[1]:
                expected = f"expected {self._size[1]} as in line {self._size[0]}"
                raise self._error(number, "hidden", f"vector of {size}, {expected}")
        if row.get("trace_id") is None:
            raise self._error(number, "trace_id", "missing")
        first = self._ids.setdefault(str(row["trace_id"]), number)
        if first != number:
            raise self._error(number, "trace_id", f"{row['trace_id']!r} is in line {first} too")
        question = str(row.get("question_id"))
        stated = {name: row.get(name) for name in ("split", "gold")}
        first, before = self._questions.setdefault(question, (number, stated))
        for name, value in stated.items():
            if None not in (value, before[name]) and value != before[name]:
                told = f"{value!r:.40}, but {before[name]!r:.40} in line {first}"
                raise self._error(number, name, f"question {question!r:.40} has {told}")

    def _error(self, number: int, name: str, text: str) -> InputError:
        return InputError(f"{self._source}, line {number}: column {name!r}: {text}")
