"""Run folders: what a training leaves behind, written and read in one place."""

from runs.learned import Learned
from runs.run import Beginning, Gates, Points, Run

__all__ = ["Beginning", "Gates", "Learned", "Points", "Run"]
