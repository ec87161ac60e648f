"""Moves the price of a group of requests so that its mean loss stays within a target.

A group's state changes by what audits tell, and by nothing else: no clock, no chance. Two parts
keep each other in check. The ceiling is certified (`haltwise.control.ceiling`): below it a price
loses at most the target if requests stay as they were. The reach holds whatever requests do: it
falls where more is lost than the target allows, as in adaptive conformal inference (Gibbs and
Candes, 2021, arXiv 2106.00170), and nothing is halted below 0. For every sequence of losses, with
up to d audits drawn that have not told what they lost,

    sum over audits of rest / probability * (loss - target)
        <= (first reach + sum of its rises with the ceiling) / gain + (d + 1) (1 - target)

since the reach is clamped at the top alone: a clamp at the bottom would forgive what was lost. A
detector (Shin, Ramdas and Rinaldo, 2023, arXiv 2203.03532) raises the share of audits if it smells
smoke, and opens the breaker at fire: then nothing is halted, every request is an audit, and a new
epoch has to certify anew, at a smaller level. So does one that halts nothing and has lost its bets.

Shapes: leading places (...) are anybody's: () in service, draws in simulations. K prices, counted
from the strictest; step k stands for the k-th of them, step 0 for never halting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.control.betting import Float
from haltwise.control.ceiling import Counted, Evidence, fewest_audits, level_of
from haltwise.errors import InputError

Int = NDArray[np.int64]

#: More audits than there ever are.
FOREVER = 2**62

# Bets of the detector that losses are above the target; their capitals are averaged.
_BETS: Float = np.array([0.5, 1.0, 2.0])
# Log capital of the strictest price at which an epoch that halts nothing is given up: what was lost
# while something was wrong would hold up the certificate for long after.
_RUIN = -3.0
# Steps that the reach may be above the ceiling, so that a loss or two at it change nothing.
_SLACK = 0.5
# Reaches are sums of many terms; a step is not missed by their rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Promise:
    """What is promised to a group, and how it is watched."""

    target: float = 0.02
    """Mean loss that is allowed: 0.02 is two points of exact match."""
    audit: float = 0.05
    """Share of requests that is audited until `settled` audits of an epoch are there."""
    rest: float = 0.025
    """Share that is audited from then on."""
    settled: int = 2_000
    """Audits of an epoch after which it is known well what prices lose."""
    alert: float = 0.5
    """Share that is audited while the detector smells smoke, or nobody vouches for the ceiling."""
    gain: float = 0.02
    """How far a loss moves the reach, as a share of all prices."""
    smoke: float = 3.0
    """Capital of the detector at which more is audited."""
    fire: float = 2_000.0
    """Capital at which the breaker opens; false alarms are so many audits apart in the mean."""
    cooling: int = 100
    """Audits that an open breaker waits for at least; doubled with every epoch."""

    @property
    def deadline(self) -> int:
        """Audits by which a certificate is to be as good as it can be."""
        return max(self.settled, 1)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is out of its range.
        """
        for name in ("target", "gain"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected between 0 and 1")
        if not 0 < self.rest <= self.audit <= self.alert <= 1:
            raise InputError(
                f"audited are {self.rest} at rest, {self.audit} before and {self.alert} on alert, "
                "expected above 0, rising, and at most 1"
            )
        if not 1 < self.smoke < self.fire:
            raise InputError(f"smoke is {self.smoke}, fire {self.fire}, expected 1 < smoke < fire")
        if self.settled < 0 or self.cooling < 1:
            raise InputError(
                f"settled is {self.settled}, cooling {self.cooling}, expected 0 and 1 at least"
            )


@dataclass(frozen=True, eq=False)
class GroupState:
    """All that is remembered of a group."""

    level: Float
    """(...) the probability that any of its own certificates is wrong, at most."""
    first: Int
    """(...) prices that other data certified, such as calibrate.py's."""
    trial: Int
    """(...) audits of the epoch until which the ceiling stands though nobody vouches for it."""
    reach: Float
    """(...) how far up the prices it may go, as a share of them; below 0 where it has lost more
    than it may."""
    ceiling: Int
    """(...) the largest step that it may be served; 0 while the breaker is open."""
    epoch: Int
    """(...) how often it was begun to certify anew."""
    num_audits: Int
    """(...) audits of this epoch."""
    alarm: Float
    """(..., 3) the detector's capital, a bet each."""
    evidence: Evidence
    """What the audits of this epoch say about each price."""

    @classmethod
    def begin(
        cls,
        num_prices: int,
        level: ArrayLike,
        certified: ArrayLike = 0,
        ceiling: ArrayLike = 0,
        trial: ArrayLike = 0,
    ) -> GroupState:
        """Returns the state of a group that no audit has told anything about.

        Args:
            num_prices: K.
            level: (...) the probability that any of its own certificates is wrong, at most.
            certified: (...) prices that are certified already, such as by calibrate.py.
            ceiling: (...) the largest step at first, if it is more than is certified.
            trial: (...) for how many audits that ceiling stands, while much is audited; from then
                on only certified prices are served. `FOREVER` for a group whose requests are in
                another one that has a certificate.
        """
        level = np.asarray(level, dtype=np.float64)
        first, least, trial = (
            np.broadcast_to(np.asarray(value, dtype=np.int64), level.shape)
            for value in (certified, ceiling, trial)
        )
        top = np.maximum(first, least)
        return cls(
            level=level,
            first=first,
            trial=trial,
            reach=(top + np.where(top > 0, _SLACK, 0.0)) / num_prices,
            ceiling=top,
            epoch=np.zeros(level.shape, dtype=np.int64),
            num_audits=np.zeros(level.shape, dtype=np.int64),
            alarm=np.ones((*level.shape, len(_BETS))),
            evidence=Evidence.none((*level.shape, num_prices)),
        )

    @property
    def num_prices(self) -> int:
        """K."""
        return int(self.evidence.passed.shape[-1])

    @property
    def step(self) -> Int:
        """(...) the step that may be served."""
        reached = np.floor(self.reach * self.num_prices + _ROUNDING)
        return np.clip(reached, 0, self.ceiling).astype(np.int64)

    @property
    def top(self) -> Float:
        """(...) the largest reach."""
        steps = self.ceiling + np.where(self.ceiling > 0, _SLACK, 0.0)
        share: Float = steps / self.num_prices
        return share

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object; the state is that of one group."""
        data = {name: np.asarray(value).tolist() for name, value in vars(self).items()}
        evidence = {name: value.tolist() for name, value in vars(self.evidence).items()}
        return data | {"evidence": evidence}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GroupState:
        """Rebuilds a state from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            evidence = Evidence(**{k: np.array(v) for k, v in data["evidence"].items()})
            values: dict[str, Any] = {name: np.array(value) for name, value in data.items()}
            return cls(**values | {"evidence": evidence})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"state of a group is not readable ({error!r})") from None


def audit_rate(state: GroupState, promise: Promise) -> Float:
    """Returns the probability (...) with which the group's next request is to be audited."""
    rate = np.where(state.num_audits >= promise.settled, promise.rest, promise.audit)
    tried = (state.num_audits < state.trial) & (state.trial < FOREVER)
    rate = np.where(tried | on_alert(state, promise), promise.alert, rate)
    return np.where(state.ceiling == 0, 1.0, rate)


def on_alert(state: GroupState, promise: Promise) -> NDArray[np.bool_]:
    """Returns whether the detector smells smoke (...), so that more is audited."""
    alert: NDArray[np.bool_] = state.alarm.mean(axis=-1) >= promise.smoke
    return alert


def is_open(state: GroupState) -> NDArray[np.bool_]:
    """Returns whether the breaker is open (...): what was certified is void, and nothing is yet."""
    found: NDArray[np.bool_] = (state.epoch > 0) & (state.ceiling == 0)
    return found


def audits_due(state: GroupState, promise: Promise) -> Int:
    """Returns how many audits (...) at least are due before anything is halted; 0 if none is."""
    halts, level = np.asarray(state.ceiling > 0), level_of(state.level, state.epoch)
    fewest = np.zeros(halts.shape)
    fewest[~halts] = [
        fewest_audits(promise.target, float(one), promise.deadline) for one in level[~halts]
    ]
    needed = np.maximum(fewest, _cooling(state, promise))
    missing = np.maximum(np.ceil(needed - state.num_audits), 1)
    return np.where(halts, 0, missing).astype(np.int64)


def stakes(state: GroupState, promise: Promise) -> Float:
    """Returns the stakes (..., K) on an audit that is drawn now, see `Evidence.stakes`."""
    level = level_of(state.level, state.epoch)
    return state.evidence.stakes(state.num_audits, promise.deadline, promise.target, level)


def counted(state: GroupState, audit: Counted, promise: Promise) -> GroupState:
    """Returns the state after an audit has become evidence."""
    level = level_of(state.level, state.epoch)
    evidence = state.evidence.after(audit, promise.target, level)
    return _certified(replace(state, evidence=evidence, num_audits=state.num_audits + 1), promise)


def corrected(state: GroupState, before: Counted, now: Counted, promise: Promise) -> GroupState:
    """Returns the state after an audit of this epoch has told more, see `Evidence.corrected`."""
    level = level_of(state.level, state.epoch)
    evidence = state.evidence.corrected(before, now, promise.target, level)
    return _certified(replace(state, evidence=evidence), promise)


def felt(
    state: GroupState, loss: ArrayLike, probability: ArrayLike, promise: Promise
) -> GroupState:
    """Returns the state after an audit has told what the served price lost.

    Args:
        state: The state before.
        loss: (...) that of the step that was served when the request came, in [-1, 1].
        probability: (...) with which the request was drawn.
        promise: What is promised.
    """
    excess = np.asarray(loss, dtype=np.float64) - promise.target
    reach = state.reach - promise.gain * promise.rest / np.asarray(probability) * excess
    alarm = np.maximum(state.alarm, 1) * (1 + _BETS * excess[..., None])
    moved = replace(state, reach=np.minimum(reach, state.top), alarm=alarm)
    return opened(moved, alarm.mean(axis=-1) >= promise.fire)


def complained(state: GroupState, weight: float, promise: Promise) -> GroupState:
    """Returns the state after users complained: the reach falls, to 0 at the lowest.

    Args:
        state: The state before.
        weight: How much is complained, in [0, 1]; praise is not heard.
        promise: What is promised.
    """
    lower = np.maximum(state.reach - promise.gain * weight, np.minimum(state.reach, 0.0))
    return replace(state, reach=lower)


def opened(state: GroupState, where: ArrayLike = True) -> GroupState:
    """Returns the state with the breaker opened: the certificate is void, and an epoch begins."""
    return _next_epoch(state, np.asarray(where) & (state.ceiling > 0))


def _next_epoch(state: GroupState, begins: ArrayLike) -> GroupState:
    """Returns the state with nothing certified, where an epoch begins (...)."""
    each, old = np.asarray(begins)[..., None], state.evidence
    none = Evidence.none(old.passed.shape)
    evidence = Evidence(
        np.where(each[..., None], none.log_capital, old.log_capital),
        np.where(each, none.supposed, old.supposed),
        np.where(each, none.squares, old.squares),
        np.where(each, none.passed, old.passed),
    )
    return replace(
        state,
        first=np.where(begins, 0, state.first),
        trial=np.where(begins, 0, state.trial),
        reach=np.where(begins, np.minimum(state.reach, 0.0), state.reach),
        ceiling=np.where(begins, 0, state.ceiling),
        epoch=state.epoch + np.asarray(begins),
        num_audits=np.where(begins, 0, state.num_audits),
        alarm=np.where(each, 1.0, state.alarm),
        evidence=evidence,
    )


def _certified(state: GroupState, promise: Promise) -> GroupState:
    """Moves the ceiling to what is certified, and the reach with it where that is a rise."""
    certified = state.evidence.certified(state.first)
    on_trial = state.num_audits < state.trial
    allowed = np.where(on_trial, np.maximum(state.ceiling, certified), certified)
    cooled = state.num_audits >= _cooling(state, promise)
    moved = replace(state, ceiling=np.where(cooled, allowed, state.ceiling))
    rise = np.maximum(moved.top - state.top, 0)
    moved = replace(moved, reach=np.minimum(state.reach + rise, moved.top))
    ruined = moved.evidence.log_total[..., 0] < _RUIN
    return _next_epoch(moved, (moved.ceiling == 0) & cooled & ruined)


def _cooling(state: GroupState, promise: Promise) -> Float:
    """Returns the audits (...) that an epoch waits for before anything is halted again."""
    return np.where(state.epoch > 0, promise.cooling * 2.0 ** np.minimum(state.epoch - 1, 50), 0.0)
