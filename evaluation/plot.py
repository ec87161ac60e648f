"""Draws the picture of exact match against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from command import whole_file
from evaluation.figures import frontier, style
from evaluation.rows import FrozenRow, MissingPoint, MissingSweep, SweepRow


def plot_frontiers(
    rows: Sequence[SweepRow | MissingSweep], frozen: Sequence[FrozenRow | MissingPoint], path: Path
) -> None:
    """Draws every policy's sweep and its frozen points into a PNG file.

    Args:
        rows: The rows of sweeps, and of rules without a parameter.
        frozen: The frozen rows, of any number of gates.
        path: The file, which is written whole or not at all.
    """
    with style(), whole_file(path) as temporary:
        frontier(rows, frozen).savefig(temporary, format="png")
