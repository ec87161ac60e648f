"""Draws by key: whether a request is audited, before anything is known of it.

A draw is a number in [0, 1) that follows from a secret key and the request's id, which the server
gives. So it is the same wherever and whenever it is made, and clients can neither choose nor tell
it before. A group counts a request as its audit if the number is below the group's own rate. So one
that smells smoke looks closer at its own requests, while the audits of the other groups that they
are in are drawn as if it did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from haltwise.errors import InputError

#: What is drawn: whether a request is audited; whether an audit is dense, with an answer at every
#: decision point; whether a question is kept back from training; which of two prices is served;
#: which of two heads serves. Draws of two purposes have nothing to do with each other.
Purpose = Literal["audit", "dense", "split", "price", "arm"]
# Bytes of a key that nobody guesses.
_FEWEST_BYTES = 16


def draw(key: bytes, request: str, purpose: Purpose = "audit") -> float:
    """Returns a number in [0, 1) that only who has the key can tell.

    Raises:
        InputError: If the key is shorter than 16 bytes or longer than 64.
    """
    check_key(key)
    digest = blake2b(request.encode(), key=key, digest_size=8, person=purpose.encode()).digest()
    # The 53 bits that a float can hold, so that no number is rounded to 1.
    return (int.from_bytes(digest) >> 11) / 2**53


def check_key(key: bytes) -> None:
    """Refuses a key that is none.

    Raises:
        InputError: If it is shorter than 16 bytes or longer than 64.
    """
    if not _FEWEST_BYTES <= len(key) <= blake2b.MAX_KEY_SIZE:
        raise InputError(
            f"the key has {len(key)} bytes, expected {_FEWEST_BYTES} to {blake2b.MAX_KEY_SIZE}"
        )


@dataclass(frozen=True)
class AuditDraw:
    """What was drawn for one request."""

    probability: float
    """With which it is audited at all, known before the draw."""
    audited: bool
    """Whether it is."""
    groups: Mapping[str, float]
    """By group that counts it as an audit, the probability that the group would."""


def draw_audit(key: bytes, request: str, rates: Mapping[str, float]) -> AuditDraw:
    """Draws whether a request is audited.

    Args:
        key: Of the installation.
        request: The request's id, given by the server.
        rates: By group that it is in, the share of requests that the group audits.

    Raises:
        InputError: If the key is none.
    """
    number = draw(key, request)
    counting = {group: rate for group, rate in rates.items() if number < rate}
    return AuditDraw(max(rates.values(), default=0.0), bool(counting), counting)
