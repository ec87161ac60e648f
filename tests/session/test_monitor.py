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
    Terms,
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


def test_a_row_that_was_reset_starts_anew_at_its_new_price(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 1)
    see(monitor, [0], ["a"])
    monitor.reset(np.array([0]))
    assert see(monitor, [0], ["a"]) == [False]
    monitor.reset(np.array([0]), Terms(10.0))
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


def test_a_halted_row_stays_halted_whatever_it_shows(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 2)
    see(monitor, [0, 1], ["a", "a"])
    assert see(monitor, [0, 1], ["a", "b"]) == [True, False]
    assert see(monitor, [0, 1], ["z", "c"]) == [True, False]
    assert monitor.observe(Signals(np.array([10])), np.array([0])).tolist() == [True]
    assert monitor.halted.tolist() == [True, False]
    assert monitor.num_bad_signals.tolist() == [0, 0]


def test_a_missing_signal_halts_nothing_and_is_counted(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 3, price=10.0)
    assert monitor.observe(Signals(np.array([10, 10])), np.array([2, 0])).tolist() == [False] * 2
    assert monitor.num_bad_signals.tolist() == [1, 0, 1]
    assert see(monitor, [0, 1, 2], ["a"] * 3) == [True] * 3
    monitor.reset(np.array([0]))
    assert monitor.num_bad_signals.tolist() == [0, 0, 1]


def test_a_request_has_a_least_and_a_most_thought(run_head: HaltHead) -> None:
    monitor = HaltMonitor(run_head, 3, price=10.0)
    monitor.reset(np.array([0]), Terms(10.0, min_tokens=11))
    monitor.reset(np.array([1]), Terms(0.0, max_tokens=10))
    monitor.reset(np.array([2]), Terms(0.0, max_tokens=11))
    rows = np.arange(3)
    assert see(monitor, [0, 1, 2], ["a"] * 3) == [False, True, False]
    assert monitor.cap(rows, np.array([10, 3, 10])).tolist() == [False, True, False]
    assert monitor.cap(rows, np.array([999, 3, 11])).tolist() == [False, True, True]
    monitor.reset(rows, Terms(10.0))
    assert monitor.cap(rows, np.array([999] * 3)).tolist() == [False] * 3


ANSWERS = st.lists(
    st.tuples(st.sampled_from(["see", "move", "join"]), st.permutations(range(4))), max_size=30
)


@given(ANSWERS, st.integers(0, 2**31))
def test_rows_that_join_leave_and_move_halt_as_if_each_were_alone(
    steps: list[tuple[str, list[int]]], seed: int
) -> None:
    """Sequences wander over the rows of one monitor; each also has a monitor of its own."""
    rng = np.random.default_rng(seed)
    head = random_head(3, ("pace", "agreement"))
    together = HaltMonitor(head, 4, price=1.0)
    alone = [HaltMonitor(head, 1, price=1.0) for _ in range(4)]  # of what is in each row
    for step, (what, order) in enumerate(steps):
        num = int(rng.integers(1, 5))
        rows, others = np.array(order[:num]), rng.permutation(4)[:num]
        if what == "see":
            positions = rng.integers(20 * step, 20 * step + 20, num)
            batch = Signals(positions, answer=rng.integers(0, 3, num))
            assert batch.answer is not None
            halts = together.observe(batch, rows)
            for i, row in enumerate(rows.tolist()):
                own = Signals(batch.position[i : i + 1], answer=batch.answer[i : i + 1])
                assert alone[row].observe(own, np.array([0]))[0] == halts[i]
        elif what == "move":
            together.move(rows, others)
            moved = list(alone)
            for row in set(rows.tolist()) - set(others.tolist()):
                moved[row] = HaltMonitor(head, 1, price=1.0)
            for source, target in zip(rows.tolist(), others.tolist(), strict=True):
                moved[target] = alone[source]
            alone = moved
        else:
            together.reset(rows, Terms(10.0))
            for row in rows.tolist():
                alone[row] = HaltMonitor(head, 1, price=10.0)
        # A row that was left keeps its price.
        for row in range(4):
            alone[row].price[:] = together.price[row]
    assert together.halted.tolist() == [bool(one.halted[0]) for one in alone]


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
