import numpy as np
import pytest
from numpy.typing import NDArray

from haltwise.session.signal_collector import LOWEST_LOGPROB, NUM_TOP, STEPWISE, TokenStatistics

ONE = np.array([0])


def top(*probs: float) -> NDArray[np.float64]:
    """Log probabilities of the likeliest tokens (1, NUM_TOP); the vocabulary has no more."""
    logprobs = np.full((1, NUM_TOP), -np.inf)
    logprobs[0, : len(probs)] = np.log(probs)
    return logprobs


def test_others_count_as_one_token() -> None:
    gauge = TokenStatistics(1)
    gauge.add(ONE, np.log([0.01]), top(*[0.03] * NUM_TOP))
    seen = gauge.read(ONE)
    expected = -20 * 0.03 * np.log(0.03) - 0.4 * np.log(0.4)
    np.testing.assert_allclose(seen["entropy"], expected, rtol=1e-6)
    np.testing.assert_allclose(seen["logprob"], np.log(0.01), rtol=1e-6)
    assert seen["margin"] == 0


def test_mean_largest_and_smallest_are_since_the_reset() -> None:
    gauge = TokenStatistics(3)
    rows = np.array([2, 0])
    gauge.add(np.array([2, 2, 0]), np.log([0.1, 0.1, 0.1]), np.repeat(top(0.9, 0.1), 3, axis=0))
    gauge.reset(rows)
    # Two tokens of row 2 in one call, with one of row 0 between them.
    tops = np.concatenate([top(0.5, 0.5), top(1.0), top(0.75, 0.25)])
    gauge.add(np.array([2, 0, 2]), np.log([0.5, 1.0, 0.25]), tops)
    seen = gauge.read(rows)
    skewed = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    expected = {
        "entropy": [(np.log(2) + skewed) / 2, 0],
        "max_entropy": [np.log(2), 0],
        "logprob": [-1.5 * np.log(2), 0],
        "min_logprob": [-2 * np.log(2), 0],
        "margin": [0.25, 1],
    }
    assert tuple(expected) == STEPWISE
    for name, values in expected.items():
        np.testing.assert_allclose(seen[name], values, atol=1e-6, err_msg=name)
    assert gauge.num_tokens.tolist() == [1, 0, 2]


def test_impossible_tokens_have_finite_signals_and_unknown_ones_none() -> None:
    gauge = TokenStatistics(2)
    unknown = np.full((1, NUM_TOP), np.nan)
    tops = np.concatenate([top(1.0), unknown, top(1.0)])
    gauge.add(np.array([0, 1, 1]), np.array([-np.inf, np.nan, 0.0]), tops)
    seen = gauge.read(np.array([0, 1]))
    assert seen["min_logprob"][0] == LOWEST_LOGPROB
    for values in seen.values():
        assert np.isfinite(values[0]) and np.isnan(values[1])
    gauge.reset(np.array([1]))
    gauge.add(np.array([1]), np.zeros(1), top(1.0))
    assert gauge.read(np.array([1]))["margin"] == 1


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_rows_do_not_see_each_other(num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    tops = -np.sort(rng.exponential(size=(num_tokens, 4, NUM_TOP)).cumsum(axis=2))[..., ::-1]
    tops = np.sort(tops, axis=2)[..., ::-1] - 3.0
    logprob = tops[..., 1]
    together, alone = TokenStatistics(4), TokenStatistics(4)
    for i in range(num_tokens):
        together.add(np.arange(4), logprob[i], tops[i])
    for row in range(4):
        alone.add(np.full(num_tokens, row), logprob[:, row], tops[:, row])
    for name, values in together.read(np.arange(4)).items():
        np.testing.assert_array_equal(values, alone.read(np.arange(4))[name])
