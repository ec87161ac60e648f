import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise import (
    HaltHead,
    HaltMonitor,
    HeadConfig,
    InputError,
    Observing,
    Signals,
    answer_keys,
)
from tests.heads import random_head


def see(monitor: HaltMonitor, rows: list[int], answers: list[str]) -> list[bool]:
    batch = Signals(
        np.full(len(rows), 10),
        answer=answer_keys(answers),
    )
    halts: list[bool] = monitor.observe(batch, np.array(rows)).tolist()
    return halts


def test_rows_halt_by_their_own_history(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 3)
    assert see(monitor, [0, 1, 2], ["a", "a", "a"]) == [False] * 3
    assert see(monitor, [2, 0], ["a", "b"]) == [True, False]
    assert see(monitor, [0, 1], ["b", "c"]) == [True, False]


def test_rows_have_their_own_prices(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 2, np.array([10.0, 0.1]))
    assert see(monitor, [0, 1], ["a", "a"]) == [True, False]


def test_at_a_price_of_0_a_row_is_never_halted(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 2, np.array([0.0, 10.0]))
    for _ in range(5):
        assert see(monitor, [0, 1], ["a", "a"]) == [False, True]
    features = np.full((3, run_head.config.observing.size - 1), 5, dtype=np.float32)
    assert run_head.halts(features, np.array([0.0, 10.0, 10.0])).tolist() == [False, True, True]
    assert run_head.prob_halt(features, 0.0).tolist() == [0.0] * 3


def test_a_row_that_was_reset_starts_anew_at_its_price(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 1)
    assert [see(monitor, [0], ["a"])[0] for _ in range(2)] == [False, True]
    monitor.reset(np.array([0]))
    assert see(monitor, [0], ["a"]) == [False]
    monitor.reset(np.array([0]))
    monitor.price[0] = 10.0
    assert see(monitor, [0], ["a"]) == [True]


def test_a_signal_that_is_not_a_number_continues_and_is_counted(run_head: HaltHead) -> None:
    observing = Observing(("confidence",), (0.0,) * 5, (1.0,) * 5, (0.1, 1.0))
    weights = {name: np.zeros_like(values) for name, values in run_head.weights.items()}
    weights |= {"w0": np.zeros((1, 6), dtype=np.float32), "b2": np.ones(1, dtype=np.float32)}
    always = HaltHead(HeadConfig(observing, run_head.config.halting, 1.0), weights)
    monitor = HaltMonitor(always, 2)
    confidence = np.array([np.nan, 0.5], dtype=np.float32)
    batch = Signals(np.array([10, 10]), confidence, answer_keys(["a", "a"]))
    assert monitor.observe(batch, np.array([0, 1])).tolist() == [False, True]
    assert monitor.num_bad_signals.tolist() == [1, 0]


@pytest.mark.parametrize("price", [-1e-9, -1.0, np.nan, np.inf])
def test_prices_that_are_none_are_refused(run_head: HaltHead, price: float) -> None:
    with pytest.raises(InputError, match="price"):
        HaltMonitor(run_head, 2, price)


@pytest.mark.filterwarnings("ignore:the head reads")
def test_a_missing_signal_halts_nothing_and_is_counted(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 3, price=10.0)
    assert monitor.observe(Signals(np.array([10, 10])), np.array([2, 0])).tolist() == [False] * 2
    assert monitor.num_bad_signals.tolist() == [1, 0, 1]
    assert see(monitor, [0, 1, 2], ["a"] * 3) == [True] * 3
    monitor.reset(np.array([0]))
    assert monitor.num_bad_signals.tolist() == [0, 0, 1]


SEEN = st.lists(st.tuples(st.booleans(), st.permutations(range(4))), max_size=30)


@given(SEEN, st.integers(0, 2**31))
def test_rows_that_join_and_leave_halt_as_if_each_were_alone(
    steps: list[tuple[bool, list[int]]], seed: int
) -> None:
    """Each row of one monitor also has a monitor of its own."""
    rng = np.random.default_rng(seed)
    head = random_head(3, ("pace", "agreement"))
    together = HaltMonitor(head, 4, price=1.0)
    alone = [HaltMonitor(head, 1, price=1.0) for _ in range(4)]
    for step, (sees, order) in enumerate(steps):
        num = int(rng.integers(1, 5))
        rows = np.array(order[:num])
        if sees:
            positions = rng.integers(20 * step, 20 * step + 20, num)
            batch = Signals(positions, answer=rng.integers(0, 3, num))
            assert batch.answer is not None
            halts = together.observe(batch, rows)
            for i, row in enumerate(rows.tolist()):
                own = Signals(batch.position[i : i + 1], answer=batch.answer[i : i + 1])
                assert alone[row].observe(own, np.array([0]))[0] == halts[i]
        else:
            together.reset(rows)
            together.price[rows] = 10.0
            for row in rows.tolist():
                alone[row] = HaltMonitor(head, 1, price=10.0)


def test_a_missing_signal_is_named_once(run_head: HaltHead) -> None:
    with pytest.warns(UserWarning, match="the head reads answer, which nobody measures"):
        HaltMonitor(run_head, 1).observe(Signals(np.array([10])), np.array([0]))


def test_a_head_without_a_price_of_its_own_says_that_it_halts_nothing(run_head: HaltHead) -> None:
    head = HaltHead(replace(run_head.config, default_price=0.0), run_head.weights)
    with pytest.warns(UserWarning, match="own price is 0: it halts no thought, unless"):
        monitor = HaltMonitor(head, 1)
    assert see(monitor, [0], ["a"]) == see(monitor, [0], ["a"]) == [False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert see(HaltMonitor(head, 1, 10.0), [0], ["a"]) == [True]


def test_prices_are_one_or_one_each(run_head: HaltHead) -> None:
    with pytest.raises(InputError, match="3 prices for 2 rows"):
        HaltMonitor(run_head, 2, np.ones(3))


def test_an_infinite_signal_leaves_no_trace() -> None:
    head = random_head(5, ("pace", "ending"))
    struck, spared = HaltMonitor(head, 1), HaltMonitor(head, 1)
    rows = np.array([0])
    for position, value in ((10, -3.0), (20, np.inf), (30, -2.0), (40, -1.0)):
        seen = Signals(np.array([position]), end_think_logprob=np.array([value], np.float32))
        struck.observe(seen, rows)
        if np.isfinite(value):
            spared.observe(seen, rows)
    assert struck.num_bad_signals.tolist() == [1]
    last = Signals(np.array([50]), end_think_logprob=np.zeros(1, np.float32))
    features = [monitor._state.update(last, rows) for monitor in (struck, spared)]
    np.testing.assert_array_equal(features[0][0, 3:], features[1][0, 3:])
