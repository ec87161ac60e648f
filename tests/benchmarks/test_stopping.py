"""Both ways of starting are judged on the same questions, which neither has seen."""

import pytest

from benchmarks.stopping import StoppingBenchConfig, _told, measure
from benchmarks.synthetic import synthetic_traces


@pytest.mark.whole
def test_both_are_told_of_each_learning_rate() -> None:
    config = StoppingBenchConfig(num_draws=2, steps=40, learning_rates=(3e-3,))
    found = {
        result.name.partition(": ")[2]: result for result in measure(synthetic_traces(80), config)
    }
    assert len(found) == 8 and all(-100 < one <= 0 for one in found["steps, each"].values)
    each = found["balanced return, each"].values
    assert len(each) == 2 and found["balanced return, mean"].median == pytest.approx(sum(each) / 2)


def test_an_interval_by_hand() -> None:
    # Of 1 and 3: the mean is 2, its error 1, Student's quantile of one degree of freedom 12.706.
    values = [result.values for result in _told("", "", [1.0, 3.0])]
    assert values[:2] == [(1.0, 3.0), (2.0,)]
    assert [one for (one,) in values[2:]] == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)
