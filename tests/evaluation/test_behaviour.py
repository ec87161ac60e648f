import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evaluation import behaviour
from evaluation.outcome import halt_outcome, outcome_row
from evaluation.rows import to_json
from haltwise import HaltHead
from traces import Traces

MakeTraces = Callable[..., Traces]
NEVER = np.zeros(3, dtype=bool)
AT_1 = np.array([False, True, True])
AT_0 = np.array([True, False, True])


def probs(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def where_halted(*args: Any) -> dict[str, Any]:
    return as_written(behaviour.where_halted(*args))


def reliability(*args: Any) -> dict[str, Any]:
    return as_written(behaviour.reliability(*args))


def cases(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return [as_written(case) for case in behaviour.cases(*args, **kwargs)]


def as_written(found: Any) -> dict[str, Any]:
    written: dict[str, Any] = to_json(found)
    return written


def test_where_a_trace_is_halted_by_hand(worked_example: Traces) -> None:
    report = where_halted(worked_example, [AT_1, NEVER, AT_0, AT_0])
    assert report["edges"] == pytest.approx([k / 20 for k in range(21)])
    right, wrong = [0.0] * 20, [0.0] * 20
    right[8] = 0.25  # 250 of 600
    wrong[3] = 0.5  # 100 of 600
    assert report["right"] == right and report["wrong"] == wrong
    assert report["never"] == 0.25
    assert report["median_position"] == 100 and report["median_share"] == pytest.approx(1 / 6)


def test_shares_of_traces_are_those_of_the_table(random_traces: Traces) -> None:
    halts = np.random.default_rng(0).random(random_traces.num_points) < 0.3
    report = where_halted(random_traces, [halts])
    row = outcome_row(random_traces, halt_outcome(random_traces, halts, "always"), "", None, "")
    assert sum(report["wrong"]) == pytest.approx(row.gave_up)
    assert sum(report["right"]) + sum(report["wrong"]) == pytest.approx(row.halt_rate)
    assert report["never"] == pytest.approx(1 - row.halt_rate)


def test_nothing_halted_has_no_median(worked_example: Traces) -> None:
    report = where_halted(worked_example, [NEVER])
    assert report["never"] == 1
    assert report["median_share"] is None and report["median_position"] is None


def test_reliability_by_hand(worked_example: Traces) -> None:
    """Returns at a price of 0.5: -0.055, 0.864, 0.7835, never 0.6835."""
    report = reliability(worked_example, [probs(0.05, 0.95, 0.6)], "always", 0.5, 0.5)
    first, last = report["bins"][0], report["bins"][9]
    empty = {"num": 0, "mean_prob": None, "better": None, "correct": None, "gain": None}
    assert report["bins"][6] == empty | {"low": 0.6, "high": 0.7}  # halted before
    assert (first["num"], first["better"], first["correct"]) == (1, 0, 0)
    assert first["gain"] == pytest.approx(-0.055 - 0.864)  # against halting at the next
    assert (last["num"], last["better"], last["correct"]) == (1, 1, 1)
    assert last["gain"] == pytest.approx(0.864 - 0.7835)  # against its own later halt
    assert report["error"] == pytest.approx((0.05 + 0.05) / 2)


def test_reliability_where_it_never_halts_is_against_the_lms_own_end(
    worked_example: Traces,
) -> None:
    bins = reliability(worked_example, [probs(0.1, 0.2, 1.0)], "at_halt", 0.5, 1.1)["bins"]
    assert bins[2]["gain"] == pytest.approx(0.869 - 0.7)
    assert bins[9]["gain"] == pytest.approx(0.7945 - 0.7)  # a probability of 1 has a bin


def test_going_on_never_leads_into_the_next_trace(make_traces: MakeTraces) -> None:
    traces = make_traces([{}, {"final_correct": False}])
    bins = reliability(traces, [probs(0.2, 0.2, 0.2, 0.95, 0.2, 0.2)], "always", 0.5, 0.5)["bins"]
    own_end = np.array([-0.055, 0.864, 0.7835]) - 0.6835
    assert bins[2]["gain"] == pytest.approx(own_end.mean())
    assert bins[9]["gain"] == pytest.approx(-0.055 - (-0.3165))


def test_trainings_are_thrown_together(worked_example: Traces) -> None:
    one, other = probs(0.05, 0.95, 0.6), probs(0.15, 0.3, 0.3)
    both = reliability(worked_example, [one, other], "always", 0.5, 0.5)
    apart = [reliability(worked_example, [each], "always", 0.5, 0.5) for each in (one, other)]
    nums = [[row["num"] for row in report["bins"]] for report in (both, *apart)]
    assert nums[0] == np.add(nums[1], nums[2]).tolist() and sum(nums[0]) == 5


def test_without_points_there_is_nothing_to_rely_on(make_traces: MakeTraces) -> None:
    none: dict[str, Any] = {
        name: [] for name in ("position", "probe_tokens", "answer", "correct", "confidence")
    } | {"answer_logprobs": []}
    report = reliability(make_traces([none]), [probs()], "always", 0.5, 0.5)
    assert report["error"] is None and {row["num"] for row in report["bins"]} == {0}


LOST = {"answer": ["3", "3", "7"], "correct": [False, False, True]}


def test_a_case_by_hand(make_traces: MakeTraces, run_head: HaltHead) -> None:
    """The head halts at the second "3" at a price of 1, and would have ended right."""
    traces = make_traces([{}, LOST, LOST | {"final_correct": False}])
    asked = []

    def head_of(question_id: str) -> HaltHead:
        asked.append(question_id)
        return run_head

    log_odds = np.array([-0.2, -0.2, 0.2] + 2 * [-0.2, 0.2, -0.2], dtype=np.float32)
    (case,) = cases(traces, [log_odds], head_of, 1.0, 0.5)
    assert asked == ["q1"]
    assert json.loads(json.dumps(case, allow_nan=False)) == case
    by = np.tanh(np.tanh(np.log1p(2) - np.log1p(1.5)))
    driver = case.pop("drivers")[0]
    assert driver["feature"] == "log_run"
    assert driver["value"] == pytest.approx(np.log1p(2))
    assert driver["contribution"] == pytest.approx(by, abs=1e-6)
    assert case.pop("prob_halt") == pytest.approx(1 / (1 + np.exp(-by)))
    assert case.pop("indifference_price") == pytest.approx((2.5 / 3) ** (2 * np.log(10)), rel=1e-5)
    assert case == {
        "trace_id": "t1",
        "question_id": "q1",
        "task": "toy",
        "segment": "easy",
        "model": "lm",
        "position": 250,
        "num_tokens": 600,
        "answer": "3",
        "right_again": 400,
        "trainings": 1.0,
        "question": "",
        "gold": "",
        "final_answer": "",
        "thought": "",
    }


def test_the_commonest_then_the_surest_cases_come_first(
    make_traces: MakeTraces, run_head: HaltHead
) -> None:
    traces = make_traces([LOST, LOST, LOST, LOST])
    first = np.array([[-1, 1, 0], [-1, 3, 0], [-1, 2, 0], [-1, -1, -1]], dtype=np.float32)
    other = np.array([[-1, 5, 0], [-1, -1, 0], [-1, -1, 9], [-1, 4, -1]], dtype=np.float32)
    log_odds = [first.ravel(), other.ravel()]
    found = cases(traces, log_odds, lambda question_id: run_head, 1.0, 0.5)
    assert [(case["trace_id"], case["trainings"]) for case in found] == [
        ("t0", 1.0),
        ("t1", 0.5),
        ("t2", 0.5),
    ]
    assert len(cases(traces, log_odds, lambda question_id: run_head, 1.0, 0.5, num=2)) == 2
    assert cases(traces, log_odds, lambda question_id: run_head, 1.0, 0.9999) == []


def test_a_case_without_a_later_right_answer_has_none(
    make_traces: MakeTraces, run_head: HaltHead
) -> None:
    traces = make_traces([{"correct": [False] * 3, "answer": ["3", "", "4"]}])
    log_odds = np.array([-1, 1, 1], dtype=np.float32)
    (case,) = cases(traces, [log_odds], lambda question_id: run_head, 1.0, 0.5)
    assert case["right_again"] is None
    assert case["indifference_price"] is None  # the head would not halt at any price
