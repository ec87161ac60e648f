"""The frozen rows as text."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.outcome import Row

_TITLES = (
    "policy",
    "parameter",
    "EM %",
    "EM change [95 %]",
    "tokens",
    "saving % [95 %]",
    "at head's EM",
    "halted %",
    "lost",
    "won",
    "gave up",
    "of hopeless",
    "head saves more [95 %]",
)


def format_table(frozen: Sequence[Row]) -> str:
    """One table a gate; EM, saving and their changes in points of a hundred."""
    gates = sorted({row["gate"] for row in frozen})
    parts = []
    for gate in gates:
        rows = [_cells(row) for row in frozen if row["gate"] == gate]
        widths = [max(map(len, column)) for column in zip(_TITLES, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if n == 0 else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in (_TITLES, *rows)
        ]
        split = next(row["split"] for row in frozen if row["gate"] == gate)
        title = f"Points chosen to lose at most {gate:.1%} of exact match; traces: {split}"
        parts.append("\n".join([title, *(line.rstrip() for line in lines)]))
    return "\n\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    if row["em"] is None:
        return (row["policy"], "not available", *[""] * (len(_TITLES) - 2))
    parameter, at_head_em = row["parameter"], row["saving_at_head_em"]
    lead = (row["head_saving_lead"], row["head_saving_lead_interval"])
    return (
        row["policy"],
        "-" if parameter is None else f"{parameter:.6g}",
        f"{100 * row['em']:.2f}",
        _with_interval(row["em_delta"], row["em_delta_interval"], "+.2f"),
        f"{row['tokens']:.0f}",
        _with_interval(row["saving"], row["saving_interval"], ".1f"),
        "" if at_head_em is None else f"{100 * at_head_em:.1f}",
        f"{100 * row['halt_rate']:.1f}",
        f"{100 * row['right_to_wrong']:.1f}",
        f"{100 * row['wrong_to_right']:.1f}",
        f"{100 * row['gave_up']:.1f}",
        f"{100 * row['hopeless_saving']:.1f}",
        "" if row["policy"] == "head" else _with_interval(*lead, "+.1f"),
    )


def _with_interval(value: float, interval: Sequence[float], form: str) -> str:
    low, high = interval
    return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"
