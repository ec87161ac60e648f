"""Forms of rows: how a question and its gold answer are read from one row."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from haltwise import InputError
from lms.sources.rows import Row
from lms.sources.task import DataConfig


@dataclass(frozen=True)
class Item:
    """What a row asks."""

    text: str
    """Without the instruction."""
    gold: str
    segment: str = ""


#: Reads a row; None if it has no answer and is to be skipped. A row of another form is an error.
Form = Callable[[Row], Item | None]


def cell(row: Row, column: str) -> Any:
    """One cell.

    Raises:
        InputError: If there is no such column.
    """
    if column not in row:
        raise InputError(f"no column {column!r}, found {', '.join(map(str, row))}")
    return row[column]


def words(row: Row, column: str) -> str:
    """A cell that is a text, stripped.

    Raises:
        InputError: If it is something else, or blank.
    """
    found = cell(row, column)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{column} is {found!r}, expected a text that is not blank")
    return found.strip()


def _scalar(found: Any, column: str) -> str:
    is_known = isinstance(found, str | int | float) and not isinstance(found, bool)
    if not is_known or (isinstance(found, float) and not math.isfinite(found)):
        raise InputError(f"{column} is {found!r}, expected a text or a number")
    return str(found).strip()


def _list(row: Row, column: str) -> list[str]:
    found = cell(row, column)
    if not isinstance(found, list) or not found:
        raise InputError(f"{column} is {found!r}, expected a list of texts")
    return [_scalar(one, column) for one in found]


def lettered(text: str, choices: Sequence[str]) -> str:
    """A question with its choices below, each with a letter.

    Raises:
        InputError: If there are fewer than 2 choices or more than letters.
    """
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise InputError(f"found {len(choices)} choices, expected 2 to 26")
    lines = (
        f"{letter}. {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    )
    return "\n".join([text, "", *lines])


def letter_of(answer: Any, choices: Sequence[str], labels: Sequence[str] | None = None) -> str:
    """The letter of the right choice.

    Args:
        answer: A label, the place of a choice as a number from 0, or its text.
        choices: In the order of their letters.
        labels: What the data calls them. Default: the letters.

    Raises:
        InputError: If the answer is none of them, or a place and the text of another choice.
    """
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool):
        by_place = letters[answer] if 0 <= answer < len(choices) else ""
        by_text = letters[choices.index(str(answer))] if str(answer) in choices else ""
        if by_place and by_text and by_place != by_text:
            raise InputError(
                f"the answer {answer} is a place and the text of another choice: expected a letter"
            )
        if by_place or by_text:
            return by_place or by_text
    for names in (labels or list(letters), choices):
        if isinstance(answer, str) and answer.strip() in names:
            return letters[list(names).index(answer.strip())]
    raise InputError(
        f"the answer is {answer!r}, expected a letter up to {letters[-1]}, a number from 0, or the "
        "text of a choice"
    )


@dataclass(frozen=True)
class Columns:
    """A person's own data: the columns are named by flags."""

    config: DataConfig

    def __call__(self, row: Row) -> Item:
        """Reads a row.

        Raises:
            InputError: If a column is missing, or a cell cannot be used.
        """
        config = self.config
        text = words(row, config.question_column)
        if config.context_column:
            text = f"{words(row, config.context_column)}\n\n{text}"
        answer = cell(row, config.answer_column)
        if config.choices_column:
            choices = _list(row, config.choices_column)
            text, answer = lettered(text, choices), letter_of(answer, choices)
        return Item(text, self._gold(answer), self._segment(row))

    def _gold(self, answer: Any) -> str:
        column = self.config.answer_column
        if not isinstance(answer, list):
            return _scalar(answer, column)
        if self.config.scorer not in ("text", "strict") and len(answer) != 1:
            raise InputError(f"{column} is {answer!r}, expected one answer, or --scorer text")
        return "\n".join(" ".join(_scalar(one, column).split()) for one in answer)

    def _segment(self, row: Row) -> str:
        column = self.config.segment_column
        found = cell(row, column) if column else None
        return "" if found is None else _scalar(found, str(column))


def gsm8k(row: Row) -> Item:
    """GSM8K: the number after #### is the answer."""
    answer = words(row, "answer")
    gold = answer.rpartition("####")[2]
    if gold == answer:
        raise InputError(f"answer is {answer!r}, expected a number after ####")
    return Item(words(row, "question"), gold.strip().replace(",", ""))


def math500(row: Row) -> Item:
    """MATH-500: a segment is a subject with its level."""
    segment = f"{words(row, 'subject')} {_scalar(cell(row, 'level'), 'level')}"
    return Item(words(row, "problem"), words(row, "answer"), segment)


def arc(row: Row) -> Item:
    """ARC: choices have labels, letters or numbers from 1."""
    found = cell(row, "choices")
    if not isinstance(found, dict):
        raise InputError(f"choices is {found!r}, expected an object with text and label")
    choices, labels = _list(found, "text"), _list(found, "label")
    if len(choices) != len(labels):
        raise InputError(f"found {len(choices)} choices with {len(labels)} labels")
    gold = letter_of(words(row, "answerKey"), choices, labels)
    return Item(lettered(words(row, "question"), choices), gold)


def mmlu_pro(row: Row) -> Item:
    """MMLU-Pro: up to ten choices; a segment is a category."""
    choices = _list(row, "options")
    gold = letter_of(words(row, "answer"), choices)
    return Item(lettered(words(row, "question"), choices), gold, words(row, "category"))


def squad(row: Row) -> Item | None:
    """SQuAD: a question about a text; without an answer there it is skipped."""
    answers = cell(row, "answers")
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        raise InputError(f"answers is {answers!r}, expected an object with a list named text")
    golds = [" ".join(_scalar(one, "answers").split()) for one in answers["text"]]
    text = f"{words(row, 'context')}\n\n{words(row, 'question')}"
    return Item(text, "\n".join(dict.fromkeys(golds))) if golds else None
