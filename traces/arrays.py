"""Traces as arrays: one entry a trace, or one entry a decision point.

In the shapes, N is the number of traces and P the number of their decision points together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise import InputError

_PER_TRACE = (
    "trace_id",
    "question_id",
    "task",
    "segment",
    "model",
    "split",
    "seed",
    "num_tokens",
    "finished",
    "final_correct",
    "labelled",
    "full_answer",
)
# A trace that is labelled has the digest that it had when all were.
_FACTS = tuple(name for name in _PER_TRACE if name not in ("labelled", "full_answer"))
_DIGESTED = ("position", "probe_tokens", "correct", "confidence", "answer", "worst_logprob")
# The entropy is left out of the digest: it follows from the same log probabilities as the worst.
_PER_POINT = (*_DIGESTED, "answer_entropy")


@dataclass(frozen=True, eq=False)
class Traces:
    """N traces with P decision points in all; the points of trace n are offsets[n]:offsets[n+1]."""

    trace_id: NDArray[np.str_]
    """(N,) the names of the traces, all different."""
    question_id: NDArray[np.str_]
    """(N,) the questions' names: a question is the unit of every split and every bootstrap."""
    task: NDArray[np.str_]
    """(N,) the tasks that the questions belong to."""
    segment: NDArray[np.str_]
    """(N,) the groups of the questions within their tasks, empty if unknown."""
    model: NDArray[np.str_]
    """(N,) the names of the LMs."""
    split: NDArray[np.str_]
    """(N,) the splits that the questions belong to."""
    seed: NDArray[np.int64]
    """(N,) the sampling seeds."""
    num_tokens: NDArray[np.int64]
    """(N,) the numbers of tokens generated when never halted."""
    finished: NDArray[np.bool_]
    """(N,) whether the LM ended by itself."""
    final_correct: NDArray[np.bool_]
    """(N,) the exact match when never halted; true where the trace is not labelled."""
    labelled: NDArray[np.bool_]
    """(N,) whether it is known what is right. Elsewhere an answer counts as right where it agrees
    with the LM's own full answer."""
    full_answer: NDArray[np.object_]
    """(N,) that answer as str, or its digest, where the trace is not labelled; empty elsewhere."""
    offsets: NDArray[np.int64]
    """(N + 1,) where the points of each trace begin, and P."""
    position: NDArray[np.int64]
    """(P,) the numbers of thinking tokens up to the points."""
    probe_tokens: NDArray[np.int64]
    """(P,) the numbers of tokens generated to force the answers."""
    correct: NDArray[np.bool_]
    """(P,) the exact match of the forced answers, or whether they agree with the full one."""
    confidence: NDArray[np.float32]
    """(P,) the LM's confidence in the forced answers; NaN if unknown."""
    answer: NDArray[np.object_]
    """(P,) the forced answers as str, or digests of them; empty if none could be read."""
    worst_logprob: NDArray[np.float32]
    """(P,) the smallest log probability of a token of the forced answer, nats; NaN if unknown."""
    answer_entropy: NDArray[np.float32]
    """(P,) the entropy of the forced answer a token, nats, as far as it is known: the least that a
    token of its probability can have, h(p) = -p log p - (1-p) log(1-p); NaN if unknown."""
    recorder: dict[str, Any]
    """How the traces were recorded; empty if the files do not tell."""
    signals: dict[str, NDArray[Any]] = field(default_factory=dict)
    """The optional signals by column name, NaN if unknown: float32 (P,), but "hidden" float16
    (P, D)."""

    def __len__(self) -> int:
        """Returns N, the number of traces."""
        return len(self.trace_id)

    @property
    def num_points(self) -> int:
        """P, the number of decision points of all traces together."""
        return len(self.position)

    @cached_property
    def trace_of_point(self) -> NDArray[np.int64]:
        """(P,) the index of the trace that each point belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @cached_property
    def hopeless(self) -> NDArray[np.bool_]:
        """(N,) whether no answer is ever right: no forced one, nor the LM's own."""
        found = np.bincount(self.trace_of_point[self.correct], minlength=len(self)) > 0
        return ~(found | self.final_correct)

    @cached_property
    def fingerprint(self) -> NDArray[np.uint64]:
        """(N, 4) the SHA-256 of each trace, of all that is kept of it but the recorder."""
        columns = {name: getattr(self, name) for name in _DIGESTED if name != "answer"}
        # What agrees follows from the answers, and may hang on who compares them.
        columns["correct"] = self.correct & self.labelled[self.trace_of_point]
        columns |= {name: self.signals[name] for name in sorted(self.signals)}
        kind = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
        points = np.empty(self.num_points, dtype=kind)
        for name, values in columns.items():
            points[name] = values
        facts = zip(*(getattr(self, name).tolist() for name in _FACTS), strict=True)
        known = zip(self.labelled.tolist(), self.full_answer.tolist(), strict=True)
        ends = self.offsets.tolist()
        digests = bytearray()
        for of, (labelled, full), start, stop in zip(
            facts, known, ends[:-1], ends[1:], strict=True
        ):
            all_of = of if labelled else (*of, full)
            texts = json.dumps([list(columns), all_of, self.answer[start:stop].tolist()])
            digests += hashlib.sha256(texts.encode() + points[start:stop].tobytes()).digest()
        return np.frombuffer(digests, "<u8").reshape(-1, 4)

    @property
    def target(self) -> str:
        """What counts as right, in a sentence; empty if it is the reference answers alone."""
        return target(int((~self.labelled).sum()), len(self))

    @property
    def digest(self) -> str:
        """The digest of all traces, but not of the recorder; order and shards do not change it."""
        return digest_of_fingerprints(self.fingerprint)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Traces:
        """Returns the traces in a mask (N,), or at indices in that order, with their points."""
        index = np.arange(len(self))[rows]
        lengths = np.diff(self.offsets)[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        points = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        fields = {name: getattr(self, name)[index] for name in _PER_TRACE}
        return replace(self, **fields).of_points(points, lengths)

    def of_points(self, points: NDArray[np.int64], lengths: NDArray[np.int64]) -> Traces:
        """Returns the traces with some of the points alone.

        Args:
            points: (K,) the indices of the points, those of the first trace first.
            lengths: (N,) how many of them each trace has.
        """
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        fields = {name: getattr(self, name)[points] for name in _PER_POINT}
        signals = {name: values[points] for name, values in self.signals.items()}
        return replace(self, offsets=offsets, signals=signals, **fields)

    def of_split(self, *names: str) -> Traces:
        """Returns the traces whose split is one of some names.

        Raises:
            InputError: If there is no such trace.
        """
        rows = np.isin(self.split, names)
        if not rows.any():
            found = ", ".join(repr(str(name)) for name in np.unique(self.split))
            raise InputError(f"no trace has split {' or '.join(map(repr, names))}: found {found}")
        return self.select(rows)


def target(num_unlabelled: int, num: int) -> str:
    """Says what counts as right in traces of which some have no reference answer; else nothing."""
    if not num_unlabelled:
        return ""
    some = f"{num_unlabelled:,} of {num:,} traces have no reference answer: there"
    return (
        f"{'No trace has a reference answer:' if num_unlabelled == num else some} an answer counts "
        "as right where it agrees with the LM's own full answer, which by that is never wrong; "
        "what is lost is at least the exact match lost."
    )


def concatenate(parts: Sequence[Traces]) -> Traces:
    """Returns all traces of some parts in order, with the recorder of the first part.

    Args:
        parts: At least one part; all have the same signals.
    """
    starts = np.cumsum([0, *(part.num_points for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (*_PER_TRACE, *_PER_POINT)
    }
    # A part without a point does not know the size of a hidden state.
    filled = [part for part in parts if part.num_points] or parts[:1]
    signals = {
        name: np.concatenate([part.signals[name] for part in filled]) for name in parts[0].signals
    }
    return replace(parts[0], offsets=np.concatenate([[0], *offsets]), signals=signals, **fields)


def digest_of_fingerprints(fingerprints: NDArray[np.uint64]) -> str:
    """Returns one digest of traces: the sums of the fingerprints' columns, modulo 2**64.

    A sum needs no order and can be taken a piece at a time. It tells that traces have changed; it
    is no proof against somebody who looks for other traces with the same sum.

    Args:
        fingerprints: `Traces.fingerprint` (N, 4).
    """
    total: NDArray[np.uint64] = fingerprints.sum(axis=0, dtype="<u8")
    return total.tobytes().hex()
