import numpy as np
import pytest

from haltwise import (
    HaltHead,
    HaltMonitor,
    HeadConfig,
    InputError,
    Observing,
    Signals,
    answer_keys,
)


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


def test_a_row_that_was_reset_starts_anew_at_its_new_price(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 1)
    see(monitor, [0], ["a"])
    monitor.reset(np.array([0]))
    assert see(monitor, [0], ["a"]) == [False]
    monitor.reset(np.array([0]), price=10.0)
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
    assert monitor.num_bad_signals == 1


@pytest.mark.parametrize("price", [-1e-9, -1.0, np.nan, np.inf])
def test_prices_that_are_none_are_refused(run_head: HaltHead, price: float) -> None:
    with pytest.raises(InputError, match="price"):
        HaltMonitor(run_head, 2, price)
