"""Sets recordings of the same questions side by side: of other LMs, quantisations or engines.

Each is told alone and halted by a head at the head's own price, and compared with the first one.
The intervals are paired by question: all recordings see the same resamples of the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from command import write_json
from evaluation.evaluate_run import Trained, judged
from evaluation.intervals import Resampled, Resamples, interval
from evaluation.outcome import Outcome, average, em_delta, halt_outcome, never_outcome, saving
from evaluation.rows import RecordingRow, to_json, without_intervals
from evaluation.table import format_recordings
from evaluation.verdict import side_by_side
from haltwise import InputError
from traces import Traces


@dataclass(frozen=True)
class Entrant:
    """A recording with the run whose head is to halt it."""

    path: Path
    trained: Trained


def compare_recordings(
    entrants: Sequence[Entrant], split: str, max_traces: int, json: Path | None
) -> list[RecordingRow]:
    """Compares recordings with the first, prints a table and the verdict, and writes a JSON file.

    Args:
        entrants: The recordings, the one to compare with first.
        split: Which of the traces to judge: train, dev, test, or all.
        max_traces: The most traces of the first to hold in memory; of more, a sample by question.
        json: The file to write; None writes none.

    Returns:
        A row for each recording.

    Raises:
        InputError: If traces cannot be used, do not fit their head, or are of other questions.
        OSError: If the file cannot be written.
    """
    found = _read(entrants, split, max_traces)
    rows = recording_rows(entrants, found)
    if found[0].target:
        print(found[0].target)
    print(format_recordings(rows))
    if json is not None:
        write_json(json, {"split": split, "recordings": to_json(rows)})
    print(f"\n{side_by_side(rows)}")
    return rows


def _read(entrants: Sequence[Entrant], split: str, max_traces: int) -> list[Traces]:
    """Reads the traces of all entrants, of the same questions.

    Raises:
        InputError: If they cannot be read, or the questions differ.
    """
    files = [entrant.trained.open_traces(entrant.path) for entrant in entrants]
    rows = [each.rows(*([] if split == "all" else [split])) for each in files]
    expected = files[0].question_ids(rows[0])
    for entrant, each, of_split in zip(entrants[1:], files[1:], rows[1:], strict=True):
        found = each.question_ids(of_split)
        _check_questions(entrant.path, found, entrants[0].path, expected)
    sample = files[0].question[files[0].sample(rows[0], max_traces)]
    return [
        each.read(of_split & np.isin(each.question, sample))
        for each, of_split in zip(files, rows, strict=True)
    ]


def _check_questions(
    path: Path, found: frozenset[str], first: Path, expected: frozenset[str]
) -> None:
    """Refuses recordings of other questions.

    Raises:
        InputError: If one has a question that the other has not.
    """
    if found != expected:
        example = min(found ^ expected)
        raise InputError(
            f"{path}: {len(found - expected)} of its {len(found)} questions are not in {first}, "
            f"which has {len(expected - found)} others, such as {example!r}: expected recordings "
            "of the same questions"
        )


def recording_rows(entrants: Sequence[Entrant], recordings: Sequence[Traces]) -> list[RecordingRow]:
    """Makes a row for each recording.

    Args:
        entrants: The recordings' runs, the recording to compare with first.
        recordings: Their traces, all of the same questions.
    """
    drawn = Resamples.draw(recordings[0].question_id)
    found = [_Found.of(*pair, drawn) for pair in zip(entrants, recordings, strict=True)]
    rows = [_row(each, found[0]) for each in found]
    return rows if drawn.num_questions > 1 else [without_intervals(row) for row in rows]


@dataclass(frozen=True, eq=False)
class _Found:
    """What a recording comes to, on its questions and in each of R resamples of them."""

    entrant: Entrant
    traces: Traces
    halted: Outcome
    em: NDArray[np.float64]
    """(R,) the EM of never halting."""
    halted_em: NDArray[np.float64]
    """(R,) the EM when the head halts."""
    resampled: Resampled
    """How that changes when the head halts, and what it saves."""

    @classmethod
    def of(cls, entrant: Entrant, traces: Traces, drawn: Resamples) -> _Found:
        """Halts the traces of a recording, whose questions are those that were drawn."""
        # Another recording may have the questions in another order, or more answers to one.
        _, question = np.unique(traces.question_id, return_inverse=True)
        resamples = replace(drawn, question=question)
        halted = _halted(entrant.trained, traces)
        num, *right = resamples.sums([np.ones(len(traces)), traces.final_correct, halted.em])
        em, halted_em = (each / num for each in right)
        return cls(entrant, traces, halted, em, halted_em, resamples.of(traces, [halted])[0])


def _halted(trained: Trained, traces: Traces) -> Outcome:
    """Returns what a run's head comes to at its own price; at 0 it neither halts nor looks."""
    price, probing = trained.head.config.default_price, trained.head.config.halting.probing
    if not price:
        return never_outcome(traces)
    return average(
        [
            halt_outcome(traces, judge.halts(judge.signal(traces), price), probing)
            for judge in trained.judges(traces)
        ]
    )


def _row(found: _Found, first: _Found) -> RecordingRow:
    """Makes the row of a recording, beside the first one."""
    traces, halted, trained = found.traces, found.halted, found.entrant.trained
    em, first_em = traces.final_correct.mean(), first.traces.final_correct.mean()
    own, of_first = found.resampled, first.resampled
    saved = saving(traces, halted)
    return RecordingRow(
        traces=str(found.entrant.path),
        lm=", ".join(np.unique(traces.model).tolist()),
        head=str(trained.run.folder),
        price=trained.head.config.default_price,
        evidence=judged(traces, trained)[1],
        num_questions=len(np.unique(traces.question_id)),
        num_traces=len(traces),
        em=float(em),
        em_lead=float(em - first_em),
        em_lead_interval=interval(found.em - first.em),
        tokens=float(traces.num_tokens.mean()),
        halted_em=float(halted.em.mean()),
        halted_em_lead=float(halted.em.mean() - first.halted.em.mean()),
        halted_em_lead_interval=interval(found.halted_em - first.halted_em),
        em_delta=em_delta(traces, halted),
        em_delta_interval=interval(own.em_delta),
        saving=saved,
        saving_interval=interval(own.saving),
        saving_lead=saved - saving(first.traces, first.halted),
        saving_lead_interval=interval(own.saving - of_first.saving),
    )
