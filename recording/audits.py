"""Audits of a head that serves: a copy to learn from, and what the state tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from haltwise import InputError
from haltwise.control.record import AuditedRow, audited_rows
from haltwise.control.status import read_library
from haltwise.control.store import store_of
from lms.scorers import scorer_of
from traces import import_json_lines

_SHARD_SIZE = 256


@dataclass(frozen=True)
class ServedAudits:
    """The audits of an installation. Nothing there is ever changed."""

    state: str
    """Where the books and the record are, see `haltwise.control.store.store_of`."""
    folder: Path
    """Where audits are kept as traces, while others are written."""

    def check_knows(self, digest: str, name: str) -> None:
        """Refuses a head that the state does not know: the audits are not its own.

        Args:
            digest: The head's.
            name: What a person knows it by.

        Raises:
            InputError: If it is so, or the state cannot be read.
        """
        library = read_library(self.state)
        if digest not in library.shelf:
            raise InputError(
                f"{name}: the state does not know head {digest[:12]}, expected the one that "
                f"serves, {library.champion[:12]}, or another one that is audited"
            )

    def copy(self, out: Path) -> int:
        """Copies the audits that are there now as traces into a new folder; returns their number.

        Raises:
            InputError: If there are none, or a line is wrong.
        """
        if not self.folder.is_dir():
            raise InputError(
                f"{self.folder}: no folder, expected the --audit-traces of haltwise serve"
            )
        return import_json_lines(self.folder, out, _SHARD_SIZE, scorer_of)

    def rows(self) -> dict[str, AuditedRow]:
        """Returns, by trace id, what the record has of audits; its rows may be deleted any time.

        Raises:
            InputError: If the state cannot be read.
        """
        return audited_rows(store_of(self.state))
