"""Trace files: read with checks, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from haltwise import InputError
from traces.arrays import Traces, concatenate
from traces.checks import check_unique, check_values
from traces.schema import POINTWISE, REQUIRED, SCHEMA, VERSION

_VERSION_KEY = b"haltwise.schema"
_RECORDER_KEY = b"haltwise.recorder"
_TEXTS = ("trace_id", "question_id", "task", "segment", "model", "split")


def read_traces(path: Path | str) -> Traces:
    """Reads a trace file, or all *.parquet shards in a folder.

    Raises:
        InputError: If there is nothing to read, a file is damaged or of another schema version,
            a column or value is not as the schema says, or shards do not belong together.
    """
    paths = _shards(Path(path))
    parts = [_read_shard(shard) for shard in paths]
    for shard, part in zip(paths, parts, strict=True):
        if part.recorder != parts[0].recorder:
            keys = part.recorder.keys() | parts[0].recorder.keys()
            differ = sorted(k for k in keys if part.recorder.get(k) != parts[0].recorder.get(k))
            raise InputError(
                f"{shard}: haltwise.recorder differs from {paths[0].name}'s in "
                f"{', '.join(differ)}: expected shards of one recording"
            )
    traces = concatenate(parts)
    names = np.array([str(shard) for shard in paths])
    check_unique(traces.trace_id, np.repeat(names, [len(part) for part in parts]))
    return traces


def write_shard(path: Path | str, rows: Sequence[dict[str, Any]], recorder: dict[str, Any]) -> None:
    """Writes traces as one Parquet file, which appears whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        rows: One dict a trace, by column name. `question` and `text` may be left out of all.
        recorder: How the traces were recorded, kept in the file's metadata.

    Raises:
        InputError: If a row is not as the schema says; then nothing is written.
    """
    path = Path(path)
    names = {name for row in rows for name in row}
    unknown = sorted(names - set(SCHEMA.names))
    if unknown:
        raise InputError(f"{path}: unknown columns {unknown}, expected {SCHEMA.names}")
    schema = pa.schema([f for f in SCHEMA if f.name in names or f.name in REQUIRED])
    try:
        table = pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InputError(f"{path}: rows do not fit the schema: {error}") from None
    traces = _traces(table, recorder, str(path))
    check_unique(traces.trace_id, np.full(len(traces), str(path)))
    metadata = {_VERSION_KEY: VERSION, _RECORDER_KEY: json.dumps(recorder)}
    _replace(path, table.replace_schema_metadata(metadata))


def _replace(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # no *.parquet: never read as a shard
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _shards(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder, expected traces in Parquet")
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: folder without traces, expected *.parquet files")
    return paths


def _read_shard(path: Path) -> Traces:
    try:
        with pq.ParquetFile(path) as file:
            recorder = _recorder(file.schema_arrow.metadata or {}, path)
            missing = sorted(set(REQUIRED) - set(file.schema_arrow.names))
            if missing:
                raise InputError(f"{path}: column {', '.join(missing)} is missing")
            table = file.read(columns=list(REQUIRED))
            table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        found = str(error).partition("\n")[0]
        raise InputError(f"{path}: damaged, or no Parquet file: {found}") from None
    return _traces(table, recorder, str(path))


def _recorder(metadata: dict[bytes, bytes], path: Path) -> dict[str, Any]:
    """The recorder's metadata of a file whose schema version is known."""
    version = metadata.get(_VERSION_KEY, b"none").decode(errors="replace")
    if version.partition(".")[0] != VERSION:
        raise InputError(f"{path}: schema version is {version}, expected {VERSION}")
    try:
        recorder = json.loads(metadata.get(_RECORDER_KEY, b"{}"))
    except ValueError:
        recorder = None
    if not isinstance(recorder, dict):
        raise InputError(f"{path}: haltwise.recorder is not a JSON object")
    return recorder


def _traces(table: pa.Table, recorder: dict[str, Any], source: str) -> Traces:
    """Arrays of a checked table."""
    if not table.num_rows:
        raise InputError(f"{source}: no rows, expected at least one trace")
    arrays = {name: _column(table, name, source) for name in REQUIRED}
    lengths = _point_counts(arrays, source)
    arrays |= {name: arrays[name].flatten() for name in POINTWISE}
    for name in POINTWISE:
        if arrays[name].null_count:
            raise InputError(f"{source}: column {name!r} has a null in a list, expected none")
    logprobs = arrays.pop("answer_logprobs")
    columns = {name: _to_numpy(array) for name, array in arrays.items()}
    check_values(columns, lengths, source)
    del columns["gold"], columns["final_answer"]
    # Texts of traces become fixed-width strings, which sort and compare fast. Forced answers stay
    # objects: one long answer would widen them all.
    texts = {name: columns[name].astype(str) for name in _TEXTS}
    return Traces(
        **columns | texts,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        worst_logprob=_smallest(logprobs),
        recorder=recorder,
    )


def _column(table: pa.Table, name: str, source: str) -> pa.Array:
    """One column, of the schema's type and without nulls."""
    expected = SCHEMA.field(name).type
    column = table[name]
    try:
        array = column.cast(expected).combine_chunks()
    except pa.ArrowException:
        found = column.type
        raise InputError(f"{source}: column {name!r} is {found}, expected {expected}") from None
    if name == "segment":
        return array.fill_null("")
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{source}: column {name!r}, row {row}: found null, expected {expected}")
    return array


def _point_counts(arrays: dict[str, pa.Array], source: str) -> NDArray[np.int64]:
    """(N,) points of each trace, the same by every column."""
    lengths = {name: arrays[name].value_lengths().to_numpy() for name in POINTWISE}
    expected = lengths["position"]
    for name, found in lengths.items():
        if (found != expected).any():
            row = int(np.argmax(found != expected))
            raise InputError(
                f"{source}: column {name!r}, row {row}: found {found[row]} entries, "
                f"expected {expected[row]} as in 'position'"
            )
    return np.asarray(expected, dtype=np.int64)


def _to_numpy(array: pa.Array) -> NDArray[Any]:
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values.astype(np.int64) if pa.types.is_integer(array.type) else values


def _smallest(lists: pa.Array) -> NDArray[np.float32]:
    """(P,) the smallest entry of each list; NaN for an empty list."""
    lengths = lists.value_lengths().to_numpy()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    smallest = np.full(len(lengths), np.nan, dtype=np.float32)
    smallest[lengths > 0] = np.minimum.reduceat(values, starts[lengths > 0])
    return smallest
