"""What scripts share: settings from the command line, one-line errors, files written whole."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tyro

from haltwise import InputError

Config = TypeVar("Config")


def run(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Parses the command line into a config, and calls `main` with it.

    What a person got wrong (InputError, OSError) is told in one line on stderr, and the process
    ends with status 2, as it does for an unknown flag. Any other error is a defect and keeps its
    traceback.
    """
    try:
        main(tyro.cli(config_class))
    except (InputError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def warn(message: str) -> None:
    """Tells a person on stderr, in one line, what may be wrong with what they passed."""
    print("warning:", " ".join(message.split()), file=sys.stderr, flush=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it becomes the file only once all is written.

    Raises:
        OSError: If the file cannot be put in its place.
    """
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
