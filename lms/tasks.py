"""Procedurally generated questions for the embedded LM: additions and subtractions within 0..29.

sum   7 + 8 - 5 ...            the forced answers are calibrated, the length varies widely
let   c = b + 4 , a = 7 , ...  the LM is confidently wrong until it has checked itself
leap  7 + 14 - 9 ...           large steps: attempts rarely agree, so giving up often pays
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from haltwise import InputError
from lms.questions import SPLITS, Question, question_digest, split_of

LIMIT = 30
"""Every total of a question is at least 0 and below this number."""
LETTERS = "abcdefg"


@dataclass(frozen=True)
class _QuestionKind:
    """What the questions of one task look like."""

    operands: range
    """The numbers that are added or subtracted; a question never uses one twice."""
    segments: dict[str, tuple[int, int]]
    """The fewest and the most operations of a question, by segment."""


_KINDS = {
    "sum": _QuestionKind(range(1, 10), {"short": (2, 3), "medium": (4, 6), "long": (7, 9)}),
    "let": _QuestionKind(range(1, 10), {"short": (2, 3), "long": (4, 6)}),
    "leap": _QuestionKind(range(5, 15), {"short": (3, 5), "long": (6, 9)}),
}
TASKS = tuple(_KINDS)


def apply(total: int, operator: str, operand: int) -> int:
    """Returns what an operator, + or -, makes of a total and an operand."""
    return total + operand if operator == "+" else total - operand


def _chain(
    operands: range, length: int, rng: np.random.Generator
) -> tuple[int, list[tuple[str, int]], int]:
    """Draws a start and operations that never leave 0..29.

    Args:
        operands: The numbers to draw the operands from.
        length: The number of operations.
        rng: Decides on all of it; it is moved on.

    Returns:
        The start, the operator and operand of each operation, and the final total.
    """
    numbers = [int(n) for n in rng.permutation(operands)[:length]]
    # A number tells where in its question it stands, and so no number is there twice.
    start = int(rng.choice([n for n in range(LIMIT) if n not in numbers]))
    total, steps = start, []
    for number in numbers:
        allowed = [op for op in "+-" if 0 <= apply(total, op, number) < LIMIT]
        operator = str(rng.choice(allowed))
        total = apply(total, operator, number)
        steps.append((operator, number))
    return start, steps, total


def _body(task: str, start: int, steps: list[tuple[str, int]], rng: np.random.Generator) -> str:
    if task != "let":
        return " ".join([str(start), *(f"{operator} {n}" for operator, n in steps)])
    lines = [f"{LETTERS[0]} = {start}"]
    lines += [
        f"{name} = {before} {operator} {n}"
        for before, name, (operator, n) in zip(LETTERS, LETTERS[1:], steps, strict=False)
    ]
    shuffled = " , ".join(lines[i] for i in rng.permutation(len(lines)))
    return f"{shuffled} ; {LETTERS[len(steps)]}"


def draw(task: str, rng: np.random.Generator) -> Question:
    """Draws one question of any split; all segments are equally likely.

    Args:
        task: One of `TASKS`.
        rng: Decides on the question; it is moved on.
    """
    kind = _KINDS[task]
    segment = str(rng.choice(list(kind.segments)))
    low, high = kind.segments[segment]
    start, steps, gold = _chain(kind.operands, int(rng.integers(low, high + 1)), rng)
    text = f"{task} : {_body(task, start, steps, rng)}"
    # A question's name, and so its split, comes from what the LM reads: the LM's weights have
    # learned from the train split of these names.
    digest = question_digest(f"{text} <think>")
    return Question(f"{task}-{digest[:16]}", task, segment, text, str(gold), split_of(digest))


def questions(task: str, split: str, num: int, seed: int = 0) -> list[Question]:
    """Returns the questions that `each_question` yields, as a list.

    Args:
        task: One of `TASKS`, or "all" for every task in turn.
        split: train, dev or test.
        num: The number of questions, at least 1.
        seed: The number of the draw.

    Raises:
        InputError: If the task or the split is unknown, or `num` is below 1.
    """
    return list(each_question(task, split, num, seed))


def each_question(task: str, split: str, num: int, seed: int = 0) -> Iterator[Question]:
    """Draws distinct questions of one split, one by one; the same arguments give the same ones.

    Args:
        task: One of `TASKS`, or "all" for every task in turn.
        split: train, dev or test.
        num: The number of questions, at least 1.
        seed: The number of the draw; two draws may share questions, two splits never do.

    Raises:
        InputError: If the task or the split is unknown, or `num` is below 1.
    """
    if task != "all" and task not in TASKS:
        raise InputError(f"unknown task {task!r}: choose from {', '.join(TASKS)}, all")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if num < 1:
        raise InputError(f"num must be at least 1, got {num}")
    tasks = TASKS if task == "all" else (task,)
    rngs = {name: np.random.default_rng([seed, TASKS.index(name)]) for name in tasks}
    found: set[str] = set()
    while len(found) < num:
        name = tasks[len(found) % len(tasks)]
        question = draw(name, rngs[name])
        if question.split == split and question.question_id not in found:
            found.add(question.question_id)
            yield question
