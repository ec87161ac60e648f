"""The governor keeps its bound for every sequence, and its level where requests stay alike."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.control import counted_at_once
from haltwise import InputError
from haltwise.control.ceiling import WORST, Counted
from haltwise.control.governor import (
    FOREVER,
    GroupState,
    Promise,
    audit_rate,
    audits_due,
    complained,
    corrected,
    felt,
    opened,
    stakes,
)
from tests.control.test_ceiling import NUM_WITHIN, RISKS

PROMISE = Promise(audit=0.1, rest=0.1, cooling=30)
# Its breaker never opens, so that the reach alone has to keep the bound.
NO_BREAKER = replace(PROMISE, fire=1e300)
K = 6
#: What a request does: the groups that it is in, its loss where it is halted, how many requests
#: come before it tells, the probability of its audit, and whether the other prices lose as well.
Request = tuple[tuple[int, ...], float, int, float, bool]


def excess_over_bound(
    requests: Iterator[Request], longest: int, promise: Promise, num_groups: int = 3
) -> float:
    """How far any group is ever above the bound that every sequence keeps."""
    groups = [
        GroupState.begin(K, 0.1, certified=2 + g, ceiling=K, trial=50) for g in range(num_groups)
    ]
    allowed = [float(group.reach) for group in groups]
    lost, worst = [0.0] * num_groups, -math.inf
    under_way: list[tuple[int, tuple[int, ...], float, float]] = []
    for now, (members, loss, delay, probability, others_lose) in enumerate(requests):
        step = min(int(groups[g].step) for g in members)
        assert all(step <= groups[g].ceiling for g in members)
        loss = loss if step > 0 else 0.0
        told = np.full(K, loss if others_lose else 0.0)
        for g in members:
            before = float(groups[g].top)
            groups[g] = counted_at_once(groups[g], told, promise)
            allowed[g] += max(float(groups[g].top) - before, 0)
        under_way.append((now + min(delay, longest), members, loss, probability))
        done = [one for one in under_way if one[0] <= now]
        under_way = [one for one in under_way if one[0] > now]
        for _, of, said, drawn in done:
            for g in of:
                groups[g] = felt(groups[g], said, drawn, promise)
                lost[g] += promise.rest / drawn * (said - promise.target)
                bound = allowed[g] / promise.gain + (longest + 1) * (1 - promise.target)
                worst = max(worst, lost[g] - bound)
    return worst


requests = st.tuples(
    st.sampled_from([(0,), (0, 1), (0, 2), (0, 1, 2)]),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
    st.integers(0, 20),
    st.sampled_from([0.1, 0.3, 1.0]),
    st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(requests, max_size=120), st.integers(0, 20))
def test_no_sequence_loses_more_than_the_bound(sequence: list[Request], longest: int) -> None:
    for promise in (PROMISE, NO_BREAKER):
        assert excess_over_bound(iter(sequence), longest, promise) <= 1e-9


def greedy(num: int, delay: int) -> Iterator[Request]:
    """Everything that is halted loses."""
    for n in range(num):
        yield ((0,), (0, 1), (0, 2))[n % 3], 1.0, delay, 0.1, False


def in_turns(num: int, delay: int) -> Iterator[Request]:
    """Long calm, in which debts could be forgotten, and then losses for as long as nobody knows."""
    for n in range(num):
        yield (0, 1, 2)[: n % 3 + 1], float(n % (3 * delay + 90) < delay + 30), delay, 0.1, False


def of_one_group(num: int, delay: int) -> Iterator[Request]:
    """One group pays for what its requests lose, while the others have nothing but gains."""
    for n in range(num):
        members = (0, 1) if n % 2 else (2,)
        yield members, 1.0 if n % 2 else -1.0, delay, (0.1, 0.5)[n % 5 == 0], False


@pytest.mark.whole
@pytest.mark.parametrize("adversary", [greedy, in_turns, of_one_group])
@pytest.mark.parametrize("delay", [0, 7, 60])
@pytest.mark.parametrize("promise", [PROMISE, NO_BREAKER], ids=["breaker", "no breaker"])
def test_no_adversary_loses_more_than_the_bound(
    adversary: Callable[[int, int], Iterator[Request]], delay: int, promise: Promise
) -> None:
    assert excess_over_bound(adversary(1000, delay), delay, promise) <= 1e-9


def test_the_bound_is_nearly_reached() -> None:
    assert excess_over_bound(greedy(1500, 7), 7, NO_BREAKER) > -9


def losses(rng: np.random.Generator, draws: int, more: float | np.ndarray = 0.0) -> np.ndarray:
    """Losses (draws, 1 + 12) of one request each, that of never halting first."""
    at = rng.random((draws, 1))
    lost = (at < RISKS + 0.01 + more).astype(float) - (at > 0.99)
    return np.concatenate([np.zeros((draws, 1)), lost], axis=1)


def play(
    state: GroupState, promise: Promise, audits: int, seed: int, more: float = 0.0
) -> Iterator[tuple[GroupState, np.ndarray]]:
    """Yields the states before and after each audit of many draws, and what was served then."""
    rng, rows = np.random.default_rng(seed), np.arange(len(state.level))
    for _ in range(audits):
        step, probability = state.step, audit_rate(state, promise)
        assert (step <= state.ceiling).all() and (step >= 0).all()
        lost = losses(rng, len(rows), more)
        state = counted_at_once(state, lost[:, 1:], promise)
        state = felt(state, lost[rows, step], probability, promise)
        yield state, step


@pytest.mark.whole
@pytest.mark.parametrize("draws", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_level_and_power(draws: int) -> None:
    """A price over the target is seldom served, and what is served is not far from the best."""
    over = np.zeros(draws, dtype=bool)
    for _state, step in play(GroupState.begin(12, np.full(draws, 0.1)), Promise(), 2000, 0):
        over |= step > NUM_WITHIN
    assert 0 < over.mean() <= 0.1 + 3 * math.sqrt(0.09 / draws)
    assert step.mean() > 4.5


@pytest.mark.whole
def test_a_sudden_loss_opens_the_breaker_and_a_calm_does_not() -> None:
    promise = Promise()
    rested = GroupState.begin(12, np.full(200, 0.1), certified=6)
    *_, (calm, _) = play(rested, promise, 1000, 1)
    assert calm.epoch.mean() <= 0.01
    shares, opens = [], np.full(200, np.inf)
    for n, (state, _) in enumerate(play(calm, promise, 400, 2, more=0.08)):
        shares.append(audit_rate(state, promise))
        opens = np.minimum(opens, np.where(state.epoch > calm.epoch, n, np.inf))
    assert np.median(opens) < 200
    first = shares[int(np.median(opens)) // 2]
    assert (first >= promise.alert).mean() > 0.5  # it looks closer before it is sure
    # What is behind an open breaker is certified anew once it is as it was.
    *_, (back, _) = play(state, promise, 2500, 3)
    assert (back.step > 0).mean() > 0.8


def test_an_open_breaker_audits_all_and_waits_longer_each_time() -> None:
    promise, waits = Promise(cooling=400), []
    state = GroupState.begin(2, 0.1, certified=2)
    for epoch in (1, 2):
        state = opened(state)
        assert (int(state.step), int(state.epoch), float(audit_rate(state, promise))) == (
            0,
            epoch,
            1,
        )
        due = int(audits_due(state, promise))
        waits.append(0)
        while state.ceiling == 0:
            state = felt(counted_at_once(state, np.zeros(2), promise), 0.0, 1.0, promise)
            waits[-1] += 1
        assert due <= waits[-1]
    assert waits[0] >= 400 and waits[1] == 800
    assert int(opened(GroupState.begin(2, 0.1)).epoch) == 0  # it was open


def test_how_much_is_audited_when() -> None:
    promise = Promise(settled=10)
    begun = GroupState.begin(4, 0.1, certified=4)
    assert audit_rate(begun, promise) == 0.05
    assert audit_rate(replace(begun, num_audits=np.array(10)), promise) == 0.025
    assert audit_rate(GroupState.begin(4, 0.1), promise) == 1.0
    assert audit_rate(GroupState.begin(4, 0.1, ceiling=3, trial=50), promise) == 0.5
    assert audit_rate(GroupState.begin(4, 0.1, ceiling=4, trial=FOREVER), promise) == 0.05
    assert audit_rate(felt(begun, 1.0, 1.0, promise), promise) == 0.05
    smelling = begun
    for _ in range(4):
        smelling = felt(smelling, 1.0, 1.0, promise)
    assert audit_rate(smelling, promise) == 0.5


def test_a_ceiling_on_trial_falls_to_what_is_certified() -> None:
    state = GroupState.begin(4, 0.1, ceiling=3, trial=50)
    for n in range(50):
        assert int(state.step) == 3 and n == int(state.num_audits)
        state = counted_at_once(state, np.zeros(4), PROMISE)
    assert int(state.step) == 0


def test_prices_fall_at_once_and_rise_after_half_a_step() -> None:
    promise = Promise(gain=0.1, rest=0.1, audit=0.1)
    state = GroupState.begin(10, 0.1, certified=5)
    once = felt(state, 1.0, 0.1, promise)  # down by 0.098 of the grid, nearly a step
    assert (int(state.step), int(once.step)) == (5, 4)
    gains = 0
    while int(once.step) < 5:
        once, gains = felt(once, 0.0, 0.1, promise), gains + 1
    assert gains == 24  # 0.48 of a step at 0.02 each
    kept = felt(state, 0.3, 0.1, promise)
    assert int(kept.step) == 5  # the slack takes small losses


def test_complaints_only_tighten() -> None:
    state = GroupState.begin(10, 0.1, certified=5)
    assert float(complained(state, 0.0, PROMISE).reach) == float(state.reach)
    for _ in range(100):
        state = complained(state, 1.0, PROMISE)
    assert float(state.reach) == 0.0
    indebted = replace(state, reach=np.array(-0.3))
    assert float(complained(indebted, 1.0, PROMISE).reach) == -0.3


def test_a_state_comes_back_from_json() -> None:
    state = GroupState.begin(3, 0.1, certified=1)
    before = Counted(stakes(state, PROMISE), np.full(3, WORST), np.zeros(3, dtype=bool))
    for loss in (WORST, 0.0):
        state = felt(counted_at_once(state, np.full(3, loss), PROMISE), loss, 0.3, PROMISE)
    state = corrected(state, before, replace(before, losses=np.zeros(3)), PROMISE)
    again = GroupState.from_json(json.loads(json.dumps(state.to_json())))
    assert again.to_json() == state.to_json()
    assert (
        counted_at_once(again, np.ones(3), PROMISE).to_json()
        == counted_at_once(state, np.ones(3), PROMISE).to_json()
    )
    for broken in ({}, {"evidence": 3}, state.to_json() | {"mood": 1}):
        with pytest.raises(InputError, match="state of a group is not readable"):
            GroupState.from_json(broken)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(target=0.0),
        dict(gain=1.0),
        dict(rest=0.0),
        dict(rest=0.2),
        dict(alert=2.0),
        dict(smoke=0.5),
        dict(fire=2.0),
        dict(target=math.nan),
        dict(cooling=0),
    ],
)
def test_a_promise_that_cannot_be_kept(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        Promise(**wrong)
