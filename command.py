"""The command line of the scripts: a frozen dataclass in, one line of error out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from haltwise import InputError

Config = TypeVar("Config")


def run(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Parses the command line into a config and calls `main` with it.

    What a person got wrong (InputError, OSError) is told in one line on stderr, and the process
    ends with status 2, as it does for an unknown flag. Any other error is a defect and keeps its
    traceback.
    """
    try:
        main(tyro.cli(config_class))
    except (InputError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
