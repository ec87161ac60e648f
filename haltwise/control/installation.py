"""The key of an installation, by which audits are drawn and digests are made."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from haltwise.control.draws import check_key, draw
from haltwise.control.record import digest
from haltwise.errors import InputError

log = logging.getLogger("haltwise.control")

# Of the questions, as many are learned from as are kept back.
_KEPT_BACK = 0.5


def key_file_of(state: str | Path) -> Path:
    """Returns the file of the installation's key that lies beside the file of a state."""
    return Path(f"{state}.key")


def installation_key(path: Path) -> bytes:
    """Returns the key in a file, which is made if it is not there.

    Raises:
        InputError: If it cannot be read or made, or is none.
    """
    try:
        if not path.exists():
            with NamedTemporaryFile(dir=path.parent) as file:  # which only its owner can read
                file.write(os.urandom(32))
                file.flush()
                with suppress(FileExistsError):  # another process was faster
                    os.link(file.name, path)
        key = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected to write there") from None
    check_key(key)
    return key


def tell_if_readable(path: Path) -> None:
    """Warns if a file with keys can be read by whoever has an account on this machine."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o004:
        log.warning(
            "%s holds keys and can be read by everybody (mode %o), expected 600", path, mode
        )


def name_of(key: bytes) -> str:
    """Returns what tells an installation from others, which does not tell its key."""
    return digest(key, "installation")


def question_id_of(key: bytes, question: str) -> str:
    """Returns the name of a question: the same whenever it comes again, and for nobody to read."""
    return digest(key, question)


def is_kept_back(key: bytes, question_id: str) -> bool:
    """Returns whether nothing is ever learned from a question, by a draw that never changes."""
    return draw(key, question_id, "split") < _KEPT_BACK
