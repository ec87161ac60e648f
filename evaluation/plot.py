"""The picture: exact match against tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from evaluation.outcome import Row

_COLORS = {
    "head": "tab:red",
    "confidence": "tab:blue",
    "stability": "tab:green",
    "budget": "tab:orange",
    "random": "tab:gray",
}
_RULES = {
    "never": ("s", "never halting"),
    "hindsight": ("*", "hindsight: first correct"),
    "hindsight_give_up": ("P", "hindsight: and giving up"),
}


def plot_frontiers(rows: Sequence[Row], frozen: Sequence[Row], path: Path) -> None:
    """Draws every policy's sweep and its frozen points into a PNG file.

    Args:
        rows: Sweeps, and the rules without a parameter.
        frozen: Frozen rows, of any number of gates.
        path: Written whole or not at all.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    known = [row for row in rows if row["em"] is not None]
    for policy, color in _COLORS.items():
        swept = [row for row in known if row["policy"] == policy]
        points = [row for row in frozen if row["policy"] == policy and row["em"] is not None]
        label = policy if swept else f"{policy} (not available)"
        width = 2.2 if policy == "head" else 1.2
        axes.plot(*_places(swept), color=color, linewidth=width, label=label)
        axes.scatter(*_places(points), color=color, s=50, edgecolors="black", zorder=3)
    for row in known:
        if row["policy"] in _RULES:
            marker, label = _RULES[row["policy"]]
            axes.scatter(*_places([row]), color="black", marker=marker, s=70, label=label, zorder=4)
    _dress(axes, known)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Tokens and EM in %, in the order of tokens."""
    places = sorted((row["tokens"], 100 * row["em"]) for row in rows)
    return [tokens for tokens, _ in places], [em for _, em in places]


def _dress(axes: Axes, rows: Sequence[Row]) -> None:
    """Labels, and limits that show where policies differ: from far below never halting up."""
    never = next(row for row in rows if row["policy"] == "never")
    best = max(row["em"] for row in rows)
    height = max(best - never["em"], 0.02)
    axes.set_ylim(100 * max(never["em"] - 3 * height, -0.01), 100 * (best + 0.25 * height))
    axes.axhline(100 * never["em"], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("tokens a trace, probes included")
    axes.set_ylabel("exact match, %")
    axes.set_title("Exact match against tokens; dots: frozen before these traces")
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
