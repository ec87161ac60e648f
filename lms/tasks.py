"""Procedurally generated questions for the embedded LM, in arithmetic modulo 13.

sum      7 + 12 - 5 ...            the forced answers are calibrated, the length varies widely
let      c = b + 4 , a = 7 , ...   the LM is confidently wrong until it has checked itself
product  3 * 7 * 11 ...            attempts rarely agree, so giving up often pays
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MODULUS = 13
LETTERS = "abcdefgh"
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Question:
    """One question: what the LM reads, the answer it should give, and where it belongs."""

    question_id: str
    """Unique and stable: the same text has the same id."""
    task: str
    """One of TASKS."""
    segment: str
    """Difficulty group within the task."""
    prompt: str
    """The LM's whole input; ends with the "<think>" marker."""
    gold: str
    """Canonical answer."""
    split: str
    """train, dev or test, decided by the prompt alone."""


def apply(value: int, operator: str, operand: int) -> int:
    """Returns `value operator operand` modulo 13, for the operators +, - and *."""
    if operator == "*":
        return value * operand % MODULUS
    return (value + operand if operator == "+" else value - operand) % MODULUS


def _fold(value: int, steps: Sequence[tuple[str, int]]) -> int:
    for operator, operand in steps:
        value = apply(value, operator, operand)
    return value


def _numbers(rng: np.random.Generator, num: int) -> list[int]:
    """Distinct, so that a number tells where in its question it stands; never 0."""
    return [int(n) for n in rng.permutation(np.arange(1, MODULUS))[:num]]


def _sum(rng: np.random.Generator, length: int) -> tuple[str, int]:
    value, *operands = _numbers(rng, length + 1)
    steps = [(str(rng.choice(["+", "-"])), n) for n in operands]
    return " ".join([str(value), *(f"{op} {n}" for op, n in steps)]), _fold(value, steps)


def _let(rng: np.random.Generator, length: int) -> tuple[str, int]:
    value, *operands = _numbers(rng, length + 1)
    steps = [(str(rng.choice(["+", "-"])), n) for n in operands]
    lines = [f"{LETTERS[0]} = {value}"]
    lines += [
        f"{LETTERS[i + 1]} = {LETTERS[i]} {op} {n}" for i, (op, n) in enumerate(steps)
    ]
    shuffled = " , ".join(lines[i] for i in rng.permutation(len(lines)))
    return f"{shuffled} ; {LETTERS[length]}", _fold(value, steps)


def _product(rng: np.random.Generator, length: int) -> tuple[str, int]:
    value, *operands = _numbers(rng, length + 1)
    return " * ".join(map(str, [value, *operands])), _fold(value, [("*", n) for n in operands])


_WRITERS: dict[str, Callable[[np.random.Generator, int], tuple[str, int]]] = {
    "sum": _sum,
    "let": _let,
    "product": _product,
}
# Number of operations, lowest and highest, of each segment.
_SEGMENTS: dict[str, dict[str, tuple[int, int]]] = {
    "sum": {"short": (2, 4), "medium": (5, 8), "long": (9, 11)},
    "let": {"short": (2, 3), "long": (4, 6)},
    "product": {"short": (3, 5), "long": (6, 9)},
}
TASKS = tuple(_WRITERS)


def draw(task: str, rng: np.random.Generator) -> Question:
    """Draws one question of any split; its segment is uniform.

    Args:
        task: one of TASKS.
        rng: moved on by the draw.
    """
    segments = _SEGMENTS[task]
    segment = str(rng.choice(list(segments)))
    low, high = segments[segment]
    body, gold = _WRITERS[task](rng, int(rng.integers(low, high + 1)))
    prompt = f"{task} mod13 : {body} <think>"
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    # The text alone decides the split, so no draw can put one question in two of them.
    split = {0: "test", 1: "dev"}.get(int(digest, 16) % 10, "train")
    return Question(f"{task}-{digest[:16]}", task, segment, prompt, str(gold), split)


def questions(task: str, split: str, num: int, seed: int = 0) -> list[Question]:
    """Draws distinct questions of one split; the same arguments give the same list.

    Args:
        task: one of TASKS, or "all" for every task in turn.
        split: train, dev or test.
        num: how many questions, at least 1.
        seed: which draw; two seeds may share questions, two splits never do.

    Raises:
        ValueError: unknown task or split, or num below 1.
    """
    if task != "all" and task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}, all")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    tasks = TASKS if task == "all" else (task,)
    rngs = {name: np.random.default_rng([seed, TASKS.index(name)]) for name in tasks}
    found: dict[str, Question] = {}
    while len(found) < num:
        name = tasks[len(found) % len(tasks)]
        question = draw(name, rngs[name])
        if question.split == split:
            found.setdefault(question.question_id, question)
    return list(found.values())
