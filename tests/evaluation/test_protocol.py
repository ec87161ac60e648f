from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.outcome import (
    Outcome,
    em_delta,
    halt_outcome,
    never_outcome,
    outcome_row,
    saving,
    sweep,
)
from evaluation.protocol import (
    folds,
    operating_point,
    same_rate,
    strictest_price,
)
from evaluation.rows import MissingSweep, to_json
from haltwise import InputError
from haltwise.policy.halting import Probing
from policies.policy import first_halts
from traces import Traces

MakeTraces = Callable[..., Traces]


@pytest.mark.parametrize(
    ("point", "always", "at_halt", "em"),
    [(0, 110, 110, False), (1, 272, 262, True), (2, 433, 411, True), (None, 633, 600, True)],
)
def test_outcomes_of_the_worked_example(
    worked_example: Traces, point: int | None, always: int, at_halt: int, em: bool
) -> None:
    halts = np.arange(3) == point
    costs: list[tuple[Probing, int]] = [("always", always), ("at_halt", at_halt)]
    for probing, cost in costs:
        outcome = halt_outcome(worked_example, halts, probing)
        assert outcome.cost.tolist() == [cost]
        assert outcome.em.tolist() == [em]
        assert outcome.halted.tolist() == [point is not None]
        assert saving(worked_example, outcome) == pytest.approx(1 - cost / 600)


def test_never_halting_does_not_probe_and_saves_exactly_nothing(random_traces: Traces) -> None:
    row = outcome_row(random_traces, never_outcome(random_traces), "never", None, "all")
    assert (row.saving, row.em_delta, row.halt_rate) == (0.0, 0.0, 0.0)
    assert row.right_to_wrong == row.wrong_to_right == 0


def test_a_policy_that_probes_and_never_halts_pays_for_its_probes(worked_example: Traces) -> None:
    outcome = halt_outcome(worked_example, np.zeros(3, dtype=bool), "always")
    assert saving(worked_example, outcome) == pytest.approx(-33 / 600)


def test_the_first_true_point_halts(make_traces: MakeTraces) -> None:
    columns = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    empty: dict[str, list[Any]] = {name: [] for name in columns}
    traces = make_traces([{}, empty, {}])
    halts = np.array([False, True, True, False, False, True])
    assert first_halts(traces, halts).tolist() == [1, -1, 5]
    outcome = halt_outcome(traces, halts, "always")
    assert outcome.halted.tolist() == [True, False, True]
    assert outcome.cost.tolist() == [272, 600, 433]  # no point, no probe


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_row_counts_what_changed(halts: list[bool]) -> None:
    traces = example_without_a_file()
    row = outcome_row(traces, halt_outcome(traces, np.array(halts), "always"), "x", 1.0, "test")
    net = row.wrong_to_right - row.right_to_wrong
    assert row.em_delta == pytest.approx(net)
    assert list(to_json(row)) == list(to_json(MissingSweep("x", "test")))


def example_without_a_file() -> Traces:
    """Points: wrong of a right trace; right of a wrong trace; wrong of a wrong trace."""
    text: dict[str, Any] = {
        name: np.array(["a", "b", "c"])
        for name in ("trace_id", "question_id", "task", "segment", "model", "split")
    }
    return Traces(
        **text,
        seed=np.zeros(3, dtype=np.int64),
        num_tokens=np.array([30, 20, 10]),
        finished=np.ones(3, dtype=bool),
        final_correct=np.array([True, False, False]),
        labelled=np.ones(3, dtype=bool),
        full_answer=np.full(3, "", dtype=object),
        offsets=np.arange(4),
        position=np.array([10, 10, 5]),
        probe_tokens=np.array([1, 2, 3]),
        correct=np.array([False, True, False]),
        confidence=np.full(3, 0.5, dtype=np.float32),
        answer=np.array(["1", "2", "3"], dtype=object),
        worst_logprob=np.zeros(3, dtype=np.float32),
        answer_entropy=np.zeros(3, dtype=np.float32),
        recorder={},
    )


def test_one_row_by_hand() -> None:
    traces = example_without_a_file()
    outcome = halt_outcome(traces, np.array([True, True, False]), "always")
    assert to_json(outcome_row(traces, outcome, "rule", 0.5, "test")) == {
        "policy": "rule",
        "parameter": 0.5,
        "split": "test",
        "em": 1 / 3,
        "em_delta": 0.0,
        "tokens": (11 + 12 + 13) / 3,
        "saving": 1 - 36 / 60,
        "halt_rate": 2 / 3,
        "right_to_wrong": 1 / 3,
        "wrong_to_right": 1 / 3,
        "hopeless_saving": -0.05,
        "gave_up": 1 / 3,
        "em_delta_interval": None,
        "saving_interval": None,
    }


def made(traces: Traces, num_wrong: int, saved: int) -> Outcome:
    """An outcome that loses some right answers and saves some tokens of every trace."""
    em = traces.final_correct.copy()
    em[np.flatnonzero(em)[:num_wrong]] = False
    return Outcome(em, traces.num_tokens - saved, np.ones(len(traces), dtype=bool))


def test_the_operating_point_saves_most_within_the_gate(make_traces: MakeTraces) -> None:
    traces = make_traces([{}] * 100)
    outcomes = {
        1.0: made(traces, 0, 60),
        2.0: made(traces, 0, 120),
        3.0: made(traces, 1, 180),  # exactly at a gate of 1 %
        4.0: made(traces, 2, 300),
    }
    assert operating_point(traces, outcomes, 0.0) == 2.0
    assert operating_point(traces, outcomes, 0.01) == 3.0
    assert operating_point(traces, outcomes, 0.0199) == 3.0
    assert operating_point(traces, outcomes, 0.02) == 4.0


def test_nothing_within_the_gate_or_nothing_saved_is_never_halting(
    make_traces: MakeTraces,
) -> None:
    traces = make_traces([{}] * 10)
    assert operating_point(traces, {1.0: made(traces, 1, 100)}, 0.0) is None
    assert operating_point(traces, {1.0: made(traces, 0, -5)}, 0.0) is None
    assert operating_point(traces, {}, 0.0) is None


@given(gate=st.sampled_from([0.0, 0.01, 0.1]), seed=st.integers(0, 100))
def test_an_operating_point_keeps_its_gate_on_the_traces_it_was_chosen_on(
    gate: float, seed: int
) -> None:
    traces = example_without_a_file()
    rng = np.random.default_rng(seed)
    decisions = {float(n): rng.random(3) < n / 10 for n in range(10)}
    outcomes = sweep(traces, decisions, "always")
    chosen = operating_point(traces, outcomes, gate)
    if chosen is not None:
        assert em_delta(traces, outcomes[chosen]) >= -gate - 1e-9
        assert saving(traces, outcomes[chosen]) > 0


@given(
    ids=st.lists(st.integers(0, 30), min_size=60, max_size=90),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 3),
)
def test_folds_keep_questions_together_and_are_balanced(
    ids: list[int], num_folds: int, seed: int
) -> None:
    question_id = np.array([f"q{n}" for n in [*range(5), *ids]])
    fold = folds(question_id, num_folds, seed)
    for name in set(question_id):
        assert len(set(fold[question_id == name])) == 1
    questions = [len(set(question_id[fold == n])) for n in range(num_folds)]
    assert max(questions) - min(questions) <= 1
    np.testing.assert_array_equal(fold, folds(question_id, num_folds, seed))


def test_folds_depend_on_the_seed_and_need_a_question_each() -> None:
    question_id = np.array([f"q{n}" for n in range(50)])
    assert (folds(question_id, seed=0) != folds(question_id, seed=1)).any()
    assert np.bincount(folds(question_id)).tolist() == [10] * 5
    with pytest.raises(InputError, match="3 questions: expected at least 5"):
        folds(np.array(["a", "b", "c"]))


def test_a_control_is_tuned_to_halt_as_often_as_the_head() -> None:
    zero = np.zeros(4)
    outcomes = {
        at: Outcome(zero, zero, np.arange(4) < num) for at, num in ((0.1, 0), (0.2, 2), (0.5, 3))
    }
    assert same_rate(outcomes, 0.6) == 0.2
    assert same_rate(outcomes, 1.0) == 0.5
    assert same_rate(outcomes, 0.0) is None


def test_the_strictest_price_is_that_of_the_first_gate_that_halts() -> None:
    gates: dict[float, dict[str, float | None]] = {0.01: {"head": 2.0}, 0.0: {"head": 1.0}}
    assert strictest_price(gates) == 1.0
    assert strictest_price(gates | {0.0: {"head": None}}) == 2.0
    assert strictest_price({0.0: {"head": None}}) is None


def test_outcomes_do_not_change_the_traces(worked_example: Traces) -> None:
    before: Any = worked_example.digest
    halt_outcome(worked_example, np.array([True, False, False]), "at_halt")
    del worked_example.__dict__["fingerprint"]
    assert worked_example.digest == before
