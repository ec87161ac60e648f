"""The record: what happened to every request, beside the books in one store.

Rows of requests, audits' answers and labels go through a queue to one writer thread. Whoever puts a
row never waits: what does not fit, or cannot be written, is counted and dropped. No content and no
key is ever in it, only keyed digests.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from haltwise.control.draws import check_key
from haltwise.control.store import Connection, Store
from haltwise.errors import reason_of


@dataclass(frozen=True)
class RequestRow:
    """One request. Digests are `digest`'s; None is unknown, or does not apply."""

    id: str
    at: float
    """When it had ended: seconds since 1970, by the clock of the machine that served it."""
    operation: str | None = None
    """chat, or text_completion."""
    tenant: str | None = None
    session: str | None = None
    user: str | None = None
    segment: str | None = None
    task: str | None = None
    lm: str | None = None
    head: str | None = None
    head_probability: float | None = None
    """With which it was drawn to serve, while another one served too."""
    certificate: str | None = None
    price_asked: float | None = None
    price_ceiling: float | None = None
    price_served: float | None = None
    price_due: float | None = None
    """The price that it was served, or would have been if it were no audit."""
    price_probability: float | None = None
    """With which that price was drawn, where it was one of two."""
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
    """How it ended: the answer's finish reason, "cut off", or "passed on" where nobody watched."""
    seconds: float | None = None
    """From its arrival to its end."""
    halts: str | None = None
    """From which price on its thought has how many tokens, see `course.halts_of`; of prices below
    the one that was served, what it really had. None where it was not replayed."""


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


@dataclass(frozen=True)
class EventRow:
    """One entry of the books."""

    number: int
    """Its place among all, from 1 on."""
    name: str
    """Of its own, so that it is kept once."""
    entry: str
    """As JSON."""


@dataclass(frozen=True)
class SnapshotRow:
    """The books after some entry."""

    number: int
    """Of that entry; 0 before the first one."""
    state: str
    """As JSON."""


@dataclass(frozen=True)
class ProcessRow:
    """A process that writes into the books."""

    id: str
    until: float
    """Seconds since 1970 after which it is taken for dead."""


@dataclass(frozen=True)
class AccountRow:
    """What somebody has spent in one window of time, and what is held back for running requests."""

    id: str
    """Whose it is, and the number of the window."""
    until: float
    """Seconds since 1970 at which the window ends; infinity if it never does."""
    requests: int
    spent_nano: int
    held_nano: int
    spent_tokens: int
    held_tokens: int


@dataclass(frozen=True)
class HoldRow:
    """What is held back in one account for one running request."""

    id: str
    """The request's and the account's."""
    request: str
    account: str
    process: str
    until: float
    """Seconds since 1970 after which it counts as spent: its process has died."""
    nano: int
    tokens: int


Row = RequestRow | AnswerRow | LabelRow

#: All tables of a store.
TABLES: dict[str, type] = {
    "request": RequestRow,
    "answer": AnswerRow,
    "label": LabelRow,
    "event": EventRow,
    "snapshot": SnapshotRow,
    "process": ProcessRow,
    "account": AccountRow,
    "hold": HoldRow,
}
_NAMES = {row: name for name, row in TABLES.items()}
_MOST_ROWS_AT_ONCE = 500
# Seconds after which rows are looked for that are too old; requests that are deleted at once.
_TRIMS, _MOST_TRIMMED = 3600.0, 5_000
_OLD = f"SELECT id FROM request WHERE at < ? ORDER BY at, id LIMIT {_MOST_TRIMMED}"


def digest(key: bytes, text: str) -> str:
    """Returns a digest that only who has the key can make.

    Raises:
        InputError: If the key is shorter than 16 bytes or longer than 64.
    """
    check_key(key)
    told = text.encode("utf-8", "surrogatepass")  # JSON may hold what is no text
    return blake2b(told, key=key, digest_size=16, person=b"digest").hexdigest()


@dataclass(frozen=True)
class Whose:
    """Who made a request, as digests, and which head has served it; None is unknown."""

    tenant: str | None
    task: str | None
    user: str | None
    head: str | None
    head_probability: float | None
    is_rated: bool
    """Whether somebody has rated it."""


@dataclass(frozen=True)
class AuditedRow:
    """What is known of an audit before its LM says anything."""

    at: float
    """When it had ended, seconds since 1970."""
    segment: str
    """A digest; empty if it has none."""
    input_tokens: int | None


def audited_rows(store: Store) -> dict[str, AuditedRow]:
    """Returns, by id, what a store has of audits.

    Raises:
        InputError: If it cannot be used.
    """
    with closing(store.connect(TABLES)) as opened:
        found = opened.execute("SELECT id, at, segment, input_tokens FROM request WHERE audited")
    return {name: AuditedRow(at, segment or "", num) for name, at, segment, num in found}


class Record:
    """Rows on their way into a store. To be closed."""

    def __init__(
        self,
        store: Store,
        room: int = 10_000,
        tell: Callable[[Row], None] | None = None,
        keep_seconds: float = math.inf,
    ) -> None:
        """Opens or makes the tables, and starts the writer.

        Args:
            store: Where they are.
            room: Rows that may wait.
            tell: Is told of every row too; what it raises is no matter.
            keep_seconds: For how long rows of requests are kept, with their answers and labels.

        Raises:
            InputError: If the store cannot be used, is another program's or of another version.
        """
        store.connect(TABLES).close()
        self._store, self._tell = store, tell
        self._keep_seconds, self._trims_at = keep_seconds, -math.inf
        self._rows: queue.Queue[Row | None] = queue.Queue(room)
        #: Rows that were not written: the queue was full, or the store could not be written to.
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

    def whose(self, request: str) -> Whose | None:
        """Returns who made a request, or None if there is no row of it.

        Args:
            request: Its id.

        Raises:
            InputError: If the store cannot be used.
        """
        request = _storable(request)
        with closing(self._store.connect(TABLES)) as opened:
            asked = 'SELECT tenant, task, "user", head, head_probability FROM request WHERE id = ?'
            found = opened.execute(asked, request)
            rated = "SELECT 1 FROM label WHERE request = ? AND source = 'user'"
            if not found:
                return None
            tenant, task, user, head, probability = found[0]
            is_rated = bool(opened.execute(rated, request))
            return Whose(tenant, task, user, head, probability, is_rated)

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
        """Tells of rows, and writes them together or drops them together.

        The store is opened each time: one that was moved, replaced or away for a while is no
        trouble for longer than that.
        """
        if self._tell is not None:
            for row in rows:
                with suppress(Exception):
                    self._tell(row)
        num_left = len(rows)
        try:
            with closing(self._store.connect(TABLES)) as opened:
                with opened.transaction():
                    for row in rows:
                        opened.execute(_insert(row), *map(_storable, vars(row).values()))
                num_left = 0
                self._trim(opened)
            self.trouble = ""
        except Exception as error:
            self.trouble = reason_of(error)
            self._dropped(num_left)

    def _trim(self, opened: Connection) -> None:
        """Deletes rows that are too old: many of them a part at a time, so that nobody waits."""
        if time.monotonic() < self._trims_at or math.isinf(self._keep_seconds):
            return
        until = time.time() - self._keep_seconds
        with opened.transaction():
            num_old = len(opened.execute(_OLD, until))
            opened.execute("DELETE FROM label WHERE at < ?", until)
            opened.execute(f"DELETE FROM answer WHERE request IN ({_OLD})", until)
            opened.execute(f"DELETE FROM request WHERE id IN ({_OLD})", until)
        self._trims_at = time.monotonic() + (_TRIMS if num_old < _MOST_TRIMMED else 0.0)


def _insert(row: Row) -> str:
    places = ", ".join("?" * len(fields(row)))
    return f"INSERT INTO {_NAMES[type(row)]} VALUES ({places}) ON CONFLICT DO NOTHING"


def _storable(value: Any) -> Any:
    """Returns a value; of a text, what a store can hold."""
    if not isinstance(value, str):
        return value
    return value.encode(errors="replace").decode().replace("\0", "?")
