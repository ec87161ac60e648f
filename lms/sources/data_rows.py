"""Rows of data: from files, read piece by piece, or from the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from command import warn
from haltwise import InputError
from haltwise.errors import each_once, json_fault, reason_of
from lms.hub_names import ask_hub, is_hub_name
from lms.scorers import needed

DataRow = dict[str, Any]
#: Begins one pass over a data set: every row with the split that it stands in ("" if none is
#: stated) and its place, for a message.
DataRows = Callable[[], Iterator[tuple[str, str, DataRow]]]

#: The splits by the names that data sets give them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}
_SPLIT_OF_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])")
_SPLIT_ANYWHERE = re.compile(rf"(?<![a-z]){_SPLIT_OF_FILE.pattern}")


class _Number(Decimal):
    """A number with all digits that a file has; a message shows it as it stands there."""

    __repr__ = Decimal.__str__


_loads = partial(json.loads, parse_float=_Number, object_pairs_hook=each_once)


def _each_object(number: int, text: str) -> Iterator[tuple[str, Any]]:
    if text.strip():
        try:
            yield f"line {number}", _loads(text)
        except (ValueError, RecursionError) as error:
            told = f"{json_fault(error)}: expected a JSON object on every line"
            raise InputError(f"line {number}: {told}") from None


def _json_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        yield from _each_object(number, line)


def _json(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Yields the objects of a list; or of lines, for files of lines are named .json too."""
    first = file.readline()
    while first.isspace():
        first = file.readline()
    file.seek(0)
    if first.strip() == "{":
        raise InputError("found one object over many lines, expected a list, or an object a line")
    if not first.lstrip().startswith("["):
        yield from _json_lines(file)
        return
    try:
        found = _loads(file.read())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{error}: expected a list of JSON objects") from None
    yield from ((f"row {number}", row) for number, row in enumerate(found, 1))


def _csv(file: TextIO) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**30)  # the usual limit takes long texts for a mistake
    reader, before = csv.reader(file, strict=True), 0
    try:
        names = next(reader, [])
        if len(names) == 1 and (found := next((sign for sign in ";\t" if sign in names[0]), "")):
            raise InputError(f"line 1: found {found!r} between columns, expected commas")
        _check_names(names)
        before = reader.line_num
        for row in reader:
            place, before = f"line {before + 1}", reader.line_num
            if row and len(row) != len(names):
                raise InputError(
                    f"{place}: found {len(row)} fields, expected {len(names)}, as in line 1 (one "
                    "that has commas stands in double quotes)"
                )
            if row:  # a line without anything is no row
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        last = reader.line_num
        told = f", in a row that goes on to line {last}: is a quote not closed?"
        raise InputError(f"line {before + 1}: {error}{told * (last > before + 1)}") from None


def _check_names(names: list[str]) -> None:
    """Refuses a table with two columns of one name, of which only one could be read."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"column {', '.join(map(repr, twice))} is there twice, expected once")


_TEXT_FORMATS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
FORMATS = (*_TEXT_FORMATS, ".parquet")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with pq.ParquetFile(path) as file:
        _check_names(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024):
            for row in pa.table(list(map(_exact, batch.columns)), batch.schema.names).to_pylist():
                number += 1
                yield f"row {number}", row


def _exact(column: pa.Array) -> pa.Array:
    """Returns a column of which numbers of 32 bits are 0.1, not 0.10000000149."""
    if not pa.types.is_float32(column.type):
        return column
    return column.cast(pa.string()).cast(pa.float64())


def _rows_of_file(path: Path) -> Iterator[tuple[str, DataRow]]:
    """Yields the rows of one file, each with its place.

    Raises:
        InputError: If the file, or a row, cannot be read.
    """
    try:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        # Each format's reader sees the ends of lines as they are: csv has lines within fields.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for place, row in _TEXT_FORMATS[suffix](file):
                if not isinstance(row, dict):
                    raise InputError(f"{place}: found {type(row).__name__}, expected an object")
                yield place, row
    except InputError as error:
        raise InputError(f"{path}, {error}") from None
    except UnicodeDecodeError as error:
        place = f"{path}, {_undecoded(path)}" if suffix in _TEXT_FORMATS else str(path)
        raise InputError(f"cannot read {place}: {error.reason}: expected text in UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or reason_of(error)}") from None
    except pa.ArrowException as error:
        reason = reason_of(error)
        raise InputError(f"cannot read {path}: {reason}: expected a Parquet file") from None


def _undecoded(path: Path) -> str:
    """Returns the place of the first line that is no UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "at its end"


def columns_of(place: str) -> str:
    """Returns the place where the columns of a row are named: a table names those of all rows."""
    table = place.rpartition(", ")[0]
    in_table = {".csv": f"{table}, line 1", ".parquet": table}
    return in_table.get(Path(table).suffix.lower(), place)


def rows_of(path: Path, by_column: bool = False) -> DataRows:
    """Returns the rows of a file, or of all files in a folder.

    The name of a file may begin with its split, such as train.jsonl. A warning names the files
    that are not read because of that, and a split that stands elsewhere in a name.

    Args:
        path: The file or folder.
        by_column: Whether a column tells the split of every row, whatever the files are called.

    Raises:
        InputError: If there is nothing to read; during a pass, if something cannot be read, or a
            split that files are named by has no rows.
    """
    formats = ", ".join(FORMATS)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = [p for p in sorted(path.rglob("*")) if _is_file(p) and not _is_hidden(p, path)]
    files = [p for p in found if p.suffix.lower() in FORMATS] if path.is_dir() else [path]
    if not files or files[0].suffix.lower() not in FORMATS:
        told = "has no file that ends" if path.is_dir() else "does not end"
        raise InputError(f"{path} {told} with one of {formats}, expected questions and answers")
    named = {file: name for file in found or files if (name := _split_of_file(file))}
    # If some files are named by splits, the others, such as dataset_infos.json, are no data.
    splits = {file: named[file] for file in files if file in named} or dict.fromkeys(files, "")
    if any(splits.values()):
        _warn_of_unread(path, {*files, *named} - splits.keys())
    elif not by_column:
        _warn_of_names(path, files)

    def each() -> Iterator[tuple[str, str, DataRow]]:
        empty = set(splits.values())
        for file, split in splits.items():
            for place, row in _rows_of_file(file):
                empty.discard(split)
                yield split, f"{file}, {place}", row
        if empty:
            of_split = f" of split {', '.join(sorted(empty))}" if any(empty) else ""
            raise InputError(f"{path}: no rows{of_split}, expected questions with their answers")

    return each


def _is_file(path: Path) -> bool:
    """Says whether there is a file, or a link to one: that it is gone is told once it is read."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _is_hidden(path: Path, folder: Path) -> bool:
    """Says whether a file in a folder, or one of the folders on the way, is hidden."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _split_of_file(file: Path) -> str:
    """Returns the split that the name of a file begins with; "" if there is none."""
    name = _SPLIT_OF_FILE.match(file.stem.lower())
    return SPLIT_NAMES[name[1]] if name else ""


def _warn_of_unread(folder: Path, files: set[Path]) -> None:
    """Tells of files that are not read, since the names of others begin with splits."""
    if files:
        names = ", ".join(sorted(str(file.relative_to(folder)) for file in files))
        warn(
            f"{folder}: not read: {names:.300}: expected names that begin with train, dev or test, "
            f"as others do, and end with one of {', '.join(FORMATS)}"
        )


def _warn_of_names(path: Path, files: list[Path]) -> None:
    """Tells of a name that has a split where it says nothing."""
    inside = path if path.is_dir() else path.parent
    names = [str(file.relative_to(inside)) for file in files]
    if told := next((name for name in names if _SPLIT_ANYWHERE.search(name.lower())), ""):
        warn(
            f"{path}: a hash divides the questions, whatever split the name {told!r} tells: "
            "expected a folder of files whose names begin with their splits, or --split-column"
        )


def rows_of_hub(name: str) -> DataRows:
    """Returns the rows of a data set of the Hugging Face Hub, in the splits that we name alike.

    Args:
        name: The name of the data set: OWNER/NAME or OWNER/NAME:CONFIG.

    Raises:
        InputError: If `datasets` is missing, there is no such data set, it cannot be reached, or
            it has several splits of which none is in `SPLIT_NAMES`.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise InputError(needed("datasets", "data")) from None
    path, _, config = name.partition(":")
    trouble = ""
    try:
        trouble = ask_hub(path, "dataset") if is_hub_name(path) else ""
        loaded = load_dataset(path, config or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = f"{trouble}, and its cache here has it not" if trouble else reason_of(error)
        raise InputError(
            f"cannot load {name!r} from the hub: {reason}: expected its name, or --data-file with "
            "its rows"
        ) from None
    splits = {split: SPLIT_NAMES[split] for split in loaded if split in SPLIT_NAMES}
    if not splits and len(loaded) > 1:
        raise InputError(f"{name}: found splits {', '.join(loaded)}, expected train, dev or test")

    def each() -> Iterator[tuple[str, str, DataRow]]:
        for split in splits or loaded:
            for number, row in enumerate(loaded[split], 1):
                yield splits.get(split, ""), f"{name}, {split}, row {number}", row

    return each
