"""Rows by group: segments, tasks and LMs, each on its own questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evaluation.frozen import head_lead_intervals
from evaluation.intervals import interval, resample
from evaluation.outcome import Outcome, em_delta, saving
from evaluation.rows import GroupRow, without_intervals
from traces import Traces

_COLUMNS = ("segment", "task", "model")


def group_rows(
    traces: Traces,
    outcomes: Mapping[float, Mapping[str, Outcome]],
    num_resamples: int = 10_000,
) -> list[GroupRow]:
    """A row for each group, gate and policy, of every column by which the traces differ.

    Each interval is at 95 % by itself: of twenty groups, one misses its truth.

    Args:
        traces: N traces; those of an unknown (empty) segment are in no row of a segment.
        outcomes: By gate and policy, on those traces, "head" among them; a gate is what the
            operating points were chosen under.
        num_resamples: Of the questions of a group, the same ones for all.

    Returns:
        Rows by column, group, gate and policy; without intervals for a group of a single question.
    """
    traces = replace(traces, signals={})  # not needed, and hidden states are large to select from
    rows: list[GroupRow] = []
    for by in _COLUMNS:
        column = getattr(traces, by)
        for group in _groups(column):
            members = column == group
            chosen = {
                (gate, policy): outcome.select(members)
                for gate, of_gate in outcomes.items()
                for policy, outcome in of_gate.items()
            }
            rows += _rows(by, group, traces.select(members), chosen, num_resamples)
    return rows


def _groups(column: NDArray[np.str_]) -> list[str]:
    """The known values of a column (N,) that has several."""
    values = np.unique(column).tolist()
    return [value for value in values if value] if len(values) > 1 else []


def _rows(
    by: str,
    group: str,
    traces: Traces,
    outcomes: Mapping[tuple[float, str], Outcome],
    num_resamples: int,
) -> list[GroupRow]:
    """One row a gate and policy."""
    resampled = resample(traces, outcomes, num_resamples)
    rows = []
    for (gate, policy), outcome in outcomes.items():
        head = outcomes[gate, "head"]
        own = resampled[gate, policy]
        em_lead, saving_lead = head_lead_intervals(resampled[gate, "head"], own)
        rows.append(
            GroupRow(
                by=by,
                group=group,
                gate=gate,
                policy=policy,
                num_questions=len(np.unique(traces.question_id)),
                num_traces=len(traces),
                em=float(outcome.em.mean()),
                em_never=float(traces.final_correct.mean()),
                em_delta=em_delta(traces, outcome),
                em_delta_interval=interval(own.em_delta),
                saving=saving(traces, outcome),
                saving_interval=interval(own.saving),
                head_em_lead=em_delta(traces, head) - em_delta(traces, outcome),
                head_em_lead_interval=em_lead,
                head_saving_lead=saving(traces, head) - saving(traces, outcome),
                head_saving_lead_interval=saving_lead,
            )
        )
    return [without_intervals(row) if row.num_questions < 2 else row for row in rows]
