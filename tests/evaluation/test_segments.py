from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from evaluation.outcome import Outcome, em_delta, never_outcome, saving
from evaluation.segments import _spread_between, outcome_by_segment, segment_points, segment_rows
from evaluation.table import format_segments
from traces import Traces

MakeTraces = Callable[..., Traces]


@pytest.fixture
def asked(make_traces: MakeTraces) -> Traces:
    """100 easy questions, 50 hard ones, and 10 of a segment that is too small."""
    of = ["easy"] * 100 + ["hard"] * 50 + ["few"] * 10
    traces = make_traces(
        [{"trace_id": f"t{n}", "question_id": f"q{n}", "segment": s} for n, s in enumerate(of)]
    )
    return replace(traces, final_correct=np.ones(160, dtype=bool))


def losing(traces: Traces, saved: float, **lost: int) -> Outcome:
    """Loses so many answers of each segment."""
    em = np.ones(len(traces))
    for segment, num in lost.items():
        em[np.flatnonzero(traces.segment == segment)[:num]] = 0
    return Outcome(em, (1 - saved) * traces.num_tokens, np.ones(len(traces)))


def test_a_segment_that_loses_has_a_price_of_its_own(asked: Traces) -> None:
    outcomes = {
        1.0: losing(asked, 0.2),
        2.0: losing(asked, 0.5, hard=15),
        3.0: losing(asked, 0.6, easy=2, hard=40),
    }
    assert segment_points(asked, outcomes, 0.01) == {"easy": 2.0, "hard": 1.0}
    assert segment_points(asked, outcomes, 0.5) == {"easy": 3.0, "hard": 2.0}


def test_a_segment_that_loses_by_chance_has_the_price_of_all(asked: Traces) -> None:
    # 1 of 100 and 1 of 50 differ by less than chance: both count as 2 of 150, 1.33 points.
    outcomes = {1.0: losing(asked, 0.2), 2.0: losing(asked, 0.5, easy=1, hard=1)}
    assert segment_points(asked, outcomes, 0.014) == {"easy": 2.0, "hard": 2.0}
    assert segment_points(asked, outcomes, 0.013) == {"easy": 1.0, "hard": 1.0}
    unlucky = {1.0: losing(asked, 0.2), 2.0: losing(asked, 0.5, hard=2)}  # 4 points are too many
    assert segment_points(asked, unlucky, 0.014) == {"easy": 2.0, "hard": 1.0}


def test_nothing_is_told_apart_with_one_segment(make_traces: MakeTraces) -> None:
    traces = make_traces([{}] * 40)
    assert segment_points(traces, {1.0: losing(traces, 0.5)}, 0.0) == {}


def test_the_spread_between_segments_is_what_chance_leaves() -> None:
    # Equal variances v: the variance of the means less v, and not below 0.
    means, noise = np.array([0.0, 1.0, 5.0]), np.full(3, 2.0)
    assert _spread_between(means, noise) == pytest.approx(means.var(ddof=1) - 2.0)
    assert _spread_between(means / 10, noise) == 0.0
    assert _spread_between(means, np.zeros(3)) == 0.0


def test_each_segment_is_halted_at_its_own_price(asked: Traces) -> None:
    never = never_outcome(asked)
    outcomes = {None: never, 1.0: losing(asked, 0.2), 2.0: losing(asked, 0.5, hard=15, few=1)}
    points: dict[str, float | None] = {"easy": 2.0, "hard": None}
    own = outcome_by_segment(asked, outcomes, points, 1.0)
    assert em_delta(asked, own) == 0.0
    assert saving(asked, own) == pytest.approx((100 * 0.5 + 10 * 0.2) / 160)
    rows = segment_rows(asked, outcomes, 0.01, points, 2.0)
    assert [(row.segment, row.num_questions, row.price) for row in rows] == [
        ("", 160, None),
        ("easy", 100, 2.0),
        ("hard", 50, None),
    ]
    assert (rows[2].em_delta_of_all, rows[2].em_delta) == pytest.approx((-0.3, 0.0))
    assert (rows[2].saving_of_all, rows[2].saving) == pytest.approx((0.5, 0.0))
    assert rows[0].em_delta == pytest.approx(-1 / 160)
    assert format_segments(rows).splitlines()[2].split()[:3] == ["(all)", "160", "2"]
