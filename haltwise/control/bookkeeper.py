"""Keeps the books of one process in a store that others may use too.

A thread of its own writes notes into the ledger and takes them in; whoever makes a note does not
wait, and reads the newest books without a lock. If the store cannot be written to, that is counted
and the books go on in memory; what the store has missed is written as soon as it can be.
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
from dataclasses import asdict
from typing import Any

from haltwise.control.books import Books, Entry
from haltwise.control.ledger import Ledger, MissedError
from haltwise.control.library import Library, Note
from haltwise.control.store import Store
from haltwise.errors import InputError, reason_of

log = logging.getLogger("haltwise.control")

# Seconds after which a process looks for notes of others, if it has none of its own, and after
# which it tries a store anew that has failed.
_LOOKS = 1.0
# Seconds after which a process tells that it lives, and after which it is taken for dead.
_BEATS, _LIVES = 5.0, 30.0
# Notes after which the whole state is written, so that a restart need not fold more.
_SNAPSHOT = 200
# Notes that may wait for a store that is away.
_MOST_UNWRITTEN = 10_000
# What a person is told of a promise that differs.
_PROMISED = {
    "target": "a target of",
    "audit": "a share of audits of",
    "rest": "a share of audits at rest of",
}
# Groups whose targets differ that are told of.
_MOST_TOLD = 3


def _difference(found: Any, about: Mapping[str, Any]) -> str:
    """Says what books are about that others are not.

    Args:
        found: What they are about, as far as it can be read.
        about: What the others are about.
    """
    found = found if isinstance(found, dict) else {}
    was, promise = found.get("promise") or {}, about["promise"]
    told = ["another head"] if found.get("head") != about.get("head") else []
    for name, words in _PROMISED.items():
        if was.get(name) != promise[name]:
            told.append(f"{words} {was.get(name)}, not {promise[name]}")
    had, has = found.get("targets") or {}, about.get("targets") or {}
    others = [name for name in sorted({*had, *has}) if had.get(name) != has.get(name)]
    for name in others[:_MOST_TOLD]:
        before, now = (one.get(name, "everything's") for one in (had, has))
        told.append(f"{name} with a target of {before}, not {now}")
    return ", ".join(told) or "something else"


class Bookkeeper:
    """Keeps the books of one process in a store that others may use too. To be closed.

    Notes of all processes are in one order there, and each process takes in all of them, so that
    all have the same books. Where the store is away, a process goes on with its own.
    """

    def __init__(
        self,
        store: Store,
        begun: Library,
        about: Mapping[str, Any],
        watch: Callable[[Library], None] | None = None,
    ) -> None:
        """Opens or makes the store, and takes up the books where they are.

        Args:
            store: The store.
            begun: The books of who begins, with one head.
            about: What they are about, as a JSON object; books about anything else are refused.
            watch: Is shown the books as they are at first, and then once a second at least.

        Raises:
            InputError: If the store cannot be used, or is about something else.
        """
        self.process = uuid.uuid4().hex
        """The name of this process."""
        self.num_failed = 0
        """Notes that made no sense or could not be written at once."""
        self.trouble = ""
        """Why, the last time; empty if the store has everything."""
        groups = begun.books.groups
        self._about = {**about, "promise": asdict(groups.promise)}
        self._about |= {"targets": groups.targets} if groups.targets else {}
        self._ledger = Ledger(store)
        saved, self._number = self._ledger.load(self._state(begun))
        found = {} if saved is None else saved.get("about")
        if saved is None or found != self._about:
            raise InputError(
                f"the state is about {_difference(found, self._about)}: expected the same head, "
                "targets and share of audits, or a state of its own"
            )
        self.library = self._common = Library.from_json(saved["books"])
        """The newest."""
        # Own notes that the store may not have, by name.
        self._unwritten: dict[str, Note] = {}
        self._num_named, self._beats_at, self._tries_at = 0, -math.inf, -math.inf
        self._notes: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
        self._watch = watch
        self._exchange()
        self._show()
        self._thread = threading.Thread(target=self._run, name="haltwise books", daemon=True)
        self._thread.start()

    @property
    def books(self) -> Books:
        """The newest of the champion."""
        return self.library.books

    def put(self, note: Note | Entry) -> None:
        """Takes in a note soon; those of this process are taken in in their order.

        Args:
            note: The note, or an entry of the champion's books.
        """
        if isinstance(note, Entry):
            note = Note({self.library.champion: note})
        self._notes.put(note)

    def close(self) -> None:
        """Takes in what waits, writes it, and leaves the store to the others."""
        self._notes.put(None)
        self._thread.join()
        self._ledger.close()

    def _run(self) -> None:
        """Takes in entries until there is a None, and meanwhile those of others."""
        goes_on = True
        while goes_on:
            with suppress(queue.Empty):
                note = self._notes.get(timeout=_LOOKS)
                goes_on = note is not None
                self._take(note or self.library.gone(self.process))
            if not goes_on or time.monotonic() >= self._tries_at:
                self._written(self._exchange)
            self._show()
        self._written(lambda: self._ledger.forget([self.process]))
        self._written(self._save)

    def _take(self, note: Note) -> None:
        """Names a note and takes it in ahead of others."""
        try:
            self.library = self.library.after(note)
        except Exception as error:
            log.exception("a note of the books makes no sense")
            self.num_failed, self.trouble = self.num_failed + 1, reason_of(error)
            return
        if len(self._unwritten) >= _MOST_UNWRITTEN:
            self._fail("the store is away for too long")
            return
        self._num_named += 1
        self._unwritten[f"{self.process} {self._num_named}"] = note

    def _show(self) -> None:
        """Shows the books to who watches them, whose failure is not theirs."""
        if self._watch is not None:
            try:
                self._watch(self.library)
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
        """Writes own notes, and takes in all that are new, those of dead processes too."""
        if self.trouble:
            self._save()  # the store may be another one than it was
        gone = self._gone()
        for process in gone:
            self._take(self.library.gone(process))
        notes = {name: note.to_json() for name, note in self._unwritten.items()}
        before = self._number
        try:
            found = self._ledger.exchange(notes, before)
        except MissedError:
            saved, self._number = self._ledger.load(self._state(self._common))
            self._common = Library.from_json(saved["books"]) if saved else self._common
            found = self._ledger.exchange(notes, self._number)
        for number, note in found:
            self._common, self._number = after(self._common, note), number
        self._unwritten.clear()
        self.library = self._common
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

    def _state(self, library: Library) -> dict[str, Any]:
        return {"about": self._about, "books": library.to_json()}


def after(library: Library, note: Mapping[str, Any]) -> Library:
    """Returns the books after a note in JSON, which changes nothing if it makes no sense."""
    try:
        return library.after(Note.from_json(note))
    except Exception:
        log.exception("a note of the books makes no sense")
        return library
