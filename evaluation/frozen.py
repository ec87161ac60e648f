"""Makes the rows of a report: policies over their grids, and frozen at their operating points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from evaluation.frontier import AREA_FLOOR, frontier_area, frontier_savings, saving_at_em
from evaluation.honest import honest_rows
from evaluation.intervals import Resampled, Resamples, interval, intervals
from evaluation.outcome import Outcome, outcome_row
from evaluation.protocol import GATES, RATE_MATCHED, operating_point, same_rate
from evaluation.rows import (
    FrozenRow,
    HonestRow,
    Interval,
    MissingPoint,
    MissingSweep,
    SegmentRow,
    SweepRow,
    without_intervals,
)
from evaluation.segments import segment_points, segment_rows
from runs import Gates, Points
from traces import Traces

#: The split that is named in rows whose decisions were made without having learned from their
#: questions.
OUT_OF_FOLD = "out of fold"


@dataclass(frozen=True, eq=False)
class AtPoint:
    """A policy at one parameter."""

    parameter: float | None
    """The parameter; None is never halting, or that of a rule, which has none."""
    outcome: Outcome


@dataclass(frozen=True)
class Choice:
    """The operating points of all policies, and what they were chosen from."""

    gates: Gates
    """By gate, the points; policies that are not available are left out."""
    rows: list[SweepRow | MissingSweep]
    """Every policy over its grid."""
    frozen: list[FrozenRow | MissingPoint]
    """Every policy at its points, on the traces that they were chosen on."""
    honest: list[HonestRow]
    """Every policy where it is sure to keep a gate on new questions too."""
    segments: list[SegmentRow]
    """The head at each gate where it halts, on every segment with enough questions."""

    @property
    def segment_prices(self) -> dict[str, float]:
        """By segment, the head's price at the gate of its own price; empty if that is 0."""
        strictest = min(self.gates)
        return {
            row.segment: row.price or 0.0
            for row in self.segments
            if row.gate == strictest and row.segment
        }


def choose_points(
    traces: Traces,
    outcomes: Mapping[str, Mapping[float, Outcome] | None],
    rules: Mapping[str, Outcome],
) -> Choice:
    """Applies the protocol for operating points to several policies.

    Args:
        traces: N traces.
        outcomes: By policy and parameter, the outcomes of decisions made without having learned
            from these questions; None for a policy whose signal the traces lack.
        rules: By name, the outcomes of the rules, "never" and "hindsight" among them.
    """
    sweeps = {name: swept for name, swept in outcomes.items() if swept}
    gates = {gate: _points(traces, sweeps, gate) for gate in GATES}
    at_points = {
        gate: {
            name: AtPoint(at, rules["never"] if at is None else sweeps[name][at])
            for name, at in points.items()
        }
        for gate, points in gates.items()
    }
    rows, frozen = report_rows(traces, OUT_OF_FOLD, outcomes, at_points, rules)
    honest = honest_rows(traces, OUT_OF_FOLD, outcomes, rules["never"])
    segments = []
    for gate, points in gates.items():
        if (price := points["head"]) is not None:
            own = segment_points(traces, sweeps["head"], gate)
            swept: dict[float | None, Outcome] = {None: rules["never"]}
            swept.update(sweeps["head"].items())
            segments += segment_rows(traces, swept, gate, own, price) if own else []
    return Choice(gates, rows, frozen, honest, segments)


def _points(traces: Traces, sweeps: Mapping[str, Mapping[float, Outcome]], gate: float) -> Points:
    """Chooses the points of all policies at one gate; that of the control follows the head's."""
    points = {name: operating_point(traces, swept, gate) for name, swept in sweeps.items()}
    if RATE_MATCHED in sweeps:
        price = points["head"]
        rate = 0.0 if price is None else float(sweeps["head"][price].halted.mean())
        points[RATE_MATCHED] = same_rate(sweeps[RATE_MATCHED], rate)
    return points


def report_rows(
    traces: Traces,
    split: str,
    sweeps: Mapping[str, Mapping[float, Outcome] | None],
    at_points: Mapping[float, Mapping[str, AtPoint]],
    rules: Mapping[str, Outcome],
) -> tuple[list[SweepRow | MissingSweep], list[FrozenRow | MissingPoint]]:
    """Makes the rows of all policies, with intervals from one set of resamples.

    Args:
        traces: N traces.
        split: The name of the split that they are of.
        sweeps: By policy, the outcomes over its grid; None for one that is not available.
        at_points: By gate, the policies at their operating points, "head" among them. One without
            a point is not available at that gate.
        rules: By name, the outcomes of the rules, "hindsight" among them.

    Returns:
        The rows of the rules and of every policy's grid; and the frozen rows, one gate after the
        other. All intervals are None if the traces are of a single question.
    """
    resamples = Resamples.draw(traces.question_id)
    measure = partial(_measure, traces, split, resamples)
    heads = {gate: measure("head", [points["head"]]) for gate, points in at_points.items()}
    hindsight = measure("hindsight", [AtPoint(None, rules["hindsight"])])
    rows: list[SweepRow | MissingSweep] = []
    frozen: list[FrozenRow | MissingPoint] = []
    for name, outcome in rules.items():
        rows += measure(name, [AtPoint(None, outcome)]).rows
    for name, swept in sweeps.items():
        known = [gate for gate in heads if swept and name in at_points[gate]]
        frozen += [MissingPoint(name, split, gate) for gate in heads if gate not in known]
        if not swept:
            rows.append(MissingSweep(name, split))
            continue
        grid = [AtPoint(parameter, outcome) for parameter, outcome in swept.items()]
        measured = measure(name, grid + [at_points[gate][name] for gate in known])
        rows += measured.rows[: len(grid)]
        for k, gate in enumerate(known, start=len(grid)):
            row = _frozen_row(measured, k, gate, heads[gate], hindsight)
            frozen.append(_on_frontier(row, measured, heads[gate]))
    for name, outcome in rules.items():
        measured = measure(name, [AtPoint(None, outcome)])
        frozen += [_frozen_row(measured, 0, gate, head, hindsight) for gate, head in heads.items()]
    frozen = [row for gate in heads for row in frozen if row.gate == gate]
    if resamples.num_questions > 1:
        return rows, frozen
    return (
        [without_intervals(row) if isinstance(row, SweepRow) else row for row in rows],
        [without_intervals(row) if isinstance(row, FrozenRow) else row for row in frozen],
    )


def strongest(frozen: Sequence[FrozenRow | MissingPoint], gate: float) -> str | None:
    """Returns the baseline that the head leads least at equal EM, which no doubter may miss.

    Those to which it is shown to lose come first, by however little. A head that halts nothing has
    no EM of its own to be equal to. There it is the baseline that saves most at its own point, of
    those that are not shown to lose more than they may.

    Args:
        frozen: The frozen rows.
        gate: The gate whose rows count.

    Returns:
        The name of the policy; None if no baseline is available.
    """
    rows = [row for row in frozen if isinstance(row, FrozenRow) and row.gate == gate]
    halts = any(row.policy == "head" and row.halts for row in rows)
    others = [row for row in rows if row.policy != "head"]
    if halts:
        baselines = [row for row in others if row.head_lead_at_equal_em is not None]
    else:
        own = [row for row in others if row.parameter is not None and row.saving > 0]
        baselines = [row for row in own if not _loses_more(row)]
    best = max(baselines, key=lambda row: _strength(row, halts), default=None)
    return None if best is None else best.policy


def _strength(row: FrozenRow, head_halts: bool) -> tuple[bool, float]:
    """Returns what a baseline is ranked by: the saving that it is ahead of the head."""
    if not head_halts:
        return False, row.saving
    interval = row.head_lead_at_equal_em_interval
    return interval is not None and interval[0] < interval[1] < 0, -(
        row.head_lead_at_equal_em or 0.0
    )


def _loses_more(row: FrozenRow) -> bool:
    """Returns whether a policy is shown to lose more than the gate allows."""
    interval = row.em_delta_interval
    return interval is not None and interval[1] < -row.gate


@dataclass(frozen=True, eq=False)
class _Measured:
    """What one policy comes to at K parameters."""

    rows: list[SweepRow]
    """K rows."""
    resampled: Resampled
    """The K outcomes over the resamples."""


def _measure(
    traces: Traces, split: str, resamples: Resamples, name: str, points: Sequence[AtPoint]
) -> _Measured:
    """Makes the rows of a policy at some points, with their intervals."""
    resampled = resamples.of(traces, [at.outcome for at in points])
    rows = [
        outcome_row(traces, at.outcome, name, at.parameter, split, *ends)
        for at, *ends in zip(
            points, intervals(resampled.em_delta), intervals(resampled.saving), strict=True
        )
    ]
    return _Measured(rows, resampled)


def _frozen_row(
    measured: _Measured, k: int, gate: float, head: _Measured, hindsight: _Measured
) -> FrozenRow:
    """Makes the frozen row of a policy at its k-th parameter; what a frontier tells is None.

    Args:
        measured: The policy.
        k: Which of its parameters is the operating point.
        gate: The gate that the point was chosen under.
        head: The head at its operating point alone.
        hindsight: The rule that halts at the first correct answer.
    """
    row, resampled = measured.rows[k], measured.resampled[k]
    possible, possible_resampled = hindsight.rows[0].saving, hindsight.resampled.saving[0]
    always_possible = (possible_resampled > 0).all()
    em_lead, saving_lead = head_lead_intervals(head.resampled[0], resampled)
    return FrozenRow(
        **vars(row),
        gate=gate,
        head_em_lead=head.rows[0].em_delta - row.em_delta,
        head_em_lead_interval=em_lead,
        head_saving_lead=head.rows[0].saving - row.saving,
        head_saving_lead_interval=saving_lead,
        saving_at_head_em=None,
        head_lead_at_equal_em=None,
        head_lead_at_equal_em_interval=None,
        hindsight_share=row.saving / possible if possible > 0 else None,
        hindsight_share_interval=(
            interval(resampled.saving / possible_resampled) if always_possible else None
        ),
        area=None,
    )


def head_lead_intervals(head: Resampled, policy: Resampled) -> tuple[Interval, Interval]:
    """Returns the intervals of how far the head is ahead of a policy in EM and in saving.

    Both must be of the same resamples.
    """
    return interval(head.em_delta - policy.em_delta), interval(head.saving - policy.saving)


def _on_frontier(row: FrozenRow, measured: _Measured, head: _Measured) -> FrozenRow:
    """Adds to a row what the frontier of the policy's K points tells, also against the head."""
    head_row, head_resampled = head.rows[0], head.resampled[0]
    points = [(row.em_delta, row.saving) for row in measured.rows]
    at_head_em = saving_at_em(points, head_row.em_delta)
    at_highest_em = max([*points, (0.0, 0.0)])[1]
    nearest = at_highest_em if at_head_em is None else at_head_em
    resampled = frontier_savings(
        measured.resampled.em_delta, measured.resampled.saving, head_resampled.em_delta
    )
    return replace(
        row,
        saving_at_head_em=at_head_em,
        head_lead_at_equal_em=head_row.saving - nearest,
        head_lead_at_equal_em_interval=interval(head_resampled.saving - resampled),
        area=frontier_area(points, AREA_FLOOR),
    )
