"""Draws the pictures of exact match against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from command import whole_file
from evaluation.figures import frontier, recordings, style
from evaluation.rows import FrozenRow, MissingPoint, MissingSweep, RecordingRow, SweepRow


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


def plot_recordings(rows: Sequence[RecordingRow], path: Path) -> None:
    """Draws recordings, alone and halted at every price of their heads, into a PNG file.

    Args:
        rows: The recordings.
        path: The file, which is written whole or not at all.
    """
    with style(), whole_file(path) as temporary:
        recordings(rows).savefig(temporary, format="png")
