"""The governor's figures are found on a generated population as they are on traces."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.control import (
    Account,
    Audited,
    ControlConfig,
    Population,
    at_rest,
    measure,
    population,
    stranger,
    sudden,
)
from benchmarks.synthetic import synthetic_traces
from haltwise import InputError
from haltwise.control.governor import GroupState, Promise

CONFIG = ControlConfig(draws=60, num_prices=10, num_audits=1500, num_requests=10_000)


def generated(seed: int, first: float = 0.002) -> Population:
    """3,000 requests whose first price loses so much, and each further one half as much again."""
    rng, num = np.random.default_rng(seed), 3000
    full = rng.gamma(3, 1000, num)
    at = rng.random((num, 1))
    losses = (at < 0.01 + first * 1.5 ** np.arange(10)).astype(float) - (at > 0.99)
    costs = full[:, None] * np.linspace(0.7, 0.4, 10)
    return Population(
        np.column_stack([np.zeros(num), losses]), np.column_stack([full, costs]), full * 1.02
    )


@pytest.mark.whole
def test_the_promise_is_kept_at_rest() -> None:
    found = {result.name: result.median for result in at_rest(generated(0), CONFIG, Promise())}
    best = found["best fixed price in hindsight: saving"]
    assert 45 < best < 55
    assert found["audits decay to 5.0%: runs that ever serve over target"] <= 10 + 12  # 3 s.e.
    assert found["audits decay to 5.0%: ceiling's saving short of the best"] <= 10
    assert found["audits decay to 5.0%: saving, audits paid, of the best"] >= 75
    assert found["audits decay to 2.5%: late loss"] < 2


@pytest.mark.whole
def test_a_sudden_loss_is_found_and_a_stranger_is_learned() -> None:
    found = {result.name: result.median for result in sudden(generated(1), CONFIG, Promise())}
    assert found["8 points lost: requests until it stops, median"] < 2000
    assert found["8 points lost: audited before"] < 8
    new = stranger("new", generated(2, first=0.004), 8, CONFIG, Promise())
    loses, kept, saved = (result.median for result in new)
    assert loses > 4 and kept >= 90 and saved >= 50


def test_an_account_by_hand() -> None:
    drawn = Population(
        np.array([[0, 0.5], [0, 0.0]]), np.array([[100.0, 40], [300, 100]]), np.array([110.0, 310])
    )
    state = GroupState.begin(1, np.array([0.1]), certified=1)
    account = Account(drawn, 10, 0.02, 1)
    one = Audited(state, np.array([1]), np.array([4]), np.array([310.0]))
    assert account.add(one) and account.add(one) and not account.add(one)
    # Eight halted requests at 70 in the mean and two audits, of requests that cost 200 unhalted.
    assert account.saving.tolist() == [1 - (8 * 70 + 2 * 310) / 2000]
    # Of the last five requests one is an audit, which loses nothing; the others lose 0.25 each.
    assert account.late_loss.tolist() == [4 * 0.25 / 5]
    assert account.audits.tolist() == [2] and account.over.tolist() == [True]


def test_traces_make_a_population() -> None:
    traces = synthetic_traces(60)
    drawn = population(traces, replace(CONFIG, num_prices=5))
    assert drawn.losses.shape == drawn.costs.shape == (60, 6)
    assert (drawn.saving[0], drawn.risk[0]) == (0, 0)
    assert drawn.saving[5] > drawn.saving[1] and (drawn.audited >= drawn.costs[:, 0]).all()


def test_all_figures_come_from_traces() -> None:
    tiny = ControlConfig(draws=2, num_prices=4, num_audits=20, num_requests=50)
    assert len(measure(synthetic_traces(60), tiny)) == 15


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no questions\.json"):
        population(synthetic_traces(6), replace(CONFIG, run=tmp_path))


def test_a_cascade_needs_the_traces_of_both_lms(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected --traces and --control\.run with it"):
        measure(synthetic_traces(6), replace(CONFIG, large=tmp_path))
