"""Paced spending keeps to its budget, whatever requests come to cost."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from haltwise.control import pacing
from haltwise.control.budgets import Account, Amount, Budget, Standing
from haltwise.control.pacing import Pace, expected

DAY = 86_400.0


def standing(left: int, requests: int, passed: float, guess: int = 1_000) -> Standing:
    budget = Budget(nano=10**9, seconds=DAY, requests=guess)
    return Standing(Account("everything", budget), Amount(left, 10**18), requests, DAY, passed)


def test_requests_are_expected_as_the_operator_guesses_and_then_as_they_come() -> None:
    assert expected(standing(1, 0, 0.0)) == 1_000
    assert expected(standing(1, 250, 0.25)) == pytest.approx(750)
    assert expected(standing(1, 93, 0.9, guess=0)) == pytest.approx(10)  # 93 of them in 90 and 3 %
    assert expected(standing(1, 1_500, 0.5)) == pytest.approx((30 + 1_500) / 0.53 * 0.5)
    assert expected(standing(1, 5, 1.0)) == 1


def test_a_request_that_costs_more_than_its_allowance_makes_it_more_urgent() -> None:
    pace, stands = Pace(), standing(1_000_000, 0, 0.0)
    assert pace.of([stands]) == 0.0
    steps = [(2_000, 0.02), (1_500, 0.03), (1_000, 0.03), (500, 0.02), (0, 0.0), (0, 0.0)]
    for cost, urgency in steps:  # of 1,000 each
        pace.spent(stands, Amount(cost))
        assert pace.of([stands]) == pytest.approx(urgency)
    pace.spent(stands, Amount(10**15))
    assert pace.of([stands]) == pytest.approx(0.1)  # no single one is felt more
    pace.spent(standing(0, 0, 0.0), Amount(1))
    assert pace.of([stands]) == pytest.approx(0.2)
    for _ in range(20):
        pace.spent(stands, Amount(10**15))
    assert pace.of([stands]) == 1.0


def test_only_paced_budgets_are_urgent_and_the_most_pressed_one_counts() -> None:
    pace, stands = Pace(), standing(1_000_000, 0, 0.0)
    plain = replace(stands, account=Account("tenant a", Budget(nano=5)))
    other = replace(stands, account=Account("tenant b", stands.account.budget))
    pace.spent(plain, Amount(10**6))
    pace.spent(other, Amount(2_000))
    assert pace.of([plain]) is None and pace.of([]) is None
    assert pace.of([plain, stands]) == 0.0 and pace.of([stands, other]) == pytest.approx(0.02)


def test_accounts_that_were_moved_longest_ago_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pacing, "_MOST_ACCOUNTS", 2)
    pace, stands = Pace(), standing(1_000_000, 0, 0.0)
    for name in "abac":
        pace.spent(replace(stands, account=Account(name, stands.account.budget)), Amount(9_000))
    assert list(pace.urgency) == ["a", "c"]


def spent(mean: Callable[[float], float], num: int, guess: int, seed: int = 0) -> float:
    """What a window comes to, as a share of its budget.

    A request that is halted as late as it may costs `mean` of the share of the window that has
    passed, and 45 % less if it is as urgent as can be. The budget is 0.8 for each.
    """
    rng, pace, total = np.random.default_rng(seed), Pace(), 0.0
    unit = 10**6
    whole = round(0.8 * num * unit)
    for n in range(num):
        left = max(whole - round(total), 0)
        stands = standing(left, n, n / num, guess)
        urgency = pace.of([stands]) or 0.0
        cost = mean(n / num) * (1 - 0.45 * urgency) * rng.gamma(2.0, 0.5) * unit
        pace.spent(stands, Amount(round(cost)))
        total += cost
    return total / whole


@pytest.mark.parametrize("guess", [3_000, 1_500, 6_000])
@pytest.mark.parametrize(
    "mean",
    [
        lambda _: 1.0,
        lambda at: 1.0 if at < 0.5 else 1.3,  # harder questions from the middle on
        lambda at: 1.3 if at < 0.5 else 1.0,
        lambda at: 1.1 + 0.3 * math.sin(20 * at),
    ],
    ids=["steady", "harder", "easier", "waves"],
)
def test_spending_stays_within_2_percent_of_a_budget(
    mean: Callable[[float], float], guess: int
) -> None:
    found = [spent(mean, 3_000, guess, seed) for seed in range(5)]
    assert all(0.98 <= share <= 1.02 for share in found), found


def test_where_no_price_is_high_enough_it_is_as_urgent_as_can_be() -> None:
    assert spent(lambda _: 2.0, 1_000, 1_000) > 1.02
    assert spent(lambda _: 0.5, 1_000, 1_000) < 0.65  # and it never spends for spending's sake
