"""Formats the frozen rows, and the worst errors, as tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.behaviour import Behaviour, Case
from evaluation.figures import plain
from evaluation.frozen import strongest
from evaluation.rows import FrozenRow, HonestRow, LookingRow, MissingPoint, RecordingRow, SegmentRow

_TITLES = (
    "policy",
    "parameter",
    "EM %",
    "EM change [95 %]",
    "tokens",
    "saving % [95 %]",
    "hindsight",
    "halted",
    "lost",
    "won",
    "gave up",
    "hopeless",
    "head saves more at equal EM [95 %]",
)
_HONEST_TITLES = ("policy", "parameter", "EM change [95 %]", "saving % [95 %]")
_SEGMENT_TITLES = (
    "segment",
    "questions",
    "price of all",
    "EM change [95 %]",
    "saving %",
    "own price",
    "EM change [95 %]",
    "saving %",
)
_RECORDING_TITLES = (
    "recording",
    "head",
    "EM % alone",
    "beside the first [95 %]",
    "tokens",
    "beside the first [95 %]",
    "price",
    "EM % halted",
    "EM change [95 %]",
    "saving % [95 %]",
    "",
)
_CASE_TITLES = ("trace", "tokens", "of", "answer", "P(halt) %", "right again at", "driven by")
_NUM_CASES, _LONGEST_ANSWER = 5, 20
_NOTES = "* strongest baseline, > it never has the head's EM"


def format_table(frozen: Sequence[FrozenRow | MissingPoint]) -> str:
    """Returns one table for each gate; EM, saving and their changes are in points of a hundred."""
    return "\n\n".join(_table(frozen, gate) for gate in sorted({row.gate for row in frozen}))


def _table(frozen: Sequence[FrozenRow | MissingPoint], gate: float) -> str:
    """Returns the table of one gate, its title first."""
    rows = [row for row in frozen if row.gate == gate]
    marked = strongest(rows, gate)
    names = [row.policy + (" *" if row.policy == marked else "") for row in rows]
    lines = [
        (name, *_cells(row)) if isinstance(row, FrozenRow) else (name,)
        for name, row in zip(names, rows, strict=True)
    ]
    full = [_TITLES, *(line for line in lines if len(line) > 1)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(map(len, names))
    title = (
        f"Points chosen to lose at most {gate:.1%} of exact match; "
        f"traces: {rows[0].split}; {_NOTES}"
    )
    return "\n".join([title, *(_line(line, widths) for line in (_TITLES, *lines))])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Returns the line of a policy; one that has no cells beside its name is not available."""
    if len(cells) == 1:
        return f"{cells[0]:<{widths[0]}}  not available"
    aligned = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *aligned]).rstrip()


def _cells(row: FrozenRow) -> tuple[str, ...]:
    """Returns the cells of a row, all but the policy's name."""
    parameter, lead = row.parameter, row.head_lead_at_equal_em
    beyond = "> " if row.saving_at_head_em is None else ""
    return (
        "-" if parameter is None else f"{parameter:.6g}",
        f"{100 * row.em:.2f}",
        _with_interval(row.em_delta, row.em_delta_interval, "+.2f"),
        f"{row.tokens:.0f}",
        _with_interval(row.saving, row.saving_interval, ".1f"),
        _percent(row.hindsight_share),
        _percent(row.halt_rate),
        _percent(row.right_to_wrong),
        _percent(row.wrong_to_right),
        _percent(row.gave_up),
        _percent(row.hopeless_saving),
        ""
        if lead is None or row.policy == "head"
        else beyond + _with_interval(lead, row.head_lead_at_equal_em_interval, "+.1f"),
    )


def _percent(share: float | None) -> str:
    """Returns a share in %; empty where it is unknown."""
    return "" if share is None else f"{100 * share:.1f}"


def _with_interval(
    value: float, interval: Sequence[float] | None, form: str, scale: int = 100
) -> str:
    """Returns a value with its interval where there is one: a share in points of a hundred."""
    if interval is None:
        return f"{scale * value:{form}}"
    low, high = (scale * end for end in interval)
    return f"{scale * value:{form}} [{low:{form}}, {high:{form}}]"


def format_honest(rows: Sequence[HonestRow]) -> str:
    """Returns one table for each gate, of the points that are sure to keep it."""
    return "\n\n".join(
        _honest_table([row for row in rows if row.gate == gate])
        for gate in sorted({row.gate for row in rows})
    )


def _honest_table(rows: Sequence[HonestRow]) -> str:
    """Returns the table of one gate, its title first."""
    lines = [_HONEST_TITLES, *map(_honest_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = (
        f"Points that are estimated to lose at most {rows[0].gate:.1%} of exact match on new "
        f"questions too, by a test at {rows[0].confidence:.0%}; traces: {rows[0].split}"
    )
    return "\n".join([title, *(_line(line, widths) for line in lines)])


def _honest_cells(row: HonestRow) -> tuple[str, ...]:
    """Returns the cells of a row."""
    return (
        row.policy,
        "-" if row.parameter is None else f"{row.parameter:.6g}",
        _with_interval(row.em_delta, row.em_delta_interval, "+.2f"),
        _with_interval(row.saving, row.saving_interval, ".1f"),
    )


def format_segments(rows: Sequence[SegmentRow]) -> str:
    """Returns one table for each gate, of one price for all beside a price for each segment."""
    return "\n\n".join(
        _segment_table([row for row in rows if row.gate == gate])
        for gate in sorted({row.gate for row in rows})
    )


def _segment_table(rows: Sequence[SegmentRow]) -> str:
    """Returns the table of one gate, its title first."""
    lines = [_SEGMENT_TITLES, *map(_segment_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = f"The head by segment, at prices chosen to lose at most {rows[0].gate:.1%}"
    return "\n".join([title, *(_line(line, widths) for line in lines)])


def _segment_cells(row: SegmentRow) -> tuple[str, ...]:
    """Returns the cells of a row."""
    return (
        row.segment or "(all)",
        str(row.num_questions),
        f"{row.price_of_all:.6g}",
        _with_interval(row.em_delta_of_all, row.em_delta_of_all_interval, "+.2f"),
        f"{100 * row.saving_of_all:.1f}",
        "-" if row.price is None else f"{row.price:.6g}",
        _with_interval(row.em_delta, row.em_delta_interval, "+.2f"),
        f"{100 * row.saving:.1f}",
    )


def format_recordings(rows: Sequence[RecordingRow]) -> str:
    """Returns one table of recordings; EM, saving and their changes are in points of a hundred."""
    lines = [_RECORDING_TITLES, *map(_recording_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = f"{rows[0].num_questions:,} questions, each head at its own price"
    return "\n".join([title, *(_line(line, widths) for line in lines)])


def _recording_cells(row: RecordingRow) -> tuple[str, ...]:
    """Returns the cells of a row."""
    return (
        row.traces,
        row.head,
        f"{100 * row.em:.2f}",
        _with_interval(row.em_lead, row.em_lead_interval, "+.2f"),
        f"{row.tokens:.0f}",
        _with_interval(row.tokens_lead, row.tokens_lead_interval, "+.0f", 1),
        f"{row.price:.4g}" if row.price else "never",
        f"{100 * row.halted_em:.2f}",
        _with_interval(row.em_delta, row.em_delta_interval, "+.2f"),
        _with_interval(row.saving, row.saving_interval, ".1f"),
        "" if row.evidence else "no evidence: learned from these questions",
    )


def format_looking(rows: Sequence[LookingRow]) -> str:
    """Returns one table of decision rules; savings and leads are in points of a hundred."""
    losses = (f"-{loss}" for loss in rows[0].savings)
    titles = ("policy", "decision rule", "points a trace", *losses, "mean")
    lines = [(*titles, "beside the first [95 %]"), *map(_looking_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = "Saving %, net of every look, by the points of exact match that may be lost"
    return "\n".join([title, *(_line(line, widths) for line in lines)])


def _looking_cells(row: LookingRow) -> tuple[str, ...]:
    """Returns the cells of a row."""
    return (
        row.policy,
        row.rule,
        f"{row.num_points:.1f}",
        *(f"{100 * saved:.1f}" for saved in row.savings.values()),
        f"{100 * row.saving:.1f}",
        _with_interval(row.saving_lead, row.saving_lead_interval, "+.1f"),
    )


def format_cases(behaviour: Behaviour) -> str:
    """Returns the worst right-to-wrong cases at one gate, a line each; no text if there is none."""
    found = behaviour.cases[:_NUM_CASES]
    if not found:
        return ""
    lines = [_CASE_TITLES, *map(_case_cells, found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = f"Worst of the right answers turned wrong, at the points of {behaviour.gate:.1%}"
    rows = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines]
    return "\n".join(["", title, *rows])


def _case_cells(case: Case) -> tuple[str, ...]:
    """Returns the cells of a case's line."""
    again = case.right_again
    drivers = [f"{driver.feature} {driver.contribution:+.1f}" for driver in case.drivers]
    return (
        case.trace_id,
        str(case.position),
        str(case.num_tokens),
        plain(case.answer, _LONGEST_ANSWER),
        f"{100 * case.prob_halt:.1f}",
        "its end" if again is None else str(again),
        ", ".join(drivers[:3]),
    )
