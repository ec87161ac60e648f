"""Estimates are right in the mean, and their intervals hold at all times at once."""

import json
import math
from typing import Any

import numpy as np
import pytest

from haltwise import InputError
from haltwise.control.betting import growth, half_width, log_mean_exp, log_wealth
from haltwise.control.estimates import LOSSES, Audit, Sums

NAN = math.nan


def audit(agrees: Any, cost: Any = None, **labels: Any) -> Audit:
    right = labels.pop("right", None)
    return Audit(
        np.array(agrees, dtype=bool),
        np.array([30.0] * len(agrees) if cost is None else cost, dtype=float),
        labels.pop("full_cost", 100.0),
        None if right is None else np.array(right, dtype=float),
        **labels,
    )


@pytest.mark.parametrize(
    ("right", "full_right", "net", "wrong"),
    [
        (None, None, [0, 1, 1], [0, 1, 1]),  # nobody knows: the worst
        (None, 1.0, [0, 1, 1], [0, 1, 1]),
        ([1, 0, NAN], 1.0, [0, 1, 1], [0, 1, 1]),
        ([0, 1, 0], 0.0, [0, -1, 0], [0, 0, 0]),
        ([1, 0.5, 1], 1.0, [0, 0.5, 0], [0, 0.5, 0]),
    ],
)
def test_losses_by_kind(right: Any, full_right: Any, net: Any, wrong: Any) -> None:
    told = audit([1, 0, 0], right=right, full_right=full_right)
    assert told.losses.tolist() == [net, wrong, [0, 1, 1]]


def test_an_estimate_by_hand() -> None:
    # Ten requests, two of them audited: one for sure, one with 1 in 4.
    sums = Sums.none(2, 0.25, 200).request(10)
    sums = sums.audit(audit([0, 0], [50, 20], right=[0, 1], full_right=1.0), 0.25)
    sums = sums.audit(audit([1, 0], [60, 10], right=[0, 1], full_right=0.0), 1.0)
    losses = dict(zip(LOSSES, sums.losses().estimate.tolist(), strict=True))
    assert losses == {
        "net-em-loss": [4 / 10, -1 / 10],
        "right-to-wrong": [4 / 10, 0],
        "disagreement": [4 / 10, 5 / 10],
    }
    saved = sums.savings().estimate
    assert saved == pytest.approx([1 - (4 * 50 + 60) / 500, 1 - (4 * 20 + 10) / 500])


def test_labels_replace_what_was_taken_for_the_worst() -> None:
    due, known = audit([0, 1]), audit([0, 1], right=[1, 0], full_right=0.0)
    before = Sums.none(2, 0.1, 100).request(50).audit(due, 0.5)
    after = before.label(due, known, 0.5)
    direct = Sums.none(2, 0.1, 100).request(50).audit(known, 0.5)
    assert json.dumps(after.to_json()) == json.dumps(direct.to_json())
    unlabelled, labelled = before.losses(), after.losses()
    assert unlabelled.estimate[0, 0] == 2 / 50 and labelled.estimate[0, 0] == -2 / 50
    # While it is due the interval holds whatever the label will be.
    assert unlabelled.low[0, 0] <= labelled.estimate[0, 0] <= unlabelled.high[0, 0]


def population(rng: np.random.Generator, num: int) -> tuple[Any, ...]:
    """Requests of 2 prices that lose 3 and 12 points; long ones lose more."""
    full = rng.integers(100, 1000, num).astype(float)
    difference = rng.random((num, 1)) < np.array([0.06, 0.2]) * full[:, None] / 550
    right = rng.random((num, 2)) < np.array([0.25, 0.2])
    full_right = np.where(difference.any(1), ~right.min(1), rng.random(num) < 0.7)
    right = np.where(difference, right, full_right[:, None])
    cost = full[:, None] * rng.uniform([0.4, 0.2], [0.9, 0.7], (num, 2))
    return full, right.astype(float), full_right.astype(float), cost


@pytest.mark.whole
def test_estimates_hold_at_all_times_at_once() -> None:
    """Audits are drawn with 0.02 to 1, more often after one that lost."""
    num, draws, rng = 800, 40, np.random.default_rng(1)
    full, right, full_right, cost = population(rng, 200_000)
    loss = (full_right[:, None] - right).mean(0)
    saving = 1 - cost.sum(0) / full.sum()
    errors, missed = [], np.zeros((draws, 4))
    for n in range(draws):
        sums, probability = Sums.none(2, 0.02, 1000), 0.2
        for i in rng.integers(0, len(full), num).tolist():
            sums = sums.request()
            if rng.random() >= probability:
                probability = max(probability * 0.97, 0.02)
                continue
            told = Audit(right[i] == full_right[i], cost[i], full[i], right[i], full_right[i])
            sums = sums.audit(told, probability)
            probability = 1.0 if told.losses[0, 1] > 0 else probability
            if sums.num_audits % 20:
                continue
            lost, saved = sums.losses(), sums.savings()
            missed[n, :2] += (loss < lost.low[0]) | (loss > lost.high[0])
            missed[n, 2:] += (saving < saved.low) | (saving > saved.high)
        errors.append([*(lost.estimate[0] - loss), *(saved.estimate - saving)])
    mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0) / math.sqrt(draws)
    assert (np.abs(mean) < 3 * spread + [0, 0, 2e-3, 2e-3]).all()  # a ratio has a small bias
    assert ((missed > 0).mean(axis=0) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)).all()


def test_intervals_say_something() -> None:
    """A normal interval of 400 audits with 8 losses is 1.4 points to each side."""
    sums = Sums.none(1, 1.0, 500).request(400)
    for n in range(400):
        told = audit([n % 50], [30 + n % 20], right=[0], full_right=1.0)
        sums = sums.audit(told, 1.0)
    lost, saved = sums.losses(), sums.savings()
    assert -0.02 < lost.low[0, 0] < 0.02 < lost.high[0, 0] < 0.06
    assert saved.estimate[0] == pytest.approx(0.605)
    assert 0.5 < saved.low[0] < 0.605 < saved.high[0] < 0.7


@pytest.mark.whole
def test_a_capital_that_may_be_looked_at_at_any_time() -> None:
    """Of fair games, at most a tenth ever reach 10; some do."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((2000, 1500)) < 0.04, 1.0, -0.0) * rng.choice([-1, 1], (2000, 1500))
    sums, squares = np.cumsum(x, axis=1)[:, 4::5], np.cumsum(x**2, axis=1)[:, 4::5]
    ever = (log_wealth(sums, squares) >= math.log(10)).any(axis=1).mean()
    assert 0 < ever <= 0.1
    out = (sums[:200] > half_width(squares[:200], 0.1)).any(axis=1)
    inside = (log_wealth(sums[:200], squares[:200]) >= math.log(10)).any(axis=1)
    assert (out == inside).all()
    capital = log_mean_exp(np.cumsum(growth(x * 0.5 + 0.02, 0.02), axis=1))
    assert 0 < (capital >= math.log(10)).any(axis=1).mean() <= 0.1


def test_a_bet_grows_as_it_says() -> None:
    assert growth(0.1, 0.5).tolist() == pytest.approx(
        [math.log(1 + stake / 0.5 * 0.4) for stake in (0.2, 0.45)]
    )
    assert log_mean_exp(np.log([[1.0, 3.0]])).tolist() == pytest.approx([math.log(2)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(full_cost=-1.0), "negative or not finite"),
        (dict(full_cost=NAN), "negative or not finite"),
        (dict(cost=[1.0]), "1 costs"),
        (dict(right=[0.0, 2.0], full_right=1.0), "labels are not all in"),
        (dict(full_right=-0.5), "labels are not all in"),
    ],
)
def test_an_audit_that_is_none(change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        audit([1, 0], **change)


def test_sums_refuse_what_voids_them() -> None:
    sums = Sums.none(2, 0.1, 100)
    with pytest.raises(InputError, match=r"drawn with 0\.05, expected 0\.1 to 1"):
        sums.audit(audit([1, 1]), 0.05)
    with pytest.raises(InputError, match="has 101 tokens, expected at most 100"):
        sums.audit(audit([1, 1], full_cost=101.0), 0.5)
    for floor, most in ((0, 100), (2, 100), (0.1, 0), (0.1, math.inf)):
        with pytest.raises(InputError, match="expected a share"):
            Sums.none(2, floor, most)
    with pytest.raises(InputError, match="not readable"):
        Sums.from_json({"floor": 1})


def test_sums_come_back_from_json() -> None:
    sums = Sums.none(2, 0.1, 100).request(3).audit(audit([0, 1]), 0.3)
    again = Sums.from_json(json.loads(json.dumps(sums.to_json())))
    assert again.to_json() == sums.to_json()
    assert again.losses().high.tolist() == sums.losses().high.tolist()


def test_the_sums_of_one_price_tell_the_same_of_it() -> None:
    sums = Sums.none(3, 0.25, 100.0)
    for i in range(200):
        one = Audit(np.array([True, i % 5 > 0, i % 3 > 0]), np.array([60.0, 50.0, i % 40]), 80.0)
        sums = sums.request(2).audit(one, 0.25 + 0.25 * (i % 4))
    for step in (1, 2, 3):
        alone = sums.at(step)
        for all_, own in ((sums.losses(), alone.losses()), (sums.savings(), alone.savings())):
            for end in ("low", "estimate", "high"):
                expected = getattr(all_, end)[..., step - 1]
                assert getattr(own, end)[..., 0].tolist() == pytest.approx(expected.tolist())
