"""The record never holds up a request, and loses nothing that the governor needs."""

import os
import signal
import sqlite3
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from haltwise import InputError
from haltwise.control.groups import Groups, event_from_json, event_to_json
from haltwise.control.record import AnswerRow, LabelRow, Ledger, Record, RequestRow, digest
from tests.control.test_groups import BEGUN, story, text

KEY = b"0123456789abcdef"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.sqlite"


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    return sqlite3.connect(path).execute(query).fetchall()


def test_rows_of_every_kind_are_kept(path: Path) -> None:
    record = Record(path)
    record.put(RequestRow("a", 1.5, tenant=digest(KEY, "me"), audited=True, audit_probability=0.05))
    record.put(RequestRow("a", 2.0))  # an id is kept once
    record.put(AnswerRow("a", 120, 0.1, 0.4, digest(KEY, "42"), True, 7, "number"))
    record.put(LabelRow("a", 120, "gold", 1.0, None, 3.0))
    record.close()
    assert (record.num_dropped, record.trouble) == (0, "")
    kept = rows(path, "SELECT id, at, tenant, audited, audit_probability FROM request")
    assert kept == [("a", 1.5, digest(KEY, "me"), 1, 0.05)]
    assert rows(path, "SELECT position, agrees FROM answer") == [(120, 1)]
    assert rows(path, "SELECT source, value FROM label") == [("gold", 1.0)]
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


def test_a_digest_tells_nothing_without_the_key() -> None:
    assert digest(KEY, "me") == digest(KEY, "me") != digest(KEY[::-1], "me")
    assert len(digest(KEY, "me")) == 32
    assert digest(KEY, "\ud800") != digest(KEY, "\ud801")  # which JSON can hold, but no text


def test_a_full_queue_drops_rows_counts_them_and_holds_up_nobody(path: Path) -> None:
    record = Record(path, room=5, patience=0.2)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    put = [record.put(RequestRow(str(n), 0.0)) for n in range(1000)]
    assert not all(put)
    other.execute("ROLLBACK")
    record.close()
    assert len(rows(path, "SELECT id FROM request")) == 1000 - record.num_dropped
    assert record.num_dropped >= put.count(False)


def test_a_locked_file_is_told_and_overcome(path: Path) -> None:
    record = Record(path, patience=0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    record.put(RequestRow("lost", 0.0))
    while not record.trouble:
        pass
    assert "locked" in record.trouble and record.num_dropped == 1
    other.execute("ROLLBACK")
    record.put(RequestRow("kept", 0.0))
    record.close()
    assert rows(path, "SELECT id FROM request") == [("kept",)] and record.trouble == ""


def test_rows_that_do_not_fit_the_file_are_counted(path: Path) -> None:
    record = Record(path)
    record.put(RequestRow("a", 0.0, position=2**80))
    record.put(RequestRow(3.5, 0.0, task=b"x"))  # type: ignore[arg-type]
    record.close()
    assert record.num_dropped == 2 and record.trouble


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_told_in_a_line() -> None:
    with pytest.raises(InputError, match="/dev/full: "):
        Record(Path("/dev/full"))


def test_files_that_are_no_record(path: Path, tmp_path: Path) -> None:
    Record(path).close()
    file = sqlite3.connect(path)
    file.execute("PRAGMA user_version = 7")
    file.close()
    with pytest.raises(InputError, match="is a record of version 7, expected 1"):
        Record(path)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE mine (x)")
    with pytest.raises(InputError, match="another program's file"):
        Ledger(other)
    (tmp_path / "text").write_text("no database, but long enough for its header to be read " * 20)
    for wrong in (tmp_path / "text", tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(InputError, match=str(wrong)):
            Ledger(wrong)


def test_one_holds_the_lease_and_a_former_holder_writes_nothing(path: Path) -> None:
    one, two = Ledger(path), Ledger(path)
    assert one.take("one", 0.0, 10) == 1
    assert two.take("two", 5.0, 10) is None
    assert one.take("one", 8.0, 10) == 1 and two.take("two", 12.0, 10) is None
    assert two.take("two", 18.0, 10) == 2
    assert not one.append(1, [{"x": 1}]) and not one.save(1, 0, {})
    assert two.append(2, [{"x": 2}]) and two.save(2, 0, {"y": 3})
    assert one.load() == ({"y": 3}, 1, [{"x": 2}])
    # A clock that jumps back a year leaves nobody waiting for a year.
    assert one.take("one", -3e7, 10) == 3


def replayed(path: Path) -> tuple[Groups, int]:
    ledger = Ledger(path)
    state, number, since = ledger.load()
    ledger.close()
    begun = BEGUN if state is None else Groups.from_json(state)
    return reduce(Groups.after, map(event_from_json, since), begun), number


def keep_on(path: Path, num: int) -> None:
    """Goes on with the story where the file has it, and dies in the middle of a sentence."""
    events, ledger = story(40), Ledger(path)
    state, number = replayed(path)
    term = ledger.take(f"process {os.getpid()}", float(number), 0.5)
    assert term is not None
    for event in events[number : number + num]:
        assert ledger.append(term, [event_to_json(event)])
        state, number = state.after(event), number + 1
        if number % 10 == 0:
            ledger.save(term, number, state.to_json())
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(path: Path, num: int) -> None:
    code = "from tests.control.test_record import *; keep_on(Path(sys.argv[1]), int(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, str(path), str(num)], timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_process_that_is_killed_loses_no_event(path: Path) -> None:
    told = 0
    for num in (1, 13, 30):
        killed_after(path, num)
        told += num
        state, number = replayed(path)
        assert number == told
        assert text(state) == text(reduce(Groups.after, story(40)[:told], BEGUN))


@pytest.mark.slow
def test_a_process_may_be_killed_at_every_event(path: Path) -> None:
    for n in range(len(story(40))):
        killed_after(path, 1)
        assert replayed(path)[1] == n + 1
    assert text(replayed(path)[0]) == text(reduce(Groups.after, story(40), BEGUN))
