"""The picture: exact match against tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from evaluation.figures import frontier, style
from evaluation.outcome import Row


def plot_frontiers(rows: Sequence[Row], frozen: Sequence[Row], path: Path) -> None:
    """Draws every policy's sweep and its frozen points into a PNG file.

    Args:
        rows: Sweeps, and the rules without a parameter.
        frozen: Frozen rows, of any number of gates.
        path: Written whole or not at all.
    """
    temporary = path.with_name(f".{path.name}.part")
    with style():
        frontier(rows, frozen).savefig(temporary, format="png")
    os.replace(temporary, path)
