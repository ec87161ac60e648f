"""A head that another one goes on from: the child observes the same, and knows what it knows."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from envs.replay import availability
from haltwise import HaltHead, HeadConfig, InputError
from haltwise.policy.head import told_by
from lms.scorers import agreeing
from runs import Learned, Run
from traces import TraceFiles, Traces
from traces.stream import RowMask


@dataclass(frozen=True)
class Parent:
    """A run whose head is gone on from."""

    folder: Path
    head: HaltHead
    learned: Learned
    """What it learned from. The child learns from other questions, so that what its folds keep back
    is new to all that it knows."""

    @classmethod
    def load(cls, folder: Path) -> Parent:
        """Reads a parent.

        Raises:
            InputError: If it has no readable head, or does not tell what it learned from.
        """
        run = Run(folder)
        return cls(folder, run.head(), run.learned())

    def fresh(self, files: TraceFiles) -> RowMask:
        """Returns the rows (N,) of questions that the parent has not learned from."""
        return ~files.rows_of_questions(self.learned.questions, self.learned.texts)

    def read(self, path: Path, max_traces: int) -> Traces:
        """Reads traces that the parent can look at.

        Args:
            path: Their file or folder.
            max_traces: The most of them; of more, a sample by question is read.

        Raises:
            InputError: If they were recorded under other conditions than the parent's, or lack what
                it looks at.
        """
        files = TraceFiles.of_head(path, self.head.config, agreeing)
        traces = files.read(files.sample(files.rows(), max_traces))
        missing = availability(traces, self.head.config.halting).left_out
        for group in self.head.config.observing.groups:
            if group in missing:
                raise InputError(
                    f"{path}: the parent reads feature group {group}, {missing[group]}"
                )
        return traces

    def child(self, traces: Traces, digest: str) -> HeadConfig:
        """Returns what a child is valid for, before a price is chosen: it observes the same.

        Args:
            traces: What it learns from.
            digest: Their digest.
        """
        config, recorder = self.head.config, traces.recorder
        return replace(
            config,
            default_price=0.0,
            segment_prices={},
            certificate=None,
            lm=", ".join(np.unique(traces.model).tolist()),
            **told_by(recorder),
            installation=recorder.get("installation", config.installation),
            traces=digest,
            command=shlex.join(sys.argv),
        )

    def with_own(self, learned: Learned) -> Learned:
        """Returns what a child learned from, the parent's own included; no fold kept that back."""
        questions, texts = learned.questions, learned.texts
        return Learned(
            questions | self.learned.questions, learned.folds, texts | self.learned.texts
        )
