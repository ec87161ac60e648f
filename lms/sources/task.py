"""What is asked: the flags, and what every source of questions can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from haltwise import InputError
from lms.questions import SPLITS, Question


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is asked."""

    task: str = "all"
    """Of the embedded LM: sum, let, leap or all. Built in: gsm8k, math500, arc_challenge, mmlu_pro,
    squad, or reasoning_gym:NAME. Your own: a file (JSON lines, JSON, CSV, Parquet), a folder of
    them, or OWNER/NAME or OWNER/NAME:CONFIG of the Hugging Face Hub."""
    scorer: str | None = None
    """The rule by which answers are read and compared, such as short, text, number, choice or
    latex; an unknown name is answered with all of them. Default: the task's own rule; for your own
    data short, or choice with --choices-column."""
    instruction: str | None = None
    """Follows every question. Default: the scorer's."""
    question_column: str = "question"
    """Of your own data: what is asked."""
    answer_column: str = "answer"
    """Of your own data: the reference answer; a list of them for the scorers text and strict."""
    context_column: str | None = None
    """Of your own data: a text that comes before the question."""
    choices_column: str | None = None
    """Of your own data: a list of choices. The answer is a letter, a number from 0, or the text
    of one."""
    segment_column: str | None = None
    """Of your own data: a group within the task, such as its difficulty."""
    split_column: str | None = None
    """Has train, dev or test for every row. Default: the names of files or of the hub's splits;
    without them, the hash of a question decides."""
    data_file: Path | None = None
    """The task's rows, from this file or folder instead of from the hub."""


class Answered(Protocol):
    """How an LM is made to answer, and how its answers are read."""

    @property
    def scorer(self) -> str:
        """The answer rule: a key of haltwise.policy.answers.READERS."""

    @property
    def cue(self) -> str:
        """Said after a thought to force an answer, such as "The answer is "; may be empty."""

    @property
    def answer_end(self) -> str:
        """See haltwise.Halting."""


class Task(Answered, Protocol):
    """Questions of one kind, answered and scored alike."""

    @property
    def instruction(self) -> str:
        """Follows every question; may be empty."""

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """At most `num` distinct questions of a split, the same for the same arguments.

        Raises:
            InputError: If there is no such split, or what was read cannot be asked.
        """

    def describe(self) -> str:
        """One line for a person: what there is, and how it is asked.

        Raises:
            InputError: If what was read cannot be asked.
        """


def check_draw(split: str, num: int) -> None:
    """Refuses arguments that no task can take.

    Raises:
        InputError: Unknown split, or `num` below 1.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if num < 1:
        raise InputError(f"num must be at least 1, got {num}")


def asked(text: str, instruction: str) -> str:
    """The whole of what an LM is asked."""
    return f"{text}\n\n{instruction}" if instruction else text
