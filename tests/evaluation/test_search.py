"""What a search has found, in numbers and as a page."""

from pathlib import Path

import numpy as np
import pytest

from evaluation.outcome import Outcome
from evaluation.search import Judged, Point, Searched, Tried, write_search
from tests.conftest import MakeTraces
from tests.evaluation.test_report import Page

SETTINGS = {"learning_rate": 0.003, "without": "none"}


def point(tokens: float, em: float, on_front: bool) -> Point:
    """Of traces that are right in 80 % and have 200 tokens."""
    return Point(1.0, em, tokens, em - 0.8, 1 - tokens / 200, on_front)


def searched(judged: Judged | None) -> Searched:
    tried = [
        Tried(0, SETTINGS, [point(150, 0.8, True), point(100, 0.77, False)]),
        Tried(1, SETTINGS | {"without": "<pace>"}, [point(100, 0.8, True), point(50, 0.7, True)]),
        Tried(2, SETTINGS, [point(100, 0.8, True)]),
    ]
    best = 1 if judged else 0
    shares = {"learning_rate": 0.75, "without": 0.25}
    return Searched(
        "search.py", "some.parquet", 9, 0.8, 200.0, tried, best, "--x 1", shares, judged
    )


def outcome(em: float, cost: float, num: int) -> Outcome:
    return Outcome(np.full(num, em), np.full(num, cost), np.ones(num))


def test_the_best_candidate_is_judged_in_pairs(make_traces: MakeTraces) -> None:
    # Each trace is right, with 600 tokens. At half of them, either is level: the area is 0.5 of
    # the 5 points above the floor. With a fifth saved more, it is 0.7 of them.
    traces = make_traces([{}] * 20)
    defaults, best = {1.0: outcome(1.0, 300, 20)}, {1.0: outcome(1.0, 180, 20)}
    judged = Judged.of(traces, defaults, best, np.ones(1))
    for (more, ends), expected in ((judged.area_more, 0.01), (judged.return_more, 0.12)):
        assert [more, *ends] == pytest.approx([expected] * 3)
    assert judged.savings["best"][0.0] == pytest.approx(0.7)
    assert (judged.verdict, judged.num_questions) == ("ahead", 20)
    assert Judged.of(traces, best, defaults, np.ones(1)).verdict == "behind"
    assert Judged.of(traces, best, best, np.ones(1)).verdict == "tie"


def test_equal_points_of_the_front_are_one() -> None:
    found = searched(None)
    assert [(at.tokens, numbers) for at, numbers in found.front] == [
        (50, [1]),
        (100, [1, 2]),
        (150, [0]),
    ]
    assert found.in_words.startswith(
        "3 candidates, the defaults among them, on 9 questions: the defaults come to 1 of the 3"
    )
    # At the floor of -5 points, half of the allowances buy the 5 points above it.
    assert found.tried[2].area == pytest.approx(0.5 * 0.05)
    assert found.to_json()["tried"][2]["area"] == pytest.approx(0.025)


@pytest.mark.parametrize("more", [0.01, None])
def test_the_page_tells_of_front_candidates_and_verdict(more: float | None, tmp_path: Path) -> None:
    savings: dict[float, float | None] = {0.0: 0.5, 0.01: None}
    judged = more and Judged(4, (more, [-0.02, 0.03]), (0.1, [0.0, 0.2]), {"best": savings})
    found = searched(judged or None)
    write_search(found, tmp_path / "search.html")
    page = Page((tmp_path / "search.html").read_text())
    assert found.in_words in page.text
    assert ("The best candidate is not told apart from the defaults" in page.text) == bool(more)
    front, by_area, shares = page.tables[-3:]
    assert [line[0] for line in front] == ["Candidate", "1", "1, 2", "the defaults"]
    assert by_area[1][0] == "1" and by_area[1][-1] == "<pace>"
    assert shares[1] == ["learning rate", "75.0"]
    assert all(name in page.all("id") for name in ("front-title", "front-desc"))
