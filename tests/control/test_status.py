"""What a person is told of the books."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from haltwise import InputError, Terms
from haltwise.control.group_names import Usual
from haltwise.control.groups import EVERYTHING
from haltwise.control.status import group_status, read_library, table_of
from tests.control.test_books import ENTRIES, begun, opened, settle, shelved
from tests.control.test_governed import control
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
    head, broken_off, figures, priced, names, everything, task, *heads = lines
    assert head.startswith("target 0.1; 1 audits under way, 1 labels due, ")
    assert broken_off == "1 audits broken off, which tell nothing; the newest: timeout"
    assert figures == "figures are of requests of up to 100 tokens"
    assert priced == "price: what the audits vouch for, which --control apply serves"
    assert names.split()[:4] == ["group", "requests", "audits", "price"]
    # Where nothing is halted nothing is measured: zeros would read as a head that loses nothing.
    assert everything.split()[5:] == ["closed", "10", "nothing", "is", "halted"]
    assert everything.split()[:5] == ["everything", "20", "4", "0", "0"]
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


def test_under_observe_the_usual_price_is_told_beside_what_apply_would_serve() -> None:
    books = begun()
    for entry in ENTRIES:
        books = books.after(entry)
    usual = Usual(1.0, {}, is_served=True)
    library = replace(shelved(books), usual=usual)
    _, _, _, priced, _, everything, at_usual, *others = table_of(library).splitlines()
    assert priced.endswith("apply serves; the usual price: what --control observe serves, as here")
    assert everything.endswith(" nothing is halted")
    # Of 20 requests 2 differ at price 1, and one of these is known to be won.
    words, cells = at_usual[:29], at_usual[29:].replace("[-100.0, 100.0]", "").split()
    assert words.strip() == "at the usual price" and cells[0] == "1"
    found = group_status(books, EVERYTHING, np.array([1.0, 2.0]), 2, 1.0)["at_usual_price"]
    estimates = [100 * found[part]["estimate"] for part in ("loss", "saving")]
    assert estimates == pytest.approx([10.0, 50.0]) and cells[1] == "10.0" and "50.0" in cells
    assert len([line for line in others if "at the usual price" in line]) == 1
    # Under apply it is served to nobody.
    assert "usual" not in table_of(replace(library, usual=replace(usual, is_served=False)))


def test_what_is_usual_is_kept_in_the_state(tmp_path: Path) -> None:
    usual = Terms(1.0, segment_prices={"easy": 2.0})
    with control(tmp_path, usual=usual) as steering:
        pass
    assert read_library(tmp_path / "state").usual == Usual(1.0, {"easy": 2.0}, is_served=True)
    with control(tmp_path, mode="apply", usual=usual) as steering:
        steering.reprice(Terms(3.0))
    assert read_library(tmp_path / "state").usual == Usual(3.0, {}, is_served=False)


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
