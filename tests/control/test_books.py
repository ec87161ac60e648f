"""The books are a fold of entries, and are found as they were left."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control import bookkeeper as module
from haltwise.control import ledger
from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.books import Awaited, Books, Entry
from haltwise.control.estimates import Audit
from haltwise.control.governor import Promise
from haltwise.control.groups import EVERYTHING, BrokenOff, Drawn, Expired, Groups, Told
from haltwise.control.library import Library, Shelved
from haltwise.control.store import store_of
from tests.stores import NewName

PROMISE = Promise(target=0.1, audit=0.5, rest=0.25)
ABOUT = {"head": "h", "prices": [1.0, 2.0]}


def begun(promise: Promise = PROMISE) -> Books:
    return Books(Groups.begin(promise, num_prices=2), {}, most_tokens=100.0)


def shelved(books: Books) -> Library:
    """The books of the only head."""
    return Library("h", {"h": Shelved.begin(books, (1.0, 2.0))})


def opened(name: str, about: Any = ABOUT, promise: Promise = PROMISE) -> Bookkeeper:
    return Bookkeeper(store_of(name), shelved(begun(promise)), about)


def drawn(request: str) -> Entry:
    return Entry(Drawn(request, 1, {EVERYTHING: 0.5, "task:a": 0.25}), None, {EVERYTHING: 3})


def told(request: str, agrees: tuple[bool, bool], full: float = 80.0) -> Entry:
    losses = tuple(0.0 if same else 1.0 for same in agrees)
    audit = Audit(np.array(agrees), np.array([40.0, 20.0]), full)
    return Entry(Told(request, losses, (False, False)), audit)


def awaited(request: str) -> Entry:
    one = told(request, (True, False))
    event = Told(request, (0.0, 1.0), (False, True))
    return replace(one, event=event, awaited=Awaited(("a", "b", "a"), 9.0))


def labelled(request: str) -> Entry:
    """The answer at price 2 is right, and the full one wrong."""
    one = told(request, (True, False))
    assert one.audit is not None
    audit = replace(one.audit, right=np.array([0.0, 1.0]), full_right=0.0)
    return Entry(Told(request, (0.0, -1.0), (False, False)), audit)


ENTRIES = [
    *(drawn("r3"), awaited("r3"), drawn("r4"), awaited("r4"), labelled("r4")),
    *(drawn("r0"), told("r0", (True, False)), drawn("r1"), drawn("r2")),
    *(
        told("r2", (False, False)),
        Entry(BrokenOff("r1"), why="timeout"),
        Entry(None, None, {EVERYTHING: 5}),
    ),
]


def test_sums_are_those_of_each_groups_own_audits() -> None:
    books = begun()
    for entry in ENTRIES:
        books = books.after(entry)
    everything, task = books.sum_of(EVERYTHING), books.sum_of("task:a")
    assert (everything.num_requests, everything.num_audits) == (20, 4)
    # Of 20 requests 2 differ at price 1 and 8 at price 2, at a probability of 1/2.
    assert everything.losses().estimate[2].tolist() == pytest.approx([2 / 20, 8 / 20])
    # One of them is known to be won.
    assert everything.losses().estimate[0].tolist() == pytest.approx([2 / 20, 4 / 20])
    assert list(books.awaited) == list(books.groups.under_way) == ["r3"]
    assert everything.savings().estimate.tolist() == pytest.approx([0.5, 0.75])
    assert task.num_audits == 4
    done = books.after(Entry(Expired("r3")))
    assert not (done.awaited or done.groups.under_way)


def test_an_audit_that_is_too_long_is_counted_and_in_no_sum() -> None:
    books = begun().after(drawn("r")).after(told("r", (True, True), full=101.0))
    assert books.num_too_long == 1 and books.sum_of(EVERYTHING).num_audits == 0
    assert not books.groups.under_way


def test_entries_and_books_are_the_same_after_json() -> None:
    books = begun()
    for entry in ENTRIES:
        again = Entry.from_json(entry.to_json())
        assert again.to_json() == entry.to_json()
        books = books.after(again)
    assert Books.from_json(books.to_json()).to_json() == books.to_json()
    with pytest.raises(InputError, match="entry of the books is not readable"):
        Entry.from_json({"event": None})
    with pytest.raises(InputError, match="books are not readable"):
        Books.from_json({"groups": begun().groups.to_json()})


def test_the_newest_differing_audits_are_remembered() -> None:
    books = begun()
    for i in range(30):
        books = books.after(drawn(f"r{i}")).after(told(f"r{i}", (i % 2 == 0, i % 3 == 0)))
    expected = [
        (f"r{i}", (EVERYTHING, "task:a"), 1 + (i % 2 == 0)) for i in range(29, 0, -1) if i % 6
    ]
    found = [(one.request, one.groups, one.step) for one in books.differing]
    assert found == expected[:20]
    assert Books.from_json(books.to_json()).differing == books.differing


def test_whoever_watches_the_books_sees_them_and_does_them_no_harm(tmp_path: Path) -> None:
    seen: list[Library] = []

    def watch(library: Library) -> None:
        seen.append(library)
        raise RuntimeError("broken")

    keeper = Bookkeeper(store_of(tmp_path / "books"), shelved(begun()), ABOUT, watch)
    assert seen == [keeper.library]
    settle(keeper, ENTRIES)
    keeper.close()
    assert seen[-1] is keeper.library and keeper.books.sum_of(EVERYTHING).num_audits == 4
    assert keeper.num_failed == len(seen) and not keeper.trouble


def settle(keeper: Bookkeeper, entries: list[Entry]) -> None:
    """Puts entries and waits until they are taken in, and written if they can be."""
    for entry in entries:
        keeper.put(entry)
    keeper.put(Entry(None, None, {}))
    while keeper._notes.qsize():
        time.sleep(0.001)
    keeper.put(Entry(None, None, {}))  # once this is taken, the others are dealt with
    while keeper._notes.qsize() or (not keeper.trouble and keeper._unwritten):
        time.sleep(0.001)


def same(*keepers: Bookkeeper) -> bool:
    """Waits until the books of some keepers are the same; returns it."""
    while len({str(keeper.books.to_json()) for keeper in keepers}) > 1:
        time.sleep(0.01)
    return True


def of(keeper: Bookkeeper, entry: Entry) -> Entry:
    """An entry that an audit is drawn, as the keeper's own."""
    assert isinstance(entry.event, Drawn)
    return replace(entry, event=replace(entry.event, process=keeper.process))


def all_after(books: Books, entries: list[Entry]) -> Any:
    for entry in entries:
        books = books.after(entry)
    return books.to_json()


@pytest.mark.parametrize("num", range(len(ENTRIES) + 1))
def test_a_killed_process_leaves_all_that_it_took_in(num: int, tmp_path: Path) -> None:
    keeper = opened(str(tmp_path / "books"))
    settle(keeper, ENTRIES[:num])
    (tmp_path / "copy").mkdir()
    for name in ("books", "books-wal"):  # as a kill would leave them
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    again = opened(str(tmp_path / "copy" / "books"))
    assert again.books.to_json() == all_after(begun(), ENTRIES[:num])
    for one in (keeper, again):
        one.close()


def test_closed_books_are_found_as_they_were(new_name: NewName) -> None:
    name = new_name()
    keeper = opened(name)
    settle(keeper, ENTRIES)
    keeper.close()
    again = opened(name)
    assert again.books.to_json() == keeper.books.to_json() == all_after(begun(), ENTRIES)
    again.close()


def test_processes_of_a_state_have_the_same_books(new_name: NewName) -> None:
    name = new_name()
    one, two = opened(name), opened(name)
    settle(one, [drawn("r0"), drawn("r1")])
    assert same(one, two) and list(two.books.groups.under_way) == ["r0", "r1"]
    settle(two, [told("r0", (True, False)), drawn("r2")])
    settle(one, [told("r1", (True, True)), told("r2", (True, True))])
    assert same(one, two) and one.books.sum_of(EVERYTHING).num_audits == 3
    late = opened(name)
    assert same(one, two, late)
    for keeper in (one, two, late):
        keeper.close()


def test_what_a_dead_process_had_under_way_is_broken_off(
    new_name: NewName, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = new_name()
    dead, alive = opened(name), opened(name)
    settle(dead, [of(dead, drawn("mine")), of(dead, drawn("r3")), awaited("r3")])
    settle(alive, [of(alive, drawn("other"))])
    assert same(dead, alive)
    for method in ("exchange", "forget", "save"):  # it tells nothing more, not even its end
        monkeypatch.setattr(dead._ledger, method, lambda *_: [])
    dead.close()
    monkeypatch.setattr(module, "_LIVES", 1e-6)
    alive._beats_at = 0.0
    while "mine" in alive.books.groups.under_way:
        time.sleep(0.01)
    assert list(alive.books.groups.under_way) == ["r3", "other"]
    alive.close()


def test_who_has_missed_entries_begins_with_the_newest_state(
    new_name: NewName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_KEPT", 1)
    name = new_name()
    away, writing = opened(name), opened(name)
    with monkeypatch.context() as patch:
        patch.setattr(away, "_exchange", lambda: None)
        settle(writing, ENTRIES)
        writing.close()
        away.put(drawn("late"))
        while not away._unwritten:
            time.sleep(0.001)
    settle(away, [])
    assert away.books.to_json() == all_after(begun(), [*ENTRIES, drawn("late")])
    away.close()


def test_who_closes_has_nothing_under_way(new_name: NewName) -> None:
    name = new_name()
    one, two = opened(name), opened(name)
    settle(one, [of(one, drawn("r0"))])
    settle(two, [of(two, drawn("r1"))])
    one.close()
    while "r0" in two.books.groups.under_way:
        time.sleep(0.01)
    assert list(two.books.groups.under_way) == ["r1"]
    two.close()


@pytest.mark.parametrize(
    ("about", "promise", "told"),
    [
        (ABOUT | {"head": "other"}, PROMISE, "another head"),
        (ABOUT, Promise(target=0.2, audit=0.5, rest=0.25), "a target of 0.1, not 0.2"),
        (ABOUT, Promise(target=0.1, audit=0.4, rest=0.25), "a share of audits of 0.5, not 0.4"),
        (ABOUT, replace(PROMISE, rest=0.2), "a share of audits at rest of 0.25, not 0.2"),
        (ABOUT | {"prices": [1.0, 3.0]}, PROMISE, "something else"),
    ],
)
def test_books_about_something_else_are_refused(
    about: Any, promise: Promise, told: str, new_name: NewName
) -> None:
    name = new_name()
    opened(name).close()
    with pytest.raises(InputError, match=f"the state is about {told}: expected the same head"):
        opened(name, about, promise)


@pytest.mark.parametrize("num", range(len(ENTRIES) + 1))
def test_what_the_store_has_missed_is_written_later(
    num: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(tmp_path / "books")
    keeper, other = opened(name), opened(name)

    def away(*_: object) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as patch:
        for method in ("exchange", "save"):
            patch.setattr(keeper._ledger, method, away)
        settle(keeper, ENTRIES[:num])
        assert keeper.num_failed >= 1 and keeper.trouble == "the store is away"
        assert keeper.books.to_json() == all_after(begun(), ENTRIES[:num])
    settle(keeper, ENTRIES[num:])
    while keeper.trouble:
        time.sleep(0.01)
    assert same(keeper, other) and keeper.books.to_json() == all_after(begun(), ENTRIES)
    for one in (keeper, other):
        one.close()


def test_an_answer_that_is_lost_on_its_way_back_makes_no_entry_count_twice(
    new_name: NewName, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = opened(new_name())
    exchange = keeper._ledger.exchange

    def unheard(*about: Any) -> Any:
        exchange(*about)
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(keeper._ledger, "exchange", unheard)
        settle(keeper, ENTRIES)
    while keeper.trouble:
        time.sleep(0.01)
    assert keeper.books.to_json() == all_after(begun(), ENTRIES)
    keeper.close()


def test_an_entry_that_breaks_the_books_is_counted_and_the_next_one_taken(tmp_path: Path) -> None:
    keeper = opened(str(tmp_path / "books"))
    keeper.put(Entry("no event"))  # type: ignore[arg-type]
    settle(keeper, ENTRIES[:1])
    assert keeper.num_failed == 1 and "r3" in keeper.books.groups.under_way
    keeper.close()


def test_what_is_too_much_for_a_store_that_is_away_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_UNWRITTEN", 2)
    keeper = opened(str(tmp_path / "books"))

    def away(*_: object) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(keeper._ledger, "exchange", away)
    settle(keeper, [drawn(f"r{n}") for n in range(5)])
    assert len(keeper._unwritten) == 2 and keeper.num_failed >= 3
    keeper.close()


def test_a_file_that_was_taken_away_is_made_anew_with_all_that_is_known(tmp_path: Path) -> None:
    name = str(tmp_path / "books")
    keeper = opened(name)
    settle(keeper, ENTRIES[:7])
    keeper._ledger.close()
    keeper._ledger._transactions._opened = None
    for file in tmp_path.glob("books*"):
        file.unlink()
    settle(keeper, ENTRIES[7:])
    while keeper.trouble:
        time.sleep(0.01)
    keeper.close()
    again = opened(name)
    assert again.books.to_json() == all_after(begun(), ENTRIES)
    again.close()
