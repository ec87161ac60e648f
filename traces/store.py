"""Trace files: read with checks, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from haltwise import InputError
from haltwise.errors import reason_of
from traces.arrays import Traces
from traces.checks import check_digests, check_unique, check_values
from traces.schema import (
    ANSWERS,
    NAMES,
    POINTWISE,
    REQUIRED,
    SCHEMA,
    SIGNALS,
    VERDICTS,
    VERSIONS,
)
from traces.verdicts import Agree, agreement, are_digests, filled, labelled_rows

_VERSION_KEY = b"haltwise.schema"
_RECORDER_KEY = b"haltwise.recorder"
# SHA-256 of the recorder's bytes: Parquet itself has no checksum of its metadata.
_DIGEST_KEY = b"haltwise.recorder.sha256"
#: The number of traces that are decoded at a time.
_PIECE = 1024
_TEXTS = (*NAMES, "split")


def read_ids(path: Path | str) -> tuple[set[str], dict[str, Any]]:
    """Reads the trace ids in a file or folder, and how it was recorded, and no other column.

    Raises:
        InputError: If there is nothing to read, a file is damaged or of another schema version, or
            shards are not of one recording.
    """
    paths = shards_of(path)
    recorder = read_recorder(paths)
    ids: set[str] = set()
    for shard in paths:
        for (found,) in read_columns(shard, ("trace_id",)):
            ids.update(found)
    return ids, recorder


def write_shard(path: Path | str, rows: Sequence[dict[str, Any]], recorder: dict[str, Any]) -> None:
    """Writes traces as one Parquet file, which appears whole or not at all.

    Args:
        path: The file to write; one that is there is replaced.
        rows: One dict a trace, by column name. All may leave out an optional column.
        recorder: How the traces were recorded; it is kept in the file's metadata.

    Raises:
        InputError: If a row is not as the schema says; then nothing is written.
    """
    path = Path(path)
    text = json.dumps(recorder).encode()
    table = table_of(rows, str(path), recorder)
    is_new = table["gold"].null_count or "answers" in recorder
    version = VERSIONS[-1] if is_new else VERSIONS[0]
    metadata = {_VERSION_KEY: version, _RECORDER_KEY: text, _DIGEST_KEY: _digest(text)}
    _replace(path, table.replace_schema_metadata(metadata))


def table_of(
    rows: Sequence[dict[str, Any]], source: str, recorder: dict[str, Any] | None = None
) -> pa.Table:
    """Returns traces as a checked table.

    Args:
        rows: One dict a trace, by column name.
        source: The name of what the traces come from, with which messages begin.
        recorder: How the traces were recorded.

    Raises:
        InputError: If a row is not as the schema says.
    """
    names = {name for row in rows for name in row}
    unknown = sorted(names - set(SCHEMA.names))
    if unknown:
        raise InputError(f"{source}: unknown columns {unknown}, expected {SCHEMA.names}")
    columns = {
        field.name: _from_rows(rows, field, source)
        for field in SCHEMA
        if field.name in names or field.name in REQUIRED
    }
    table = pa.table(columns)
    traces = _traces(table, recorder or {}, source)
    check_unique(traces.trace_id, np.full(len(traces), source))
    return table


def _from_rows(rows: Sequence[dict[str, Any]], field: pa.Field, source: str) -> pa.Array:
    """Returns one column of some rows; a trace that lacks it gets a null."""
    name, kind = field.name, field.type
    values = [row.get(name) for row in rows]
    try:
        if name == "hidden":
            # The first point tells the size that all vectors must have.
            size = next((len(vector) for vectors in values for vector in vectors or ()), 1)
            kind = pa.list_(pa.list_(pa.float16(), size))
        elif not _fits(pa.array(values).type, kind):
            raise TypeError(f"found {pa.array(values).type}")
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = reason_of(error)
        raise InputError(f"{source}: column {name!r} does not fit {kind}: {reason}") from None


def _fits(found: pa.DataType, kind: pa.DataType) -> bool:
    """Says whether pyarrow keeps values: it would cut 1.5 to 1, and "ab" to "a" and "b"."""
    while pa.types.is_list(found) and pa.types.is_list(kind):
        found, kind = found.value_type, kind.value_type
    cuts_number = pa.types.is_floating(found) and pa.types.is_integer(kind)
    return not cuts_number and not (pa.types.is_string(found) and pa.types.is_list(kind))


def _replace(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")  # no *.parquet: never read as a shard
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shards_of(path: Path | str) -> list[Path]:
    """Returns a trace file, or all *.parquet shards in a folder, in the order of their names.

    Raises:
        InputError: If there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder, expected traces in Parquet")
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: folder without traces, expected *.parquet files")
    return paths


def read_recorder(shards: Sequence[Path]) -> dict[str, Any]:
    """Reads how the traces in some shards were recorded.

    Raises:
        InputError: If a shard is damaged or of another schema version, or the shards are not of
            one recording.
    """
    recorders = []
    for shard in shards:
        with _open(shard) as file:
            recorders.append(_recorder(file.schema_arrow.metadata or {}, shard))
        _check_recorder(shard, recorders[-1], shards[0], recorders[0])
    return recorders[0]


def read_columns(shard: Path, names: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yields some columns of texts, a piece of the rows at a time.

    Args:
        shard: The file.
        names: The names of columns that every file has.

    Raises:
        InputError: If the file is damaged, or a column or value is not as the schema says.
    """
    for row, table in _tables(shard, names):
        yield [_column(table, name, _place(shard, row)).to_pylist() for name in names]


def read_tables(
    shard: Path, names: Sequence[str], row_group: int | None = None
) -> Iterator[pa.Table]:
    """Yields some columns in the schema's types, a piece of the rows at a time.

    Args:
        shard: The file.
        names: The names of columns. "question" and "text" are left out where the file does not
            have them, and empty where they are null; verdicts are null where nobody knows.
        row_group: The row group to read; None reads all.

    Raises:
        InputError: If the file is damaged, or a column is missing or not as the schema says.
    """
    for row, table in _tables(shard, names, row_group):
        place = _place(shard, row)
        yield pa.table({name: _column(table, name, place) for name in table.column_names})


def row_groups(shard: Path) -> list[int]:
    """Reads the number of rows of each row group.

    Raises:
        InputError: If the file is damaged or has no rows.
    """
    with _open(shard) as file:
        metadata = file.metadata
        if not metadata.num_rows:
            raise InputError(f"{shard}: no rows, expected at least one trace")
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def read_parts(
    shard: Path,
    row_group: int | None = None,
    recorder: dict[str, Any] | None = None,
    agree: Agree = operator.eq,
) -> Iterator[Traces]:
    """Yields the traces of a shard, or of one of its row groups, in order, a piece at a time.

    Args:
        shard: The file.
        row_group: The row group to read; None reads all.
        recorder: How the traces were recorded.
        agree: Says which answers agree where nobody knows what is right.

    Raises:
        InputError: If the file is damaged or of another schema version, or a column or value is
            not as the schema says.
    """
    for row, table in _tables(shard, (*REQUIRED, *SIGNALS), row_group):
        yield _traces(table, recorder or {}, _place(shard, row), agree)


def _tables(
    shard: Path, names: Sequence[str], row_group: int | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yields pieces of some columns, each with the number of its first row.

    Optional columns are left out if the file does not have them.
    """
    with _open(shard) as file:
        found = set(file.schema_arrow.names)
        if len(found) < len(file.schema_arrow.names):
            twice = sorted(name for name in found if file.schema_arrow.names.count(name) > 1)
            raise InputError(f"{shard}: column {', '.join(twice)} is there twice, expected once")
        missing = sorted(set(names) & set(REQUIRED) - found)
        if missing:
            raise InputError(f"{shard}: column {', '.join(missing)} is missing")
        groups = range(file.num_row_groups) if row_group is None else [row_group]
        version = _version(file.schema_arrow.metadata or {})
        row = sum(file.metadata.row_group(i).num_rows for i in range(groups[0] if groups else 0))
        columns = [name for name in names if name in found]
        for batch in file.iter_batches(_PIECE, list(groups), columns, use_threads=False):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            if version.partition(".")[0] == VERSIONS[0]:
                for name in set(VERDICTS) & set(columns):
                    _refuse_nulls(table[name], name, _place(shard, row))
            yield row, table
            row += len(table)


@contextmanager
def _open(shard: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = reason_of(error)
        raise InputError(
            f"{shard}: damaged, or no Parquet file, expected traces that collect.py has recorded "
            f"or imported: {reason}"
        ) from None


def _place(shard: Path, row: int) -> str:
    """Returns the name of a piece of a file, for messages that count rows."""
    return f"{shard}, counting rows from {row}" if row else str(shard)


def _check_recorder(
    shard: Path, recorder: dict[str, Any], first: Path, expected: dict[str, Any]
) -> None:
    if recorder != expected:
        keys = recorder.keys() | expected.keys()
        differ = sorted(key for key in keys if recorder.get(key) != expected.get(key))
        raise InputError(
            f"{shard}: haltwise.recorder differs from {first.name}'s in "
            f"{', '.join(differ)}: expected shards of one recording"
        )


def check_together(place: Path, part: Traces, first: Path, expected: Traces) -> None:
    """Refuses a part that does not have the signals of another one.

    Raises:
        InputError: If a signal, or the size of hidden states, differs; it names both files.
    """
    differ = sorted(part.signals.keys() ^ expected.signals.keys())
    if differ:
        raise InputError(
            f"{place}: column {', '.join(differ)} is there or in {first.name}, not in both: "
            "expected in all shards or in none"
        )
    if "hidden" in part.signals and part.num_points and expected.num_points:
        found, size = (p.signals["hidden"].shape[1] for p in (part, expected))
        if found != size:
            raise InputError(
                f"{place}: column 'hidden' has vectors of {found}, "
                f"expected {size} as in {first.name}"
            )


def _recorder(metadata: dict[bytes, bytes], path: Path) -> dict[str, Any]:
    """Returns how the traces of a file were recorded, as the file's metadata tell.

    Raises:
        InputError: If the file is of another schema version, or the metadata are damaged.
    """
    version = _version(metadata)
    if version.partition(".")[0] not in VERSIONS:
        raise InputError(
            f"{path}: schema version is {version}, expected {' or '.join(VERSIONS)}, of traces "
            "that collect.py has recorded or imported"
        )
    text = metadata.get(_RECORDER_KEY, b"{}")
    if metadata.get(_DIGEST_KEY, _digest(text)) != _digest(text):
        raise InputError(f"{path}: damaged: haltwise.recorder is not what was written")
    try:
        recorder = json.loads(text)
    except (ValueError, RecursionError):
        recorder = None
    if not isinstance(recorder, dict):
        raise InputError(f"{path}: haltwise.recorder is not a JSON object")
    return recorder


def _version(metadata: dict[bytes, bytes]) -> str:
    return metadata.get(_VERSION_KEY, b"none").decode(errors="replace")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _traces(
    table: pa.Table, recorder: dict[str, Any], source: str, agree: Agree = operator.eq
) -> Traces:
    """Returns a table's traces as arrays, once all columns and values are checked.

    Raises:
        InputError: If a column or value is not as the schema says.
    """
    if not table.num_rows:
        raise InputError(f"{source}: no rows, expected at least one trace")
    names = [name for name in (*REQUIRED, *SIGNALS) if name in table.column_names]
    arrays = {name: _column(table, name, source) for name in names}
    labelled = labelled_rows(arrays, source)
    arrays["final_correct"] = arrays["final_correct"].fill_null(True)
    num_points = arrays["position"].value_lengths().to_numpy()
    arrays["correct"] = filled(arrays["correct"], labelled, num_points)
    lists = {name: arrays[name] for name in names if name in POINTWISE}
    lengths = _point_counts(lists, source)
    arrays |= {name: array.flatten() for name, array in lists.items()}
    for name in lists:
        if _has_null(arrays[name]):
            raise InputError(f"{source}: column {name!r} has a null in a list, expected none")
    logprobs = arrays.pop("answer_logprobs")
    logprob = logprobs.flatten().to_numpy(zero_copy_only=False)
    num_logprobs = logprobs.value_lengths().to_numpy()
    vectors = {"hidden": _matrix(arrays.pop("hidden"), source)} if "hidden" in arrays else {}
    # Each different answer is kept once: the same ones are forced again and again.
    answer = arrays.pop("answer").dictionary_encode()
    columns = {name: _to_numpy(array) for name, array in arrays.items()} | vectors
    columns["answer"] = _to_numpy(answer.dictionary)[_to_numpy(answer.indices)]
    largest = _reduce(np.maximum, logprob, num_logprobs)
    check_values(columns | {"answer_logprobs": largest}, lengths, source)
    digested = are_digests(recorder, source)
    for name in ANSWERS if digested else ():
        check_digests(name, columns[name], source)
    row, full = np.repeat(np.arange(len(lengths)), lengths), columns.pop("final_answer")
    unknown = ~labelled[row]
    columns["correct"] = columns["correct"].copy()  # pyarrow's own memory cannot be written to
    columns["correct"][unknown] = agreement(
        columns["answer"][unknown],
        full[row[unknown]],
        operator.eq if digested else agree,
    )
    del columns["gold"]
    signals = {name: columns.pop(name) for name in SIGNALS if name in columns}
    # The texts of traces become fixed-width strings, which sort and compare fast. Forced answers
    # stay objects: one long answer would widen them all.
    texts = {name: columns[name].astype(str) for name in _TEXTS}
    return Traces(
        **columns | texts,
        labelled=labelled,
        full_answer=np.where(labelled, "", full),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        worst_logprob=_reduce(np.minimum, logprob, num_logprobs),
        answer_entropy=_reduce(np.add, _known_entropy(logprob), num_logprobs)
        / np.maximum(num_logprobs, 1),
        recorder=recorder,
        signals=signals,
    )


def _column(table: pa.Table, name: str, source: str) -> pa.Array:
    """Returns one column in the schema's type; verdicts may be null.

    Raises:
        InputError: If it is of another type, or has a null otherwise.
    """
    expected = SCHEMA.field(name).type
    column = table[name]
    try:
        array = column.cast(expected).combine_chunks()
    except pa.ArrowException:
        found = column.type
        raise InputError(f"{source}: column {name!r} is {found}, expected {expected}") from None
    if name in ("segment", "question", "text"):
        return array.fill_null("")
    if name not in VERDICTS:
        _refuse_nulls(array, name, source)
    return array


def _refuse_nulls(array: pa.Array | pa.ChunkedArray, name: str, source: str) -> None:
    """Refuses a column with a null.

    Raises:
        InputError: If there is one; it names the first.
    """
    if array.null_count:
        row = array.is_null().to_pylist().index(True)
        expected = SCHEMA.field(name).type
        raise InputError(f"{source}: column {name!r}, row {row}: found null, expected {expected}")


def _point_counts(lists: dict[str, pa.Array], source: str) -> NDArray[np.int64]:
    """Returns the number of points (N,) of each trace.

    Raises:
        InputError: If two columns do not have the same number.
    """
    lengths = {name: array.value_lengths().to_numpy() for name, array in lists.items()}
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


def _has_null(array: pa.Array) -> bool:
    """Says whether an entry of a column is null, or a number in one of its lists."""
    inner = array.flatten() if pa.types.is_list(array.type) else array
    return bool(array.null_count or inner.null_count)


def _matrix(lists: pa.Array, source: str) -> NDArray[Any]:
    """Returns P lists of D numbers as an array (P, D).

    Raises:
        InputError: If the lists are of different sizes.
    """
    sizes = np.unique(lists.value_lengths().to_numpy())
    if len(sizes) > 1:
        found = ", ".join(map(str, sizes))
        raise InputError(f"{source}: column 'hidden' has vectors of {found}, expected one size")
    values: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), sizes.max(initial=0))


def _reduce(ufunc: np.ufunc, values: NDArray[Any], lengths: NDArray[Any]) -> NDArray[Any]:
    """Reduces the entries of each of P lists to one number (P,), NaN for an empty list.

    Args:
        ufunc: The function that reduces two entries to one.
        values: The entries of all lists, one list after the other.
        lengths: (P,) the number of entries of each list.
    """
    starts = np.cumsum(lengths) - lengths
    reduced = np.full(len(lengths), np.nan, dtype=np.float32)
    reduced[lengths > 0] = ufunc.reduceat(values, starts[lengths > 0])
    return reduced


def _known_entropy(logprob: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the least entropy, nats, of distributions in which a token has a log probability.

    h(p) = -p log p - (1-p) log(1-p): merging the other tokens into one cannot add entropy (Cover
    and Thomas, Elements of Information Theory, 2006, section 2.2).
    """
    from scipy.special import entr

    known = np.minimum(logprob.astype(np.float64), 0.0)
    entropy: NDArray[np.float64] = entr(np.exp(known)) + entr(-np.expm1(known))
    return entropy
