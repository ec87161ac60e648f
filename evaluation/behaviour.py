"""What a policy does inside a thought: where it halts, how far its probabilities hold, its errors.

The policy may be several trainings, S of them. What is found then is found on the decisions of all
of them together, so that shares are means over trainings. Shapes: N traces, P points, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features
from envs.reward import halt_costs, never_costs, reward
from haltwise import HaltHead, HeadConfig, explain
from haltwise.policy.halting import Probing
from haltwise.policy.head import prob_of
from haltwise.policy.signals import Float
from policies.policy import first_halts
from traces import Traces, Words

Bools = NDArray[np.bool_]

_NUM_PLACES = 20
_NUM_BINS = 10
_NUM_DRIVERS = 4


@dataclass(frozen=True)
class WhereHalted:
    """How far into their thoughts traces are halted, and how often at a right answer."""

    edges: list[float]
    """The 21 edges of 20 bins of position / num_tokens."""
    right: list[float]
    """For each bin, the share of all traces that are halted in it at a right answer."""
    wrong: list[float]
    """For each bin, the share of all traces that are halted in it at a wrong answer."""
    never: float
    """The share of the traces that are never halted."""
    median_share: float | None
    """The median of position / num_tokens over the halted traces; None if nothing is halted."""
    median_position: float | None
    """The median position of the halted traces, in tokens; None if nothing is halted."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The points at which the probability of halting lies between two values."""

    low: float
    high: float
    num: int
    """The number of those points."""
    mean_prob: float
    """The mean probability of halting."""
    better: float
    """The share of the points where halting is the better choice."""
    correct: float
    """The share of the points where the forced answer is right."""
    gain: float
    """The mean return of halting, less that of going on."""


@dataclass(frozen=True)
class EmptyBin:
    """A bin of probabilities of halting in which no point lies."""

    WHOLE: ClassVar[type] = ReliabilityBin
    low: float
    high: float
    num: int = 0


@dataclass(frozen=True)
class Reliability:
    """What halting is worth, by the probability of halting."""

    bins: list[ReliabilityBin | EmptyBin]
    """Bins of equal width, from 0 to 1."""
    error: float | None
    """The expected calibration error, the mean of |mean_prob - better| over points (Guo et al.,
    "On Calibration of Modern Neural Networks", 2017, equation 3); None without points."""

    @property
    def seen(self) -> list[ReliabilityBin]:
        """The bins that hold a point."""
        return [found for found in self.bins if isinstance(found, ReliabilityBin)]


@dataclass(frozen=True)
class Driver:
    """A feature that drove a decision to halt."""

    feature: str
    value: float
    contribution: float
    """What it adds to the log-odds of halting, against a mean point; see `haltwise.explain`."""


@dataclass(frozen=True)
class Case:
    """A trace halted at a wrong answer that would have ended with a right one."""

    trace_id: str
    question_id: str
    task: str
    segment: str
    model: str
    position: int
    """Where the trace was halted, in tokens."""
    num_tokens: int
    """The length of the whole trace."""
    answer: str
    """The forced answer."""
    prob_halt: float
    """The probability of halting there."""
    right_again: int | None
    """The position of the first later point with a right answer; None if no forced answer is right
    after it, only the LM's own."""
    drivers: list[Driver]
    """The features with the largest contributions."""
    indifference_price: float | None
    """The price at which halting and going on weigh the same to the head; None if infinite."""
    trainings: float
    """The share of the trainings that make this error."""
    question: str = ""
    """The question; it and the rest are empty if they were not recorded."""
    gold: str = ""
    """The reference answer; empty if nobody knows."""
    final_answer: str = ""
    """The answer of the LM when it is never halted."""
    thought: str = ""
    """The last words of the thought before the halt."""

    def with_words(self, words: Words) -> Case:
        """Returns the case with what a person needs in order to see for themselves."""
        return replace(
            self,
            question=words.question,
            gold=words.gold,
            final_answer=words.final_answer,
            thought=words.thought_before(self.position / self.num_tokens),
        )


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
    """Finds what a policy does inside thoughts at one price.

    Args:
        gate: The gate that the price was chosen under.
        traces: N traces.
        log_odds: For each of S trainings, its log-odds (P,) of halting at that price.
        head_of: Returns, for a question id, the head that judged it in the first training.
        price: The price, in exact match per 1,000 tokens.
        config: The heads' config, with their threshold and conditions.
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
    """Finds how far into their thoughts traces are halted, and how often at a right answer.

    Args:
        traces: N traces.
        halts: For each of S trainings, whether it would halt at each point (P,).
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
    """Finds what halting is worth by its probability, at the points that the policy reaches.

    Halting is the better choice where it returns at least as much as going on with the policy's
    own later decisions. A trace holds every outcome, so that this is known and not estimated.
    A policy that maximises its return halts where halting gains in the mean. That can differ from
    where halting is mostly better: a few tokens are often saved, and EM is lost seldom but dearly.

    Args:
        traces: N traces.
        prob_halt: For each of S trainings, its probabilities (P,) of halting.
        probing: "always" or "at_halt", see `haltwise.Halting`.
        price: The price that those probabilities are for, in exact match per 1,000 tokens.
        threshold: The policy halts from this probability on.
    """
    columns = []
    for prob in prob_halt:
        halts = prob >= threshold
        gain = _gains(traces, halts, probing, price)
        reached = _reached(traces, halts) & np.isfinite(prob)
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
    """Returns the k-th bin of `reliability`.

    Args:
        k: The number of the bin, from 0.
        seen: (4, num) at each point of the bin: the probability of halting, whether halting is
            better, whether the answer is right, and the gain.
    """
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
    """Returns the worst errors: traces halted at a wrong answer that would have ended right.

    They are errors of the first training, whose heads explain them. First come those that the
    most trainings make, then those that the first training was surest of.

    Args:
        traces: N traces.
        log_odds: For each of S trainings, its log-odds (P,) of halting.
        head_of: Returns, for a question id, the head that judged it in the first training.
        price: The price that those log-odds are for, in exact match per 1,000 tokens.
        threshold: The policy halts from this probability on.
        num: The most errors to return.
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
    """Returns which points (P,) the policy comes to; the one that it halts at is the last."""
    first = first_halts(traces, halts)
    last = np.where(first >= 0, first, traces.num_points)[traces.trace_of_point]
    reached: Bools = np.arange(traces.num_points) <= last
    return reached


def _gains(traces: Traces, halts: Bools, probing: Probing, price: float) -> NDArray[np.float64]:
    """Returns what halting at each point (P,) gains over going on to the policy's next halt.

    It is a difference of two returns, in exact match.
    """
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
    """Returns which traces (N,) are halted at a wrong answer and would have ended right.

    Args:
        traces: N traces.
        first: (N,) the index of the point that each is halted at, -1 if never.
    """
    lost: Bools = traces.final_correct & (first >= 0)
    lost[lost] = ~traces.correct[first[lost]]
    return lost


def _case(traces: Traces, point: int, head: HaltHead, price: float, trainings: float) -> Case:
    """Describes a trace that is halted at a point, and why the head halted it there."""
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
