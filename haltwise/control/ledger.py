"""The entries of the books in a store, in one order that all processes see.

Every process writes its own entries and reads everybody's, so that all come to the same books.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from haltwise.control.record import TABLES
from haltwise.control.store import Connection, Store, Transactions
from haltwise.errors import InputError

Json = dict[str, Any]
# Entries that are kept behind the newest state, for who comes late or wants to know why.
_KEPT = 50_000


class MissedError(InputError):
    """Whoever has been away for so long has to begin with the newest state."""


class Ledger:
    """The entries and the newest state of the books in a store. To be closed.

    Args:
        store: Where they are.

    Raises:
        InputError: If it cannot be used, is another program's or of another version.
    """

    def __init__(self, store: Store) -> None:
        """Opens the store, or makes its tables."""
        self._transactions = Transactions(store, TABLES)

    def close(self) -> None:
        """Closes the store."""
        self._transactions.close()

    def load(self, begun: Mapping[str, Any] | None = None) -> tuple[Json | None, int]:
        """Returns the newest state or None, and the number of the last entry that is in it.

        Args:
            begun: The state if there is none yet, which it is from now on.

        Raises:
            InputError: If the store cannot be used.
        """

        def read(opened: Connection) -> tuple[Json | None, int]:
            found = opened.execute("SELECT number, state FROM snapshot")
            if not found and begun is not None:
                found = [(0, json.dumps(begun))]
                opened.execute("INSERT INTO snapshot VALUES (?, ?)", *found[0])
            return (json.loads(found[0][1]), found[0][0]) if found else (None, 0)

        return self._transactions.run(read)

    def exchange(
        self, entries: Mapping[str, Mapping[str, Any]], known: int
    ) -> list[tuple[int, Json]]:
        """Writes entries, and returns all that there are behind a known one, with their numbers.

        Args:
            entries: By name; one that is there already, behind the known one, is not written again.
            known: The number of the last entry that is known.

        Raises:
            InputError: If the store cannot be used; then nothing is written, or nobody knows.
            MissedError: If entries behind the known one are kept no more.
        """

        def write(opened: Connection) -> list[tuple[int, Json]]:
            if not opened.execute("SELECT number FROM snapshot"):
                raise InputError(f"{opened.name}: the books are not there any more")
            oldest = opened.execute("SELECT min(number) FROM event")[0][0]
            if oldest is not None and oldest > known + 1:
                raise MissedError(f"{opened.name}: entries of the books were missed")
            newer = "SELECT number, name, entry FROM event WHERE number > ? ORDER BY number"
            found = opened.execute(newer, known)
            written, last = {name for _, name, _ in found}, found[-1][0] if found else known
            for name, entry in entries.items():
                if name not in written:
                    last += 1
                    found.append((last, name, json.dumps(entry)))
                    opened.execute("INSERT INTO event VALUES (?, ?, ?)", *found[-1])
            return [(number, json.loads(entry)) for number, _, entry in found]

        return self._transactions.run(write)

    def save(self, state: Mapping[str, Any], number: int) -> None:
        """Writes a state, unless there is a newer one, and deletes entries from long before.

        Args:
            state: As a JSON object.
            number: Of the last entry that is in it.

        Raises:
            InputError: If the store cannot be used.
        """

        def write(opened: Connection) -> None:
            found = opened.execute("SELECT number FROM snapshot")
            if not found or found[0][0] < number:
                opened.execute("DELETE FROM snapshot")
                opened.execute("INSERT INTO snapshot VALUES (?, ?)", number, json.dumps(state))
                opened.execute("DELETE FROM event WHERE number <= ?", number - _KEPT)

        self._transactions.run(write)

    def beat(self, process: str, now: float, seconds: float) -> list[str]:
        """Tells that a process lives, and returns those that have not told so for too long.

        One that claims to live longer than it could if it told so now has a clock that has jumped.

        Args:
            process: The name of the process, which nobody else has.
            now: Seconds, by a clock that all share.
            seconds: For how long it is to be taken for alive.

        Raises:
            InputError: If the store cannot be used.
        """

        def write(opened: Connection) -> list[str]:
            opened.execute("DELETE FROM process WHERE id = ?", process)
            others = opened.execute("SELECT id, until FROM process")
            opened.execute("INSERT INTO process VALUES (?, ?)", process, now + seconds)
            return [name for name, until in others if not now <= until <= now + seconds]

        return self._transactions.run(write)

    def forget(self, processes: Sequence[str]) -> None:
        """Forgets processes, whose audits have been broken off.

        Raises:
            InputError: If the store cannot be used.
        """

        def write(opened: Connection) -> None:
            for name in processes:
                opened.execute("DELETE FROM process WHERE id = ?", name)

        self._transactions.run(write)
