"""Prices by segment: kinds of questions that lose most get a price of their own.

One price for all questions is paid by the hardest of them. Each segment by itself has too few to
choose on, so that its loss is drawn towards that of all, the more the fewer its questions are and
the less segments differ beyond chance (empirical Bayes; the spread between segments is the estimate
of DerSimonian and Laird, Controlled Clinical Trials 7, 1986).

Shapes: N traces, Q questions, S segments.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import interval, resample
from evaluation.outcome import Outcome, em_delta, saving
from evaluation.rows import SegmentRow
from traces import Traces

Float = NDArray[np.float64]
#: By segment, its price; None never halts.
SegmentPoints = dict[str, float | None]

# With fewer questions, a segment has the price of all.
_FEWEST_QUESTIONS = 20
# What a segment is seen to lose is never more than this above the gate, whatever all others lose.
_MOST_ABOVE = 0.01
_ROUNDING = 1e-12


def segment_of(traces: Traces) -> NDArray[np.str_]:
    """Returns the segment (N,) of each trace, which is its task where none is named."""
    named: NDArray[np.str_] = np.where(traces.segment != "", traces.segment, traces.task)
    return named


def segment_points(traces: Traces, outcomes: Mapping[float, Outcome], gate: float) -> SegmentPoints:
    """Chooses for each segment the parameter with the largest saving within the gate.

    Within it is a parameter at which the segment's loss of mean EM, drawn towards that of all, is
    at most the gate, and the loss itself at most a point above it.

    Args:
        traces: N traces to choose on.
        outcomes: By parameter, the outcomes on those traces.
        gate: How much mean EM may be lost, in [0, 1].

    Returns:
        By segment of 20 questions or more, the parameter; empty if there are no two of them.
    """
    segments = _Segments.of(traces)
    if len(segments.names) < 2:
        return {}
    chosen: SegmentPoints = dict.fromkeys(segments.names)
    best = dict.fromkeys(segments.names, 0.0)
    for parameter, outcome in outcomes.items():
        seen, drawn = segments.losses(traces, outcome)
        within = (drawn <= gate + _ROUNDING) & (seen <= gate + _MOST_ABOVE + _ROUNDING)
        for name, fits in zip(segments.names, within, strict=True):
            rows = segments.rows[name]
            saved = saving(traces.select(rows), outcome.select(rows)) if fits else 0.0
            if saved > best[name]:
                chosen[name], best[name] = parameter, saved
    return chosen


def outcome_by_segment(
    traces: Traces,
    outcomes: Mapping[float | None, Outcome],
    points: SegmentPoints,
    otherwise: float | None,
) -> Outcome:
    """Returns the outcome (N,) where each segment has its own parameter.

    Args:
        traces: N traces.
        outcomes: By parameter, the outcomes on those traces; None is never halting.
        points: By segment, its parameter.
        otherwise: The parameter of all other traces.
    """
    segment = segment_of(traces)
    of_all = outcomes[otherwise]
    em, cost, halted = (
        np.array(column, dtype=np.float64) for column in (of_all.em, of_all.cost, of_all.halted)
    )
    for name, parameter in points.items():
        rows, own = segment == name, outcomes[parameter]
        em[rows], cost[rows], halted[rows] = own.em[rows], own.cost[rows], own.halted[rows]
    return Outcome(em, cost, halted)


def segment_rows(
    traces: Traces,
    outcomes: Mapping[float | None, Outcome],
    gate: float,
    points: SegmentPoints,
    of_all: float,
) -> list[SegmentRow]:
    """Makes a row for each segment, and one for all questions together.

    Args:
        traces: N traces.
        outcomes: By parameter, the outcomes on those traces; None is never halting.
        gate: The gate that the parameters were chosen under.
        points: By segment, its parameter.
        of_all: The parameter of all questions.
    """
    own = outcome_by_segment(traces, outcomes, points, of_all)
    segment, everything = segment_of(traces), np.ones(len(traces), dtype=bool)
    rows = []
    for name in ("", *points):
        members = segment == name if name else everything
        part = traces.select(members)
        both = {"all": outcomes[of_all].select(members), "own": own.select(members)}
        resampled = resample(part, both)
        rows.append(
            SegmentRow(
                segment=name,
                gate=gate,
                num_questions=len(np.unique(part.question_id)),
                price_of_all=of_all,
                em_delta_of_all=em_delta(part, both["all"]),
                em_delta_of_all_interval=interval(resampled["all"].em_delta),
                saving_of_all=saving(part, both["all"]),
                price=points.get(name),
                em_delta=em_delta(part, both["own"]),
                em_delta_interval=interval(resampled["own"].em_delta),
                saving=saving(part, both["own"]),
            )
        )
    return rows


class _Segments:
    """The segments of N traces that have enough questions."""

    def __init__(self, names: list[str], rows: dict[str, NDArray[np.bool_]]) -> None:
        """Takes the names (S,) and by name which traces (N,) are of it."""
        self.names, self.rows = names, rows

    @classmethod
    def of(cls, traces: Traces) -> _Segments:
        """Finds the segments with enough questions."""
        segment = segment_of(traces)
        rows = {name: segment == name for name in np.unique(segment).tolist()}
        names = [
            name
            for name, of in rows.items()
            if len(np.unique(traces.question_id[of])) >= _FEWEST_QUESTIONS
        ]
        return cls(names, rows)

    def losses(self, traces: Traces, outcome: Outcome) -> tuple[Float, Float]:
        """Returns each segment's mean loss of EM (S,) as it is seen, and drawn towards that of all.

        A question counts once, by the mean of its traces.
        """
        lost: Float = traces.final_correct - outcome.em.astype(np.float64)
        each = [_by_question(traces.question_id[rows], lost[rows]) for rows in self._members()]
        sizes = np.array([len(of) for of in each])
        seen = np.array([of.mean() for of in each])
        within = sum(float(((of - of.mean()) ** 2).sum()) for of in each)
        noise = within / (sizes.sum() - len(sizes)) / sizes
        everything = float(np.concatenate(each).mean())
        between = _spread_between(seen, noise)
        share = np.divide(between, between + noise, out=np.ones_like(seen), where=noise > 0)
        return seen, everything + share * (seen - everything)

    def _members(self) -> list[NDArray[np.bool_]]:
        return [self.rows[name] for name in self.names]


def _by_question(question_id: NDArray[np.str_], values: Float) -> Float:
    """Returns the mean (Q,) of values (N,) over the traces of each question."""
    _, question = np.unique(question_id, return_inverse=True)
    means: Float = np.bincount(question, values) / np.bincount(question)
    return means


def _spread_between(means: Float, noise: Float) -> float:
    """Returns the variance between segments beyond chance, of their means and those' variances."""
    if (noise <= 0).any():
        return 0.0
    weight = 1 / noise
    total = weight.sum()
    centre = (weight * means).sum() / total
    excess = (weight * (means - centre) ** 2).sum() - (len(means) - 1)
    return max(0.0, float(excess / (total - (weight**2).sum() / total)))
