"""Pairs of a challenger and the champion, with labels that come late, and evidence from them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from haltwise.control.betting import STAKES, growth, log_mean_exp
from haltwise.control.trial import ENOUGH, MARGIN, Pair, Side, Trial


def side(*losses: float | None, step: int = 1, saved: float = 0.0, answers: str = "") -> Side:
    """What a head with two prices would have lost; answers are letters, the full one's last.

    At the second price it saves a tenth more.
    """
    told = tuple(answers) if answers else ("",) * 3
    return Side(losses, told, (saved, saved + 0.1), step)


def trial_of(*pairs: tuple[Side, Side]) -> Trial:
    trial = Trial.begin(2, 2)
    for n, (challenger, champion) in enumerate(pairs):
        trial = trial.after(f"r{n}", Pair(challenger, champion))
    return trial


def served_bets(more: float) -> Any:
    return np.log1p(STAKES / (1 + MARGIN) * (more - MARGIN))


def test_a_pair_is_compared_at_all_prices() -> None:
    """The champion loses 1 at its second price; the challenger too, saving 40 points more."""
    trial = trial_of((side(0, 1, step=2, saved=0.6), side(0, 1, step=2, saved=0.2)))
    lost = np.array([[0, 0, -1], [1, 1, 0]])
    saved = np.array([[0.6, 0.4, 0.3], [0.7, 0.5, 0.4]])
    assert trial.num == 1 and trial.lost.tolist() == lost.tolist()
    np.testing.assert_allclose(trial.saved, saved)
    np.testing.assert_allclose(trial.worse, growth(lost, MARGIN))
    np.testing.assert_allclose(trial.dearer, np.log1p(STAKES * saved[..., None]))
    np.testing.assert_allclose(trial.as_good, served_bets(1 - 1))
    unhalted = trial_of((side(1, 1, step=0), side(1, 1, step=2)))
    np.testing.assert_allclose(unhalted.as_good, served_bets(0 - 1))


@pytest.mark.parametrize(
    ("challenger", "champion", "told", "more"),
    [
        # Only the challenger differs: it lost what the label says.
        (side(0, None, step=2, answers="fgf"), side(0, 0, answers="fff"), ((0, -1), None), (0, -1)),
        # Only the champion differs, and was wrong.
        (side(0, 0, answers="fff"), side(None, 0, answers="gff"), (None, (1, 0)), (-1, -1)),
        # Both differ from the full answer, once in the same way.
        (side(None, None, answers="hgf"), side(None, 0, answers="gff"), ((1, 0), (0, 0)), (1, 0)),
    ],
)
def test_labels_put_a_pair_right(
    challenger: Side, champion: Side, told: tuple[Any, Any], more: tuple[float, float]
) -> None:
    """Beside the champion's first price, which it is served."""
    before = trial_of((challenger, champion))
    assert set(before.unknown) == {"r0"}
    lost = before.lost[:, 1].tolist()
    assert lost[challenger.step - 1] == 1  # the worst for the challenger until then
    sides = [None if one is None else np.array(one, dtype=float) for one in told]
    again = Trial.from_json(json.loads(json.dumps(before.to_json())))
    for trial in (before, again):
        after = trial.labelled("r0", *sides)
        assert not after.unknown and after.num == 1
        assert after.lost[:, 1].tolist() == list(more)
        np.testing.assert_allclose(after.worse[:, 1], growth(np.array(more), MARGIN))
        np.testing.assert_allclose(after.as_good, served_bets(more[challenger.step - 1]))
    late = before.expired("r0")
    assert not late.unknown and late.lost[:, 1].tolist() == lost


def test_the_same_answer_needs_no_label() -> None:
    trial = trial_of((side(None, None, answers="ggf"), side(None, None, answers="ggf")))
    assert trial.lost[:, 1:].tolist() == [[0, 0], [0, 0]]
    assert trial.lost[:, 0].tolist() == [1, 1] and trial.unknown  # beside never halting


def test_until_labels_come_a_pair_speaks_for_neither_side() -> None:
    """Whatever it will be, the capitals are at most what they will be."""
    unknown = trial_of((side(None, None, answers="ghf"), side(0, 0, answers="fff")))
    for lost in (-1.0, 0.0, 1.0):
        known = unknown.labelled("r0", np.array([lost, lost]), None)
        assert (unknown.worse <= known.worse + 1e-12).all()
        assert (unknown.as_good <= known.as_good + 1e-12).all()


def test_a_step_is_ready_if_all_below_it_are() -> None:
    enough, little = np.log(ENOUGH), np.log(ENOUGH) - 0.01
    capital = np.full((2, 3, 2), enough)
    worse = capital.copy()
    worse[1, 1] = little
    trial = replace(Trial.begin(2, 2), worse=worse, dearer=capital)
    found = [[trial.is_ready(step, champion) for champion in range(3)] for step in range(3)]
    assert found == [[False] * 3, [True] * 3, [True, False, True]]
    assert not replace(trial, dearer=capital - 0.01).is_ready(1, 1)
    assert trial.status(2, 1)["evidence"]["worse"] == pytest.approx(ENOUGH - 0.2, abs=0.01)


def capital(seed: int, num: int, lost: tuple[float, float], saved: float) -> Any:
    """Whether many trials, whose pairs differ so often either way, ever have enough evidence."""
    rng = np.random.default_rng(seed)
    logs, enough = np.zeros((3, 300, len(STAKES))), np.zeros((3, 300), dtype=bool)
    for _ in range(num):
        draws, nothing = rng.random(300), side(0, 0)
        loses = (draws < lost[0]).astype(float) - (draws > 1 - lost[1])
        saves = rng.normal(saved, 0.2, 300)
        steps = [
            Trial.begin(2, 2).after("r", Pair(side(one, one, saved=other), nothing))
            for one, other in zip(loses, saves, strict=True)
        ]
        logs[:2] += [[getattr(s, name)[0, 1] for s in steps] for name in ("worse", "dearer")]
        logs[2] += [s.as_good for s in steps]
        enough |= log_mean_exp(logs) >= np.log(ENOUGH)
    return enough


@pytest.mark.slow
def test_evidence_is_wrong_no_more_often_than_stated() -> None:
    """At the edge of each claim; 5 % of 300 are 15, and 26 are three standard deviations more."""
    at_margin, nothing_saved, as_good = capital(0, 1_000, (0.03 + MARGIN, 0.03), 0.0).sum(axis=1)
    assert at_margin <= 26 and nothing_saved <= 26 and as_good <= 26


@pytest.mark.slow
def test_evidence_comes_where_a_head_is_better_or_worse() -> None:
    better = capital(1, 2_000, (0.01, 0.01), 0.05)
    assert better[0].mean() > 0.65 and better[1].mean() > 0.95 and better[2].mean() == 0
    worse = capital(2, 2_000, (0.05, 0.01), 0.05)
    assert worse[2].mean() > 0.8 and worse[0].mean() < 0.01
