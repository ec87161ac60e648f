"""Rows by group: segments, tasks and LMs, each on its own questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evaluation.frozen import head_leads
from evaluation.intervals import interval, resample, without_intervals
from evaluation.outcome import Outcome, Row, em_delta, saving
from traces import Traces

_COLUMNS = ("segment", "task", "model")


def group_rows(
    traces: Traces,
    outcomes: Mapping[float, Mapping[str, Outcome]],
    num_resamples: int = 10_000,
) -> list[Row]:
    """A row for each group, gate and policy, of every column by which the traces differ.

    Each interval is at 95 % by itself: of twenty groups, one misses its truth.

    Args:
        traces: N traces; those of an unknown (empty) segment are in no row of a segment.
        outcomes: By gate and policy, on those traces, "head" among them; a gate is what the
            operating points were chosen under.
        num_resamples: Of the questions of a group, the same ones for all.

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
            members = column == group
            chosen = {
                (gate, policy): outcome.select(members)
                for gate, of_gate in outcomes.items()
                for policy, outcome in of_gate.items()
            }
            found = _rows(traces.select(members), chosen, num_resamples)
            rows += [{"by": by, "group": group} | row for row in found]
    return rows


def _groups(column: NDArray[np.str_]) -> list[str]:
    """The known values of a column (N,) that has several."""
    values = np.unique(column).tolist()
    return [value for value in values if value] if len(values) > 1 else []


def _rows(
    traces: Traces, outcomes: Mapping[tuple[float, str], Outcome], num_resamples: int
) -> list[Row]:
    """One row a gate and policy."""
    num_questions = len(np.unique(traces.question_id))
    resampled = resample(traces, outcomes, num_resamples)
    rows: dict[tuple[float, str], Row] = {
        (gate, policy): {
            "gate": gate,
            "policy": policy,
            "num_questions": num_questions,
            "num_traces": len(traces),
            "em": float(outcome.em.mean()),
            "em_never": float(traces.final_correct.mean()),
            "em_delta": em_delta(traces, outcome),
            "em_delta_interval": interval(resampled[gate, policy].em_delta),
            "saving": saving(traces, outcome),
            "saving_interval": interval(resampled[gate, policy].saving),
        }
        for (gate, policy), outcome in outcomes.items()
    }
    for (gate, policy), row in rows.items():
        head = gate, "head"
        row |= head_leads(rows[head], resampled[head], row, resampled[gate, policy])
    return [without_intervals(row) if num_questions < 2 else row for row in rows.values()]
