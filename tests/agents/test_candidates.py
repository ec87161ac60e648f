"""Candidates of a search, as optuna proposes them and a file keeps them."""

from pathlib import Path

import numpy as np
import pytest

from agents.candidates import Candidate, Candidates, Found
from agents.fit import FitConfig
from haltwise import InputError

GROUPS = ("pace", "confidence", "agreement")
GRID = (0.1, 1.0, 10.0)


def opened(file: Path, seed: int = 0) -> Candidates:
    return Candidates(file, GROUPS, (GRID[0], GRID[-1]), seed)


def made_up(candidate: Candidate) -> Found:
    """Better at a learning rate near to 1e-2, whatever else: more right at every price."""
    lag = abs(np.log(candidate.settings["learning_rate"] / 1e-2))
    prices = sorted({*GRID, candidate.price})
    return {price: (0.8 - 0.1 * np.log(price) - lag, 100.0 - 5 * np.log(price)) for price in prices}


def tried(candidates: Candidates, num: int) -> list[tuple[Candidate, Found]]:
    while candidates.num < num:
        candidate = candidates.propose()
        candidates.tell(candidate, made_up(candidate))
    return candidates.found()


def test_the_first_candidate_is_the_defaults(tmp_path: Path) -> None:
    first = opened(tmp_path / "search.sqlite").propose()
    assert first.number == 0 and first.fit == FitConfig()
    assert first.groups(GROUPS) == GROUPS
    assert first.options(GROUPS) == (
        "--fit.pathwise.learning-rate 0.003 --fit.pathwise.steps 300 "
        "--fit.pathwise.prior-questions 1500 --fit.pathwise.correct-coef 2 --fit.ppo.net-width 64"
    )


def test_a_group_that_is_left_out_is_not_read() -> None:
    defaults = {"learning_rate": 0.003, "steps": 300, "prior_questions": 1500.0}
    defaults |= {"correct_coef": 2.0, "net_width": 64}
    without = Candidate(1, {**defaults, "without": "pace"}, 1.0)
    assert without.groups(GROUPS) == GROUPS[1:]
    assert without.options(GROUPS).endswith(" --groups confidence agreement")


def test_the_front_is_what_no_candidate_beats_at_any_price(tmp_path: Path) -> None:
    candidates = opened(tmp_path / "search.sqlite")
    for em, tokens in ((0.5, 50.0), (0.6, 40.0)):
        candidate = candidates.propose()
        at = {1.0: (em, tokens), 10.0: (em - 0.3, tokens - 10), candidate.price: (0.1, 90.0)}
        candidates.tell(candidate, at)
    assert sorted(candidates.front()) == [(1, 1.0), (1, 10.0)]


@pytest.mark.whole
def test_a_search_comes_nearer_to_what_is_better(tmp_path: Path) -> None:
    found = tried(opened(tmp_path / "search.sqlite"), 30)
    rates = np.log([candidate.settings["learning_rate"] for candidate, _ in found])
    assert len(set(rates[:10])) == 10
    lag = abs(rates - np.log(1e-2))
    assert lag[20:].mean() < 0.5 * lag[:10].mean()
    candidates = opened(tmp_path / "search.sqlite")
    shares = candidates.importances([-each for each in lag])
    assert next(iter(shares)) == "learning_rate" and sum(shares.values()) == pytest.approx(1)


@pytest.mark.whole
@pytest.mark.parametrize("written", [0, 2])
def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tried(opened(tmp_path / "whole.sqlite"), 14)
    broken = opened(tmp_path / "broken.sqlite")
    tried(broken, 12)
    candidate = broken.propose()
    left, add = [None] * written, broken._study.add_trial

    def killed(trial: object) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        add(trial)  # type: ignore[arg-type]

    monkeypatch.setattr(broken._study, "add_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        broken.tell(candidate, made_up(candidate))
    again = opened(tmp_path / "broken.sqlite")
    assert again.num == 12 and again.propose() == candidate
    assert tried(again, 14) == whole
    assert len(again._study.trials) == sum(len(found) for _, found in whole)  # none twice


@pytest.mark.whole
def test_another_seed_proposes_something_else(tmp_path: Path) -> None:
    one, other = (tried(opened(tmp_path / f"{seed}", seed), 2)[1][0] for seed in (0, 1))
    assert one.settings != other.settings


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "search.sqlite").write_text("not SQLite" * 100)
    with pytest.raises(InputError, match=r"search\.sqlite: not the file of a search \(\w+\)"):
        opened(tmp_path / "search.sqlite")
