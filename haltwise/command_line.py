"""Settings from the command line, for every command whose settings are a dataclass."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import TypeVar

import tyro

from haltwise.errors import NUMBER_WORDS, InputError

Config = TypeVar("Config")

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
# Rows that tell what an option does are indented further than the option itself.
_HELP = re.compile("│? {9}")
# What parts a box, and its bottom; without UTF-8 it is drawn in ASCII.
_RULE = re.compile("[─-]{3}")

# What tyro says of a value that it cannot read; the kind of value stands in the part of the box
# that repeats the option's help.
_UNREADABLE = re.compile(r"Error parsing (?P<option>--\S+): (?P<why>.*)")
_KIND = re.compile(r"Argument helptext: --.*?\b(?P<kind>INT|FLOAT)\b(?P<more> \[)?")
# Its values as Python writes them: a list of all, or the only one at the end.
_VALUES = re.compile(r"""(?P<all>\[(?:'.*?'|".*?")\])|(?P<last>'.*'|".*")$""")
_NO_CHOICE = re.compile(
    r"invalid choice '(?P<value>.*)' for argument '(?P<option>\S+)'\. "
    r"Expected one of (?P<choices>\(.*\))\."
)
_NO_VALUE = re.compile(r"Missing value for argument '(?P<option>\S+)'\. ")
_NUMBERS = {"INT": int, "FLOAT": float}


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
    told = [part.strip().replace("{None}|", "") for part in parts if part.strip()]
    helped = next((part for part in told if part.startswith("Argument helptext")), "")
    return "; ".join(_in_words(part, helped) for part in told if part != helped)


def _in_words(said: str, helped: str) -> str:
    """Returns what is wrong with an option's value, in words for who has typed it.

    Args:
        said: What tyro says, in the words of its own code.
        helped: The part of the box that repeats the option's help.
    """
    if found := _NO_CHOICE.match(said):
        choices = sorted(set(ast.literal_eval(found["choices"])) - {"None"})
        return f"{found['option']}: found '{found['value']}', expected one of {', '.join(choices)}"
    if found := _NO_VALUE.match(said):
        told = f"{found['option']}: found no value, expected one behind it"
        return f"{told} (an empty variable is none)"
    found, kind = _UNREADABLE.match(said), _KIND.match(helped)
    values = found and _VALUES.search(found["why"])
    if not found or not kind or not values:
        return said
    number = _NUMBERS[kind["kind"]]
    given = ast.literal_eval(values["all"] or f"[{values['last']}]")
    wrong = next((value for value in given if not _is_read(value, number)), " ".join(given))
    word = NUMBER_WORDS[number]
    expected = f"{word}s with blanks between them" if kind["more"] else f"a {word}"
    return f"{found['option']}: found {wrong!r}, expected {expected}"


def _is_read(value: str, number: type) -> bool:
    """Returns whether a value is a number of some type."""
    try:
        number(value)
    except ValueError:
        return False
    return True
