"""A ceiling is wrong as seldom as it says, whenever it is looked at, and is found all the same."""

import math
from dataclasses import replace

import numpy as np
import pytest

from haltwise.control.ceiling import WORST, Counted, Evidence, fewest_audits, level_of

# What a population of nested losses loses at 12 prices, in points: the ninth is over the target.
RISKS = np.array([0.2, 0.3, 0.5, 0.7, 0.9, 1.2, 1.5, 1.9, 2.2, 2.7, 3.3, 4.0]) / 100
NUM_WITHIN = 8
DEADLINE = 2000


def losses(rng: np.random.Generator, draws: int) -> np.ndarray:
    """Losses (draws, 12) of one request each: a question is lost from some price on, or won."""
    at = rng.random((draws, 1))
    return (at < RISKS + 0.01).astype(float) - (at > 0.99)


def counted(stakes: np.ndarray, losses: np.ndarray, due: bool = False) -> Counted:
    return Counted(stakes, losses, np.full(losses.shape, due))


def after(evidence: Evidence, num: int, lost: np.ndarray) -> Evidence:
    """The evidence after an audit that tells all it has lost before the next one is drawn."""
    return evidence.after(counted(evidence.stakes(num, DEADLINE, 0.02, 0.1), lost), 0.02, 0.1)


def ceilings(draws: int, audits: int, seed: int = 0) -> np.ndarray:
    """The ceiling (draws,) at the end, which is the highest there ever was."""
    evidence, rng = Evidence.none((draws, 12)), np.random.default_rng(seed)
    for num in range(audits):
        evidence = after(evidence, num, losses(rng, draws))
    return evidence.certified(0)


@pytest.mark.parametrize(
    "draws", [pytest.param(300), pytest.param(1000, marks=pytest.mark.slow)], ids=str
)
def test_level_and_power(draws: int) -> None:
    found = ceilings(draws, DEADLINE)
    over = (found > NUM_WITHIN).mean()
    assert 0 < over <= 0.1 + 3 * math.sqrt(0.09 / draws)
    assert np.median(found) >= 6 and found.mean() > 5.5


def test_what_no_audit_tells_is_not_certified() -> None:
    assert (ceilings(50, 100) == 0).all()


@pytest.mark.parametrize("deadline", [20, 60])
def test_nobody_wins_in_the_mean_against_what_is_true(deadline: int) -> None:
    """Over all sequences of losses whose mean is the target, each as often as it comes."""
    audits, target = 9, 0.3
    lost = (np.arange(2**audits)[:, None] >> np.arange(audits)) % 2.0
    often = np.where(lost == 1, target, 1 - target).prod(axis=1)
    evidence = Evidence.none((2**audits, 1))
    for num in range(audits):
        stakes = evidence.stakes(num, deadline, target, 0.5)
        evidence = evidence.after(counted(stakes, lost[:, num, None]), target, 0.5)
        assert (often * np.exp(evidence.log_total[:, 0])).sum() == pytest.approx(1.0)
    assert len(np.unique(stakes)) > 5  # they hang on the past


def test_who_has_more_to_win_in_less_time_bets_more() -> None:
    begun = Evidence.none((1,))
    # Half of what is needed, of a goal of 1.25 / 0.02 less the steady gambler's 0.2.
    half = replace(begun, supposed=np.log([(1.25 / 0.02 - 0.2) / 2]), squares=np.array([9.0]))
    for num, left in ((100, 900), (1000, 1000), (1990, 10), (2000, 2000)):
        deviation = math.sqrt((9 + 50 * 0.02) / (num + 50))
        bet = 1 / math.sqrt(2 * math.pi) / (0.5 * deviation * math.sqrt(left))
        bounded = min(max(bet, 0.1 / 0.98), 0.6 / 0.98)
        assert half.stakes(num, 1000, 0.02, 0.02) == pytest.approx(bounded, rel=1e-3)
    more, less = (
        replace(half, supposed=half.supposed + 0.5),
        replace(half, supposed=half.supposed - 0.5),
    )
    assert more.stakes(100, 500, 0.02, 0.02) < half.stakes(100, 500, 0.02, 0.02)
    assert half.stakes(100, 500, 0.02, 0.02) < less.stakes(100, 500, 0.02, 0.02)


def test_a_ceiling_needs_every_stricter_price() -> None:
    evidence = replace(Evidence.none((3,)), passed=np.array([False, True, True]))
    assert evidence.certified(0) == 0
    assert evidence.certified(1) == 3  # calibrate.py vouches for the first
    assert replace(evidence, passed=np.array([True, False, True])).certified(0) == 1


def test_audits_that_tell_late_certify_what_they_would_have_at_once() -> None:
    rng = np.random.default_rng(3)
    told, worst = losses(rng, 600), np.full(12, WORST)
    bets = rng.uniform(0.1, 0.6, told.shape)
    at_once = late = Evidence.none((12,))
    for bet, row in zip(bets, told, strict=True):
        at_once = at_once.after(counted(bet, row), 0.02, 0.1)
        late = late.after(counted(bet, worst, due=True), 0.02, 0.1)
        assert not (late.passed & ~at_once.passed).any()
    none = Evidence.none((12,))
    assert late.supposed.tolist() == none.supposed.tolist() and not late.squares.any()
    for n in rng.permutation(len(told)):
        before, now = counted(bets[n], worst, due=True), counted(bets[n], told[n])
        late = late.corrected(before, now, 0.02, 0.1)
        assert not (late.passed & ~at_once.passed).any()
    for one, other in zip(vars(late).values(), vars(at_once).values(), strict=True):
        assert one.astype(float) == pytest.approx(other.astype(float), abs=1e-9)


def test_levels_of_all_epochs_sum_to_the_level() -> None:
    shares = level_of(0.1, np.arange(100_000))
    assert shares[:3] == pytest.approx([0.09, 0.005, 0.01 / 6])
    assert shares.sum() == pytest.approx(0.1, rel=1e-4)


def test_fewest_audits_suffice_and_one_less_does_not() -> None:
    num = fewest_audits(0.02, 0.1, DEADLINE)
    evidence, passed = Evidence.none((1,)), []
    for n in range(num):
        evidence = after(evidence, n, np.zeros(1))
        passed.append(bool(evidence.passed[0]))
    assert passed == [False] * (num - 1) + [True]
    assert 200 < num < 400
