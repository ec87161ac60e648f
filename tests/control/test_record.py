"""The record never holds up a request, and says what it has lost."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from haltwise import InputError
from haltwise.control import record as record_module
from haltwise.control.record import TABLES, AnswerRow, LabelRow, Record, RequestRow, Whose, digest
from haltwise.control.store import PostgreSQLStore, SQLiteStore, Store, store_of

KEY = b"0123456789abcdef"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record.sqlite"


def rows(store: Store, query: str) -> list[tuple[object, ...]]:
    with closing(store.connect(TABLES)) as opened:
        return opened.execute(query)


def test_rows_of_every_kind_are_kept(store: Store) -> None:
    record = Record(store)
    record.put(RequestRow("a", 1.5, tenant=digest(KEY, "me"), audited=True, audit_probability=0.05))
    record.put(RequestRow("a", 2.0))  # an id is kept once
    record.put(AnswerRow("a", 120, 0.1, 0.4, digest(KEY, "42"), True, 7, "number"))
    record.put(LabelRow("a", 120, "gold", 1.0, None, 3.0))
    record.close()
    assert (record.num_dropped, record.trouble) == (0, "")
    kept = rows(store, "SELECT id, at, tenant, audited, audit_probability FROM request")
    assert kept == [("a", 1.5, digest(KEY, "me"), 1, 0.05)]
    assert rows(store, "SELECT position, agrees FROM answer") == [(120, 1)]
    assert rows(store, "SELECT source, value FROM label") == [("gold", 1.0)]
    assert record.whose("a") == Whose(digest(KEY, "me"), None, None, None, None, is_rated=False)
    assert record.whose("b") is None and record.whose("\ud800") is None


def test_texts_that_a_store_cannot_hold_are_kept_as_far_as_it_can(store: Store) -> None:
    record = Record(store)
    record.put(RequestRow("a", 0.0, lm="x\0y \ud800é"))  # JSON can hold them
    record.close()
    assert rows(store, "SELECT lm FROM request") == [("x?y ?é",)] and not record.num_dropped


def test_a_digest_tells_nothing_without_the_key() -> None:
    assert digest(KEY, "me") == digest(KEY, "me") != digest(KEY[::-1], "me")
    assert len(digest(KEY, "me")) == 32
    assert digest(KEY, "\ud800") != digest(KEY, "\ud801")  # which JSON can hold, but no text


def test_a_full_queue_drops_rows_counts_them_and_holds_up_nobody(path: Path) -> None:
    record = Record(SQLiteStore(path, 0.2), room=5)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    put = [record.put(RequestRow(str(n), 0.0)) for n in range(1000)]
    assert not all(put)
    other.execute("ROLLBACK")
    record.close()
    assert len(rows(SQLiteStore(path), "SELECT id FROM request")) == 1000 - record.num_dropped
    assert record.num_dropped >= put.count(False)


def test_a_locked_file_is_told_and_overcome(path: Path) -> None:
    record = Record(SQLiteStore(path, 0.05))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    record.put(RequestRow("lost", 0.0))
    while not record.trouble:
        pass
    assert "locked" in record.trouble and record.num_dropped == 1
    other.execute("ROLLBACK")
    record.put(RequestRow("kept", 0.0))
    record.close()
    kept = rows(SQLiteStore(path), "SELECT id FROM request")
    assert kept == [("kept",)] and record.trouble == ""


def test_rows_that_do_not_fit_are_counted(store: Store) -> None:
    record = Record(store)
    record.put(RequestRow("a", 0.0, position=2**80))
    record.put(RequestRow(3.5, 0.0, task=b"x"))  # type: ignore[arg-type]
    record.close()
    assert record.num_dropped == 2 and record.trouble


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_told_in_a_line() -> None:
    with pytest.raises(InputError, match="/dev/full: "):
        Record(SQLiteStore(Path("/dev/full")))


def test_files_that_are_no_record(path: Path, tmp_path: Path) -> None:
    Record(SQLiteStore(path)).close()
    file = sqlite3.connect(path)
    file.execute("PRAGMA user_version = 1")
    file.close()
    with pytest.raises(InputError, match="is a record of version 1, expected 5"):
        Record(SQLiteStore(path))
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE mine (x)")
    with pytest.raises(InputError, match="another program's file"):
        Record(SQLiteStore(other))
    (tmp_path / "text").write_text("no database, but long enough for its header to be read " * 20)
    for wrong in (tmp_path / "text", tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(InputError, match=str(wrong)):
            Record(SQLiteStore(wrong))


def test_databases_that_are_no_record(postgresql: str, path: Path) -> None:
    import psycopg

    address = postgresql.format("postgres")
    with psycopg.connect(address, autocommit=True) as server:
        server.execute("CREATE DATABASE of_other_version")
    other = postgresql.format("of_other_version")
    Record(store_of(other)).close()
    with psycopg.connect(other, autocommit=True) as server:
        server.execute("UPDATE haltwise.version SET number = 7")
    with pytest.raises(InputError, match="is a record of version 7, expected 5"):
        Record(store_of(other))
    with pytest.raises(InputError, match='database "missing" does not exist') as error:
        Record(store_of(postgresql.format("missing").replace("haltwise@", "haltwise:secret@")))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["postgresql://me:secret@there:5433/db?x=1", "postgres:///db"])
def test_a_database_is_told_from_a_file_and_named_without_its_password(name: str) -> None:
    found = store_of(name)
    assert isinstance(found, PostgreSQLStore)
    assert found.name in ("postgresql://there:5433/db", "postgresql:///db")
    assert isinstance(store_of("postgresql.db"), SQLiteStore)


def test_rows_are_kept_for_so_long_and_no_longer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "_MOST_TRIMMED", 2)
    monkeypatch.setattr(record_module, "_OLD", record_module._OLD.replace("5000", "2"))
    before = Record(store)
    now = time.time()
    for age in range(6):  # days; the last three are older than two and a half
        name, at = str(age), now - 86_400 * age
        before.put(AnswerRow(name, 9, None, None, "a", True, 7, "number"))
        before.put(RequestRow(name, at))
        before.put(LabelRow(name, 0, "user", 1.0, None, at))
    before.close()
    record = Record(store, keep_seconds=2.5 * 86_400)
    for name in ("new", "newer"):  # of three old ones two are deleted at once, then the third
        record.put(RequestRow(name, now))
        while not rows(store, f"SELECT 1 FROM request WHERE id = '{name}'"):
            pass
    record.close()
    assert (record.num_dropped, record.trouble) == (0, "")
    for query in ("SELECT request FROM answer", "SELECT request FROM label"):
        assert sorted(rows(store, query)) == [("0",), ("1",), ("2",)]
    kept = rows(store, "SELECT id FROM request")
    assert sorted(kept) == [("0",), ("1",), ("2",), ("new",), ("newer",)]
