"""Tasks: the flags that name one, and what every task can do."""

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
    """The task. The embedded LM's own are sum, let, leap or all. Built in are gsm8k, math500,
    arc_challenge, mmlu_pro, squad, and reasoning_gym:NAME. Your own is a file (JSON lines, JSON,
    CSV, Parquet), a folder of files, or OWNER/NAME or OWNER/NAME:CONFIG of the Hugging Face Hub."""
    scorer: str | None = None
    """The rule by which answers are read and compared, such as short, text, number, choice or
    latex; an unknown name is answered with all of them. Default: the task's own rule; for your own
    data short, or choice with --choices-column."""
    instruction: str | None = None
    """The text that follows every question. Default: the scorer's own instruction."""
    question_column: str = "question"
    """The column of your own data that holds what is asked."""
    answer_column: str = "answer"
    """The column of your own data that holds the gold answer; for the scorers text and strict it
    may hold a list of gold answers."""
    context_column: str | None = None
    """The column of your own data that holds a text to put before the question."""
    choices_column: str | None = None
    """The column of your own data that holds a list of choices. The gold answer is then a letter,
    a number from 0, or the text of a choice."""
    segment_column: str | None = None
    """The column of your own data that holds a group within the task, such as its difficulty."""
    split_column: str | None = None
    """The column that holds train, dev or test for every row. Default: the names of the files or
    of the hub's splits decide, and without such names the hash of a question does."""
    data_file: Path | None = None
    """A file or folder to read the task's rows from, instead of from the hub."""


class NoQuestionError(InputError):
    """A split has no question, or fewer than are asked for."""


class AnswerFormat(Protocol):
    """How an LM is led to an answer, and how its answers are read."""

    @property
    def scorer(self) -> str:
        """The answer rule: a key of haltwise.policy.answers.READERS."""

    @property
    def cue(self) -> str:
        """The words after a closed thought that lead the LM to its answer; they may be empty."""

    @property
    def answer_end(self) -> str:
        """The text that ends a forced answer, see `haltwise.Halting.answer_end`."""


class QuestionTask(AnswerFormat, Protocol):
    """A task: questions of one kind, which are asked, answered and scored alike."""

    @property
    def instruction(self) -> str:
        """The text that follows every question; it may be empty."""

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """Yields at most `num` distinct questions of a split, the same for the same arguments.

        Args:
            split: train, dev or test.
            num: The largest number of questions, at least 1.
            seed: The number of the draw.

        Raises:
            InputError: If there is no such split, `num` is below 1, or what was read cannot be
                asked.
        """

    def describe(self) -> str:
        """Returns one line for a person: what there is, and how it is asked.

        Raises:
            InputError: If what was read cannot be asked.
        """


def check_draw(split: str, num: int) -> None:
    """Refuses arguments of `QuestionTask.questions` that no task can take.

    Raises:
        InputError: If the split is unknown, or `num` is below 1.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if num < 1:
        raise InputError(f"num must be at least 1, got {num}")


def with_instruction(text: str, instruction: str) -> str:
    """Returns the whole of what an LM is asked: a question's text, and the instruction if any."""
    return f"{text}\n\n{instruction}" if instruction else text
