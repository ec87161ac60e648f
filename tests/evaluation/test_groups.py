"""Rows by segment, task and LM, by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evaluation import groups
from evaluation.outcome import Outcome, never_outcome
from evaluation.rows import to_json
from traces import Traces

MakeTraces = Callable[..., Traces]
Row = dict[str, Any]


def group_rows(*args: Any, **kwargs: Any) -> list[Row]:
    """The rows, as they are written."""
    rows: list[Row] = to_json(groups.group_rows(*args, **kwargs))
    return rows


@pytest.fixture
def traces(make_traces: MakeTraces) -> Traces:
    """Two LMs; two segments, and one trace of none; 600 tokens each."""
    return make_traces(
        [
            {"question_id": "a", "segment": "easy", "model": "big"},
            {"question_id": "a", "segment": "easy", "model": "small"},
            {"question_id": "b", "segment": "easy", "model": "big", "final_correct": False},
            {"question_id": "c", "segment": "hard", "model": "big"},
            {"question_id": "d", "segment": "", "model": "small"},
        ]
    )


def outcomes(traces: Traces) -> dict[str, Outcome]:
    halted = np.ones(5, dtype=bool)
    head = Outcome(np.array([1, 1, 1, 0, 1]), np.array([300, 0, 600, 150, 600]), halted)
    return {"head": head, "never": never_outcome(traces)}


def find(rows: list[Row], group: str, policy: str) -> Row:
    (row,) = [row for row in rows if (row["group"], row["policy"]) == (group, policy)]
    return row


def test_rows_are_of_every_column_with_several_values(traces: Traces) -> None:
    rows = group_rows(traces, {0.01: outcomes(traces)}, num_resamples=50)
    assert [(row["by"], row["group"], row["policy"]) for row in rows] == [
        (by, group, policy)
        for by, group in [
            ("segment", "easy"),
            ("segment", "hard"),
            ("model", "big"),
            ("model", "small"),
        ]
        for policy in ("head", "never")
    ]
    assert {row["gate"] for row in rows} == {0.01}


def test_a_group_is_counted_by_itself(traces: Traces) -> None:
    rows = group_rows(traces, {0.0: outcomes(traces)})
    easy, never = (find(rows, "easy", policy) for policy in ("head", "never"))
    expected = {
        "num_questions": 2,
        "num_traces": 3,
        "em": 1.0,
        "em_never": 2 / 3,
        "em_delta": 1 / 3,
        "saving": 0.5,
        "head_em_lead": 0.0,
    }
    assert {name: easy[name] for name in expected} == pytest.approx(expected)
    # Both questions drawn are a (2 traces, no change), or both are b, each with probability 1/4.
    assert easy["em_delta_interval"] == [0.0, 1.0]
    assert easy["saving_interval"] == pytest.approx([0.0, 0.75])
    assert never["em"] == never["em_never"] == pytest.approx(2 / 3)
    assert never["saving_interval"] == [0.0, 0.0]
    assert (never["head_em_lead"], never["head_saving_lead"]) == pytest.approx((1 / 3, 0.5))
    assert never["head_em_lead_interval"] == [0.0, 1.0]
    assert never["head_saving_lead_interval"] == pytest.approx([0.0, 0.75])
    assert find(rows, "small", "head")["saving"] == pytest.approx(0.5)
    assert find(rows, "big", "head")["em_delta"] == 0.0


def test_each_gate_has_the_rows_it_has_alone(traces: Traces) -> None:
    chosen = outcomes(traces)
    strict = {"head": chosen["never"], "budget": chosen["head"]}
    both = group_rows(traces, {0.0: strict, 0.01: chosen}, num_resamples=50)
    for gate, alone in ((0.0, strict), (0.01, chosen)):
        rows = [row for row in both if row["gate"] == gate]
        assert rows == group_rows(traces, {gate: alone}, num_resamples=50)


def test_a_single_question_has_no_interval(traces: Traces) -> None:
    row = find(group_rows(traces, {0.0: outcomes(traces)}, num_resamples=50), "hard", "head")
    assert (row["num_questions"], row["em_delta"], row["saving"]) == (1, -1.0, 0.75)
    intervals = {name: value for name, value in row.items() if name.endswith("_interval")}
    assert len(intervals) == 4 and set(intervals.values()) == {None}


def test_traces_that_do_not_differ_have_no_groups(make_traces: MakeTraces) -> None:
    traces = make_traces([{}] * 3)
    assert group_rows(traces, {0.0: {"head": never_outcome(traces)}}) == []
