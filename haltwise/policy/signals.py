"""Signals: the raw numbers seen at a decision point."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Signals:
    """What is seen at one decision point by each of B rows; None is what nobody looked at.

    All but the answer's key and `points_left` are (B,) numbers under their column's name in the
    trace schema, NaN where unknown; `hidden` is (B, D). "Since" is since the previous point, or
    the start.
    """

    position: Index
    """Thinking tokens so far."""
    confidence: Float | None = None
    """Of the forced answer, in [0, 1]."""
    answer: Index | None = None
    """Keys of the forced answers, see `answer_keys`; 0 for no answer."""
    worst_logprob: Float | None = None
    """Smallest log probability of a token of the forced answer, nats; NaN if it has none."""
    probe_tokens: Index | None = None
    """Tokens generated to force the answer."""
    entropy: Float | None = None
    """Mean entropy of the next-token distribution since, nats."""
    max_entropy: Float | None = None
    """Largest entropy since, nats."""
    logprob: Float | None = None
    """Mean log probability of the generated tokens since, nats."""
    min_logprob: Float | None = None
    """Smallest log probability of a generated token since, nats."""
    margin: Float | None = None
    """Mean difference of the two largest probabilities since."""
    end_think_logprob: Float | None = None
    """Log probability of the end-of-thinking token at the point, nats."""
    num_reflections: Float | None = None
    """Reflection words since."""
    hidden: Float | None = None
    """(B, D) last-layer state at the point."""
    points_left: Index | None = None
    """Decision points that the decision rule allows after this one."""


def answer_keys(answers: Sequence[str]) -> Index:
    """Keys (B,) that are equal exactly when the answers are; 0 for an empty answer.

    Two different answers share a key with probability 2**-63.
    """
    keys = {text: _answer_key(text) for text in set(answers)}
    return np.array([keys[text] for text in answers], dtype=np.int64)


def _answer_key(text: str) -> int:
    if not text:
        return 0
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True) or 1
