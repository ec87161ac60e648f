"""What a person is told of the books."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control.status import read_library, table_of
from tests.control.test_books import ENTRIES, opened, settle, shelved
from tests.control.test_history import state_of
from tests.control.test_library import answered, drawn, fold
from tests.stores import NewName


def test_the_table_is_of_the_newest_books(new_name: NewName) -> None:
    name = new_name()
    keeper = opened(name)
    settle(keeper, ENTRIES)
    assert read_library(name).to_json() == keeper.library.to_json()
    keeper.close()
    lines = table_of(read_library(name)).splitlines()
    head, broken_off, figures, names, everything, task, *heads = lines
    assert head.startswith("target 0.1; 1 audits under way, 1 labels due, ")
    assert broken_off == "1 audits broken off, which tell nothing; the newest: timeout"
    assert figures == "figures are of requests of up to 100 tokens"
    assert names.split()[:4] == ["group", "requests", "audits", "price"]
    assert everything.split()[:6] == ["everything", "20", "4", "0", "0", "closed"]
    # It might go further by itself, but nothing is certified for everything.
    assert task.split()[0] == "task:a" and task.split()[2:5] == ["4", "0", "0"]
    assert [line.split()[:2] for line in heads[1:]] == [["head", "role"], ["h", "champion"]]


def test_what_is_served_is_told_with_its_intervals(tmp_path: Path) -> None:
    keeper = opened(str(tmp_path / "books"))
    settle(keeper, ENTRIES)
    keeper.close()
    books = read_library(tmp_path / "books").books
    longer = table_of(shelved(replace(books, num_too_long=2)))
    assert "figures are of requests of up to 100 tokens; 2 longer audits are left out" in longer
    certified = shelved(state_of(books, ceiling=np.array(2), reach=np.array(1.0)))
    *_, task, _, _, _ = table_of(certified).splitlines()
    assert task.split()[3:5] == ["2", "2"]
    # Of 80 tokens 60 are saved at the second price; four audits are too few for an interval.
    assert task.split("closed")[1].split()[-3:] == ["75.0", "[-100.0,", "100.0]"]


def test_the_evidence_is_told_by_what_it_is_against() -> None:
    pair = [drawn("r"), answered("r", 0, 0, 80, 40)]  # the challenger b saves more
    evidence = fold(pair).shelf["b"].trial.status(1, 1)["evidence"]
    told = (
        f"evidence against worse {evidence['worse']:.3g}, against dearer {evidence['dearer']:.3g}"
    )
    assert evidence["worse"] != evidence["dearer"] and told in table_of(fold(pair))


def test_a_folder_is_no_state(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: is a folder, expected the file of a state"):
        read_library(tmp_path)


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_state_that_is_none_is_told_in_one_line(state: str, tmp_path: Path) -> None:
    if state == "empty":
        (tmp_path / state).touch()
    command = [sys.executable, "-m", "haltwise", "status", "--state", str(tmp_path / state)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout
    assert done.stderr.endswith(", expected the --state of haltwise serve\n")
