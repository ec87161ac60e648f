"""The generated questions."""

from __future__ import annotations

import numpy as np
import pytest

from haltwise.policy.answers import canonical
from lms.embedded import prompt_of
from lms.questions import SPLITS
from lms.tasks import LIMIT, TASKS, apply, draw, each_question, questions


def test_apply() -> None:
    assert apply(7, "+", 12) == 19
    assert apply(7, "-", 5) == 2


@pytest.mark.parametrize("task", [*TASKS, "all"])
def test_questions_are_distinct_and_well_formed(task: str) -> None:
    found = questions(task, "train", 90)
    assert len({q.question_id for q in found}) == len({prompt_of(q) for q in found}) == 90
    for question in found:
        assert prompt_of(question).startswith(f"{question.task} : ")
        assert prompt_of(question).endswith(" <think>")
        assert question.split == "train"
        assert question.gold == canonical(question.gold)
        numbers = [w for w in prompt_of(question).split() if w.isdigit()]
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("task", ["sum", "leap"])
def test_gold_of_a_chain_is_its_value_and_no_total_leaves_the_limit(task: str) -> None:
    for question in questions(task, "dev", 50):
        words = prompt_of(question).split()[2:-1]
        signs = [1, *(1 if w == "+" else -1 for w in words[1::2])]
        totals = np.cumsum([s * int(n) for s, n in zip(signs, words[::2], strict=True)])
        assert question.gold == str(totals[-1])
        assert totals.min() >= 0
        assert totals.max() < LIMIT


def test_gold_of_a_let_is_the_value_of_its_last_letter() -> None:
    for question in questions("let", "dev", 50):
        body, _, wanted = prompt_of(question)[len("let : ") : -len(" <think>")].partition(" ; ")
        values: dict[str, int] = {}
        for line in sorted(body.split(" , ")):
            name, _, right = line.partition(" = ")
            first, *more = right.split()
            values[name] = values[first] if more else int(first)
            if more:
                values[name] += int(more[1]) if more[0] == "+" else -int(more[1])
        assert question.gold == str(values[wanted])


def test_segments_differ_in_length() -> None:
    found = questions("sum", "train", 120)
    lengths = {
        segment: {
            prompt_of(q).count("+") + prompt_of(q).count("-") for q in found if q.segment == segment
        }
        for segment in ("short", "medium", "long")
    }
    assert lengths == {"short": {2, 3}, "medium": {4, 5, 6}, "long": {7, 8, 9}}


def test_splits_are_disjoint_whatever_the_seed() -> None:
    prompts = [
        {prompt_of(q) for seed in (0, 1) for q in questions("all", split, 150, seed)}
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
        ("gcd", "test", 1, "sum, let, leap, all"),
        ("sum", "validation", 1, "train, dev, test"),
        ("sum", "test", 0, "at least 1"),
    ],
)
def test_bad_arguments(task: str, split: str, num: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        questions(task, split, num)


def test_questions_are_drawn_one_by_one() -> None:
    endless = each_question("all", "dev", 10**12)
    assert [next(endless) for _ in range(7)] == questions("all", "dev", 7)
