"""Where questions come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

from haltwise import InputError
from lms.questions import Question
from lms.scorers import check_scorer, scorer_of
from lms.sources.builtin import BUILT_INS
from lms.sources.forms import Columns
from lms.sources.gym import PREFIX, Gym
from lms.sources.rows import FORMATS, rows_of, rows_of_hub
from lms.sources.table import Table
from lms.sources.task import Answered, DataConfig, Task
from lms.tasks import TASKS, each_question

__all__ = ["Answered", "DataConfig", "Task", "open_task"]

_COLUMNS = tuple(field.name for field in fields(DataConfig) if field.name.endswith("_column"))


@dataclass(frozen=True)
class Procedural:
    """The embedded LM's own questions, asked as it has learned them."""

    name: str
    scorer = "short"
    instruction = ""
    cue = ""
    answer_end = ""

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """See `Task`."""
        return each_question(self.name, split, num, seed)

    def describe(self) -> str:
        """See `Task`."""
        return f"{self.name}: drawn without end; scorer {self.scorer}; no instruction"


def open_task(config: DataConfig) -> Task:
    """The task that a person has named; its data are read once a process.

    Raises:
        InputError: If there is no such task, a flag is not for it, or its data cannot be read.
    """
    return _open(
        DataConfig(**{field.name: getattr(config, field.name) for field in fields(DataConfig)})
    )


@lru_cache(maxsize=4)
def _open(config: DataConfig) -> Task:
    if config.scorer is not None:
        check_scorer(config.scorer)
    name = config.task
    if name == "all" or name in TASKS:
        _refuse(config, "scorer", "instruction", "data_file", *_COLUMNS)
        return Procedural(name)
    if name.startswith(PREFIX):
        _refuse(config, "data_file", *_COLUMNS)
        return Gym(name.removeprefix(PREFIX), *_asking(config, "short"))
    if name in BUILT_INS:
        return _built_in(config)
    return _own(config)


def _built_in(config: DataConfig) -> Task:
    _refuse(config, *(column for column in _COLUMNS if column != "split_column"))
    known = BUILT_INS[config.task]
    scorer, instruction = _asking(config, known.scorer)
    rows = rows_of(Path(config.data_file)) if config.data_file else rows_of_hub(known.hub)
    table = (known.rename(rows), known.form, config.split_column)
    return Table(config.task, scorer, instruction, *table)


def _own(config: DataConfig) -> Task:
    path, name = Path(config.task), config.task
    if path.suffix.lower() in FORMATS or path.exists():
        _refuse(config, "data_file")
        name, rows = path.resolve().stem, rows_of(path)
    elif "/" in name:
        rows = rows_of(Path(config.data_file)) if config.data_file else rows_of_hub(name)
    else:
        known = ", ".join(("all", *TASKS, *BUILT_INS))
        raise InputError(
            f"unknown task {name!r}: choose from {known}, {PREFIX}NAME, a file or folder, or "
            "OWNER/NAME of the hub"
        )
    scorer, instruction = _asking(config, "choice" if config.choices_column else "short")
    return Table(name, scorer, instruction, rows, Columns(config), config.split_column)


def _asking(config: DataConfig, usual: str) -> tuple[str, str]:
    """Scorer and instruction, a person's word first."""
    scorer = config.scorer or usual
    check_scorer(scorer)
    instruction = config.instruction
    return scorer, scorer_of(scorer).instruction if instruction is None else instruction


def _refuse(config: DataConfig, *names: str) -> None:
    """Refuses flags that say nothing about a task.

    Raises:
        InputError: If one of them is set.
    """
    for name in names:
        if getattr(config, name) != getattr(DataConfig, name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is not for task {config.task}: expected it to be left out")
