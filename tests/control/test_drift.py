"""What happens if requests change: at once, slowly, by the day, and back again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks.control import counted_at_once
from haltwise.control.governor import GroupState, Promise, audit_rate, felt
from tests.control.test_ceiling import NUM_WITHIN, RISKS
from tests.control.test_governor import losses

PROMISE = Promise()
#: Given the requests so far, the share of requests that lose more than they did.
Drift = Callable[[np.ndarray], np.ndarray]
AT_REST = 20_000
# What each step loses in the mean while nothing changes.
RISK_OF = np.append(0.0, RISKS)


@dataclass
class Outcome:
    """What D streams of requests came to, each over as many requests."""

    stopped: np.ndarray
    """(D,) requests from the change on until nothing is halted, or less than before; inf."""
    loss: np.ndarray
    """(D,) mean loss of all requests behind the change."""
    step: np.ndarray
    """(D,) what is served in the end."""
    false_alarms: float
    """Breakers that opened before the change, by stream."""
    audited: float
    """Share of the requests before the change that were audits."""


def live(drift: Drift, num: int, draws: int, seed: int = 0) -> Outcome:
    """Lets certified groups rest for some requests, and then change."""
    rng, rows = np.random.default_rng(seed), np.arange(draws)
    state = GroupState.begin(12, np.full(draws, 0.1), certified=NUM_WITHIN)
    at, lost, audits = np.zeros(draws), np.zeros(draws), np.zeros(draws)
    stopped, alarms = np.full(draws, np.inf), np.zeros(draws)
    while (at < AT_REST + num).any():
        step, rate = state.step, audit_rate(state, PROMISE)
        gap = rng.geometric(rate)
        here = np.minimum(at + gap, AT_REST + num)
        more = drift(np.maximum(here - AT_REST, 0))
        one = losses(rng, draws, more[:, None])
        risk = np.where(step > 0, RISK_OF[step] + more, 0.0)
        lost += np.where(here > AT_REST, (here - np.maximum(at, AT_REST)) * risk, 0.0)
        audits += here <= AT_REST
        state = counted_at_once(state, one[:, 1:], PROMISE)
        before, state = state, felt(state, one[rows, step], rate, PROMISE)
        opens = state.epoch > before.epoch
        alarms += opens & (here <= AT_REST)
        stopped = np.where(opens & (here > AT_REST), np.minimum(stopped, here - AT_REST), stopped)
        at = here
    return Outcome(stopped, lost / num, state.step, alarms.mean(), audits.mean() / AT_REST)


def suddenly(more: float) -> Drift:
    return lambda since: np.where(since > 0, more, 0.0)


def slowly(more: float) -> Drift:
    """Over 20,000 requests."""
    return lambda since: more * np.minimum(since / 20_000, 1)


def daily(more: float) -> Drift:
    """Every 10,000 requests it comes and goes."""
    return lambda since: more * (1 - np.cos(2 * np.pi * since / 10_000)) / 2


def for_a_while(more: float) -> Drift:
    """For 10,000 requests."""
    return lambda since: np.where((since > 0) & (since < 10_000), more, 0.0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("drift", "num", "draws", "soon", "is_over"),
    [
        (suddenly(0.08), 3_000, 30, 1_500, False),
        pytest.param(suddenly(0.08), 20_000, 100, 1_000, False, marks=SLOW),
        pytest.param(suddenly(0.04), 40_000, 100, 5_000, False, marks=SLOW),
        pytest.param(slowly(0.08), 40_000, 100, 12_000, False, marks=SLOW),
        pytest.param(slowly(0.04), 40_000, 100, 24_000, False, marks=SLOW),
        pytest.param(daily(0.08), 40_000, 100, 5_000, False, marks=SLOW),
        pytest.param(daily(0.04), 40_000, 100, 8_000, False, marks=SLOW),
        pytest.param(for_a_while(0.08), 60_000, 100, 1_000, True, marks=SLOW),
    ],
)
@pytest.mark.whole
def test_whatever_changes_the_loss_is_soon_within_the_target_again(
    drift: Drift, num: int, draws: int, soon: int, is_over: bool
) -> None:
    found = live(drift, num, draws)
    assert np.median(found.stopped) <= soon
    if num > 3_000:  # in which a stop can make up for what was lost before it
        assert found.loss.mean() <= PROMISE.target
    # A breaker that is nervous, or never closes again, keeps any promise.
    assert found.false_alarms <= AT_REST * found.audited / PROMISE.fire and found.audited < 0.08
    if is_over:
        assert found.step.mean() > NUM_WITHIN / 2
