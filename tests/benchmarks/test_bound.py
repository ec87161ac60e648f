"""What halting returns more than going on is what it says, and trees are judged as they learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.bound import BoundConfig, _advantage, measure
from benchmarks.synthetic import synthetic_traces
from haltwise import InputError
from tests.conftest import MakeTraces

CONFIG = BoundConfig(num_prices=2, rounds=1, num_trees=5)


def test_an_advantage_by_hand(make_traces: MakeTraces) -> None:
    traces = make_traces([{}])  # wrong, right, right; probes take 10, 12 and 11 tokens
    price = 1e-3
    halted = [0 - 0.11, 1 - 0.272, 1 - 0.433]
    never = 1 - 0.633
    alone = _advantage(traces, price, np.zeros(3, dtype=bool))
    assert alone.tolist() == pytest.approx([one - never for one in halted])
    behind = _advantage(traces, price, np.array([False, True, True]))
    assert behind.tolist() == pytest.approx(
        [halted[0] - halted[1], halted[1] - halted[2], halted[2] - never]
    )


def test_all_frontiers_are_told() -> None:
    found = {result.name: result.median for result in measure(synthetic_traces(300), CONFIG)}
    assert len(found) == 15 and all(0 <= value < 100 for value in found.values())
    for name in ("evidence in sample", "boosted trees in sample", "boosted trees out of fold"):
        by_drop = [found[f"{name}: saving at a drop of {drop}"] for drop in ("0", "0.5", "1", "2")]
        assert by_drop == sorted(by_drop)
    assert found["boosted trees in sample: saving at a drop of 3"] > 0


@pytest.mark.parametrize("groups", [("nothing",), ("hidden",)])
def test_groups_that_there_are_not_are_refused(groups: tuple[str, ...]) -> None:
    with pytest.raises(InputError):
        measure(synthetic_traces(30), replace(CONFIG, groups=groups))
