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
from lms.questions import SPLITS, Question, digest_of, split_of

LIMIT = 30
"""Every total is at least 0 and below this."""
LETTERS = "abcdefg"


@dataclass(frozen=True)
class _Kind:
    """What the questions of one task look like."""

    operands: range
    """What is added or subtracted; a question never uses one twice."""
    segments: dict[str, tuple[int, int]]
    """Fewest and most operations of each segment."""


_KINDS = {
    "sum": _Kind(range(1, 10), {"short": (2, 3), "medium": (4, 6), "long": (7, 9)}),
    "let": _Kind(range(1, 10), {"short": (2, 3), "long": (4, 6)}),
    "leap": _Kind(range(5, 15), {"short": (3, 5), "long": (6, 9)}),
}
TASKS = tuple(_KINDS)


def apply(total: int, operator: str, operand: int) -> int:
    """Returns `total operator operand` for the operators + and -."""
    return total + operand if operator == "+" else total - operand


def _chain(
    operands: range, length: int, rng: np.random.Generator
) -> tuple[int, list[tuple[str, int]], int]:
    """Draws a start, `length` operations that never leave 0..29, and where they lead."""
    numbers = [int(n) for n in rng.permutation(operands)[:length]]
    # A number tells where in its question it stands, so none is there twice.
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
    """Draws one question of any split; its segment is uniform.

    Args:
        task: one of TASKS.
        rng: moved on by the draw.
    """
    kind = _KINDS[task]
    segment = str(rng.choice(list(kind.segments)))
    low, high = kind.segments[segment]
    start, steps, gold = _chain(kind.operands, int(rng.integers(low, high + 1)), rng)
    text = f"{task} : {_body(task, start, steps, rng)}"
    # Named by what the LM reads: its weights have learned from that train split.
    digest = digest_of(f"{text} <think>")
    return Question(f"{task}-{digest[:16]}", task, segment, text, str(gold), split_of(digest))


def questions(task: str, split: str, num: int, seed: int = 0) -> list[Question]:
    """Draws distinct questions of one split; the same arguments give the same list.

    Arguments and errors are those of `each_question`.
    """
    return list(each_question(task, split, num, seed))


def each_question(task: str, split: str, num: int, seed: int = 0) -> Iterator[Question]:
    """Draws the same as `questions`, one by one.

    Args:
        task: one of TASKS, or "all" for every task in turn.
        split: train, dev or test.
        num: how many questions, at least 1.
        seed: which draw; two seeds may share questions, two splits never do.

    Raises:
        InputError: unknown task or split, or num below 1.
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
