"""A folder of traces that is written shard by shard, and completed after an interrupt."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haltwise import InputError
from recording.trace_row import TraceRow
from traces import read_ids, write_shard


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other recordings out of a folder, which is made if there is none.

    Raises:
        InputError: If another recording writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(f"{out}: another recording writes there, expected one at a time") from None
    except OSError:
        pass  # some network file systems lock no folder
    try:
        yield
    finally:
        os.close(folder)


def recorded_ids(out: Path, recorder: dict[str, Any]) -> set[str]:
    """Returns the ids of the traces that a folder holds already.

    Args:
        out: The folder.
        recorder: The metadata of the recording that is to be completed.

    Raises:
        InputError: If it was recorded under other settings.
    """
    if not any(out.glob("*.parquet")):
        return set()
    ids, known = read_ids(out)
    for name, expected in recorder.items():
        if name == "code_version":  # another version of haltwise records the same
            continue
        found = known.get(name)
        if found != expected:
            raise InputError(
                f"{out} was recorded with {name} {found!r}, not {expected!r}: "
                "choose another --out, or delete it"
            )
    return ids


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
