"""The record: what happened to every request, in one SQLite file, and the governor's own state.

Rows of requests, audits' answers and labels go through a queue to one writer thread. Whoever puts a
row never waits: what does not fit, or cannot be written, is counted and dropped. No content and no
key is ever in it, only keyed digests.

The governor's events and snapshots are not dropped: the process that holds the lease writes them at
once, and others read the newest snapshot. Every holder has a term of its own, and what a former one
still writes is refused.
"""

from __future__ import annotations

import json
import queue
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_type_hints

from haltwise.control.draws import check_key
from haltwise.errors import InputError, reason_of

#: The version of the file's tables; others are refused.
VERSION = 1
# "halt", so that no other program's file is taken for ours.
_APPLICATION = 0x68616C74
_MOST_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class RequestRow:
    """One request. Digests are `digest`'s; None is unknown, or does not apply."""

    id: str
    at: float
    """Seconds since 1970, by the clock of the machine that served it."""
    tenant: str | None = None
    session: str | None = None
    user: str | None = None
    segment: str | None = None
    task: str | None = None
    lm: str | None = None
    head: str | None = None
    certificate: str | None = None
    price_asked: float | None = None
    price_ceiling: float | None = None
    price_served: float | None = None
    audited: bool = False
    audit_probability: float = 0.0
    """As it was known before the draw."""
    halted: bool = False
    reason: str | None = None
    position: int | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    output_tokens: int | None = None
    audit_tokens: int = 0
    """Tokens of the answers that were forced for the audit alone."""
    cost_nano: int | None = None
    """In 1e-9 dollars."""
    outcome: str | None = None


@dataclass(frozen=True)
class AnswerRow:
    """One answer of an audit, where some prices would have halted it; the full one's is last."""

    request: str
    position: int
    lowest_price: float | None
    """The lowest of the prices that halt there; None for the full answer."""
    highest_price: float | None
    answer: str
    """Digest of the answer as its scorer compares it."""
    agrees: bool
    tokens: int
    scorer: str


@dataclass(frozen=True)
class LabelRow:
    """What somebody says about one answer."""

    request: str
    position: int
    source: str
    """gold, judge, test or user."""
    value: float
    reporter: str | None
    at: float


Row = RequestRow | AnswerRow | LabelRow

_TABLES: dict[type[Row], str] = {RequestRow: "request", AnswerRow: "answer", LabelRow: "label"}
_TYPES = {bool: "INTEGER", int: "INTEGER", float: "REAL", str: "TEXT"}
_GOVERNOR = """
CREATE TABLE event (term INTEGER NOT NULL, number INTEGER PRIMARY KEY, event TEXT NOT NULL) STRICT;
CREATE TABLE snapshot (one INTEGER PRIMARY KEY CHECK (one = 1), number INTEGER NOT NULL,
  state TEXT NOT NULL) STRICT;
CREATE TABLE lease (one INTEGER PRIMARY KEY CHECK (one = 1), holder TEXT NOT NULL,
  term INTEGER NOT NULL, until REAL NOT NULL) STRICT;
"""


def digest(key: bytes, text: str) -> str:
    """Returns a digest that only who has the key can make.

    Raises:
        InputError: If the key is shorter than 16 bytes or longer than 64.
    """
    check_key(key)
    told = text.encode("utf-8", "surrogatepass")  # JSON may hold what is no text
    return blake2b(told, key=key, digest_size=16, person=b"digest").hexdigest()


class Record:
    """Rows on their way into the file. To be closed."""

    def __init__(self, path: Path, room: int = 10_000, patience: float = 5.0) -> None:
        """Opens or makes the file, and starts the writer.

        Args:
            path: The file.
            room: Rows that may wait.
            patience: Seconds that the writer waits for a locked file before it drops rows.

        Raises:
            InputError: If the file cannot be used, is another program's or of another version.
        """
        with closing(_connect(path, patience)):
            pass
        self._path, self._patience = path, patience
        self._rows: queue.Queue[Row | None] = queue.Queue(room)
        #: Rows that were not written: the queue was full, or the file could not be written to.
        self.num_dropped = 0
        #: Why rows could not be written, the last time; empty if they could.
        self.trouble = ""
        self._counting = threading.Lock()
        self._writer = threading.Thread(target=self._write, name="haltwise record", daemon=True)
        self._writer.start()

    def put(self, row: Row) -> bool:
        """Returns at once whether a row is on its way; if it is not, it is counted."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._dropped(1)
            return False
        return True

    def close(self) -> None:
        """Writes what waits, and ends the writer; rows put from now on are never written."""
        self._rows.put(None)
        self._writer.join()

    def _dropped(self, num: int) -> None:
        with self._counting:
            self.num_dropped += num

    def _write(self) -> None:
        """Writes rows, as many at once as wait, until there is a None."""
        ended = False
        while not ended:
            rows = [self._rows.get()]
            while len(rows) < _MOST_ROWS_AT_ONCE and rows[-1] is not None:
                try:
                    rows.append(self._rows.get_nowait())
                except queue.Empty:
                    break
            ended = rows[-1] is None
            self._write_rows([row for row in rows if row is not None])

    def _write_rows(self, rows: Sequence[Row]) -> None:
        """Writes rows together, or drops them together.

        The file is opened each time: one that was moved, replaced or full for a while is no
        trouble for longer than that.
        """
        try:
            with closing(_connect(self._path, self._patience)) as file, file:
                for row in rows:
                    file.execute(_insert(type(row)), list(vars(row).values()))
            self.trouble = ""
        except (sqlite3.Error, InputError, OverflowError) as error:
            self.trouble = reason_of(error)
            self._dropped(len(rows))


class Ledger:
    """The governor's lease, events and snapshots in the file. To be closed."""

    def __init__(self, path: Path, patience: float = 5.0) -> None:
        """Opens or makes the file.

        Args:
            path: The file.
            patience: Seconds to wait for a locked file.

        Raises:
            InputError: If the file cannot be used, is another program's or of another version.
        """
        self._file = _connect(path, patience)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def take(self, holder: str, now: float, seconds: float) -> int | None:
        """Takes or renews the lease.

        One that ends later than it could if it was taken now is of a clock that jumped, and is
        taken too.

        Args:
            holder: Who asks, such as a process; nobody else has the name.
            now: Seconds, by a clock that the holders share.
            seconds: For how long.

        Returns:
            The holder's term; None if somebody else has the lease.

        Raises:
            InputError: If the file cannot be written to.
        """
        with self._transaction():
            row = self._file.execute("SELECT holder, term, until FROM lease").fetchone()
            owner, term, until = row or ("", 0, 0.0)
            if owner != holder:
                if now < until <= now + seconds:
                    return None
                term += 1
            self._file.execute(
                "INSERT OR REPLACE INTO lease VALUES (1, ?, ?, ?)", (holder, term, now + seconds)
            )
        return int(term)

    def append(self, term: int, events: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether events, as JSON objects, were written: not by who has lost the lease.

        Raises:
            InputError: If the file cannot be written to.
        """
        with self._transaction():
            if self._term() != term:
                return False
            self._file.executemany(
                "INSERT INTO event (term, event) VALUES (?, ?)",
                [(term, json.dumps(event)) for event in events],
            )
        return True

    def save(self, term: int, number: int, state: Mapping[str, Any]) -> bool:
        """Returns whether a snapshot was written: not by who has lost the lease.

        Args:
            term: The holder's.
            number: Of the last event that is in the state.
            state: As a JSON object.

        Raises:
            InputError: If the file cannot be written to.
        """
        with self._transaction():
            if self._term() != term:
                return False
            self._file.execute(
                "INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (number, json.dumps(state))
            )
        return True

    def load(self) -> tuple[dict[str, Any] | None, int, list[dict[str, Any]]]:
        """Returns the newest snapshot or None, the number of the last event, and those since.

        Raises:
            InputError: If the file cannot be read.
        """
        with self._transaction():
            found = self._file.execute("SELECT number, state FROM snapshot").fetchone()
            number, state = found or (0, "null")
            rows = self._file.execute(
                "SELECT number, event FROM event WHERE number > ? ORDER BY number", (number,)
            ).fetchall()
        last = rows[-1][0] if rows else number
        return json.loads(state), last, [json.loads(event) for _, event in rows]

    def _term(self) -> int | None:
        found = self._file.execute("SELECT term FROM lease").fetchone()
        return None if found is None else int(found[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Does everything inside or nothing, with nobody else writing meanwhile."""
        try:
            self._file.execute("BEGIN IMMEDIATE")
            with self._file:
                yield
        except sqlite3.Error as error:
            raise InputError(f"the record cannot be used: {reason_of(error)}") from None


def _insert(kind: type[Row]) -> str:
    places = ", ".join("?" * len(fields(kind)))
    return f"INSERT OR IGNORE INTO {_TABLES[kind]} VALUES ({places})"


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    """Opens a file, and makes its tables if it is new.

    Raises:
        InputError: If it cannot be used, is another program's or of another version.
    """
    try:
        file = sqlite3.connect(path, timeout=patience, check_same_thread=False)
    except sqlite3.Error as error:
        raise InputError(f"{path}: {reason_of(error)}, expected a file to write into") from None
    try:
        file.execute("PRAGMA synchronous = NORMAL")
        _check(path, file)
    except sqlite3.Error as error:
        file.close()
        raise InputError(f"{path}: {reason_of(error)}") from None
    except InputError:
        file.close()
        raise
    return file


def _check(path: Path, file: sqlite3.Connection) -> None:
    """Makes the tables of a new file, and refuses one that is not ours.

    Raises:
        InputError: If it is another program's or of another version.
    """
    if _marks(file) == (_APPLICATION, VERSION):
        return
    file.execute("PRAGMA journal_mode = WAL")
    with file:
        file.execute("BEGIN IMMEDIATE")  # of two that find it new, one makes the tables
        application, version = _marks(file)
        tables = file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application == _APPLICATION and version != VERSION:
            raise InputError(f"{path} is a record of version {version}, expected {VERSION}")
        if application != _APPLICATION and (application or version or tables):
            raise InputError(f"{path} is another program's file, expected a record or none")
        if not tables:
            for statement in _schema():
                file.execute(statement)
            file.execute(f"PRAGMA application_id = {_APPLICATION}")
            file.execute(f"PRAGMA user_version = {VERSION}")


def _marks(file: sqlite3.Connection) -> tuple[int, int]:
    """Returns whose file it is, and of which version."""
    application, version = (
        file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    return application, version


def _schema() -> Iterator[str]:
    """Yields the statements that make the tables."""
    for kind, table in _TABLES.items():
        columns = []
        for name, hint in get_type_hints(kind).items():
            options = getattr(hint, "__args__", (hint,))
            needed = "" if type(None) in options else " NOT NULL"
            columns.append(f"{name} {_TYPES[options[0]]}{needed}")
        columns += ["PRIMARY KEY (id)"] if kind is RequestRow else []
        yield f"CREATE TABLE {table} ({', '.join(columns)}) STRICT"
    yield from filter(str.strip, _GOVERNOR.split(";"))
