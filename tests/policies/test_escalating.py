from collections.abc import Callable, Sequence

import numpy as np
import pytest

from evaluation.cascade import Played
from policies.course import AT_END, AT_START, LargeAnswers
from policies.escalating import (
    Always,
    ConfidenceCascade,
    Halted,
    Hindsight,
    Routed,
    Router,
)
from policies.head import HeadPolicy
from tests.heads import random_head
from tests.pairs import made_up, worked_pair
from traces import Pairs, Traces, pair_up

MakeTraces = Callable[..., Traces]
INF = float("inf")


def played(policy: object, pairs: Pairs, ratio: float = 2.0) -> Played:
    return Played.of(policy, pairs, LargeAnswers.unhalted(pairs.large), ratio)  # type: ignore[arg-type]


def came_to(
    policy: object, pairs: Pairs, parameter: Sequence[float]
) -> tuple[list[bool], list[float], list[bool]]:
    outcome = played(policy, pairs).outcome(tuple(parameter))
    return outcome.em.tolist(), outcome.cost.tolist(), outcome.halted.tolist()


def test_either_lm_alone_costs_its_own_tokens(make_traces: MakeTraces) -> None:
    pairs = worked_pair(make_traces)
    assert came_to(Always("always_small", [1.0]), pairs, (1.0,)) == ([True], [600], [False])
    assert came_to(Always("always_large", [1.0]), pairs, (1.0,)) == ([True], [600], [True])
    assert Always("always_small", [1.0, 2.0]).grid(None) == [(1.0,)]


def test_a_confidence_cascade_by_hand(make_traces: MakeTraces) -> None:
    pairs = worked_pair(make_traces)  # confidences 0.5, 0.75 and 0.96875
    policy = ConfidenceCascade([1.0])
    bars = np.array(list(policy.signal(pairs)[1]))
    low, high = (float(bars[np.abs(bars - bar).argmin()]) for bar in (0.45, 0.65))
    assert low < 0.5 < high < 0.75
    # Halted at the second point, whose answer is sure enough to hold, or is not.
    assert came_to(policy, pairs, (high, 0.7, 1.0)) == ([True], [272], [False])
    assert came_to(policy, pairs, (high, 0.8, 1.0)) == ([True], [272 + 600], [True])
    assert came_to(policy, pairs, (low, -INF, 1.0)) == ([False], [110], [False])
    # Never halted: the last answer's confidence counts, and all probes are paid.
    assert came_to(policy, pairs, (1.0, 0.9, 1.0)) == ([True], [633], [False])
    assert came_to(policy, pairs, (1.0, 0.99, 1.0)) == ([True], [633 + 600], [True])


def test_without_a_point_or_a_confidence_nothing_is_sure(make_traces: MakeTraces) -> None:
    names = ("position", "probe_tokens", "answer", "correct", "confidence", "answer_logprobs")
    small = make_traces([{name: [] for name in names}, {"confidence": [np.nan] * 3}])
    pairs = pair_up(small, make_traces([{"model": "big"}, {"model": "big"}]))
    policy = ConfidenceCascade([1.0])
    signal = policy.signal(pairs)
    course = policy.course(pairs, signal, (0.0, 0.0, 1.0))
    assert course.point.tolist() == [AT_END, AT_END] and course.escalated.all()


def test_a_head_can_halt_in_place_of_the_threshold(make_traces: MakeTraces) -> None:
    pairs = made_up(make_traces, 20, lambda easy: True)
    head = HeadPolicy(random_head(2))
    alone = played(Halted(head), pairs)
    both = played(ConfidenceCascade([1.0], head), pairs)
    routed = played(Routed(Router("logistic", pairs), [1.0], head), pairs)
    for price in list(alone.signal)[::10]:
        expected = alone.outcome((price,)).cost
        assert (both.outcome((price, -INF, 1.0)).cost == expected).all()
        assert (routed.outcome((INF, price, 1.0)).cost == expected).all()
    assert both.outcome((price, INF, 1.0)).halted.all()


@pytest.mark.parametrize("model", ["logistic", "boosted_trees"])
def test_a_router_learns_what_the_question_tells(model: str, make_traces: MakeTraces) -> None:
    rows = [{"task": ("plain", "hard")[n % 2], "final_correct": n % 2 == 0} for n in range(160)]
    small = make_traces(rows)
    pairs = pair_up(small, make_traces([{"model": "big"}] * 160))
    fold = {name: n % 4 // 2 for n, name in enumerate(pairs.small.question_id.tolist())}
    scores = Router(model, pairs, fold).scores(pairs)
    hard = pairs.small.task == "hard"
    assert scores[hard].min() > 0.5 > scores[~hard].max()
    course = Routed(Router(model, pairs, fold), [1.0]).course
    signal = Routed(Router(model, pairs, fold), [1.0]).signal(pairs)
    found = course(pairs, signal, (0.5, 0.0, 1.0))
    assert (found.escalated == hard).all() and (found.point[hard] == AT_START).all()


def test_a_router_never_sees_the_answers_of_a_question_that_it_scores(
    make_traces: MakeTraces,
) -> None:
    def scores(right: bool) -> float:
        rows = [{"task": "ab"[n % 2], "final_correct": n % 3 == 0} for n in range(40)]
        small = make_traces([*rows, {"task": "a", "final_correct": right}])
        pairs = pair_up(small, make_traces([{"model": "big"}] * 41))
        fold = {name: n % 2 for n, name in enumerate(sorted(small.question_id.tolist()))}
        found = Router("logistic", pairs, fold).scores(pairs)
        return float(found[pairs.small.question_id == "q40"][0])

    assert scores(True) == scores(False)


def test_hindsight_does_what_is_best(make_traces: MakeTraces) -> None:
    pairs = worked_pair(make_traces)

    def at(price: float) -> tuple[list[bool], list[float], list[bool]]:
        oracle = Hindsight(lambda of: LargeAnswers.unhalted(of.large), 2.0, [price], "always")
        return came_to(oracle, pairs, (price,))

    assert at(0.5) == ([True], [272], [False])  # 0.864, above 0.7 of escalating at once
    assert at(9.0) == ([False], [110], [False])  # nothing pays, and the least is paid
    wrong = {"correct": [False] * 3, "final_correct": False}
    hopeless = pair_up(make_traces([wrong]), pairs.large)
    oracle = Hindsight(lambda of: LargeAnswers.unhalted(of.large), 2.0, [0.5], "always")
    assert came_to(oracle, hopeless, (0.5,)) == ([True], [600], [True])


def test_a_halted_large_lm_answers_by_the_price_of_its_tokens(make_traces: MakeTraces) -> None:
    large = make_traces([{"model": "big"}])
    halts = np.array([[False, False, False], [False, True, False], [True, False, False]])
    prices = np.array([0.1, 1.0, 10.0])
    answers = LargeAnswers.halted(large, halts, prices, "always")
    assert answers.em.tolist() == [[True], [True], [False]]
    assert answers.cost.tolist() == [[633], [272], [110]]
    assert answers.nearest(np.array([0.01, 0.3, 0.33, 100])).tolist() == [0, 0, 1, 2]
    assert answers.choices == [0.1, 1.0, 10.0]
    pairs = pair_up(make_traces([{}]), large)
    policy = Always("always_large", answers.choices)
    own = Played.of(policy, pairs, answers, 3.0)
    assert [own.outcome(of).cost[0] for of in policy.grid(None)] == [1899, 816, 330]
    assert own.policy.course(pairs, None, (1.0,)).point.tolist() == [AT_START]
