"""What every script's command line does."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from command import progress, run
from haltwise import InputError, __version__
from haltwise.cli import main


@dataclass
class Settings:
    """Settings of a script."""

    num: int = 1
    """How many there are."""
    share: float = 0.5
    price: float | None = None
    cap: int | None = None
    prices: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()
    bounds: tuple[float, ...] | None = None
    kind: Literal["a", "b"] = "a"
    maybe: Literal["a", "b"] | None = None


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
        ("--num x", "--num: found 'x', expected a whole number; "),
        ("--num 1e3", "--num: found '1e3', expected a whole number; "),
        ("--num", "--num: found no value, expected one behind it (an empty variable is none); "),
        ("--share 5%", "--share: found '5%', expected a number; "),
        ("--price cheap", "--price: found 'cheap', expected a number; "),
        ("--cap 1.5", "--cap: found '1.5', expected a whole number; "),
        ("--prices 1 x", "--prices: found 'x', expected numbers with blanks between them; "),
        ("--sizes 1,2", "--sizes: found '1,2', expected whole numbers with blanks between them; "),
        ("--bounds x", "--bounds: found 'x', expected numbers with blanks between them; "),
        ("--kind c", "--kind: found 'c', expected one of a, b; "),
        ("--maybe c", "--maybe: found 'c', expected one of a, b; "),
        ("--cpa 3", "Unrecognized options: --cpa, 3; Perhaps you meant: --cap INT; "),
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


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("experiment --share half", "--share: found 'half', expected a number; "),
        ("experiment --budget 1e4", "--budget: found '1e4', expected a whole number; "),
        ("promote --haed x", "the following arguments are required: --head; "),
    ],
)
def test_the_command_tells_of_a_wrong_flag_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["haltwise", *flags.split(), "--state", "none.db"])
    with pytest.raises(SystemExit) as ended:
        main()
    where = f"For full helptext, run haltwise {flags.split()[0]} --help"
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {told}{where}\n")


def test_the_command_alone_names_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["haltwise"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = "found no command, expected one of serve, status, promote, experiment, rollback, mix"
    where = "For full helptext, run haltwise --help"
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {told}; {where}\n")


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "steps")) == [0, 1, 2]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("steps: 0% 0/3 [") and last.startswith("steps: 100% 3/3 [")
