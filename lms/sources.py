"""Where questions come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lms.questions import Question
from lms.tasks import each_question


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is asked."""

    task: str = "all"
    """Task of the questions, or all."""


class Task(Protocol):
    """Questions of one kind, answered and scored alike."""

    scorer: str
    """One of lms.scorers.SCORERS."""
    cue: str
    """Said after a thought to force an answer, such as "The answer is "; may be empty."""
    answer_end: str
    """See haltwise.Halting."""

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """At most `num` distinct questions of a split, the same for the same arguments.

        Raises:
            InputError: If there is no such split, or what was read cannot be asked.
        """


@dataclass(frozen=True)
class Procedural:
    """The embedded LM's own questions."""

    name: str
    scorer = "short"
    cue = ""
    answer_end = ""

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """See `Task`."""
        return each_question(self.name, split, num, seed)


def open_task(config: DataConfig) -> Task:
    """The task that a person has named.

    Raises:
        InputError: If there is no such task, or its data cannot be read.
    """
    return Procedural(config.task)
