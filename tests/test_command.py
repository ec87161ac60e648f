"""What every script's command line does."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from command import progress, run
from haltwise import InputError, __version__


@dataclass
class Settings:
    """Settings of a script."""

    num: int = 1
    """How many there are."""


def must_not_run(_: Settings) -> None:
    raise AssertionError


def test_the_version_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--version"])
    run(must_not_run, Settings)
    assert capsys.readouterr().out == f"haltwise {__version__}\n"


def no_file(_: Settings) -> None:
    Path("/no/such/folder/file").read_text()


def interrupted(_: Settings) -> None:
    raise KeyboardInterrupt


def refused(_: Settings) -> None:
    raise InputError("num is 1,\n  expected 2")


@pytest.mark.parametrize(
    ("main", "status", "told"),
    [
        (no_file, 2, "error: /no/such/folder/file: No such file or directory\n"),
        (refused, 2, "error: num is 1, expected 2\n"),
        (interrupted, 130, "error: interrupted\n"),
    ],
)
def test_what_went_wrong_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: object,
    status: int,
    told: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        run(main, Settings)  # type: ignore[arg-type]
    assert (ended.value.code, capsys.readouterr().err) == (status, told)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--nmu 3", "Unrecognized options: --nmu, 3; Perhaps you meant: --num INT; "),
        ("--num x", "Error parsing --num: invalid literal for int() with base 10: 'x'; "),
        ("--num", "Missing value for argument '--num'. Expected 1 values.; "),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        run(must_not_run, Settings)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {told}For full helptext, ")
    assert error.endswith("script.py --help\n") and error.count("\n") == 1


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "steps")) == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("steps: 0% 0/3 [") and last.startswith("steps: 100% 3/3 [")
