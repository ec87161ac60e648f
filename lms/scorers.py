"""Comparing an answer with the gold answer."""

from __future__ import annotations

from collections.abc import Callable

from haltwise import InputError
from haltwise.answers import canonical


def short(answer: str, gold: str) -> bool:
    """Says whether an answer equals the gold answer, both in canonical spelling.

    Args:
        answer: as returned by `read_answer`; "" is never right.
        gold: the reference answer.

    Raises:
        InputError: the gold answer is empty.
    """
    wanted = canonical(gold)
    if not wanted:
        raise InputError(f"gold answer {gold!r} is empty: expected a reference answer")
    return canonical(answer) == wanted


#: By answer rule (see haltwise.answers.READERS): compares what was read with the gold answer.
SCORERS: dict[str, Callable[[str, str], bool]] = {"short": short}
