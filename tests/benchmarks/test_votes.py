"""Several thoughts of one question, halted jointly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthetic import synthetic_traces
from benchmarks.votes import (
    Said,
    VotesConfig,
    measure,
    said_by,
    self_consistency,
    until_settled,
    voting,
)
from haltwise import InputError
from runs import Learned, Run
from tests.heads import random_head
from traces import Traces

# Two thoughts, with a look of 1 token at each answer: "a" at 10, then "b" at 20 and at the end, 30;
# and "b" at 15 and at the end, 40.
FIRST = [Said(10, 11, "a", 2.0, False), Said(20, 22, "b", 1.0, True), Said(30, 32, "b", 3.0, True)]
SECOND = [Said(15, 16, "b", 1.5, True), Said(40, 41, "b", 2.5, True)]


def test_a_vote_side_by_side_by_hand() -> None:
    """At 10, 15, 20, 30 and 40 tokens; a thought that has ended costs no more."""
    found = voting([FIRST, SECOND], in_turn=False)
    assert found.lead.tolist() == [2.0, 0.5, 2.5, 4.5, 5.5]
    assert found.right.tolist() == [False, False, True, True, True]
    spent = [11 + 10, 15 + 1 + 16, 22 + 20 + 1, 32 + 31, 32 + 41]
    assert found.cost.tolist() == spent
    right, cost = found.at(np.array([1.0, 2.0, 4.0, 9.0]))
    assert right.tolist() == [False, True, True, True]
    assert cost.tolist() == [spent[0], spent[2], spent[3], spent[4]]


def test_a_vote_in_turn_by_hand() -> None:
    found = voting([FIRST, SECOND], in_turn=True)
    assert found.lead.tolist() == [2.0, 1.0, 3.0, 4.5, 5.5]
    assert found.cost.tolist() == [11, 22, 32, 32 + 16, 32 + 41]
    unread = voting([[Said(5, 6, "", 0.0, False), *FIRST]], in_turn=True)
    assert unread.lead[0] == -np.inf and unread.right.tolist()[0] is False


def test_self_consistency_takes_the_answer_of_most(make_traces: Callable[..., Traces]) -> None:
    traces = make_traces([{}] * 4)
    answers, right = np.array(["7", "8", "8", ""]), np.array([True, False, False, False])
    traces = replace(traces, full_answer=answers, final_correct=right)
    assert self_consistency(traces, [0, 1, 2]) == (False, 1800)
    assert self_consistency(traces, [0, 1]) == (True, 1200)  # the earliest of two
    assert self_consistency(traces, [3, 0]) == (True, 1200)  # one that could be read
    said = said_by(traces, 0, np.arange(12.0), np.arange(4.0) + 9)
    assert [(one.tokens, one.spent, one.weight) for one in said] == [
        (100, 110, 0.0),
        (250, 272, 1.0),
        (400, 433, 2.0),
        (600, 633, 9.0),
    ]


def test_a_thought_that_is_halted_alone_says_no_more(make_traces: Callable[..., Traces]) -> None:
    traces = make_traces([{}])
    halts = np.array([False, True, True])
    said = said_by(traces, 0, np.ones(3), np.ones(1), halts)
    assert [one.spent for one in said] == [110, 272]


def test_no_thought_begins_that_cannot_change_the_answer() -> None:
    """Two of three are most; of three answers the earliest one holds, unless it is not read."""
    third = [Said(50, 55, "a", 1.0, False)]
    assert until_settled([SECOND, FIRST, third]) == (True, 41 + 32)
    assert until_settled([FIRST[:1], SECOND, third]) == (False, 11 + 41 + 55)
    assert until_settled([FIRST[:1], SECOND]) == (False, 11 + 41)
    assert until_settled([[Said(5, 6, "", 1.0, False)], SECOND]) == (True, 6 + 41)
    assert until_settled([[Said(5, 6, "", 1.0, False)]]) == (False, 6)


def test_wrong_answers_that_agree_outvote_a_right_one(
    make_traces: Callable[..., Traces], tmp_path: Path
) -> None:
    """What a labelled trace ends with is read from its file, where it stands."""
    ends = [{"final_answer": name, "final_correct": name == "42"} for name in ("42", "8", "8")]
    rows = [{"question_id": f"q{n}", **end} for n in range(5) for end in ends]
    traces = make_traces([row | {"seed": n} for n, row in enumerate(rows)])
    found = measure(traces, tmp_path / "made.parquet", VotesConfig(drops=(0.1,)))
    change = {one.name: one.median for one in found}["one thought to its end: EM change"]
    assert change == pytest.approx(100 / 3)  # of three thoughts two say 8, and that is wrong


def test_test_questions_are_judged_by_numbers_of_the_others(
    make_traces: Callable[..., Traces], tmp_path: Path
) -> None:
    """In train the first answers are right as the last ones are, in test they are not."""
    rows = [
        {
            "question_id": f"{split}{n // 3}",
            "split": split,
            "seed": n,
            "answer": ["7"] * 3,
            "correct": [split == "train"] * 3,
            "final_answer": "8",
        }
        for split in ("train", "test")
        for n in range(15)
    ]
    traces = make_traces(rows)
    found = measure(traces, tmp_path / "made.parquet", VotesConfig(drops=(1e-9,)))
    change = {one.name: one.median for one in found if "EM change" in one.name}
    name = "in turn, each halted alone, until settled, 0.0 points may be lost: EM change"
    assert change[name] == -100


@pytest.mark.whole
def test_thoughts_that_agree_cost_less_jointly_than_to_their_ends() -> None:
    traces = synthetic_traces(600)
    asked = np.array([f"q{n // 3}" for n in range(len(traces))])
    traces = replace(traces, question_id=asked)
    found = {one.name: one.median for one in measure(traces, None, VotesConfig(drops=(0.05,)))}
    assert found["in turn to their ends, until settled: EM change"] == 0
    for name in (
        "in turn, each halted alone, until settled",
        "side by side, halted by their lead",
        "in turn, halted by their lead",
    ):
        assert found[f"{name}, 5.0 points may be lost: saving"] > 10
    with pytest.raises(InputError, match="9 of each question and LM"):
        measure(traces, None, VotesConfig(num_thoughts=9))


def test_a_run_halts_thoughts_alone_at_its_prices(
    make_traces: Callable[..., Traces], tmp_path: Path
) -> None:
    """At a high price all are halted at their first looks, and two that agree are enough."""
    head = random_head(1)
    always = head.weights | {"w2": 0 * head.weights["w2"], "b2": np.ones(1, dtype=np.float32)}
    type(head)(head.config, always).save(tmp_path / "run")
    Run(tmp_path / "run").save_learned(Learned(frozenset(["another"])))
    same = {"answer": ["7"] * 3, "correct": [True] * 3, "final_answer": "7"}
    rows = [same | {"question_id": f"q{n // 3}", "seed": n} for n in range(15)]
    recorder = {"decision_rule": "every 20 tokens", "confidence_rule": "source"}
    traces = make_traces(rows, recorder)
    config = VotesConfig(drops=(0.1,), run=tmp_path / "run")
    found = {one.name: one.median for one in measure(traces, tmp_path / "made.parquet", config)}
    saving = found["in turn, each halted alone, until settled, 10.0 points may be lost: saving"]
    assert saving == pytest.approx(100 * (1 - 2 * 110 / 1800))
