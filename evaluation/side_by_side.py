"""Sets recordings of the same questions side by side: of other LMs, quantisations or engines.

Each is told alone and halted by a head at the head's own price, and compared with the first one.
The intervals are paired by question: all recordings see the same resamples of the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from command import write_json
from evaluation.evaluate_run import Trained, judged
from evaluation.intervals import Float, Resampled, Resamples, interval, intervals
from evaluation.outcome import Outcome, average, em_delta, halt_outcome, never_outcome, saving
from evaluation.plot import plot_recordings
from evaluation.rows import PricePoint, RecordingRow, to_json, without_intervals
from evaluation.table import format_recordings
from evaluation.verdict import side_by_side
from haltwise import InputError
from policies.head import price_grid
from traces import Traces


@dataclass(frozen=True)
class Entrant:
    """A recording with the run whose head is to halt it."""

    path: Path
    trained: Trained


def compare_recordings(
    entrants: Sequence[Entrant],
    split: str,
    max_traces: int,
    json: Path | None,
    plot: Path | None,
) -> list[RecordingRow]:
    """Compares recordings with the first, prints a table and the verdict, and writes files.

    Args:
        entrants: The recordings, the one to compare with first.
        split: Which of the traces to judge: train, dev, test, or all.
        max_traces: The most traces of the first to hold in memory; of more, a sample by question.
        json: The JSON file to write; None writes none.
        plot: The PNG file to draw exact match against tokens into; None draws none.

    Returns:
        A row for each recording.

    Raises:
        InputError: If traces cannot be used, do not fit their head, or are of other questions.
        OSError: If a file cannot be written.
    """
    found = _read(entrants, split, max_traces)
    rows = recording_rows(entrants, found)
    if found[0].target:
        print(found[0].target)
    print(format_recordings(rows))
    if json is not None:
        write_json(json, {"split": split, "recordings": to_json(rows)})
    if plot is not None:
        plot_recordings(rows, plot)
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
    judged = [
        each.question[entrant.trained.judged_rows(each, split)]
        for entrant, each in zip(entrants, files, strict=True)
    ]
    left = rows[0] & np.isin(files[0].question, reduce(np.intersect1d, judged))
    if not left.any():
        raise InputError("some head learned from each of the questions: expected others")
    sample = files[0].question[files[0].sample(left, max_traces)]
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
    prices: list[float]
    """K prices, the head's own first."""
    outcomes: list[Outcome]
    """What the head comes to at each of them."""
    em: Float
    """(K + 1, R) the EM at each of them; last that of never halting."""
    tokens: Float
    """(K + 1, R) the tokens, likewise."""
    resampled: Resampled
    """How EM changes when the head halts at its own price, and what it saves."""

    @classmethod
    def of(cls, entrant: Entrant, traces: Traces, drawn: Resamples) -> _Found:
        """Halts the traces of a recording, whose questions are those that were drawn."""
        # Another recording may have the questions in another order, or more answers to one.
        _, question = np.unique(traces.question_id, return_inverse=True)
        resamples = replace(drawn, question=question)
        own = entrant.trained.head.config.default_price
        prices = [own, *price_grid(entrant.trained.head.config.observing)]
        outcomes = _halted(entrant.trained, traces, prices)
        each = [*outcomes, never_outcome(traces)]
        columns = [np.ones(len(traces)), *(one.em for one in each), *(one.cost for one in each)]
        num, *sums = resamples.sums(columns)
        em, tokens = np.split(np.array(sums) / num, 2)
        return cls(
            entrant, traces, prices, outcomes, em, tokens, resamples.of(traces, outcomes[:1])[0]
        )

    def points(self) -> tuple[PricePoint, ...]:
        """Returns what the recording comes to at each price."""
        ends = zip(intervals(self.em), intervals(self.tokens), strict=True)
        return tuple(
            PricePoint(price, float(one.em.mean()), em, float(one.cost.mean()), tokens)
            for price, one, (em, tokens) in zip(self.prices, self.outcomes, ends, strict=False)
        )


def _halted(trained: Trained, traces: Traces, prices: Sequence[float]) -> list[Outcome]:
    """Returns what a run's head comes to at each price; at 0 it neither halts nor looks."""
    probing = trained.head.config.halting.probing
    judges = [(judge, judge.signal(traces)) for judge in trained.judges(traces)]
    return [
        average(
            [halt_outcome(traces, judge.halts(signal, price), probing) for judge, signal in judges]
        )
        if price
        else never_outcome(traces)
        for price in prices
    ]


def _row(found: _Found, first: _Found) -> RecordingRow:
    """Makes the row of a recording, beside the first one."""
    traces, halted, trained = found.traces, found.outcomes[0], found.entrant.trained
    em, first_em = traces.final_correct.mean(), first.traces.final_correct.mean()
    tokens, first_tokens = traces.num_tokens.mean(), first.traces.num_tokens.mean()
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
        em_interval=interval(found.em[-1]),
        em_lead=float(em - first_em),
        em_lead_interval=interval(found.em[-1] - first.em[-1]),
        tokens=float(tokens),
        tokens_interval=interval(found.tokens[-1]),
        tokens_lead=float(tokens - first_tokens),
        tokens_lead_interval=interval(found.tokens[-1] - first.tokens[-1]),
        halted_em=float(halted.em.mean()),
        halted_em_lead=float(halted.em.mean() - first.outcomes[0].em.mean()),
        halted_em_lead_interval=interval(found.em[0] - first.em[0]),
        em_delta=em_delta(traces, halted),
        em_delta_interval=interval(own.em_delta),
        saving=saved,
        saving_interval=interval(own.saving),
        saving_lead=saved - saving(first.traces, first.outcomes[0]),
        saving_lead_interval=interval(own.saving - of_first.saving),
        sweep=found.points(),
    )
