"""Rows by group: segments, tasks and LMs, each on its own questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evaluation.frozen import head_leads
from evaluation.intervals import interval, resample
from evaluation.outcome import Outcome, Row, em_delta, saving
from traces import Traces

_COLUMNS = ("segment", "task", "model")


def group_rows(
    traces: Traces, outcomes: Mapping[str, Outcome], gate: float, num_resamples: int = 10_000
) -> list[Row]:
    """A row for each group and policy, of every column by which the traces differ.

    Each interval is at 95 % by itself: of twenty groups, one misses its truth.

    Args:
        traces: N traces; those of an unknown (empty) segment are in no row of a segment.
        outcomes: By policy at one gate, on those traces, "head" among them.
        gate: What the operating points were chosen under.
        num_resamples: Of the questions of a group.

    Returns:
        Rows with the keys by, group, gate, policy, num_questions, num_traces, em, em_never,
        em_delta, saving, head_em_lead, head_saving_lead, and the intervals of the last four, None
        for a group with a single question.
    """
    traces = replace(traces, signals={})  # not needed, and hidden states are large to select from
    rows: list[Row] = []
    for by in _COLUMNS:
        column = getattr(traces, by)
        for group in _groups(column):
            key = {"by": by, "group": group, "gate": gate}
            members = column == group
            chosen = {name: _select(outcome, members) for name, outcome in outcomes.items()}
            rows += [key | row for row in _rows(traces.select(members), chosen, num_resamples)]
    return rows


def _groups(column: NDArray[np.str_]) -> list[str]:
    """The known values of a column (N,) that has several."""
    values = np.unique(column).tolist()
    return [value for value in values if value] if len(values) > 1 else []


def _select(outcome: Outcome, members: NDArray[np.bool_]) -> Outcome:
    return Outcome(outcome.em[members], outcome.cost[members], outcome.halted[members])


def _rows(traces: Traces, outcomes: Mapping[str, Outcome], num_resamples: int) -> list[Row]:
    """One row a policy."""
    num_questions = len(np.unique(traces.question_id))
    resampled = resample(traces, outcomes, num_resamples)
    rows: dict[str, Row] = {
        name: {
            "policy": name,
            "num_questions": num_questions,
            "num_traces": len(traces),
            "em": float(outcome.em.mean()),
            "em_never": float(traces.final_correct.mean()),
            "em_delta": em_delta(traces, outcome),
            "em_delta_interval": interval(resampled[name].em_delta),
            "saving": saving(traces, outcome),
            "saving_interval": interval(resampled[name].saving),
        }
        for name, outcome in outcomes.items()
    }
    for name, row in rows.items():
        row |= head_leads(rows["head"], resampled["head"], row, resampled[name])
        if num_questions < 2:
            row |= {key: None for key in row if key.endswith("_interval")}
    return list(rows.values())
