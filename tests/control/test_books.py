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
from haltwise.control.books import Awaited, Bookkeeper, Books, Entry
from haltwise.control.estimates import Audit
from haltwise.control.governor import Promise
from haltwise.control.groups import EVERYTHING, BrokenOff, Drawn, Expired, Groups, Told

PROMISE = Promise(target=0.1, audit=0.5, rest=0.25)
ABOUT = {"head": "h", "prices": [1.0, 2.0]}


def begun(promise: Promise = PROMISE) -> Books:
    return Books(Groups.begin(promise, num_prices=2), {}, most_tokens=100.0)


def opened(path: Path, about: Any = ABOUT, promise: Promise = PROMISE) -> Bookkeeper:
    return Bookkeeper(path, begun(promise), about)


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
    *(told("r2", (False, False)), Entry(BrokenOff("r1")), Entry(None, None, {EVERYTHING: 5})),
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


def settle(keeper: Bookkeeper, entries: list[Entry]) -> None:
    """Puts entries and waits until the file has them."""
    for entry in entries:
        before = keeper.books
        keeper.put(entry)
        while keeper.books is before or keeper._entries.qsize():
            time.sleep(0.001)
    keeper.put(Entry(None, None, {}))
    while keeper._entries.qsize():
        time.sleep(0.001)


@pytest.mark.parametrize("num", range(len(ENTRIES) + 1))
def test_a_killed_process_leaves_all_that_it_took_in(num: int, tmp_path: Path) -> None:
    keeper = opened(tmp_path / "books")
    settle(keeper, ENTRIES[:num])
    keeper._ledger._file.commit()
    (tmp_path / "copy").mkdir()
    for name in ("books", "books-wal"):  # as a kill would leave them
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    expected = keeper.books
    for request in expected.groups.under_way.keys() - expected.awaited.keys():
        expected = expected.after(Entry(BrokenOff(request)))
    again = opened(tmp_path / "copy" / "books")
    assert again.books.to_json() == expected.to_json()
    for one in (keeper, again):
        one.close()


def test_closed_books_are_found_as_they_were(tmp_path: Path) -> None:
    keeper = opened(tmp_path / "books")
    settle(keeper, ENTRIES)
    keeper.close()
    again = opened(tmp_path / "books")
    assert again.books.to_json() == keeper.books.to_json()
    again.close()


@pytest.mark.parametrize(
    ("about", "promise"),
    [(ABOUT | {"head": "other"}, PROMISE), (ABOUT, Promise(target=0.2, audit=0.5, rest=0.25))],
)
def test_books_about_something_else_are_refused(
    about: Any, promise: Promise, tmp_path: Path
) -> None:
    opened(tmp_path / "books").close()
    with pytest.raises(InputError, match="about another head, target or share of audits"):
        opened(tmp_path / "books", about, promise)


def test_books_in_use_are_refused(tmp_path: Path) -> None:
    keeper = opened(tmp_path / "books")
    with pytest.raises(InputError, match="is in use by another process"):
        opened(tmp_path / "books")
    keeper.close()
    with pytest.raises(InputError, match="expected to write there"):
        opened(tmp_path / "nowhere" / "books")


def test_what_the_file_has_missed_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = opened(tmp_path / "books")

    def full(*_: object) -> bool:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        for name in ("append", "save"):
            patch.setattr(keeper._ledger, name, full)
        settle(keeper, ENTRIES[:3])
        assert keeper.num_failed >= 3 and keeper.trouble == "disk full"
    settle(keeper, ENTRIES[3:])
    assert keeper.trouble == ""
    keeper.close()
    again = opened(tmp_path / "books")
    assert again.books.to_json() == keeper.books.to_json()
    again.close()


def test_an_entry_that_breaks_the_books_is_counted_and_the_next_one_taken(tmp_path: Path) -> None:
    keeper = opened(tmp_path / "books")
    keeper.put(Entry("no event"))  # type: ignore[arg-type]
    settle(keeper, ENTRIES[:1])
    assert keeper.num_failed == 1 and "r3" in keeper.books.groups.under_way
    keeper.close()
