"""Run folders, which hold what a training leaves behind, are written and read here alone."""

from runs.learned import Learned
from runs.run import Beginning, Gates, Points, Run

__all__ = ["Beginning", "Gates", "Learned", "Points", "Run"]
