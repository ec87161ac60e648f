"""What heads come to over a training."""

import numpy as np
import pytest

from evaluation.rows import to_json
from evaluation.training_curve import CurvePoint, curve_point
from traces import Traces


def test_a_point_of_the_curve_is_the_mean_over_trainings(worked_example: Traces) -> None:
    # Halted at the last point it is right at 433 tokens, never at 633, at the first wrong at 110.
    last, never, first = [False, False, True], [False] * 3, [True] * 3
    decided = [np.array([never, last, first]), np.array([last, last, first])]
    point = curve_point(
        worked_example, decided, [0.1, 0.5, 2.0], np.ones(3), "always", ppo=True, step=7
    )
    assert point.em == {"low": 1.0, "middle": 1.0, "high": 0.0}
    assert point.tokens == {"low": (633 + 433) / 2, "middle": 433.0, "high": 110.0}
    middle, high = 1 - 0.5 * 0.433, -2 * 0.110
    returns = [(1 - 0.1 * low + middle + high) / 3 for low in (0.633, 0.433)]
    assert point.balanced_return == pytest.approx(np.mean(returns))
    # 433 of 600 tokens buy all of the 5 points above the floor, in either training.
    assert point.area == pytest.approx(0.05 * (1 - 433 / 600))
    assert CurvePoint.from_json(to_json(point)) == point
    assert point.scalars["tokens_low_price"] == 533.0 and len(point.scalars) == 8
