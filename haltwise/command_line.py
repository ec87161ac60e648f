"""Settings from the command line, for every command whose settings are a dataclass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TypeVar

import tyro

from haltwise.errors import InputError

Config = TypeVar("Config")

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
# Rows that tell what an option does are indented further than the option itself.
_HELP = re.compile("│? {9}")
# What parts a box, and its bottom; without UTF-8 it is drawn in ASCII.
_RULE = re.compile("[─-]{3}")


def parsed(
    config_class: type[Config], args: Sequence[str] | None = None, prog: str | None = None
) -> Config:
    """Returns the settings that a command line states.

    Args:
        config_class: The class of the settings.
        args: The arguments; None for those of this process.
        prog: What the command is called; None for the name of the script.

    Raises:
        InputError: If they cannot be read; in one line, with the option that may have been meant.
        SystemExit: If they ask for help, which is printed.
    """
    told = StringIO()
    try:
        with redirect_stderr(told):
            return tyro.cli(config_class, args=args, prog=prog)
    except SystemExit as ended:
        if not ended.code:
            raise
    raise InputError(_in_one_line(told.getvalue()))


def _in_one_line(box: str) -> str:
    """Returns what stands in a box below its title, without what options do."""
    parts = [""]
    for row in _STYLE.sub("", box).splitlines()[1:]:
        if _RULE.search(row):
            parts.append("")
        elif not _HELP.match(row):
            parts[-1] += f" {row.strip('│ ')}"
    told = [part.strip() for part in parts]
    return "; ".join(part for part in told if part and not part.startswith("Argument helptext"))
