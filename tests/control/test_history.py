"""A history tells what became of the groups, and does not grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from haltwise import Terms
from haltwise.control import history as module
from haltwise.control.books import Books
from haltwise.control.estimates import LOSSES
from haltwise.control.governor import opened
from haltwise.control.groups import EVERYTHING, Drawn
from haltwise.control.history import History, Move
from haltwise.control.status import group_status
from tests.control.test_books import ENTRIES, awaited, begun, drawn, labelled, shelved, told

PRICES = np.array([1.0, 2.0])
DIFFERS = LOSSES.index("disagreement")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(clock: Clock) -> History:
    return History(DIFFERS, Terms(2.0), clock)


def all_told() -> Books:
    books = begun()
    for entry in ENTRIES:
        books = books.after(entry)
    return books


def state_of(books: Books, **changes: Any) -> Books:
    """Books with another state of everything."""
    groups = books.groups
    group = replace(groups.groups[EVERYTHING], **changes)
    return replace(books, groups=replace(groups, groups={**groups.groups, EVERYTHING: group}))


def test_a_measurement_is_what_the_status_says(history: History) -> None:
    books = all_told()
    history.note(shelved(books))
    for name in books.groups.groups:
        found = group_status(books, name, PRICES, DIFFERS, 2.0)
        series, newest = history.series(name), history.newest(name)
        assert newest is not None and series["at"] == [newest.at] == [1000.0]
        assert series["price"] == [2.0] and series["ceiling"] == [found["ceiling"]]
        for part in ("loss", "saving"):
            of_price = {end: values[0] for end, values in series[part].items()}
            assert of_price == found["at_usual_price"][part]


def test_the_governors_price_is_measured_if_no_other_is_usual(clock: Clock) -> None:
    history = History(DIFFERS, None, clock)
    history.note(shelved(all_told()))
    assert history.series(EVERYTHING)["price"] == [0.0]
    assert history.series(EVERYTHING)["saving"] == {"low": [0.0], "estimate": [0.0], "high": [0.0]}


def test_months_are_remembered_in_as_many_measurements_as_hours(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_MEASURED", 40)
    history, books = History(DIFFERS, None, clock), begun()
    for _ in range(5_000):
        books = books._counted({EVERYTHING: 1})
        history.note(shelved(books))
        clock.now += module._BETWEEN
    ages = clock.now - np.array(history.series(EVERYTHING)["at"])
    assert len(ages) == 40 and ages[0] == 5_000 * module._BETWEEN
    assert (np.diff(ages) < 0).all() and ages[-1] == module._BETWEEN
    # 40 measurements are there for 12 doublings of an age.
    assert (ages[:-1] / ages[1:] <= 2).all()


def test_what_stays_as_it_is_is_measured_once(history: History, clock: Clock) -> None:
    books = all_told()
    for _ in range(5):
        history.note(shelved(books))
        clock.now += module._BETWEEN
    assert len(history.series(EVERYTHING)["at"]) == 1


def test_a_clock_that_is_set_back_makes_no_time_run_backwards(
    history: History, clock: Clock
) -> None:
    books = begun()
    for now in (1000.0, 1010.0, 1020.0, 1005.0, 1015.0):
        clock.now, books = now, books._counted({EVERYTHING: 1})
        history.note(shelved(books))
    assert history.series(EVERYTHING)["at"] == [1000.0, 1005.0, 1015.0]


def test_moves_of_the_governor_are_told_the_newest_first(history: History, clock: Clock) -> None:
    books = state_of(begun(), ceiling=np.array(1))
    history.note(shelved(books))
    assert list(history.moves) == []
    state = books.groups.groups[EVERYTHING]
    worse = replace(opened(state), alarm=np.full(3, 9.0))
    steps = [
        state_of(books, ceiling=np.array(2)),
        state_of(books, ceiling=np.array(1)),
        state_of(books, alarm=np.full(3, 9.0)),
        state_of(books, **vars(worse)),
        state_of(books, **vars(worse) | {"ceiling": np.array(2)}),
    ]
    groups = {**steps[-1].groups.groups, "task:a": state}
    steps.append(replace(books, groups=replace(books.groups, groups=groups)))
    for step in steps:
        clock.now += 1
        history.note(shelved(step))
    found = [(one.at, one.group, one.what, one.before, one.after) for one in history.moves]
    assert found == [
        (1006.0, "task:a", "group begun", 1.0, 1.0),
        (1005.0, EVERYTHING, "breaker closed", 0.0, 2.0),
        (1004.0, EVERYTHING, "breaker opened", 1.0, 0.0),
        (1003.0, EVERYTHING, "alert begun", 1.0, 1.0),
        (1002.0, EVERYTHING, "ceiling lowered", 2.0, 1.0),
        (1001.0, EVERYTHING, "ceiling raised", 1.0, 2.0),
    ]


def test_an_epoch_that_begins_with_the_breaker_open_is_told(history: History) -> None:
    books = state_of(begun(), epoch=np.array(1))
    history.note(shelved(books))
    history.note(shelved(state_of(books, epoch=np.array(2))))
    assert [one.what for one in history.moves] == ["epoch begun"]


def test_a_ceiling_that_goes_on_rising_is_one_move_and_moves_are_bounded(
    history: History, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_MOVES", 3)
    ceilings = (0, 1, 2)
    for ceiling in ceilings:
        clock.now += 1
        history.note(shelved(state_of(begun(), ceiling=np.array(ceiling))))
    assert history.moves == (Move(1003.0, EVERYTHING, "ceiling raised", 0.0, 2.0),)
    for ceiling in 5 * ceilings:
        clock.now += 100
        history.note(shelved(state_of(begun(), ceiling=np.array(ceiling))))
    assert len(history.moves) == 3


def noted(history: History, clock: Clock, books: Books) -> Callable[[str | None], list[Any]]:
    history.note(shelved(books))
    return lambda group: [
        (one["request"], one["at"], one["price"], one["label_until"])
        for one in history.told(books, group)["disagreements"]
    ]


def test_disagreements_are_told_with_the_label_that_is_due(history: History, clock: Clock) -> None:
    books = begun().after(drawn("old")).after(told("old", (False, False)))
    history.note(shelved(books))
    clock.now += 5
    for entry in (drawn("new"), awaited("new"), drawn("same"), told("same", (True, True))):
        books = books.after(entry)
    only = replace(drawn("own"), event=Drawn("own", 1, {EVERYTHING: 0.5}, ""))
    books = books.after(only).after(told("own", (True, False)))
    found = noted(history, clock, books)
    both = [("new", 1005.0, 2.0, 9.0), ("old", None, 1.0, None)]
    assert found(None) == found(EVERYTHING) == [("own", 1005.0, 2.0, None), *both]
    assert found("task:a") == both
    assert noted(history, clock, books.after(labelled("new")))("task:a")[0] == (
        *("new", 1005.0, 2.0),
        None,
    )
