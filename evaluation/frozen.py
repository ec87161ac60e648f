"""Frozen rows: every policy at its operating point, with intervals and against the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.intervals import interval, resample
from evaluation.outcome import (
    Outcome,
    Row,
    em_delta,
    outcome_row,
    saving,
    unavailable_row,
)
from evaluation.protocol import GATES, Points, operating_point, saving_at_em
from traces import Traces

#: Keys of a frozen row beyond COLUMNS; intervals are [low, high], 95 %, paired by question.
FROZEN_COLUMNS = (
    "gate",
    "em_delta_interval",
    "saving_interval",
    "head_em_lead",  # the head's EM minus this policy's, both at their points
    "head_em_lead_interval",
    "head_saving_lead",
    "head_saving_lead_interval",
    "saving_at_head_em",  # on this policy's frontier here; None where it never has that EM
    "hindsight_share",  # of the saving of halting at the first correct point
)


#: Split of rows whose decisions were made without having learned from their questions.
OUT_OF_FOLD = "out of fold"


@dataclass(frozen=True)
class Choice:
    """The operating points of all policies, and what they were chosen from."""

    gates: dict[float, Points]
    """By gate; policies that are not available are left out."""
    rows: list[Row]
    """Every policy over its grid."""
    frozen: list[Row]
    """Every policy at its points, on the traces that they were chosen on."""


def choose_points(
    traces: Traces,
    outcomes: Mapping[str, Mapping[float, Outcome] | None],
    rules: Mapping[str, Outcome],
) -> Choice:
    """Applies the protocol for operating points to several policies.

    Args:
        traces: N traces.
        outcomes: By policy and parameter, of decisions made without having learned from these
            questions; None for a policy whose signal the traces lack.
        rules: Outcomes of what has no parameter, "never" and "hindsight" among them.
    """
    sweeps = {
        name: [
            outcome_row(traces, outcome, name, parameter, OUT_OF_FOLD)
            for parameter, outcome in swept.items()
        ]
        if swept
        else [unavailable_row(name, OUT_OF_FOLD)]
        for name, swept in outcomes.items()
    }
    gates: dict[float, Points] = {}
    frozen: list[Row] = []
    for gate in GATES:
        points = {name: operating_point(traces, o, gate) for name, o in outcomes.items() if o}
        gates[gate] = points
        at_points = {
            name: None if not swept else _at(swept, points[name], rules["never"])
            for name, swept in outcomes.items()
        }
        frozen += frozen_rows(traces, OUT_OF_FOLD, gate, points, at_points | dict(rules), sweeps)
    rows = [outcome_row(traces, rule, name, None, OUT_OF_FOLD) for name, rule in rules.items()]
    return Choice(gates, rows + [row for swept in sweeps.values() for row in swept], frozen)


def _at(outcomes: Mapping[float, Outcome], parameter: float | None, never: Outcome) -> Outcome:
    return never if parameter is None else outcomes[parameter]


def frozen_rows(
    traces: Traces,
    split: str,
    gate: float,
    points: Points,
    outcomes: Mapping[str, Outcome | None],
    sweeps: Mapping[str, Sequence[Row]],
) -> list[Row]:
    """Rows of all policies at the points of one gate.

    Args:
        traces: N traces.
        split: Its name.
        gate: What the points were chosen under.
        points: Parameter by policy; a rule without one may be absent.
        outcomes: By policy, "head" and "hindsight" among them; None if not available.
        sweeps: Rows over the grid of each policy that has one, on the same traces.
    """
    known = {name: outcome for name, outcome in outcomes.items() if outcome is not None}
    comparisons = _comparisons(traces, known)
    head_delta = em_delta(traces, known["head"])
    possible = saving(traces, known["hindsight"])
    rows = []
    for name, outcome in outcomes.items():
        if outcome is None:
            nothing = unavailable_row(name, split) | dict.fromkeys(FROZEN_COLUMNS)
            rows.append(nothing | {"gate": gate})
            continue
        row = outcome_row(traces, outcome, name, points.get(name), split)
        frontier = [(at["em_delta"], at["saving"]) for at in (row, *sweeps.get(name, ()))]
        row |= {"gate": gate} | comparisons[name]
        row["saving_at_head_em"] = saving_at_em(frontier, head_delta) if name in sweeps else None
        row["hindsight_share"] = row["saving"] / possible if possible > 0 else None
        rows.append(row)
    return rows


def _comparisons(traces: Traces, outcomes: Mapping[str, Outcome]) -> dict[str, Row]:
    """Interval columns by policy."""
    resampled = resample(traces, outcomes)
    head, head_outcome = resampled["head"], outcomes["head"]
    return {
        name: {
            "em_delta_interval": interval(other.em_delta),
            "saving_interval": interval(other.saving),
            "head_em_lead": em_delta(traces, head_outcome) - em_delta(traces, outcomes[name]),
            "head_em_lead_interval": interval(head.em_delta - other.em_delta),
            "head_saving_lead": saving(traces, head_outcome) - saving(traces, outcomes[name]),
            "head_saving_lead_interval": interval(head.saving - other.saving),
        }
        for name, other in resampled.items()
    }
