"""Judges policies on groups of traces, by segment, task and LM, each on its own questions."""

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
    """Makes a row for each group, gate and policy, for every column in which the traces differ.

    Each interval is at 95 % by itself: of twenty groups, one misses its truth.

    Args:
        traces: N traces; those of an unknown (empty) segment are in no row of a segment.
        outcomes: By gate and policy, the outcomes on those traces, "head" among the policies; a
            gate is what the operating points were chosen under.
        num_resamples: How often the questions of a group are resampled, the same for all policies.

    Returns:
        The rows by column, group, gate and policy; the intervals of a group of a single question
        are None.
    """
    # Signals are not needed, and hidden states are large to select from.
    traces = replace(traces, signals={})
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
    """Returns the known values of a column (N,); none if all traces have the same one."""
    values = np.unique(column).tolist()
    return [value for value in values if value] if len(values) > 1 else []


def _rows(
    by: str,
    group: str,
    traces: Traces,
    outcomes: Mapping[tuple[float, str], Outcome],
    num_resamples: int,
) -> list[GroupRow]:
    """Makes the rows of one group.

    Args:
        by: The column that the group is of.
        group: The value of that column.
        traces: The traces of the group.
        outcomes: By gate and policy, the outcomes on those traces.
        num_resamples: How often the questions are resampled.

    Returns:
        One row for each gate and policy.
    """
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
