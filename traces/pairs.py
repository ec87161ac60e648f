"""Pairs of traces: what two LMs make of the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from haltwise import InputError
from haltwise.policy.question import Question
from traces.arrays import Traces
from traces.stream import MAX_TRACES, Scorer, TraceFiles, same_reading


@dataclass(frozen=True, eq=False)
class Pairs:
    """N traces of a small LM, each with one of a large LM for the same question."""

    small: Traces
    """N traces."""
    large: Traces
    """N traces in the same order; one may be there more than once."""
    questions: tuple[Question, ...]
    """(N,) what is known of the questions before the first token."""

    def __len__(self) -> int:
        """Returns N, the number of pairs."""
        return len(self.small)

    def select(self, rows: NDArray[np.bool_]) -> Pairs:
        """Returns the pairs in a mask (N,)."""
        of = tuple(self.questions[n] for n in np.flatnonzero(rows))
        return Pairs(self.small.select(rows), self.large.select(rows), of)


def pair_up(small: Traces, large: Traces, text_of: Mapping[str, str] | None = None) -> Pairs:
    """Pairs the traces of a small LM with those of a large one, by question.

    Where a question was answered several times, the first answers are paired, the second ones, and
    so on, by their seeds; a large LM that has fewer answers begins again with its first.

    Args:
        small: Traces of the small LM; those of questions that the large one lacks are left out.
        large: Traces of the large LM.
        text_of: By trace id of the small LM, the text of its question, as far as it is known.

    Raises:
        InputError: If an LM is on both sides, or they have no question in common.
    """
    both = sorted(set(small.model.tolist()) & set(large.model.tolist()))
    if both:
        raise InputError(f"{', '.join(both)} is on both sides, expected traces of two LMs")
    of_question: dict[str, list[int]] = {}
    for n in np.lexsort([large.seed, large.question_id]).tolist():
        of_question.setdefault(str(large.question_id[n]), []).append(n)
    taken: dict[str, int] = {}
    rows, others = [], []
    for n in np.lexsort([small.seed, small.question_id]).tolist():
        question = str(small.question_id[n])
        if found := of_question.get(question):
            others.append(found[taken.get(question, 0) % len(found)])
            taken[question] = taken.get(question, 0) + 1
            rows.append(n)
    if not rows:
        raise InputError(
            f"no question in common: found {len(np.unique(small.question_id))} of the small LM and "
            f"{len(of_question)} others of the large one, expected recordings of the same questions"
        )
    small, large = small.select(np.array(rows)), large.select(np.array(others))
    texts = [(text_of or {}).get(name, "") for name in small.trace_id.tolist()]
    known = zip(texts, small.task.tolist(), small.segment.tolist(), strict=True)
    return Pairs(small, large, tuple(Question(*of) for of in known))


def read_pairs(
    small: Path,
    large: Path,
    small_model: str | None = None,
    large_model: str | None = None,
    scorer: Scorer = same_reading,
) -> Pairs:
    """Reads the traces of two LMs on the same questions, as many as fit into memory.

    Questions with the same text count as one.

    Args:
        small: File or folder with the small LM's traces.
        large: Likewise the large LM's.
        small_model: The LM to take from the small one's files; None takes all traces.
        large_model: Likewise from the large one's.
        scorer: Says which answers agree where nobody knows what is right.

    Raises:
        InputError: If traces cannot be read or be paired, see `pair_up`.
    """
    files = TraceFiles.open(small, scorer)
    traces = _of_model(_read(files), small_model, small)
    others = _of_model(_read(TraceFiles.open(large, scorer)), large_model, large)
    words = files.words(traces.trace_id.tolist())
    pairs = pair_up(traces, others, {name: of.question for name, of in words.items()})
    return replace(pairs, small=files.one_id_a_text(pairs.small))


def _read(files: TraceFiles) -> Traces:
    """Reads the traces of at most so many questions as fit into memory."""
    return files.read(files.sample(files.rows(), MAX_TRACES))


def _of_model(traces: Traces, model: str | None, path: Path) -> Traces:
    """Returns the traces of an LM, or all of them if it is not named.

    Raises:
        InputError: If there are none of it.
    """
    if model is None:
        return traces
    rows = traces.model == model
    if not rows.any():
        found = ", ".join(np.unique(traces.model).tolist())
        raise InputError(f"{path}: no trace of {model!r}, found those of {found}")
    return traces.select(rows)
