"""The frontier at an EM, in many resamples at once, and the area under it."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.frontier import frontier_area, frontier_savings, saving_at_em

Points = list[tuple[float, float]]

# Steps of 1/8 make ties, and points that beat each other by one of the two only.
POINTS = st.lists(
    st.tuples(st.integers(-8, 8), st.integers(-8, 8)).map(lambda p: (p[0] / 8, p[1] / 8)),
    min_size=1,
    max_size=12,
)


def by_sorting(points: Sequence[tuple[float, float]], em_delta: float) -> float:
    """The frontier as a list: from the point that saves most, each next one with a higher EM."""
    reached: Points = []
    for delta, saved in sorted([*points, (0.0, 0.0)], key=lambda p: (-p[1], -p[0])):
        if not reached or delta > reached[-1][0]:
            reached.append((delta, saved))
    deltas, savings = zip(*reached, strict=True)
    return float(np.interp(em_delta, deltas, savings))


def test_saving_at_equal_em_reads_the_frontier() -> None:
    # (-0.02, 0.1) is beaten by (-0.01, 0.3); never halting, (0, 0), closes the frontier.
    points = [(-0.01, 0.3), (-0.03, 0.5), (-0.02, 0.1)]
    assert saving_at_em(points, -0.01) == pytest.approx(0.3)
    assert saving_at_em(points, -0.02) == pytest.approx(0.4)
    assert saving_at_em(points, -0.005) == pytest.approx(0.15)
    assert saving_at_em(points, 0.0) == saving_at_em(points, 0) == 0.0
    assert saving_at_em(points, -0.2) == 0.5
    assert saving_at_em(points, 0.001) is None
    assert saving_at_em([(0.02, 0.2)], 0.01) == pytest.approx(0.2)


def test_an_em_that_differs_by_rounding_is_reached() -> None:
    assert saving_at_em([(0.11, 0.2)], np.nextafter(0.11, 1)) == pytest.approx(0.2)
    assert saving_at_em([(-1e-16, 0.2)], 0.0) == pytest.approx(0.2)  # not never halting's 0


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=20))
def test_the_frontier_is_no_worse_than_any_of_its_points(points: Points) -> None:
    for delta, saved in points:
        reached = saving_at_em(points, delta)
        assert reached is not None
        assert reached >= saved - 1e-12


@given(POINTS, st.integers(-10, 10))
def test_the_frontier_is_the_one_found_by_sorting(points: Points, tenths: int) -> None:
    at = tenths / 10
    reached = saving_at_em(points, at)
    assert (reached is None) == (at > max(0.0, *(delta for delta, _ in points)))
    if reached is not None:
        assert reached == pytest.approx(by_sorting(points, at), abs=1e-12)


@given(POINTS, st.integers(0, 1000))
def test_many_resamples_at_once_are_each_read_as_if_alone(points: Points, seed: int) -> None:
    """Above the highest EM the saving there holds, in the policy's favour."""
    rng = np.random.default_rng(seed)
    each = np.round(np.array(points)[:, :, None] + rng.normal(0, 0.2, (len(points), 2, 15)), 1)
    at = np.round(rng.uniform(-1.2, 1.2, 15), 1)
    found = frontier_savings(each[:, 0], each[:, 1], at)
    for r in range(15):
        assert found[r] == pytest.approx(by_sorting(each[:, :, r].tolist(), at[r]), abs=1e-12)
        alone = saving_at_em(each[:, :, r].tolist(), at[r])
        assert alone is None or found[r] == alone


def test_the_area_is_that_between_the_steps_and_the_floor() -> None:
    # Above the floor: 0.03 from 0.5 of the tokens on, 0.06 from 0.75 on. Of the others, one is
    # beaten, one is below the floor though nearly free, and one spends more than never halting.
    points = [(-0.02, 0.5), (0.01, 0.25), (0.0, 0.2), (-0.3, 0.99), (0.1, -0.1)]
    assert frontier_area(points, -0.05) == pytest.approx(0.25 * 0.03 + 0.25 * 0.06)
    assert frontier_area([*points, (0.0, 0.0)], -0.05) == frontier_area(points, -0.05)


def test_the_area_is_the_mean_em_of_a_random_allowance() -> None:
    rng = np.random.default_rng(0)
    saved, em_delta = rng.random(20), rng.uniform(-0.1, 0.05, 20)
    allowed = (np.arange(20_000) + 0.5) / 20_000
    bought = np.where(1 - saved[:, None] <= allowed, em_delta[:, None], -1).max(axis=0)
    area = frontier_area(list(zip(em_delta, saved, strict=True)), -0.05)
    assert area == pytest.approx(np.maximum(bought + 0.05, 0).mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("point", "area"),
    [((0.1, 0.0), 0.0), ((0.0, 1.0), 0.05), ((-0.05, 0.5), 0.0), ((-0.2, 1.0), 0.0)],
)
def test_areas_at_the_edges(point: tuple[float, float], area: float) -> None:
    assert frontier_area([point], -0.05) == pytest.approx(area)
