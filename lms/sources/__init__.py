"""The tasks that can be asked: where their questions come from, and how a person names them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from haltwise import InputError
from haltwise.errors import option
from lms.hub_names import is_hub_name, nearby
from lms.questions import Question
from lms.scorers import check_scorer, scorer_of
from lms.sources.builtin import BUILT_INS
from lms.sources.data_rows import FORMATS, DataRows, rows_of, rows_of_hub
from lms.sources.forms import NamedColumns, whole
from lms.sources.gym_task import PREFIX, ReasoningGymTask
from lms.sources.table_task import TableTask
from lms.sources.task import AnswerFormat, DataConfig, NoQuestionError, QuestionTask
from lms.tasks import TASKS, each_question

__all__ = ["AnswerFormat", "DataConfig", "NoQuestionError", "QuestionTask", "open_task"]

_COLUMNS = tuple(field.name for field in fields(DataConfig) if field.name.endswith("_column"))


@dataclass(frozen=True)
class ProceduralTask:
    """A task, or all tasks, of the embedded LM: its questions are asked as it has learned them."""

    name: str
    scorer = "short"
    instruction = ""
    cue = ""
    answer_end = ""

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """Draws `num` distinct questions of a split, the same for the same arguments.

        Raises:
            InputError: If there is no such split, or `num` is below 1.
        """
        return each_question(self.name, split, num, seed)

    def describe(self) -> str:
        """Returns one line for a person: what there is, and how it is asked."""
        return f"{self.name}: drawn without end; scorer {self.scorer}; no instruction"


def open_task(config: DataConfig) -> QuestionTask:
    """Returns the task that a person has named; its data are read once a process.

    Args:
        config: The settings, which may be those of a subclass.

    Raises:
        InputError: If there is no such task, a flag is not for it, or its data cannot be read.
    """
    return _open(
        DataConfig(**{field.name: getattr(config, field.name) for field in fields(DataConfig)})
    )


@lru_cache(maxsize=4)
def _open(config: DataConfig) -> QuestionTask:
    if config.scorer is not None:
        check_scorer(config.scorer)
    name = config.task
    if name == "all" or name in TASKS:
        _refuse(config, "scorer", "instruction", "data_file", *_COLUMNS)
        return ProceduralTask(name)
    if name.startswith(PREFIX):
        _refuse(config, "data_file", *_COLUMNS)
        return ReasoningGymTask(name.removeprefix(PREFIX), *_asking(config, "short"))
    if name in BUILT_INS:
        return _built_in(config)
    return _own(config)


def _built_in(config: DataConfig) -> QuestionTask:
    _refuse(config, *(column for column in _COLUMNS if column != "split_column"))
    known = BUILT_INS[config.task]
    scorer, instruction = _asking(config, known.scorer)
    rows = _rows(config, known.hub)
    table = (known.rename(rows), known.form, config.split_column)
    return TableTask(config.task, scorer, instruction, *table)


def _own(config: DataConfig) -> QuestionTask:
    path, name = Path(config.task), config.task
    if not name.strip():
        raise InputError("--task names no task, expected a built-in one, or a file of questions")
    if path.suffix.lower() in FORMATS or path.exists():
        _refuse(config, "data_file")
        rows = rows_of(path, bool(config.split_column))
        name = whole(path.resolve().stem, "--task")
    elif is_hub_name(name.partition(":")[0]):
        rows = _rows(config, name)
    else:
        known = ", ".join(("all", *TASKS, *BUILT_INS))
        raise InputError(
            f"unknown task {name!r}: choose from {known}, {PREFIX}NAME, a file or folder, or "
            f"OWNER/NAME of the hub{nearby(name)}"
        )
    scorer, instruction = _asking(config, "choice" if config.choices_column else "short")
    return TableTask(name, scorer, instruction, rows, NamedColumns(config), config.split_column)


def _rows(config: DataConfig, hub: str) -> DataRows:
    """Returns the rows of a data set of the hub, from the file that stands for it if one does."""
    if config.data_file:
        return rows_of(Path(config.data_file), bool(config.split_column))
    return rows_of_hub(hub)


def _asking(config: DataConfig, usual: str) -> tuple[str, str]:
    """Returns the scorer and the instruction of a task: those stated, else the usual ones.

    Raises:
        InputError: If the scorer is unknown, or lacks a package.
    """
    scorer = config.scorer or usual
    check_scorer(scorer)
    instruction = config.instruction
    return scorer, scorer_of(scorer).instruction if instruction is None else instruction


def _refuse(config: DataConfig, *names: str) -> None:
    """Refuses flags that say nothing about a task.

    Raises:
        InputError: If one of these flags is set.
    """
    for name in names:
        if getattr(config, name) != getattr(DataConfig, name):
            raise InputError(
                f"{option(name)} is not for task {config.task}: expected it to be left out"
            )
