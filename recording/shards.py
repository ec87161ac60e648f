"""A folder of traces that is written shard by shard, and completed after an interrupt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from haltwise import InputError
from recording.trace_row import TraceRow
from traces import write_shard
from traces.store import read_columns, read_recorder, shards_of

_COLUMNS = ("trace_id", "gold", "segment")


def recorded_ids(out: Path, recorder: dict[str, Any]) -> dict[str, int]:
    """Returns the ids of the traces that a folder holds already, each with `told_of` its question.

    Args:
        out: The folder.
        recorder: The metadata of the recording that is to be completed.

    Raises:
        InputError: If it was recorded under other settings.
    """
    if not any(out.glob("*.parquet")):
        return {}
    shards = shards_of(out)
    known = read_recorder(shards)
    for name, expected in recorder.items():
        if name == "code_version":  # another version of haltwise records the same
            continue
        found = known.get(name)
        if found != expected:
            raise InputError(
                f"{out} was recorded with {name} {found!r}, not {expected!r}: "
                "choose another --out, or delete it"
            )
    pieces = (rows for shard in shards for rows in read_columns(shard, _COLUMNS))
    return {
        name: told_of(gold, segment)
        for rows in pieces
        for name, gold, segment in zip(*rows, strict=True)
    }


def told_of(gold: str, segment: str) -> int:
    """Returns what tells, in this process, what is told of a question from what was told before."""
    return hash((gold, segment))


def write_shards(
    out: Path, rows: Iterable[TraceRow], recorder: dict[str, Any], shard_size: int
) -> Iterator[TraceRow]:
    """Writes traces to numbered files as they come, and passes them on.

    Args:
        out: The folder; files that are there are kept.
        rows: The traces.
        recorder: The metadata to write into every file.
        shard_size: The number of traces in a file; the last file may have fewer.
    """
    for leftover in out.glob(".*.part"):  # a killed recording has left it
        leftover.unlink()
    pending: list[TraceRow] = []
    number = 1 + max((int(path.stem) for path in out.glob("[0-9]*.parquet")), default=-1)
    try:
        for row in rows:
            pending.append(row)
            if len(pending) == shard_size:
                write_shard(out / f"{number:05d}.parquet", pending, recorder)
                number, pending = number + 1, []
            yield row
    finally:  # an interrupt loses nothing either
        if pending:
            write_shard(out / f"{number:05d}.parquet", pending, recorder)
