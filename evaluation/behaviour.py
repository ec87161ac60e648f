"""What a policy does inside a thought: where it halts, how far its probabilities hold, its errors.

The policy may be several trainings, S of them: a report of all is of their decisions thrown
together, so that its shares are means over trainings. N traces, P points, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from envs.reward import halt_costs, never_costs, reward
from evaluation.outcome import first_halts
from haltwise import HaltHead, HeadConfig, explain
from haltwise.policy.halting import Probing
from haltwise.policy.head import prob_of
from haltwise.policy.signals import Float
from traces import Traces

Bools = NDArray[np.bool_]

_NUM_PLACES = 20
_NUM_BINS = 10
_NUM_DRIVERS = 4


@dataclass(frozen=True)
class WhereHalted:
    """How far into their thoughts traces are halted, and how often at a right answer."""

    edges: list[float]
    """Of position / num_tokens, of 20 bins."""
    right: list[float]
    """Shares of all traces halted in each bin at a right answer."""
    wrong: list[float]
    """Shares of all traces halted in each bin at a wrong answer."""
    never: float
    """Share of the traces never halted."""
    median_share: float | None
    """Of position / num_tokens; None if nothing is halted."""
    median_position: float | None
    """In tokens; None if nothing is halted."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The points at which the probability of halting lies between two values."""

    low: float
    high: float
    num: int
    """Points."""
    mean_prob: float
    better: float
    """Share of the points where halting is the better choice."""
    correct: float
    """Share of right forced answers."""
    gain: float
    """Mean return of halting less that of going on."""


@dataclass(frozen=True)
class EmptyBin:
    """A bin without a point."""

    WHOLE: ClassVar[type] = ReliabilityBin
    low: float
    high: float
    num: int = 0


@dataclass(frozen=True)
class Reliability:
    """What halting is worth by probability of halting."""

    bins: list[ReliabilityBin | EmptyBin]
    """Of equal width."""
    error: float | None
    """The expected calibration error, the mean of |mean_prob - better| over points (Guo et al.,
    "On Calibration of Modern Neural Networks", 2017, equation 3); None without points."""

    @property
    def seen(self) -> list[ReliabilityBin]:
        """The bins that hold a point."""
        return [found for found in self.bins if isinstance(found, ReliabilityBin)]


@dataclass(frozen=True)
class Driver:
    """A feature that drove a decision."""

    feature: str
    value: float
    contribution: float
    """In log-odds of halting, against a mean point, see `haltwise.explain`."""


@dataclass(frozen=True)
class Case:
    """A trace halted at a wrong answer that would have ended with a right one."""

    trace_id: str
    question_id: str
    task: str
    segment: str
    model: str
    position: int
    """Where it was halted."""
    num_tokens: int
    """Of the whole trace."""
    answer: str
    """The forced one."""
    prob_halt: float
    right_again: int | None
    """Position of the first later point with a right answer; None if only the LM's own end is."""
    drivers: list[Driver]
    """The largest contributions."""
    indifference_price: float | None
    """None if infinite."""
    trainings: float
    """Share of the trainings that make this error."""


@dataclass(frozen=True)
class Behaviour:
    """What a policy does inside thoughts, at one gate and price."""

    gate: float
    price: float
    where: WhereHalted
    reliability: Reliability
    cases: list[Case]


def behaviour(
    gate: float,
    traces: Traces,
    log_odds: Sequence[Float],
    head_of: Callable[[str], HaltHead],
    price: float,
    config: HeadConfig,
) -> Behaviour:
    """All of this module about a policy at one price.

    Args:
        gate: What the price was chosen under.
        traces: N traces.
        log_odds: S times (P,) log-odds of halting at that price.
        head_of: See `cases`.
        price: In exact match per 1,000 tokens.
        config: The heads' threshold and conditions.
    """
    probs = [prob_of(each) for each in log_odds]
    threshold, probing = config.threshold, config.halting.probing
    return Behaviour(
        gate=gate,
        price=price,
        where=where_halted(traces, [prob >= threshold for prob in probs]),
        reliability=reliability(traces, probs, probing, price, threshold),
        cases=cases(traces, log_odds, head_of, price, threshold),
    )


def where_halted(traces: Traces, halts: Sequence[Bools]) -> WhereHalted:
    """How far into their thoughts traces are halted, and how often at a right answer.

    Args:
        traces: N traces.
        halts: S times (P,) whether the policy would halt at each point.
    """
    first = np.concatenate([first_halts(traces, each) for each in halts])
    at = first[first >= 0]
    place = traces.position[at] / traces.num_tokens[traces.trace_of_point[at]]
    edges = np.linspace(0, 1, _NUM_PLACES + 1)
    right, wrong = (
        np.histogram(place[traces.correct[at] == is_right], edges)[0] / len(first)
        for is_right in (True, False)
    )
    return WhereHalted(
        edges=edges.tolist(),
        right=right.tolist(),
        wrong=wrong.tolist(),
        never=float((first < 0).mean()),
        median_share=float(np.median(place)) if len(at) else None,
        median_position=float(np.median(traces.position[at])) if len(at) else None,
    )


def reliability(
    traces: Traces,
    prob_halt: Sequence[Float],
    probing: Probing,
    price: float,
    threshold: float,
) -> Reliability:
    """What halting is worth by probability of halting, at the points that the policy reaches.

    Halting is the better choice where it returns at least as much as going on with the policy's
    own later decisions. A trace holds every outcome, so that this is known and not estimated.
    A policy that maximises its return halts where halting gains in the mean. That can differ from
    where halting is mostly better: a few tokens are often saved, and EM is lost seldom but dearly.

    Args:
        traces: N traces.
        prob_halt: S times (P,) probabilities of halting.
        probing: See `haltwise.Halting`.
        price: Of those probabilities, in exact match per 1,000 tokens.
        threshold: The policy halts at this probability.
    """
    columns = []
    for prob in prob_halt:
        halts = prob >= threshold
        gain = _gains(traces, halts, probing, price)
        reached = _reached(traces, halts)
        columns.append(np.stack([prob, gain >= 0, traces.correct, gain])[:, reached])
    seen = np.concatenate(columns, axis=1)
    which = np.minimum((seen[0] * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    bins = [_bin(k, seen[:, which == k]) for k in range(_NUM_BINS)]
    gaps = [
        found.num * abs(found.mean_prob - found.better)
        for found in bins
        if isinstance(found, ReliabilityBin)
    ]
    return Reliability(bins, sum(gaps) / len(which) if len(which) else None)


def _bin(k: int, seen: NDArray[np.float64]) -> ReliabilityBin | EmptyBin:
    """The k-th bin of `reliability`: what was seen (4, num) are the columns of its means."""
    low, high, num = k / _NUM_BINS, (k + 1) / _NUM_BINS, seen.shape[1]
    return (
        ReliabilityBin(low, high, num, *seen.mean(axis=1).tolist()) if num else EmptyBin(low, high)
    )


def cases(
    traces: Traces,
    log_odds: Sequence[Float],
    head_of: Callable[[str], HaltHead],
    price: float,
    threshold: float,
    num: int = 10,
) -> list[Case]:
    """The worst errors: traces halted at a wrong answer that would have ended with a right one.

    They are errors of the first training, whose heads explain them. First come those that the
    most trainings make, then those that the first training was surest of.

    Args:
        traces: N traces.
        log_odds: S times (P,) log-odds of halting.
        head_of: By question id, the head that judged it in the first training.
        price: Of those log-odds, in exact match per 1,000 tokens.
        threshold: The policy halts at this probability.
        num: The most to return.
    """
    firsts = [first_halts(traces, prob_of(each) >= threshold) for each in log_odds]
    lost = np.array([_lost(traces, first) for first in firsts])
    share = lost.mean(axis=0)
    candidates = np.flatnonzero(lost[0])
    surest = log_odds[0][firsts[0][candidates]]
    worst = candidates[np.lexsort([-surest, -share[candidates]])][:num]
    return [
        _case(
            traces, int(firsts[0][n]), head_of(str(traces.question_id[n])), price, float(share[n])
        )
        for n in worst
    ]


def _reached(traces: Traces, halts: Bools) -> Bools:
    """Which points (P,) the policy comes to; the one that it halts at is the last."""
    first = first_halts(traces, halts)
    last = np.where(first >= 0, first, traces.num_points)[traces.trace_of_point]
    reached: Bools = np.arange(traces.num_points) <= last
    return reached


def _gains(traces: Traces, halts: Bools, probing: Probing, price: float) -> NDArray[np.float64]:
    """Return (P,) of halting at each point, less that of going on to the policy's next halt."""
    now = reward(traces.correct, halt_costs(traces, probing), price)
    never = reward(traces.final_correct, never_costs(traces, probing), price)
    points, halting = np.arange(traces.num_points), np.flatnonzero(halts)
    following = np.append(halting, -1)[np.searchsorted(halting, points, side="right")]
    halted = (following > points) & (following < traces.offsets[1:][traces.trace_of_point])
    gains: NDArray[np.float64] = now - np.where(
        halted, now[following], never[traces.trace_of_point]
    )
    return gains


def _lost(traces: Traces, first: NDArray[np.int64]) -> Bools:
    """Which traces (N,) are halted at a wrong answer and would have ended right."""
    lost: Bools = traces.final_correct & (first >= 0)
    lost[lost] = ~traces.correct[first[lost]]
    return lost


def _case(traces: Traces, point: int, head: HaltHead, price: float, trainings: float) -> Case:
    """A trace that is halted at a point, and why the head halted it there."""
    n = int(traces.trace_of_point[point])
    index = point - int(traces.offsets[n])
    trace = traces.select(np.array([n]))
    features = observed_features(trace, head.config.observing, head.config.halting)[index]
    explanation = explain(head, features, price)
    value = dict(zip(explanation.names, features.tolist(), strict=True))
    later = trace.position[index + 1 :][trace.correct[index + 1 :]]
    indifference = explanation.indifference_price
    return Case(
        trace_id=str(trace.trace_id[0]),
        question_id=str(trace.question_id[0]),
        task=str(trace.task[0]),
        segment=str(trace.segment[0]),
        model=str(trace.model[0]),
        position=int(trace.position[index]),
        num_tokens=int(trace.num_tokens[0]),
        answer=str(trace.answer[index]),
        prob_halt=explanation.prob_halt,
        right_again=int(later[0]) if len(later) else None,
        drivers=[
            Driver(name, value[name], contribution)
            for name, contribution in explanation.drivers(_NUM_DRIVERS)
        ],
        indifference_price=indifference if np.isfinite(indifference) else None,
        trainings=trainings,
    )
