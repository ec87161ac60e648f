"""A ceiling is wrong as seldom as it says, whenever it is looked at, and is found all the same."""

import math

import numpy as np
import pytest

from haltwise.control.ceiling import WORST, Evidence, fewest_audits, level_of

# What a population of nested losses loses at 12 prices, in points: the ninth is over the target.
RISKS = np.array([0.2, 0.3, 0.5, 0.7, 0.9, 1.2, 1.5, 1.9, 2.2, 2.7, 3.3, 4.0]) / 100
NUM_WITHIN = 8


def losses(rng: np.random.Generator, draws: int) -> np.ndarray:
    """Losses (draws, 12) of one request each: a question is lost from some price on, or won."""
    at = rng.random((draws, 1))
    return (at < RISKS + 0.01).astype(float) - (at > 0.99)


def ceilings(level: float, draws: int, audits: int, seed: int = 0) -> np.ndarray:
    """The ceiling (draws,) at the end, which is the highest there ever was."""
    evidence, rng = Evidence.none((draws, 12)), np.random.default_rng(seed)
    for _ in range(audits):
        evidence = evidence.after(losses(rng, draws), 0.02, level)
    return evidence.certified(0)


@pytest.mark.parametrize(
    "draws", [pytest.param(300), pytest.param(1000, marks=pytest.mark.slow)], ids=str
)
def test_level_and_power(draws: int) -> None:
    found = ceilings(0.1, draws, 2000)
    over = (found > NUM_WITHIN).mean()
    assert 0 < over <= 0.1 + 3 * math.sqrt(0.09 / draws)
    assert np.median(found) >= 5 and found.mean() > 4.5


def test_what_no_audit_tells_is_not_certified() -> None:
    assert (ceilings(0.1, 50, 100) == 0).all()


def test_a_ceiling_needs_every_stricter_price() -> None:
    evidence = Evidence(np.zeros((3, 2)), np.array([False, True, True]))
    assert evidence.certified(0) == 0
    assert evidence.certified(1) == 3  # calibrate.py vouches for the first
    assert Evidence(np.zeros((3, 2)), np.array([True, False, True])).certified(0) == 1


def test_audits_that_tell_late_certify_what_they_would_have_at_once() -> None:
    rng = np.random.default_rng(3)
    told = losses(rng, 600)
    at_once = late = Evidence.none((12,))
    for row in told:
        at_once = at_once.after(row, 0.02, 0.1)
        late = late.after(np.full(12, WORST), 0.02, 0.1)
        assert not (late.passed & ~at_once.passed).any()
    for n in rng.permutation(len(told)):
        late = late.corrected(np.full(12, WORST), told[n], 0.02, 0.1)
        assert not (late.passed & ~at_once.passed).any()
    assert late.log_capital == pytest.approx(at_once.log_capital)


def test_levels_of_all_epochs_sum_to_the_level() -> None:
    shares = level_of(0.1, np.arange(100_000))
    assert shares[:3] == pytest.approx([0.08, 0.01, 0.02 / 6])
    assert shares.sum() == pytest.approx(0.1, rel=1e-4)


def test_fewest_audits_suffice_and_one_less_does_not() -> None:
    num = fewest_audits(0.02, 0.1)
    evidence, passed = Evidence.none((1,)), []
    for _ in range(num):
        evidence = evidence.after([0.0], 0.02, 0.1)
        passed.append(bool(evidence.passed[0]))
    assert passed == [False] * (num - 1) + [True]
    assert 200 < num < 400
