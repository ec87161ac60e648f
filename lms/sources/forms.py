"""Forms of rows: how a question and its gold answer are read from one row."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from haltwise import InputError
from haltwise.errors import option
from lms.sources.data_rows import DataRow
from lms.sources.task import DataConfig

# Numbers of more digits are told by their exponents.
_MOST_DIGITS = 50
# Characters of a segment: no trace has a longer one.
_LONGEST_SEGMENT = 1000


@dataclass(frozen=True)
class RowQuestion:
    """What a row of data asks."""

    text: str
    """The text of the question, without the instruction."""
    gold: str
    """The gold answer, or several, one a line."""
    segment: str = ""
    """The group of the question within its task; empty if there is none."""


#: Reads a row: None if it has no answer and is to be skipped. A row of another form raises an
#: `InputError`.
Form = Callable[[DataRow], RowQuestion | None]


class NoColumnError(InputError):
    """A row has no column of some name."""


def cell(row: DataRow, column: str) -> Any:
    """Returns one cell of a row.

    Raises:
        NoColumnError: If there is no such column.
    """
    if column not in row:
        raise NoColumnError(f"no column {column!r}, found {', '.join(map(str, row))}")
    return row[column]


def words(row: DataRow, column: str) -> str:
    """Returns a cell that holds a text, without outer blanks.

    Raises:
        InputError: If there is no such column, or the cell is blank or holds something else.
    """
    found = cell(row, column)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{column} is {found!r}, expected a text that is not blank")
    return whole(found, column).strip()


def whole(text: str, name: str) -> str:
    """Returns a text, or raises InputError if it has halves of characters: no file can have it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is {text!r:.80}, expected no half of a character") from None
    return text


def _scalar(found: Any, column: str) -> str:
    is_known = isinstance(found, str | int | float | Decimal) and not isinstance(found, bool)
    if not is_known or (isinstance(found, float) and not math.isfinite(found)):
        raise InputError(f"{column} is {found!r}, expected a text or a number")
    if isinstance(found, float | Decimal):
        return _digits(Decimal(str(found)))
    return whole(str(found), column).strip()


def _digits(number: Decimal) -> str:
    """Returns a number as people write it: 0.00001, and not 1e-05."""
    return f"{number:f}" if abs(number.adjusted()) < _MOST_DIGITS else str(number)


def _list(row: DataRow, column: str) -> list[str]:
    found = cell(row, column)
    if not isinstance(found, list) or not found:
        raise InputError(f"{column} is {found!r}, expected a list of texts")
    return [_scalar(one, column) for one in found]


def lettered(text: str, choices: Sequence[str]) -> str:
    """Returns a question with its choices below, each with a letter.

    Raises:
        InputError: If there are fewer than 2 choices, or more than there are letters.
    """
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise InputError(f"found {len(choices)} choices, expected 2 to 26")
    lines = (
        f"{letter}. {choice}"
        for letter, choice in zip(string.ascii_uppercase, choices, strict=False)
    )
    return "\n".join([text, "", *lines])


def letter_of(answer: Any, choices: Sequence[str], labels: Sequence[str] | None = None) -> str:
    """Returns the letter of the right choice.

    Args:
        answer: The label of the right choice, its place as a number from 0, or its text.
        choices: The texts of the choices, in the order of their letters.
        labels: The names that the data give the choices, which the answer is one of; None if it
            may be anything that names a choice.

    Raises:
        InputError: If the answer names no choice, or several.
    """
    letters = string.ascii_uppercase[: len(choices)]
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    told = str(answer).strip() if is_number or isinstance(answer, str) else None
    named = [labels] if labels else [letters, choices]
    found = {place for names in named for place, name in enumerate(names) if name == told}
    if is_number and not labels and 0 <= answer < len(choices):
        found.add(answer)
    if len(found) > 1:
        several = ", ".join(letters[place] for place in sorted(found))
        raise InputError(
            f"the answer {answer!r} names the choices {several}: expected a letter, a number from "
            "0 or a text that names one alone"
        )
    if found:
        return letters[found.pop()]
    raise InputError(
        f"the answer is {answer!r}, expected a letter up to {letters[-1]}, a number from 0, or the "
        "text of a choice"
    )


@dataclass(frozen=True)
class NamedColumns:
    """The form of a person's own data, whose columns are named by flags."""

    config: DataConfig

    def __call__(self, row: DataRow) -> RowQuestion:
        """Returns what a row asks.

        Raises:
            InputError: If a column is missing, or a cell cannot be used.
        """
        config = self.config
        for flag in ("question_column", "answer_column"):
            if (name := getattr(config, flag)) not in row:
                found = ", ".join(map(str, row))
                raise NoColumnError(
                    f"no column {name!r}, found {found}: expected it in every row, "
                    f"or {option(flag)} COLUMN"
                )
        text = words(row, config.question_column)
        if config.context_column:
            text = f"{words(row, config.context_column)}\n\n{text}"
        answer = cell(row, config.answer_column)
        if config.choices_column:
            choices = _list(row, config.choices_column)
            text, answer = lettered(text, choices), letter_of(answer, choices)
        return RowQuestion(text, self._gold(answer), self._segment(row))

    def _gold(self, answer: Any) -> str:
        column, is_any_line = self.config.answer_column, self.config.scorer in ("text", "strict")
        if not isinstance(answer, list):
            gold = _scalar(answer, column)
            return " ".join(gold.split()) if is_any_line else gold
        if not is_any_line and len(answer) != 1:
            raise InputError(f"{column} is {answer!r}, expected one answer, or --scorer text")
        return "\n".join(" ".join(_scalar(one, column).split()) for one in answer)

    def _segment(self, row: DataRow) -> str:
        column = self.config.segment_column
        found = cell(row, column) if column else None
        segment = "" if found is None else _scalar(found, str(column))
        if len(segment) > _LONGEST_SEGMENT:
            raise InputError(
                f"{column} is {segment:.40} ..., of {len(segment):,} characters, expected at most "
                f"{_LONGEST_SEGMENT:,}"
            )
        return segment


def gsm8k(row: DataRow) -> RowQuestion:
    """Reads a row of GSM8K, where the number after #### is the answer."""
    answer = words(row, "answer")
    gold = answer.rpartition("####")[2]
    if gold == answer:
        raise InputError(f"answer is {answer!r}, expected a number after ####")
    return RowQuestion(words(row, "question"), gold.strip().replace(",", ""))


def math500(row: DataRow) -> RowQuestion:
    """Reads a row of MATH-500; its segment is the subject with the level."""
    segment = f"{words(row, 'subject')} {_scalar(cell(row, 'level'), 'level')}"
    return RowQuestion(words(row, "problem"), words(row, "answer"), segment)


def arc(row: DataRow) -> RowQuestion:
    """Reads a row of ARC, where choices have labels: letters, or numbers from 1."""
    found = cell(row, "choices")
    if not isinstance(found, dict):
        raise InputError(f"choices is {found!r}, expected an object with text and label")
    choices, labels = _list(found, "text"), _list(found, "label")
    if len(choices) != len(labels):
        raise InputError(f"found {len(choices)} choices with {len(labels)} labels")
    gold = letter_of(words(row, "answerKey"), choices, labels)
    return RowQuestion(lettered(words(row, "question"), choices), gold)


def mmlu_pro(row: DataRow) -> RowQuestion:
    """Reads a row of MMLU-Pro, with up to ten choices; its segment is the category."""
    choices = _list(row, "options")
    gold = letter_of(words(row, "answer"), choices, string.ascii_uppercase[: len(choices)])
    return RowQuestion(lettered(words(row, "question"), choices), gold, words(row, "category"))


def squad(row: DataRow) -> RowQuestion | None:
    """Reads a row of SQuAD: a question about a text, skipped if the text does not answer it."""
    answers = cell(row, "answers")
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        raise InputError(f"answers is {answers!r}, expected an object with a list named text")
    golds = [" ".join(_scalar(one, "answers").split()) for one in answers["text"]]
    text = f"{words(row, 'context')}\n\n{words(row, 'question')}"
    return RowQuestion(text, "\n".join(dict.fromkeys(golds))) if golds else None
