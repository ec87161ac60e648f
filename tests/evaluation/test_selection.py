from collections.abc import Callable

import numpy as np
import pytest

from evaluation.cascade import Chosen
from evaluation.selection import (
    FIRST_POINT,
    SELECTORS,
    START,
    Asked,
    Selection,
    Strategies,
    format_selection,
)
from policies.course import Escalating, LargeAnswers, Parameter
from policies.escalating import Always, Capped, Halted
from policies.head import HeadPolicy, price_grid
from tests.heads import random_head
from tests.pairs import worked_pair
from traces import Pairs, Traces, pair_up

MakeTraces = Callable[..., Traces]


def asked(pairs: Pairs, ratio: float = 2.0) -> Asked:
    return Asked(pairs, LargeAnswers.unhalted(pairs.large), ratio)


def chosen(policy: Escalating, *parameters: Parameter) -> Chosen:
    return Chosen(policy, list(parameters), {}, 0.0)


def halted() -> Chosen:
    head = random_head(2)
    return chosen(Halted(HeadPolicy(head)), (price_grid(head.config.observing)[0],))


@pytest.mark.parametrize(
    ("where", "costs"),
    [
        (START, [600, 600, 110, 262, 633]),
        # The first point comes at 100 tokens, and a look at its answer takes 10.
        (FIRST_POINT, [610, 710, 110, 272, 633]),
    ],
)
def test_who_waits_for_the_first_point_pays_for_it(
    where: str, costs: list[int], make_traces: MakeTraces
) -> None:
    some = [
        chosen(Always("always_small", [1.0]), (1.0,)),
        chosen(Always("always_large", [1.0]), (1.0,)),
        chosen(Capped(), (100.0,), (250.0,)),
        halted(),
    ]
    table = Strategies.of(asked(worked_pair(make_traces)), some, where)
    assert table.cost[:4, 0].tolist() == costs[:4]
    assert table.em[:4, 0].tolist() == [1, 1, 0, 1]
    assert table.cost[4, 0] in (110, 272, 433, 633)  # with the head's own looks, and no more


def two_tasks(make_traces: MakeTraces, num: int) -> Asked:
    """The small LM is right on plain questions alone, the large one, which is dear, on all."""
    wrong = {"correct": [False] * 3, "answer": ["1", "2", "3"]}
    rows = [{"task": ("plain", "hard")[n % 2], "final_correct": n % 2 == 0} for n in range(num)]
    small = make_traces([wrong | row for row in rows])
    big = {"model": "big", "num_tokens": 300, "position": [5, 6, 7]}
    return asked(pair_up(small, make_traces([big] * num)), 4.0)


@pytest.mark.whole
def test_a_selector_that_knows_the_task_goes_all_the_way(make_traces: MakeTraces) -> None:
    """At a price of 0.5 the large LM returns 0.4, the small one 0.7 or -0.3: 0.2 in the mean.

    So the large one is the best for all, and the best of each question returns 0.55.
    """
    small = chosen(Always("always_small", [1.0]), (1.0,))
    large = chosen(Always("always_large", [1.0]), (1.0,))
    policies = {"always_small": small, "always_large": large, "cascade": small}
    policies |= {"budget": chosen(Capped(), (400.0,)), "head": halted()}
    known, fresh = two_tasks(make_traces, 160), two_tasks(make_traces, 40)
    judged = Selection(known, fresh, random_head(2).config, [0.5], np.ones(1), 0.5)
    rows = judged.rows(policies, [40, 160])
    ways = {(row.among, row.chooser, row.where, row.learned): row.way for row in rows}
    for name in ("linear", "boosted trees"):
        assert ways["one LM, halted", name, START, 160] == pytest.approx(1.0)
        assert ways["one LM, halted", name, FIRST_POINT, 160] < 1
    assert ways["one LM, halted", "cascade", "all along", 160] == pytest.approx(-0.2 / 0.15)
    table = format_selection(rows)
    assert len(table.splitlines()) == 2 + 2 * (1 + 2 * len(SELECTORS))
    assert "linear" in table and "133.3" in table
