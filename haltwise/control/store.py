"""Where the record, the books and the accounts are: an SQLite file, or a PostgreSQL database.

A file is one machine's, a database may be many machines'.
Statements are of the kind that both understand, with a question mark where a value stands.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints
from urllib.parse import urlsplit

from haltwise.errors import InputError, from_clone, reason_of

T = TypeVar("T")
#: The version of the tables; others are refused.
VERSION = 5
# "halt", so that no other program's file is taken for ours, nor its lock.
_APPLICATION = 0x68616C74
_POSTGRESQL = ("postgresql", "postgres")
_SQLITE_TYPES = {bool: "INTEGER", int: "INTEGER", float: "REAL", str: "TEXT"}
_POSTGRESQL_TYPES = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE PRECISION", str: "TEXT"}

#: By name, the dataclass whose fields are a table's columns; the first one is the key if its name
#: is "id" or "number".
Tables = Mapping[str, type]


class Connection:
    """An open store. To be closed.

    Args:
        raw: As its library gives it, which commits each statement by itself.
        name: What a person knows the store by.
        begins: The statements that begin a transaction beside which nobody else writes.
        errors: What its library raises.
        place: What stands for a value in its library's statements.
    """

    def __init__(
        self,
        raw: Any,
        name: str,
        begins: Sequence[str],
        errors: type[Exception],
        place: str = "?",
    ) -> None:
        """Is open."""
        self.name = name
        self._raw, self._begins, self._errors, self._place = raw, begins, errors, place

    def execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Runs a statement, and returns the rows that it gives.

        Raises:
            InputError: If it fails.
        """
        try:
            found = self._raw.execute(statement.replace("?", self._place), values)
            return list(found.fetchall()) if found.description else []
        except (self._errors, OverflowError) as error:
            raise InputError(f"{self.name}: {reason_of(error)}") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Does everything inside or nothing, with nobody else writing meanwhile."""
        for statement in self._begins:
            self.execute(statement)
        try:
            yield
        except BaseException:
            with suppress(InputError):
                self.execute("ROLLBACK")
            raise
        self.execute("COMMIT")

    def close(self) -> None:
        """Closes it."""
        with suppress(self._errors):
            self._raw.close()


class Transactions:
    """A store for whole transactions, opened anew after one that failed. To be closed.

    It may have been away, or moved. One thread uses it at a time.

    Args:
        store: The store.
        tables: Its tables.

    Raises:
        InputError: If it cannot be used, is another program's or of another version.
    """

    def __init__(self, store: Store, tables: Tables) -> None:
        """Opens the store, or makes its tables."""
        self._store, self._tables = store, tables
        self._opened: Connection | None = store.connect(tables)

    def run(self, do: Callable[[Connection], T]) -> T:
        """Does something with nobody else writing meanwhile, or nothing.

        Raises:
            InputError: If the store cannot be used; then nothing is written, or nobody knows.
        """
        if self._opened is None:
            self._opened = self._store.connect(self._tables)
        try:
            with self._opened.transaction():
                return do(self._opened)
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the store."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None


class Store(Protocol):
    """A place that can be opened."""

    def connect(self, tables: Tables) -> Connection:
        """Opens it, and makes the tables if it is new.

        Raises:
            InputError: If it cannot be used, is another program's or of another version.
        """


def is_database(name: str | Path | None) -> bool:
    """Returns whether a setting names a database, and no file."""
    return urlsplit(str(name or "")).scheme in _POSTGRESQL


def store_of(name: str | Path, patience: float = 5.0) -> Store:
    """Returns the store that a setting names.

    Args:
        name: A file, or postgresql://... as libpq reads it.
        patience: Seconds to wait for a store that others have locked.

    Raises:
        InputError: If it is a database, and what reads it is not installed.
    """
    if not is_database(name):
        return SQLiteStore(Path(name), patience)
    try:
        import psycopg  # noqa: F401
    except ImportError:
        told = f"a PostgreSQL state needs psycopg: {from_clone('postgres')}"
        raise InputError(told) from None
    return PostgreSQLStore(str(name), patience)


@dataclass(frozen=True)
class SQLiteStore:
    """A file of one machine, which several processes may use."""

    path: Path
    patience: float = 5.0

    def connect(self, tables: Tables) -> Connection:
        """See `Store`."""
        try:
            raw = sqlite3.connect(
                self.path, timeout=self.patience, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            found = "is a folder" if self.path.is_dir() else reason_of(error)
            raise InputError(f"{self.path}: {found}, expected the file of a state") from None
        opened = Connection(raw, str(self.path), ["BEGIN IMMEDIATE"], sqlite3.Error)
        try:
            opened.execute("PRAGMA synchronous = NORMAL")
            if _marks(opened) != (_APPLICATION, VERSION):
                opened.execute("PRAGMA journal_mode = WAL")
                self._make(opened, tables)
        except InputError:
            opened.close()
            raise
        return opened

    def _make(self, opened: Connection, tables: Tables) -> None:
        with opened.transaction():  # of two that find it new, one makes the tables
            application, version = _marks(opened)
            found = opened.execute("SELECT count(*) FROM sqlite_master")[0][0]
            if application == _APPLICATION and version != VERSION:
                raise _other_version(opened.name, version)
            if application != _APPLICATION and (application or version or found):
                raise InputError(
                    f"{self.path} is another program's file, expected a record or none"
                )
            if not found:
                for statement in _statements(tables, _SQLITE_TYPES, " STRICT"):
                    opened.execute(statement)
                opened.execute(f"PRAGMA application_id = {_APPLICATION}")
                opened.execute(f"PRAGMA user_version = {VERSION}")


@dataclass(frozen=True)
class PostgreSQLStore:
    """A database that several machines may use; all that is ours is in its schema haltwise."""

    url: str
    patience: float = 5.0

    @property
    def name(self) -> str:
        """The address without a password."""
        parts = urlsplit(self.url)
        return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def connect(self, tables: Tables) -> Connection:
        """See `Store`."""
        import psycopg

        try:
            seconds = max(2, math.ceil(self.patience))
            raw = psycopg.connect(self.url, autocommit=True, connect_timeout=seconds)
        except psycopg.Error as error:
            raise InputError(f"{self.name}: {reason_of(error)}") from None
        begins = ["BEGIN", f"SELECT pg_advisory_xact_lock({_APPLICATION})"]
        opened = Connection(raw, self.name, begins, psycopg.Error, "%s")
        try:
            opened.execute("SET search_path TO haltwise")
            opened.execute(f"SET statement_timeout TO {math.ceil(1000 * self.patience)}")
            if not opened.execute("SELECT to_regclass('haltwise.version')")[0][0]:
                self._make(opened, tables)
            version = opened.execute("SELECT max(number) FROM version")[0][0]
            if version != VERSION:
                raise _other_version(opened.name, version)
        except InputError:
            opened.close()
            raise
        return opened

    def _make(self, opened: Connection, tables: Tables) -> None:
        with opened.transaction():
            if opened.execute("SELECT to_regclass('haltwise.version')")[0][0]:
                return  # another process was faster
            opened.execute("CREATE SCHEMA IF NOT EXISTS haltwise")
            for statement in _statements(tables, _POSTGRESQL_TYPES):
                opened.execute(statement)
            opened.execute("CREATE TABLE version (number BIGINT PRIMARY KEY)")
            opened.execute("INSERT INTO version VALUES (?)", VERSION)


def _other_version(name: str, version: int) -> InputError:
    return InputError(f"{name} is a record of version {version}, expected {VERSION}")


def _marks(file: Connection) -> tuple[int, int]:
    """Returns whose file it is, and of which version."""
    application, version = (
        int(file.execute(f"PRAGMA {name}")[0][0]) for name in ("application_id", "user_version")
    )
    return application, version


def _statements(tables: Tables, types: Mapping[type, str], suffix: str = "") -> Iterator[str]:
    """Yields the statements that make the tables."""
    for table, row in tables.items():
        hints, columns = get_type_hints(row), []
        for place, column in enumerate(fields(row)):
            options = getattr(hints[column.name], "__args__", (hints[column.name],))
            needed = "" if type(None) in options else " NOT NULL"
            is_key = place == 0 and column.name in ("id", "number")
            columns.append(f'"{column.name}" {types[options[0]]}{needed}{" PRIMARY KEY" * is_key}')
        yield f"CREATE TABLE {table} ({', '.join(columns)}){suffix}"
