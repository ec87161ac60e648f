from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from evaluation.cascade import (
    CascadeRow,
    Played,
    billed,
    format_rows,
    judge,
    questions_needed,
    verdict,
)
from haltwise.policy.halting import Probing
from policies.course import AT_END, AT_START, Bills, Course, LargeAnswers, Parameter
from policies.escalating import Always
from tests.pairs import made_up, worked_pair
from traces import Pairs, Traces

MakeTraces = Callable[..., Traces]


@pytest.mark.parametrize(
    ("point", "escalated", "always", "at_halt"),
    [
        (AT_START, True, 600, 600),
        (0, False, 110, 110),
        (1, False, 272, 262),
        (1, True, 872, 850),  # an answer that nobody forces is not paid
        (AT_END, False, 633, 600),
        (AT_END, True, 1233, 1200),
    ],
)
def test_both_bills_of_the_worked_example(
    point: int, escalated: bool, always: int, at_halt: int, make_traces: MakeTraces
) -> None:
    pairs = worked_pair(make_traces)
    course = Course(np.array([point]), np.array([escalated]))
    large = LargeAnswers.unhalted(pairs.large)
    costs: list[tuple[Probing, int]] = [("always", always), ("at_halt", at_halt)]
    for probing, cost in costs:
        found = billed(pairs, Bills.of(pairs.small, probing), course, large, 1.0, 2.0)
        assert found.cost.tolist() == [cost]
        assert found.em.tolist() == [escalated or point != 0]


@dataclass(frozen=True)
class Knowing:
    """Escalates as many questions as its number says, those that the small LM fails on first."""

    name: str
    most: int
    probing: ClassVar[Probing] = "at_halt"

    def signal(self, pairs: Pairs) -> None:
        return None

    def grid(self, signal: None) -> list[Parameter]:
        return [(float(num),) for num in range(0, self.most + 1, 10)]

    def course(self, pairs: Pairs, signal: None, parameter: Parameter) -> Course:
        first = np.argsort(np.argsort(pairs.small.final_correct)) < parameter[0]
        return Course(np.where(first, AT_START, AT_END), first)

    def large_price(self, parameter: Parameter) -> float:
        return 1.0


def rows_of(pairs: Pairs, *policies: object) -> list[CascadeRow]:
    large = LargeAnswers.unhalted(pairs.large)
    chosen = [Played.of(of, pairs, large, 4.0).choose() for of in policies]  # type: ignore[arg-type]
    return judge(pairs, large, 4.0, chosen, "cascade")


def test_the_cheapest_numbers_within_the_gate_are_frozen(make_traces: MakeTraces) -> None:
    pairs = made_up(make_traces, 100, lambda easy: True)
    large = LargeAnswers.unhalted(pairs.large)
    chosen = Played.of(Knowing("cascade", 100), pairs, large, 4.0).choose()
    num_hard = int((~pairs.small.final_correct).sum())
    assert 30 < num_hard < 50 and chosen.points[0.0] == (float(-(-num_hard // 10) * 10),)
    # Beyond that, nothing is won.
    assert [number for (number,) in chosen.parameters] == list(range(0, num_hard + 10, 10))
    assert Played.of(Knowing("cascade", 10), pairs, large, 4.0).choose().points[0.0] is None


def test_leads_at_equal_em_by_hand(make_traces: MakeTraces) -> None:
    pairs = made_up(make_traces, 100, lambda easy: True)
    always = [Always("always_small", [1.0]), Always("always_large", [1.0])]
    rows = rows_of(pairs, Knowing("cascade", 100), *always)
    own, small, large = (
        next(r for r in rows if r.policy == n and r.gate == 0.0)
        for n in ("cascade", "always_small", "always_large")
    )
    num = own.escalated * 100
    assert own.tokens == pytest.approx((num * 800 + (100 - num) * 250) / 100)
    assert own.em_delta == 0 and own.em == 1
    assert large.tokens == 800 and large.saving == 0 and large.escalated == 1
    assert large.cheaper == pytest.approx(1 - own.tokens / 800)
    low, high = large.cheaper_interval
    assert low < large.cheaper < high
    # The small LM has that EM nowhere: only the large one, which every frontier holds, has it.
    assert small.cheaper == pytest.approx(large.cheaper)
    assert small.em == pairs.small.final_correct.mean()
    assert own.cheaper == pytest.approx(0)
    again = rows_of(pairs, Knowing("cascade", 100), *always)
    assert again == rows


def row(lead: float, interval: list[float], policy: str = "router") -> CascadeRow:
    fixed = {"em_delta": 0.0, "em_delta_interval": [0.0, 0.0], "tokens": 50.0, "saving": 0.5}
    fixed |= {"saving_interval": [0.4, 0.6], "escalated": 0.2, "em": 0.9}
    ends = {"cheaper_frozen": lead, "cheaper_frozen_interval": interval}
    made = {"gate": 0.0, "parameter": [0.5], "cheaper": lead, "cheaper_interval": interval}
    return CascadeRow(policy=policy, **fixed, **ends, **made)  # type: ignore[arg-type]


def test_questions_needed_grow_with_the_square() -> None:
    # The interval reaches 0.2 below a lead of 0.1: it has to be half as wide, or a fourth.
    assert questions_needed(row(0.1, [-0.1, 0.3]), 100) == 400
    assert questions_needed(row(0.1, [-0.1, 0.3]), 100, margin=0.05) == 1600
    assert questions_needed(row(-0.1, [-0.3, 0.1]), 100) is None


@pytest.mark.parametrize(
    ("lead", "low", "said"),
    [
        (0.06, 0.01, "cheaper than all of them"),
        (0.04, 0.01, "no clear gain over all of them"),
        (0.06, -0.01, "no clear gain over all of them"),
    ],
)
def test_the_verdict_needs_a_margin_and_an_interval(lead: float, low: float, said: str) -> None:
    rows = [row(0.5, [0.4, 0.6], name) for name in ("cascade", "always_small", "always_large")]
    rows += [row(lead, [low, 0.1], "router_logistic")]
    sentence = verdict(rows, {"the best router": "router_logistic"}, 4.0, 1000)
    assert sentence.startswith(f"Verdict: {said}: at a ratio of 4 and a price of 0.5,")
    assert f"{100 * lead:.1f} % [" in sentence and "(router logistic)" in sentence
    assert "1,000 test questions" in sentence and "\n" not in sentence
    assert "router logistic" in format_rows(rows)
