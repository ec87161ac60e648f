from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from evaluation.intervals import interval, resample, resampled_sums
from evaluation.outcome import Outcome, em_delta, never_outcome, saving
from traces import Traces

MakeTraces = Callable[..., Traces]


def halve(traces: Traces) -> Outcome:
    """All right, for half of the tokens."""
    everyone = np.ones(len(traces), dtype=bool)
    return Outcome(everyone, traces.num_tokens // 2, everyone)


def test_sums_are_over_whole_questions() -> None:
    # Question a: 1 + 2 and 0; question b: 10 and 5. Two draws of a, b with replacement.
    values = np.array([[1.0, 0.0], [2.0, 0.0], [10.0, 5.0]])
    sums = resampled_sums(np.array(["a", "a", "b"]), values, 2500, seed=0)
    assert sums.shape == (2500, 2)
    outcomes, count = np.unique(sums, axis=0, return_counts=True)
    assert outcomes.tolist() == [[6, 0], [13, 5], [20, 10]]
    np.testing.assert_allclose(count / 2500, [0.25, 0.5, 0.25], atol=0.04)


def test_one_question_leaves_nothing_to_resample(random_traces: Traces) -> None:
    one = replace(random_traces, question_id=np.full(len(random_traces), "q"))
    outcome = halve(one)
    found = resample(one, {"x": outcome}, num_resamples=20)["x"]
    np.testing.assert_allclose(found.em_delta, em_delta(one, outcome))
    np.testing.assert_allclose(found.saving, saving(one, outcome))


def test_intervals_hold_the_estimate_and_never_halting_has_no_width(random_traces: Traces) -> None:
    outcomes = {"half": halve(random_traces), "never": never_outcome(random_traces)}
    found = resample(random_traces, outcomes)
    low, high = interval(found["half"].em_delta)
    assert low < em_delta(random_traces, outcomes["half"]) < high
    assert interval(found["never"].em_delta) == interval(found["never"].saving) == [0.0, 0.0]


def test_differences_are_paired(random_traces: Traces) -> None:
    outcome = halve(random_traces)
    cheaper = replace(outcome, cost=outcome.cost - random_traces.num_tokens // 10 * 2)
    found = resample(random_traces, {"a": outcome, "b": cheaper}, num_resamples=500)
    lead = found["b"].saving - found["a"].saving
    assert interval(lead)[0] > 0
    assert lead.std() < 0.2 * found["a"].em_delta.std()
    assert np.array_equal(found["a"].em_delta, found["b"].em_delta)


def test_the_same_seed_gives_the_same_resamples(random_traces: Traces) -> None:
    outcomes = {"half": halve(random_traces)}
    first, again = (resample(random_traces, outcomes, 100)["half"].em_delta for _ in range(2))
    other = resample(random_traces, outcomes, 100, seed=1)["half"].em_delta
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_spread_is_that_of_independent_questions() -> None:
    """For 0/1 means over Q questions of one trace: sqrt(p (1 - p) / Q), as by theory."""
    rng = np.random.default_rng(1)
    num = 400
    right = rng.random(num) < 0.3
    values = np.stack([np.ones(num), right], axis=1)
    sums = resampled_sums(np.arange(num).astype(str), values, 4000, seed=0)
    mean = sums[:, 1] / sums[:, 0]
    expected = np.sqrt(right.mean() * (1 - right.mean()) / num)
    assert mean.std() == pytest.approx(expected, rel=0.05)


def test_traces_of_one_question_count_once() -> None:
    """Four copies of every trace must not make the interval narrower."""
    rng = np.random.default_rng(2)
    right = rng.random(100) < 0.5
    values = np.stack([np.ones(100), right], axis=1)
    names = np.arange(100).astype(str)
    single = resampled_sums(names, values, 2000, seed=0)
    copied = resampled_sums(np.repeat(names, 4), np.repeat(values, 4, axis=0), 2000, seed=0)
    np.testing.assert_allclose(copied, 4 * single)
