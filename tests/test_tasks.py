"""The generated questions."""

from __future__ import annotations

import numpy as np
import pytest

from lms.answers import canonical
from lms.tasks import SPLITS, TASKS, apply, draw, questions


@pytest.mark.parametrize(
    ("value", "operator", "operand", "expected"),
    [(7, "+", 12, 0), (3, "-", 11, 11), (12, "*", 9, 13), (18, "+", 18, 17), (0, "-", 1, 18)],
)
def test_arithmetic_modulo_19(value: int, operator: str, operand: int, expected: int) -> None:
    assert apply(value, operator, operand) == expected


@pytest.mark.parametrize("task", [*TASKS, "all"])
def test_questions_are_distinct_and_well_formed(task: str) -> None:
    found = questions(task, "train", 90)
    assert len({q.question_id for q in found}) == len({q.prompt for q in found}) == 90
    for question in found:
        assert question.prompt.startswith(f"{question.task} mod19 : ")
        assert question.prompt.endswith(" <think>")
        assert question.split == "train"
        assert question.gold == canonical(question.gold)
        assert 0 <= int(question.gold) < 19


def test_gold_of_a_sum_is_its_value_modulo_19() -> None:
    for question in questions("sum", "dev", 50):
        body = question.prompt.removeprefix("sum mod19 : ").removesuffix(" <think>")
        words = body.split()
        signs = [1, *(1 if w == "+" else -1 for w in words[1::2])]
        total = sum(s * int(n) for s, n in zip(signs, words[::2], strict=True))
        assert int(question.gold) == total % 19


def test_gold_of_a_product_is_its_value_modulo_19() -> None:
    for question in questions("product", "dev", 50):
        numbers = [int(w) for w in question.prompt.split() if w.isdigit()]
        assert int(question.gold) == int(np.prod(numbers, dtype=object)) % 19


def test_gold_of_a_let_is_the_value_of_its_last_letter() -> None:
    for question in questions("let", "dev", 50):
        body, _, wanted = question.prompt[len("let mod19 : ") : -len(" <think>")].partition(" ; ")
        values: dict[str, int] = {}
        for line in sorted(body.split(" , ")):
            name, _, right = line.partition(" = ")
            values[name] = int(eval(right, {}, values))
        assert int(question.gold) == values[wanted] % 19


def test_splits_are_disjoint_whatever_the_seed() -> None:
    prompts = [
        {q.prompt for seed in (0, 1) for q in questions("all", split, 150, seed)}
        for split in SPLITS
    ]
    for i in range(3):
        assert not prompts[i] & prompts[i - 1]


def test_same_arguments_same_questions_and_another_seed_others() -> None:
    assert questions("let", "test", 40, seed=3) == questions("let", "test", 40, seed=3)
    assert questions("let", "test", 40, seed=3) != questions("let", "test", 40, seed=4)


def test_all_mixes_the_tasks_evenly() -> None:
    found = questions("all", "test", 31)
    counts = [sum(q.task == task for q in found) for task in TASKS]
    assert max(counts) - min(counts) <= 1
    assert [q.task for q in found[: len(TASKS)]] == list(TASKS)


def test_no_answer_is_common_enough_to_guess() -> None:
    golds = [q.gold for q in questions("all", "train", 600)]
    assert max(golds.count(g) for g in set(golds)) < 0.12 * len(golds)


def test_drawing_covers_every_split() -> None:
    rng = np.random.default_rng(0)
    assert {draw("sum", rng).split for _ in range(100)} == set(SPLITS)


@pytest.mark.parametrize(
    ("task", "split", "num", "message"),
    [
        ("gcd", "test", 1, "sum, let, product, all"),
        ("sum", "validation", 1, "train, dev, test"),
        ("sum", "test", 0, "at least 1"),
    ],
)
def test_bad_arguments(task: str, split: str, num: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        questions(task, split, num)
