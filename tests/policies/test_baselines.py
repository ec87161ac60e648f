from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evaluation.outcome import halt_outcome, outcome_row
from haltwise import HaltHead
from policies.baselines import (
    BASELINES,
    AnswerEntropy,
    Budget,
    Confidence,
    Entropy,
    EntropyVariance,
    Evidence,
    Random,
    Stability,
)
from policies.head import HeadPolicy
from policies.policy import Policy, decisions
from policies.rules import hindsight, hindsight_give_up
from traces import Traces, read_traces

MakeTraces = Callable[..., Traces]


def halts(policy: Policy, traces: Traces, parameter: float) -> list[bool]:
    signal = policy.signal(traces)
    assert signal is not None
    decided: list[bool] = policy.halts(signal, parameter).tolist()
    return decided


def with_answers(make_traces: MakeTraces, *answers: list[str]) -> Traces:
    """Traces that differ in their forced answers only, 10 tokens apart."""
    changes: list[dict[str, Any]] = [
        {
            "position": [10 * (i + 1) for i in range(len(texts))],
            "probe_tokens": [1] * len(texts),
            "answer": texts,
            "correct": [text == "7" for text in texts],
            "confidence": [0.75] * len(texts),
            "answer_logprobs": [[]] * len(texts),
        }
        for texts in answers
    ]
    return make_traces(changes)


def test_budget_halts_from_a_position_on(worked_example: Traces) -> None:
    assert halts(Budget(), worked_example, 250) == [False, True, True]
    assert halts(Budget(), worked_example, 251) == [False, False, True]
    assert Budget().grid(np.array([0, 59, 59, 118])) == pytest.approx(
        [3 * n for n in range(20)] + [59] + [118 - 3 * n for n in range(19, -1, -1)]
    )


def test_confidence_halts_above_a_threshold_where_there_is_an_answer(
    make_traces: MakeTraces,
) -> None:
    traces = make_traces([{"answer": ["", "7", "7"], "confidence": [0.99, float("nan"), 0.75]}])
    assert halts(Confidence(), traces, 0.0) == [False, False, True]
    assert halts(Confidence(), traces, 0.75) == [False, False, False]


def test_confidence_is_not_available_where_it_is_never_known(make_traces: MakeTraces) -> None:
    unknown = make_traces([{"confidence": [float("nan")] * 3}])
    available = {policy.name for policy in BASELINES if policy.signal(unknown) is not None}
    assert available == {"budget", "answer_entropy", "stability", "random"}


def test_confidence_grid_is_dense_near_one() -> None:
    grid = Confidence().grid(np.empty(0))
    assert len(grid) == 200
    assert grid[0] == 0
    assert grid[-1] == pytest.approx(1 - 1e-6, abs=1e-12)
    assert sum(threshold > 0.99 for threshold in grid) > 100


def test_stability_counts_runs_of_equal_answers_within_a_trace(make_traces: MakeTraces) -> None:
    traces = with_answers(make_traces, ["7", "7", "3", "7"], ["7", "", "", "7", "7", "7"])
    signal = Stability().signal(traces)
    assert signal.tolist() == [1, 2, 1, 1, 1, 0, 0, 1, 2, 3]
    assert halts(Stability(), traces, 2) == [n in (1, 8, 9) for n in range(10)]


def test_answer_entropy_halts_at_a_known_answer_that_the_lm_was_sure_of(
    make_traces: MakeTraces,
) -> None:
    half = np.log(0.5)  # a token of probability 0.5 has an entropy of log 2 at least
    traces = make_traces(
        [{"answer": ["", "7", "7"], "answer_logprobs": [[0.0], [half, 0.0], [half]]}]
    )
    signal = AnswerEntropy().signal(traces)
    assert signal == pytest.approx([np.inf, np.log(2) / 2, np.log(2)], rel=1e-6)
    assert halts(AnswerEntropy(), traces, 0.4) == [False, True, False]
    assert AnswerEntropy().signal(make_traces([{"answer_logprobs": [[], [], []]}])) is None


def test_entropy_halts_where_it_is_known_and_low(make_traces: MakeTraces) -> None:
    traces = make_traces([{"entropy": [float("nan"), 0.5, 0.25]}])
    np.testing.assert_array_equal(Entropy().signal(traces), [np.inf, 0.5, 0.25])
    assert halts(Entropy(), traces, 0.25) == [False, False, True]
    assert Entropy().grid(np.array([np.inf, 0.0, 1.0])) == pytest.approx(np.linspace(0, 1, 200))
    for policy in (Entropy(), EntropyVariance()):
        assert policy.signal(make_traces([{}])) is None
        assert policy.signal(make_traces([{"entropy": [float("nan")] * 3}])) is None


def test_entropy_variance_moves_and_waits_for_the_fourth_point(make_traces: MakeTraces) -> None:
    def trace(entropy: list[float]) -> dict[str, Any]:
        length = len(entropy)
        return {
            "position": list(range(1, length + 1)),
            "probe_tokens": [1] * length,
            "answer": ["7"] * length,
            "correct": [True] * length,
            "confidence": [0.5] * length,
            "answer_logprobs": [[]] * length,
            "entropy": entropy,
        }

    traces = make_traces([trace([1.0, 1.0]), trace([1.0, 2.0, 2.0, 2.0, 2.0])])
    mean = [1.0, 1.2, 1.36, 1.488, 1.5904]
    variance = [0.0]
    for m in mean[1:]:
        variance.append(0.8 * variance[-1] + 0.2 * (2.0 - m) ** 2)
    expected = [np.inf] * 5 + variance[3:]
    assert EntropyVariance().signal(traces) == pytest.approx(expected)


def test_random_is_reproducible_and_halts_at_its_rate(random_traces: Traces) -> None:
    assert halts(Random(), random_traces, 0.5) == halts(Random(), random_traces, 0.5)
    assert not any(halts(Random(), random_traces, 0.0))
    assert all(halts(Random(), random_traces, 1.0))
    assert 0.35 < np.mean(halts(Random(), random_traces, 0.5)) < 0.65


def test_head_halts_as_the_rule_it_holds(run_head: HaltHead, random_traces: Traces) -> None:
    for price, times in [(10.0, 1), (1.0, 2), (0.1, 4)]:
        expected = halts(Stability(), random_traces, times)
        assert halts(HeadPolicy(run_head), random_traces, price) == expected
    prices = HeadPolicy(run_head).grid(np.empty(0))
    assert prices[15:] == pytest.approx(np.logspace(-1, 1, 60))
    assert prices[:15] == pytest.approx(np.logspace(-1 - 30 / 59, -1 - 2 / 59, 15))


def test_evidence_is_confidence_and_repetition_together(make_traces: MakeTraces) -> None:
    traces = with_answers(make_traces, ["3", "7", "7", "", "7"])
    traces.confidence[:] = [0.5, 0.75, 0.75, 0.9, 1.0]
    signal = Evidence().signal(traces)
    assert signal is not None
    # logit(1/2) = 0, logit(3/4) = ln 3, and 25 ln 2 stands for a confidence of 1.
    expected = [0, np.log(3), np.log(3) + 1.5 * np.log(2), -np.inf, 25 * np.log(2)]
    assert signal == pytest.approx(expected)
    assert halts(Evidence(), traces, np.log(3)) == [False, False, True, False, True]
    traces.confidence[2] = np.nan
    assert Evidence().signal(traces)[2] == -np.inf  # type: ignore[index]
    traces.confidence[:] = np.nan
    assert Evidence().signal(traces) is None


@pytest.mark.parametrize("policy", BASELINES, ids=lambda policy: policy.name)
def test_grids_are_sorted_without_repeats_and_decide_every_point(
    policy: Policy, random_traces: Traces
) -> None:
    signal = policy.signal(random_traces)
    assert signal is not None
    decided = decisions(policy, signal)
    assert list(decided) == policy.grid(signal) == sorted(decided)
    assert all(halts.shape == (random_traces.num_points,) for halts in decided.values())


def test_a_question_is_judged_by_the_head_that_never_saw_it(
    run_head: HaltHead, random_traces: Traces
) -> None:
    never = HaltHead(run_head.config, run_head.weights | {"b2": -np.ones(1, dtype=np.float32)})
    policy = HeadPolicy(run_head, {"q3": never, "q4": never})
    alone = np.array(halts(HeadPolicy(run_head), random_traces, 10.0))
    kept_back = np.isin(random_traces.question_id, ["q3", "q4"])[random_traces.trace_of_point]
    assert alone[kept_back].any()
    assert halts(policy, random_traces, 10.0) == (alone & ~kept_back).tolist()
    log_odds = policy.log_odds(policy.signal(random_traces), 10.0)
    both = [
        HeadPolicy(head).log_odds(HeadPolicy(head).signal(random_traces), 10.0)
        for head in (run_head, never)
    ]
    np.testing.assert_array_equal(log_odds, np.where(kept_back, both[1], both[0]))


def test_hindsight_takes_the_first_correct_answer_and_gives_up_where_there_is_none(
    make_traces: MakeTraces,
) -> None:
    traces = with_answers(make_traces, ["3", "7", "7"], ["3", "4"], ["3"])
    traces.final_correct[2] = False
    assert hindsight(traces).tolist() == [False, True, True, False, False, False]
    # Trace 1 gets there at the end, trace 2 never does.
    assert hindsight_give_up(traces).tolist() == [False, True, True, False, False, True]


def test_no_policy_beats_hindsight(random_traces: Traces, run_head: HaltHead) -> None:
    best = halt_outcome(random_traces, hindsight(random_traces), "always")
    for policy in (*BASELINES, HeadPolicy(run_head)):
        signal = policy.signal(random_traces)
        assert signal is not None
        for decided in decisions(policy, signal).values():
            outcome = halt_outcome(random_traces, decided, "always")
            assert (outcome.em <= best.em).all()
            assert (outcome.cost >= best.cost)[outcome.em & best.halted].all()


@pytest.mark.parametrize(
    ("threshold", "em", "saving"),
    [
        (0.95, 86.73, 46.2),
        (0.99, 88.67, 39.7),
        (0.995, 89.22, 37.1),
        (0.998, 89.77, 34.2),
        (0.999, 89.95, 32.2),
    ],
)
def test_confidence_thresholds_on_the_shared_recording(
    bench: Callable[[str], Any], threshold: float, em: float, saving: float
) -> None:
    traces = read_traces(bench("r1_math_dev.parquet"))
    decided = np.array(halts(Confidence(), traces, threshold))
    check(traces, decided, em, saving)


@pytest.mark.parametrize(
    ("name", "first", "giving_up"),
    [
        ("r1_math_dev.parquet", (92.65, 50.9), (92.65, 70.4)),
        ("r1_math_dense_dev.parquet", (94.55, 58.5), (94.55, 74.4)),
    ],
)
def test_hindsight_on_the_shared_recordings(
    bench: Callable[[str], Any],
    name: str,
    first: tuple[float, float],
    giving_up: tuple[float, float],
) -> None:
    traces = read_traces(bench(name))
    check(traces, hindsight(traces), *first)
    check(traces, hindsight_give_up(traces), *giving_up)


def check(traces: Traces, decided: np.ndarray[Any, Any], em: float, saving: float) -> None:
    row = outcome_row(traces, halt_outcome(traces, decided, "always"), "rule", None, "all")
    assert round(100 * row.em, 2) == em
    assert round(100 * row.saving, 1) == saving
