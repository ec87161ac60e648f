"""What scripts share: settings from the command line, one-line errors, files written whole."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from haltwise import InputError, __version__
from haltwise.command_line import parsed
from haltwise.errors import printing, what_failed

Config = TypeVar("Config")

# Where there is no terminal, so often a line tells how far something is, and so it reads.
_SECONDS = 30.0
_LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def run(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Parses the command line into a config, and calls `main` with it.

    What a person got wrong (InputError, OSError) is told in one line on stderr, and the process
    ends with status 2; so is an unknown flag. Who interrupts it gets the status 130 that
    shells know. Any other error is a defect and keeps its traceback. `--version` tells the version.
    """
    if sys.argv[1:] == ["--version"]:
        print("haltwise", __version__)
        return
    try:
        with printing():
            main(parsed(config_class))
    except (InputError, OSError) as error:
        print("error:", " ".join(what_failed(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def warn(message: str) -> None:
    """Tells a person on stderr, in one line, what may be wrong with what they passed."""
    print("warning:", " ".join(message.split()), file=sys.stderr, flush=True)


class _Lines:
    """What a progress bar writes into where there is no terminal: each of its states is a line."""

    def write(self, text: str) -> None:
        """Writes a state, without what would draw it over the one before."""
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Does nothing: a line is there once it is written."""


def progress(
    steps: Iterable[Any] | None, name: str, total: int | None = None, **settings: Any
) -> tqdm:
    """Returns steps that tell on stderr how far they are: a bar, or without a terminal some lines.

    Args:
        steps: The steps; None if whoever does them says so by `update`.
        name: What is done.
        total: The number of steps; None for that of all that there are.
        settings: Others of tqdm.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(), "bar_format": _LINE, "mininterval": _SECONDS}
        settings |= {"maxinterval": _SECONDS}
    return tqdm(steps, name, total, **settings)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes that write there out of a folder, which is made if there is none.

    Raises:
        InputError: If another one writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise InputError(
            f"{folder}: another process writes there, expected one at a time"
        ) from None
    except OSError:
        pass  # some network file systems lock no folder
    try:
        yield
    finally:
        os.close(held)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes the file only once all is written.

    No other process takes the same path, and nothing is left of it after an error.

    Raises:
        OSError: If the file cannot be put in its place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields the path of a folder to make; it becomes the folder only once all is written.

    Raises:
        OSError: If the folder cannot be put in its place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
