"""Seeds and checkpoints of a training, judged out of fold."""

import numpy as np
import pytest

from evaluation.outcome import halt_outcome, saving
from evaluation.trials import balanced_returns, earliest, format_trials, try_checkpoints
from traces import Traces

NEVER, LAST = [False] * 3, [False, True, False]


def test_the_checkpoint_with_the_best_return_is_taken(worked_example: Traces) -> None:
    # Prices 0.5 and 1; by hand: halting at point 1 returns 1 - price * 0.272, never 0.633.
    halts = np.array([[NEVER, NEVER], [LAST, LAST], [NEVER, LAST]])
    weights = np.array([2.0, 1.0])
    trials = try_checkpoints(worked_example, {0: halts, 5: halts}, [0.5, 1.0], weights, "always")
    assert trials.taken == 1
    returns = [trial.balanced_return for trial in trials.each if trial.seed == 5]
    never, last = [1 - 0.5 * 0.633, 1 - 0.633], [1 - 0.5 * 0.272, 1 - 0.272]
    assert returns == pytest.approx(
        [
            (2 * never[0] + never[1]) / 2,
            (2 * last[0] + last[1]) / 2,
            (2 * never[0] + last[1]) / 2,
        ]
    )
    first, second, *_ = [trial.to_json() for trial in trials.each]
    assert list(first) == ["seed", "checkpoint", "return", "area", "gates"]
    # 5 points above the floor, for each share of tokens that is more than what halting spends.
    assert [first["area"], second["area"]] == pytest.approx([0, 0.05 * (1 - 272 / 600)])
    assert first["gates"]["0.0"] == {"price": None, "em_delta": 0.0, "saving": 0.0}
    chosen = second["gates"]["0.0"]
    assert chosen == {"price": 0.5, "em_delta": 0.0, "saving": pytest.approx(1 - 272 / 600)}


def test_the_outcome_is_the_mean_over_seeds(worked_example: Traces) -> None:
    early, late = [True, False, False], [False, False, True]
    decided = {0: np.array([[early]]), 1: np.array([[late]])}
    trials = try_checkpoints(worked_example, decided, [1.0], np.ones(1), "always")
    outcome = trials.outcomes[1.0]
    assert outcome.em.tolist() == [0.5] and outcome.cost.tolist() == [(110 + 433) / 2]
    assert saving(worked_example, outcome) == pytest.approx(1 - 271.5 / 600)


def test_a_return_is_weighed_by_price(worked_example: Traces) -> None:
    outcome = halt_outcome(worked_example, np.array(LAST), "always")
    found = balanced_returns({1.0: outcome}, np.array([3.0]))
    assert found.tolist() == pytest.approx([3 * (1 - 0.272)])


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ([0.3, 0.0, 0.0, -0.1], 0),  # a mean of 0.05, with an error of sqrt(0.09) / 4 = 0.075
        ([0.1, 0.1, 0.1, 0.2], 1),  # of 0.125, with 0.0217
    ],
)
def test_a_later_checkpoint_is_taken_if_it_is_told_apart(gains: list[float], taken: int) -> None:
    returns = np.array([[0.0] * 4, gains])
    assert earliest(returns, np.array(list("abcd"))) == taken
    assert earliest(returns[::-1], np.array(list("abcd"))) == 0


def test_every_checkpoint_is_reported_with_its_spread(worked_example: Traces) -> None:
    halts = np.array([[NEVER], [LAST]])
    decided = {0: halts, 1: halts[::-1]}
    trials = try_checkpoints(worked_example, decided, [0.5], np.ones(1), "always")
    text = format_trials(trials, (0.0, 1.0))
    assert text.count("<- taken") == 1 and "after 0% of PPO" in text
    # half of the seeds save 54.7 %, half nothing
    assert "saves 27.3 +- 38.7 at 0% (0.0 54.7)" in text
