"""Errors that mean the input or the installation is at fault, not haltwise."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class InputError(ValueError):
    """What a person passed cannot be used.

    The message is one line that says what was found and what was expected.
    """


# What is expected where a number of a type is.
NUMBER_WORDS: dict[type, str] = {int: "whole number", float: "number"}

# Characters of somebody else's message that fit into one line of ours.
_LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """Returns what another library says went wrong, in one line: whole, or cut where it is long.

    What the system says of a file comes without its number. Many messages go on after their first
    line with the very thing that a person needs.
    """
    said = " ".join(what_failed(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON].rstrip()} ..."


def json_fault(error: BaseException) -> str:
    """Returns what is wrong with one line of JSON, and at which character of the line it is.

    The message itself counts lines from this one, which is not the line of the file.
    """
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return reason_of(error)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON, as `object_pairs_hook` of `json.loads` takes it.

    Raises:
        ValueError: If a name is there twice: json itself would take the last value without a word.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} is there twice, expected once")
    return found


def option(setting: str) -> str:
    """Returns how a setting is called on the command line: that of "max_tokens" is --max-tokens."""
    return f"--{setting.replace('_', '-')}"


def check_ranges(settings: object, ranges: Mapping[str, tuple[bool, str]], place: str = "") -> None:
    """Refuses a setting that is out of its range, by its name on the command line.

    Args:
        settings: What has the settings as attributes.
        ranges: By name of a setting, whether it is in its range, and in words what that is.
        place: Where they stand among all settings of the command, such as "fit.ppo.".

    Raises:
        InputError: If one is out of its range.
    """
    for name, (is_in_range, expected) in ranges.items():
        if not is_in_range:
            found = f"{option(place + name)} is {getattr(settings, name)}"
            raise InputError(f"{found}, expected {expected}")


def what_failed(error: BaseException) -> str:
    """Returns an error's message; that of a file that failed begins with its path, not a number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextmanager
def printing() -> Iterator[None]:
    """Ends the process without a word, as other commands do, if nobody reads what it prints.

    Raises:
        SystemExit: If whoever reads it, such as `head`, has enough.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        sys.exit(141)  # as shells know it


def from_clone(extra: str) -> str:
    """Says how an extra is installed: haltwise is in no package index."""
    return f"run pip install -e '.[{extra}]' -c constraints.txt in the clone of haltwise"


@contextmanager
def needing(name: str, install: str) -> Iterator[None]:
    """Makes one line of a missing package: who needs it, and the command that installs it.

    Args:
        name: What needs the packages that are imported inside.
        install: Says how they are installed, see `from_clone`.

    Raises:
        ModuleNotFoundError: If one of them is not installed.
        SystemExit: The same where it is the program that needs it, by `python -m`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing == "haltwise":
            raise
        told = f"{name} needs {missing}, which is not installed: {install}"
        program = getattr(sys.modules.get("__main__"), "__spec__", None)
        if program is not None and program.name == name:
            print("error:", told, file=sys.stderr)
            sys.exit(2)
        raise ModuleNotFoundError(told, name=missing) from None
