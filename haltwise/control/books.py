"""The books: the state of all groups and what their audits sum up to, kept in a store.

The books are a fold of entries, so that a restart finds them as they were, and several processes
that take in the same entries have the same books. A thread of their own writes entries into the
ledger and takes them in; whoever makes an entry does not wait, and reads the newest books without a
lock. If the store cannot be written to, that is counted and the books go on in memory; what the
store has missed is written as soon as it can be.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.estimates import Audit, Sums
from haltwise.control.groups import (
    Event,
    Expired,
    Gone,
    Groups,
    Told,
    event_from_json,
    event_to_json,
)
from haltwise.control.ledger import Ledger, MissedError
from haltwise.control.store import Store
from haltwise.errors import InputError, reason_of

log = logging.getLogger("haltwise.control")

# Seconds after which a process looks for entries of others, if it has none of its own, and after
# which it tries a store anew that has failed.
_LOOKS = 1.0
# Seconds after which a process tells that it lives, and after which it is taken for dead.
_BEATS, _LIVES = 5.0, 30.0
# Entries after which the whole state is written, so that a restart need not fold more.
_SNAPSHOT = 200
# Newest audits that are remembered because their answers differ.
_MOST_DIFFERING = 20
# Entries that may wait for a store that is away.
_MOST_UNWRITTEN = 10_000


@dataclass(frozen=True)
class Awaited:
    """What is waited for of an audit whose answers differ: which of them is right."""

    answers: tuple[str, ...]
    """(K + 1,) digests of the answers at each price, and of the full one."""
    until: float
    """Seconds since 1970 until when it is waited for."""
    places: tuple[str, ...] = ()
    """(K,) where each price's answer was forced, in tokens of the thought; "full" is not forced."""


@dataclass(frozen=True)
class Differing:
    """An audit whose answers differ."""

    request: str
    groups: tuple[str, ...]
    """That count it."""
    step: int
    """The strictest step whose answer is not the full one."""


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
    differing: tuple[Differing, ...] = ()
    """The newest audits whose answers differ, the newest first."""

    def after(self, entry: Entry) -> Books:
        """Returns the books after an entry."""
        event, books = entry.event, self
        if event is not None:
            books = replace(self, groups=self.groups.after(event))
            told = event.request if isinstance(event, Told | Expired) else ""
            under_way = self.groups.under_way.get(told)
            if under_way is not None and under_way.may_tell:
                books = books._told(told, entry, under_way.groups)
        return books._counted(entry.num_requests)

    def _told(self, request: str, entry: Entry, probabilities: Mapping[str, float]) -> Books:
        """Returns the books after an audit has told something, or nothing more is waited for."""
        others = {name: one for name, one in self.awaited.items() if name != request}
        before, audit = self.awaited.get(request), entry.audit
        if audit is None:
            return replace(self, awaited=others)
        if self.is_too_long(audit):
            return replace(self, num_too_long=self.num_too_long + 1)
        sums, differing = dict(self.sums), self.differing
        if before is None and not audit.agrees.all():
            step = int(audit.agrees.argmin()) + 1
            newest = Differing(request, tuple(probabilities), step)
            differing = (newest, *differing)[:_MOST_DIFFERING]
        for name, probability in probabilities.items():
            one = self.sum_of(name)
            if before is None:
                sums[name] = one.audit(audit, probability)
            else:
                sums[name] = one.label(before[0], audit, probability)
        if entry.awaited is not None:
            others[request] = audit, entry.awaited
        return replace(self, sums=sums, awaited=others, differing=differing)

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
            "differing": [asdict(one) for one in self.differing],
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
            differing = tuple(
                Differing(one["request"], tuple(one["groups"]), one["step"])
                for one in data.get("differing", ())  # older states have none
            )
            built = {"groups": groups, "sums": sums, "awaited": awaited, "differing": differing}
            return cls(**{**data, **built})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"books are not readable ({error!r})") from None


def _difference(found: Any, about: Mapping[str, Any]) -> str:
    """Says what books are about that others are not.

    Args:
        found: What they are about, as far as it can be read.
        about: What the others are about.
    """
    found = found if isinstance(found, dict) else {}
    was, promise = found.get("promise") or {}, about["promise"]
    told = ["another head"] if found.get("head") != about.get("head") else []
    for name, words in (("target", "a target of"), ("audit", "a share of audits of")):
        if was.get(name) != promise[name]:
            told.append(f"{words} {was.get(name)}, not {promise[name]}")
    return ", ".join(told) or "something else"


class Bookkeeper:
    """Keeps the books of one process in a store that others may use too. To be closed.

    Entries of all processes are in one order there, and each process takes in all of them, so that
    all have the same books. Where the store is away, a process goes on with its own.
    """

    def __init__(
        self,
        store: Store,
        begun: Books,
        about: Mapping[str, Any],
        watch: Callable[[Books], None] | None = None,
    ) -> None:
        """Opens or makes the store, and takes up the books where they are.

        Args:
            store: The store.
            begun: The books of who begins.
            about: What they are about, as a JSON object; books about anything else are refused.
            watch: Is shown the books as they are at first, and then once a second at least.

        Raises:
            InputError: If the store cannot be used, or is about something else.
        """
        self.process = uuid.uuid4().hex
        """The name of this process."""
        self.num_failed = 0
        """Entries that made no sense or could not be written at once."""
        self.trouble = ""
        """Why, the last time; empty if the store has everything."""
        self._about = {**about, "promise": asdict(begun.groups.promise)}
        self._ledger = Ledger(store)
        saved, self._number = self._ledger.load(self._state(begun))
        found = {} if saved is None else saved.get("about")
        if saved is None or found != self._about:
            raise InputError(
                f"the state is about {_difference(found, self._about)}: expected the same head, "
                "target and share of audits, or a state of its own"
            )
        self.books = self._common = Books.from_json(saved["books"])
        """The newest."""
        # Own entries that the store may not have, by name.
        self._unwritten: dict[str, Entry] = {}
        self._num_named, self._beats_at, self._tries_at = 0, -math.inf, -math.inf
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._watch = watch
        self._exchange()
        self._show()
        self._thread = threading.Thread(target=self._run, name="haltwise books", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Takes in an entry soon; those of this process are taken in in their order."""
        self._entries.put(entry)

    def close(self) -> None:
        """Takes in what waits, writes it, and leaves the store to the others."""
        self._entries.put(None)
        self._thread.join()
        self._ledger.close()

    def _run(self) -> None:
        """Takes in entries until there is a None, and meanwhile those of others."""
        goes_on = True
        while goes_on:
            with suppress(queue.Empty):
                entry = self._entries.get(timeout=_LOOKS)
                goes_on = entry is not None
                self._take(entry or Entry(Gone(self.process)))
            if not goes_on or time.monotonic() >= self._tries_at:
                self._written(self._exchange)
            self._show()
        self._written(lambda: self._ledger.forget([self.process]))
        self._written(self._save)

    def _take(self, entry: Entry) -> None:
        """Names an entry and takes it in ahead of others."""
        try:
            self.books = self.books.after(entry)
        except Exception as error:
            log.exception("an entry of the books makes no sense")
            self.num_failed, self.trouble = self.num_failed + 1, reason_of(error)
            return
        if len(self._unwritten) >= _MOST_UNWRITTEN:
            self._fail("the store is away for too long")
            return
        self._num_named += 1
        self._unwritten[f"{self.process} {self._num_named}"] = entry

    def _show(self) -> None:
        """Shows the books to who watches them, whose failure is not theirs."""
        if self._watch is not None:
            try:
                self._watch(self.books)
            except Exception:
                log.exception("who watches the books has failed")
                self.num_failed += 1

    def _written(self, write: Callable[[], None]) -> None:
        """Writes to the store, and counts it if that fails."""
        try:
            write()
            self.trouble = ""
        except Exception as error:
            self._fail(reason_of(error))

    def _fail(self, reason: str) -> None:
        self.num_failed, self.trouble = self.num_failed + 1, reason
        self._tries_at = time.monotonic() + _LOOKS
        log.warning("the books cannot be written: %s", reason)

    def _exchange(self) -> None:
        """Writes own entries, and takes in all that are new, those of dead processes too."""
        if self.trouble:
            self._save()  # the store may be another one than it was
        gone = self._gone()
        for process in gone:
            self._take(Entry(Gone(process)))
        entries = {name: entry.to_json() for name, entry in self._unwritten.items()}
        before = self._number
        try:
            found = self._ledger.exchange(entries, before)
        except MissedError:
            saved, self._number = self._ledger.load(self._state(self._common))
            self._common = Books.from_json(saved["books"]) if saved else self._common
            found = self._ledger.exchange(entries, self._number)
        for number, entry in found:
            self._common, self._number = _after(self._common, entry), number
        self._unwritten.clear()
        self.books = self._common
        if gone:
            self._ledger.forget(gone)
        if before // _SNAPSHOT < self._number // _SNAPSHOT:
            self._save()

    def _gone(self) -> list[str]:
        """Tells now and then that this process lives; returns those that do not any more."""
        now = time.monotonic()
        if now < self._beats_at:
            return []
        gone = self._ledger.beat(self.process, time.time(), _LIVES)
        self._beats_at = now + _BEATS
        return gone

    def _save(self) -> None:
        self._ledger.save(self._state(self._common), self._number)

    def _state(self, books: Books) -> dict[str, Any]:
        return {"about": self._about, "books": books.to_json()}


def _after(books: Books, entry: Mapping[str, Any]) -> Books:
    """Returns the books after an entry, which changes nothing if it makes no sense."""
    try:
        return books.after(Entry.from_json(entry))
    except Exception:
        log.exception("an entry of the books makes no sense")
        return books


def _audit_to_json(audit: Audit) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(audit).items()}


def _audit_from_json(data: Mapping[str, Any]) -> Audit:
    values: dict[str, Any] = {
        name: np.array(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return Audit(**values)


def _awaited_from_json(data: Mapping[str, Any]) -> Awaited:
    return Awaited(tuple(data["answers"]), data["until"], tuple(data.get("places", ())))
