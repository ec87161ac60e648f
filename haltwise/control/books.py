"""The books: the state of all groups and what their audits sum up to, kept in a file.

The books are a fold of entries, so that a restart finds them as they were. A thread of their own
takes entries in, one after the other, and writes each into the ledger; whoever makes an entry does
not wait, and reads the newest books without a lock. If the file cannot be written to, that is
counted and the books go on in memory; what the file has missed is written as soon as it can be.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from haltwise.control.estimates import Audit, Sums
from haltwise.control.groups import (
    BrokenOff,
    Event,
    Expired,
    Groups,
    Told,
    event_from_json,
    event_to_json,
)
from haltwise.control.record import Ledger
from haltwise.errors import InputError, reason_of

log = logging.getLogger("haltwise.control")

# Seconds for which the ledger's lease is taken, and after which it is taken anew.
_LEASE, _RENEWED = 60.0, 20.0
# Entries after which the whole state is written, so that a restart need not fold more.
_SNAPSHOT = 200


@dataclass(frozen=True)
class Awaited:
    """What is waited for of an audit whose answers differ: which of them is right."""

    answers: tuple[str, ...]
    """(K + 1,) digests of the answers at each price, and of the full one."""
    until: float
    """Seconds since 1970 until when it is waited for."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What the books take in at once."""

    event: Event | None = None
    """What happened to an audit."""
    audit: Audit | None = None
    """What the audit tells, if the event is that it has told it."""
    num_requests: Mapping[str, int] = field(default_factory=dict)
    """By group, the requests that have come since the entry before."""
    awaited: Awaited | None = None
    """What is waited for, if the event leaves labels due."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "event": None if self.event is None else event_to_json(self.event),
            "audit": None if self.audit is None else _audit_to_json(self.audit),
            "num_requests": dict(self.num_requests),
            "awaited": None if self.awaited is None else asdict(self.awaited),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Rebuilds an entry from parsed JSON.

        Raises:
            InputError: If it is none.
        """
        try:
            event, told, awaited = data["event"], data["audit"], data["awaited"]
            return cls(
                None if event is None else event_from_json(event),
                None if told is None else _audit_from_json(told),
                data["num_requests"],
                None if awaited is None else _awaited_from_json(awaited),
            )
        except (TypeError, KeyError) as error:
            raise InputError(f"entry of the books is not readable ({error!r})") from None


@dataclass(frozen=True, eq=False)
class Books:
    """What is known of all groups."""

    groups: Groups
    """What they may do."""
    sums: Mapping[str, Sums]
    """By group, what its requests and audits sum up to."""
    most_tokens: float
    """The most tokens that an answer can have."""
    num_too_long: int = 0
    """Audits with more tokens than that, which no sum has."""
    awaited: Mapping[str, tuple[Audit, Awaited]] = field(default_factory=dict)
    """By request, the audits whose labels are due, the oldest first."""

    def after(self, entry: Entry) -> Books:
        """Returns the books after an entry."""
        event, books = entry.event, self
        if event is not None:
            books = replace(self, groups=self.groups.after(event))
            under_way = self.groups.under_way.get(getattr(event, "request", ""))
            if isinstance(event, Told | Expired) and under_way is not None:
                books = books._told(event.request, entry, under_way.groups)
        return books._counted(entry.num_requests)

    def _told(self, request: str, entry: Entry, probabilities: Mapping[str, float]) -> Books:
        """Returns the books after an audit has told something, or nothing more is waited for."""
        others = {name: one for name, one in self.awaited.items() if name != request}
        before, audit = self.awaited.get(request), entry.audit
        if audit is None:
            return replace(self, awaited=others)
        if self.is_too_long(audit):
            return replace(self, num_too_long=self.num_too_long + 1)
        sums = dict(self.sums)
        for name, probability in probabilities.items():
            one = self.sum_of(name)
            if before is None:
                sums[name] = one.audit(audit, probability)
            else:
                sums[name] = one.label(before[0], audit, probability)
        if entry.awaited is not None:
            others[request] = audit, entry.awaited
        return replace(self, sums=sums, awaited=others)

    def is_too_long(self, audit: Audit) -> bool:
        """Returns whether an audit has more tokens than there can be."""
        return bool(max(audit.full_cost, audit.cost.max()) > self.most_tokens)

    def _counted(self, num_requests: Mapping[str, int]) -> Books:
        known = {n: num for n, num in num_requests.items() if n in self.groups.groups}
        counted = {name: self.sum_of(name).request(num) for name, num in known.items()}
        return replace(self, sums={**self.sums, **counted})

    def sum_of(self, name: str) -> Sums:
        """Returns the sums of a group, which may have had no request yet."""
        promise, num = self.groups.promise, self.groups.num_prices
        return self.sums.get(name) or Sums.none(num, promise.rest, self.most_tokens)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return vars(self) | {
            "groups": self.groups.to_json(),
            "sums": {name: one.to_json() for name, one in self.sums.items()},
            "awaited": {
                request: [_audit_to_json(audit), asdict(awaited)]
                for request, (audit, awaited) in self.awaited.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Books:
        """Rebuilds books from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            groups = Groups.from_json(data["groups"])
            sums = {name: Sums.from_json(one) for name, one in data["sums"].items()}
            awaited = {
                request: (_audit_from_json(audit), _awaited_from_json(one))
                for request, (audit, one) in data["awaited"].items()
            }
            return cls(**{**data, "groups": groups, "sums": sums, "awaited": awaited})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"books are not readable ({error!r})") from None


class Bookkeeper:
    """Keeps the books of one process in a file that no other one has. To be closed."""

    def __init__(self, path: Path, begun: Books, about: Mapping[str, Any]) -> None:
        """Opens or makes the file, and takes up the books where they were left.

        Audits that had not told anything then are broken off: nobody will tell of them any more.

        Args:
            path: The file.
            begun: The books of who begins.
            about: What they are about, as a JSON object; books about anything else are refused.

        Raises:
            InputError: If the file cannot be used, or another process has it, or it is about
                something else.
        """
        self.num_failed = 0
        """Entries that made no sense or could not be written at once."""
        self.trouble = ""
        """Why, the last time; empty if the file has everything."""
        self._path, self._about = path, {**about, "promise": asdict(begun.groups.promise)}
        self._lock = _locked(path)
        self._ledger = Ledger(path)
        self._holder = f"{os.getpid()} {time.time_ns()}"
        self._ledger.take(self._holder, time.time(), 0)  # who had it is gone, as the lock tells
        self._term = self._ledger.take(self._holder, time.time(), _LEASE)
        self.books = self._read(begun)
        """The newest."""
        for request in self.books.groups.under_way.keys() - self.books.awaited.keys():
            self.books = self.books.after(Entry(BrokenOff(request)))
        self._missed = True
        self._save()
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="haltwise books", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Takes in an entry soon; entries are taken in in their order."""
        self._entries.put(entry)

    def close(self) -> None:
        """Takes in what waits, writes it, and gives the file back."""
        self._entries.put(None)
        self._thread.join()
        self._ledger.close()
        self._lock.close()

    def _read(self, begun: Books) -> Books:
        saved, self._number, entries = self._ledger.load()
        if saved is None:
            return begun
        if saved.get("about") != self._about:
            raise InputError(
                f"{self._path} is about another head, target or share of audits than this one; "
                "expected a file of its own for each"
            )
        books = Books.from_json(saved["books"])
        for entry in entries:
            books = books.after(Entry.from_json(entry))
        return books

    def _run(self) -> None:
        """Takes in entries until there is a None."""
        taken = 0
        while True:
            try:
                entry = self._entries.get(timeout=_RENEWED)
            except queue.Empty:
                self._written(self._renew)
                continue
            if entry is None:
                break
            self._take(entry)
            taken += 1
            if taken % _SNAPSHOT == 0:
                self._written(self._save)
        self._written(self._save)

    def _take(self, entry: Entry) -> None:
        try:
            self.books = self.books.after(entry)
        except Exception as error:
            log.exception("an entry of the books makes no sense")
            self.num_failed, self.trouble = self.num_failed + 1, reason_of(error)
            return
        self._written(lambda: self._append(entry))

    def _written(self, write: Any) -> None:
        """Writes to the file, and counts it if that fails."""
        try:
            write()
            self.trouble = ""
        except Exception as error:
            self._missed = True
            self.num_failed, self.trouble = self.num_failed + 1, reason_of(error)
            log.warning("the books cannot be written: %s", self.trouble)

    def _append(self, entry: Entry) -> None:
        """Writes an entry, or the whole state if the file has missed something."""
        if self._missed:
            self._save()
        else:
            if not self._ledger.append(self._term or 0, [entry.to_json()]):
                raise InputError("another process has taken the books")
            self._number += 1

    def _save(self) -> None:
        self._renew()
        state = {"about": self._about, "books": self.books.to_json()}
        if not self._ledger.save(self._term or 0, self._number, state):
            raise InputError("another process has taken the books")
        self._missed = False

    def _renew(self) -> None:
        """Takes the lease anew; a clock that has jumped changes nothing."""
        term = self._ledger.take(self._holder, time.time(), _LEASE)
        if term is None or term != self._term:
            raise InputError("another process has taken the books")


def _audit_to_json(audit: Audit) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(audit).items()}


def _audit_from_json(data: Mapping[str, Any]) -> Audit:
    values: dict[str, Any] = {
        name: np.array(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return Audit(**values)


def _awaited_from_json(data: Mapping[str, Any]) -> Awaited:
    return Awaited(tuple(data["answers"]), data["until"])


def _locked(path: Path) -> IO[bytes]:
    """Returns a file that is locked for as long as this process has it open.

    Raises:
        InputError: If another process has it, or it cannot be made.
    """
    beside = path.with_name(path.name + ".lock")
    try:
        file = beside.open("ab")
    except OSError as error:
        raise InputError(f"{beside}: {reason_of(error)}, expected to write there") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{path} is in use by another process, expected one of its own") from None
    return file
