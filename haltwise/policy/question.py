"""What is known of a question before an LM's first token: its task and segment, and its length.

Shapes: B questions, Q numbers of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from haltwise.errors import InputError
from haltwise.policy.signals import Float

#: What is counted in a question's text.
COUNTS = ("log_characters", "log_words", "log_numbers")

# As those of a head, standardised counts are clipped here.
_CLIP = 5.0


@dataclass(frozen=True)
class Question:
    """A question, as far as it is known; an empty text says that something is not."""

    text: str = ""
    task: str = ""
    segment: str = ""

    @property
    def counts(self) -> tuple[float, float, float]:
        """The logarithms, log(1 + n), of its characters, words and numbers."""
        numbers = re.findall(r"\d+", self.text)
        of = (len(self.text), len(self.text.split()), len(numbers))
        return tuple(np.log1p(of).tolist())


@dataclass(frozen=True)
class QuestionReader:
    """How questions become numbers: 1 for its task and its segment, and standardised counts."""

    tasks: tuple[str, ...] = ()
    """The tasks that are told apart; any other one is none of them."""
    segments: tuple[str, ...] = ()
    """Likewise the segments, each named with its task: "task/segment"."""
    mean: tuple[float, ...] = ()
    """Mean of each count over the training questions; empty if their texts are unknown."""
    scale: tuple[float, ...] = ()
    """Standard deviation of each."""

    def __post_init__(self) -> None:
        """Checks that the parts fit each other.

        Raises:
            InputError: If there is not one mean and one scale a count, or none of either, or a
                scale is not positive.
        """
        if len(self.mean) not in (0, len(COUNTS)) or len(self.mean) != len(self.scale):
            found = f"{len(self.mean)} means and {len(self.scale)} scales"
            raise InputError(f"found {found} of a question, expected {len(COUNTS)} of each or none")
        if not np.isfinite([*self.mean, *self.scale]).all() or min(self.scale, default=1.0) <= 0:
            raise InputError("a mean or scale of a question is not finite, or not positive")

    @classmethod
    def fit(cls, questions: Sequence[Question], fewest: int = 20) -> QuestionReader:
        """Returns a reader that tells apart what is there often enough.

        Args:
            questions: Those to learn from.
            fewest: Questions that a task or segment has at least, to be told apart.
        """
        named = [q.task for q in questions], [segment_name(q) for q in questions]
        tasks, segments = (_frequent(names, fewest) for names in named)
        counts = np.array([q.counts for q in questions if q.text])
        if not len(counts):
            return cls(tasks, segments)
        scale = counts.std(axis=0)
        scale = np.where(scale > 1e-6, scale, 1.0)  # a constant count stays 0
        return cls(tasks, segments, tuple(counts.mean(axis=0).tolist()), tuple(scale.tolist()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numbers, in order."""
        counts = COUNTS if self.mean else ()
        return (*(f"task {name}" for name in self.tasks), *self.segments, *counts)

    def read(self, questions: Sequence[Question]) -> Float:
        """Returns the numbers (B, Q) of questions; what is not known of one counts as the mean."""
        rows = np.zeros((len(questions), len(self.names)), dtype=np.float32)
        place = {name: k for k, name in enumerate((*self.tasks, *self.segments))}
        of_segment = {name: k + len(self.tasks) for k, name in enumerate(self.segments)}
        for row, question in zip(rows, questions, strict=True):
            for k in (place.get(question.task), of_segment.get(segment_name(question))):
                if k is not None:
                    row[k] = 1.0
            if self.mean and question.text:
                standard = (np.array(question.counts) - self.mean) / self.scale
                row[-len(COUNTS) :] = np.clip(standard, -_CLIP, _CLIP)
        return rows


def segment_name(question: Question) -> str:
    """Returns the name of a question's segment within its task; empty if it has none."""
    return f"{question.task}/{question.segment}" if question.segment else ""


def _frequent(names: Sequence[str], fewest: int) -> tuple[str, ...]:
    """Returns in order the names that are there often enough, if there are two or more of them."""
    found, num = np.unique([name for name in names if name], return_counts=True)
    frequent = tuple(found[num >= fewest].tolist())
    return frequent if len(found) > 1 else ()
