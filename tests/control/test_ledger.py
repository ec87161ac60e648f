"""All processes see the entries of the books in one order, whatever becomes of one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import reduce
from threading import Thread

import pytest

from haltwise import InputError
from haltwise.control import ledger as module
from haltwise.control.groups import Groups, event_from_json, event_to_json
from haltwise.control.ledger import Ledger
from haltwise.control.store import Store, store_of
from tests.control.test_groups import BEGUN, story, text
from tests.stores import NewName


def test_entries_are_in_one_order_and_once(store: Store) -> None:
    one, two = Ledger(store), Ledger(store)
    assert one.load({"begun": 1}) == two.load({"begun": 2}) == ({"begun": 1}, 0)
    assert one.exchange({"a": {"x": 1}, "b": {"x": 2}}, 0) == [(1, {"x": 1}), (2, {"x": 2})]
    assert two.exchange({"c": {"x": 3}}, 1) == [(2, {"x": 2}), (3, {"x": 3})]
    # Nobody knows whether what failed has been written: it is written once.
    assert one.exchange({"a": {"x": 1}, "d": {}}, 0)[-2:] == [(3, {"x": 3}), (4, {})]
    assert one.exchange({}, 4) == []
    two.save({"y": 3}, 3)
    one.save({"y": 2}, 2)
    assert one.load({}) == ({"y": 3}, 3)
    for ledger in (one, two):
        ledger.close()


def test_who_does_not_tell_that_it_lives_is_gone(store: Store) -> None:
    ledger = Ledger(store)
    assert ledger.beat("one", 0.0, 10) == ledger.beat("two", 5.0, 10) == []
    assert ledger.beat("two", 9.0, 10) == [] and ledger.beat("two", 11.0, 10) == ["one"]
    ledger.forget(["one"])
    assert ledger.beat("two", 12.0, 10) == []
    # A clock that jumps back a year leaves nobody waiting for a year.
    assert ledger.beat("three", -3e7, 10) == ["two"]
    ledger.close()


def test_many_threads_write_at_once_and_lose_nothing(store: Store) -> None:
    Ledger(store).load({})

    def write(who: int) -> None:
        ledger, known = Ledger(store), 0
        for n in range(20):
            known = ledger.exchange({f"{who} {n}": {"who": who, "n": n}}, known)[-1][0]
        ledger.close()

    threads = [Thread(target=write, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Ledger(store).exchange({}, 0)
    assert [number for number, _ in found] == list(range(1, 81))
    for who in range(4):
        assert [entry["n"] for _, entry in found if entry["who"] == who] == list(range(20))


def test_books_that_are_not_there_any_more_are_told(store: Store) -> None:
    ledger = Ledger(store)
    with pytest.raises(InputError, match="the books are not there any more"):
        ledger.exchange({}, 0)
    ledger.save({"y": 1}, 7)
    assert ledger.exchange({"a": {}}, 7) == [(8, {})]
    ledger.close()


def replayed(name: str) -> tuple[Groups, int]:
    ledger = Ledger(store_of(name))
    state, number = ledger.load(BEGUN.to_json())
    assert state is not None
    found = ledger.exchange({}, number)
    ledger.close()
    events = [event_from_json(entry) for _, entry in found]
    return reduce(Groups.after, events, Groups.from_json(state)), number + len(found)


def keep_on(name: str, num: int) -> None:
    """Goes on with the story where the store has it, and dies in the middle of a sentence."""
    state, number = replayed(name)
    ledger = Ledger(store_of(name))
    for event in story(40)[number : number + num]:
        ledger.exchange({f"{os.getpid()} {number}": event_to_json(event)}, number)
        state, number = state.after(event), number + 1
        if number % 10 == 0:
            ledger.save(state.to_json(), number)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(name: str, num: int) -> None:
    code = "from tests.control.test_ledger import *; keep_on(sys.argv[1], int(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, name, str(num)], timeout=600)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.whole
def test_a_process_that_is_killed_loses_no_event(new_name: NewName) -> None:
    told, name = 0, new_name()
    for num in (1, 13, 30):
        killed_after(name, num)
        told += num
        state, number = replayed(name)
        assert number == told
        assert text(state) == text(reduce(Groups.after, story(40)[:told], BEGUN))


@pytest.mark.slow
def test_a_process_may_be_killed_at_every_event(new_name: NewName) -> None:
    name = new_name()
    for n in range(len(story(40))):
        killed_after(name, 1)
        assert replayed(name)[1] == n + 1
    assert text(replayed(name)[0]) == text(reduce(Groups.after, story(40), BEGUN))


def test_old_entries_are_deleted_and_who_has_missed_them_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT", 3)
    ledger = Ledger(store)
    ledger.load({})
    ledger.exchange({str(n): {"n": n} for n in range(1, 11)}, 0)
    ledger.save({"n": 10}, 10)
    assert [number for number, _ in ledger.exchange({}, 7)] == [8, 9, 10]
    with pytest.raises(module.MissedError):
        ledger.exchange({"x": {}}, 6)
    assert ledger.load({}) == ({"n": 10}, 10)
    assert ledger.exchange({"x": {"n": 11}}, 10) == [(11, {"n": 11})]
    ledger.close()
