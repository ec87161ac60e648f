"""Several thoughts of one question, halted jointly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.synthetic import synthetic_traces
from benchmarks.votes import Said, VotesConfig, measure, said_by, self_consistency, voting
from haltwise import InputError
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


def test_thoughts_that_agree_cost_less_jointly_than_to_their_ends() -> None:
    traces = synthetic_traces(600)
    traces = replace(
        traces,
        question_id=np.array([f"q{n // 3}" for n in range(len(traces))]),
        full_answer=np.where(traces.final_correct, "7", ""),
    )
    found = {one.name: one.median for one in measure(traces, VotesConfig(drops=(0.05,)))}
    for name in ("side by side", "in turn"):
        assert found[f"halted jointly, {name}, 5.0 points may be lost: saving"] > 10
    with pytest.raises(InputError, match="9 of each question and LM"):
        measure(traces, VotesConfig(num_thoughts=9))
