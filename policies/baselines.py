"""Simple policies to compare a head with, and what is possible in hindsight.

A policy halts a trace at the first point where `halts` is true. Each has one number to tune; the
head is one of them, its number is the price. Shapes: P points of all traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.replay import observed_features, point_features
from haltwise import HaltHead, Observing, feature_names
from haltwise.policy.halting import Probing
from haltwise.policy.signals import Float
from traces import Traces

Halts = NDArray[np.bool_]
Signal = Any

# EAT's weight of the newest value in its moving mean and variance, and points before it may halt.
_EAT_WEIGHT, _EAT_WARM_UP = 0.2, 4


class Policy(Protocol):
    """A rule with one number: a signal seen at every point, and what to halt at."""

    @property
    def name(self) -> str:
        """Its name in every table."""
        ...

    @property
    def probes(self) -> bool:
        """Whether it looks at forced answers."""
        ...

    def signal(self, traces: Traces) -> Signal | None:
        """What it looks at, mostly (P,); None if the traces lack it."""
        ...

    def grid(self, signal: Signal) -> list[float]:
        """The numbers to try."""
        ...

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Whether it would halt at each point (P,), had it got there."""
        ...


class Budget:
    """Halts at the first point with at least `parameter` thinking tokens."""

    name = "budget"
    probes = False

    def signal(self, traces: Traces) -> Signal:
        """Position."""
        return traces.position

    def grid(self, signal: Signal) -> list[float]:
        """Up to 60 quantiles of the positions."""
        quantiles: list[float] = np.unique(np.quantile(signal, np.linspace(0, 1, 60))).tolist()
        return quantiles

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Position at least `parameter`."""
        halts: Halts = signal >= parameter
        return halts


class Confidence:
    """Halts at the first answer whose confidence is above `parameter`."""

    name = "confidence"
    probes = True

    def signal(self, traces: Traces) -> Signal | None:
        """Confidence, -1 where there is no answer or it is unknown; None if it is never known."""
        if np.isnan(traces.confidence).all():
            return None
        known = (traces.answer != "") & ~np.isnan(traces.confidence)
        return np.where(known, traces.confidence.astype(np.float64), -1.0)

    def grid(self, signal: Signal) -> list[float]:
        """200 thresholds from 0 to 1 - 1e-6, dense near 1."""
        thresholds: list[float] = (1 - np.logspace(0, -6, 200)).tolist()
        return thresholds

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Confidence above `parameter`."""
        halts: Halts = signal > parameter
        return halts


class _AtMost:
    """Halts at the first point where a signal (P,) is at most `parameter`."""

    def grid(self, signal: Signal) -> list[float]:
        """Up to 200 quantiles of the signal."""
        known = signal[np.isfinite(signal)]
        quantiles: list[float] = np.unique(np.quantile(known, np.linspace(0, 1, 200))).tolist()
        return quantiles

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Signal at most `parameter`."""
        halts: Halts = signal <= parameter
        return halts


class AnswerEntropy(_AtMost):
    """Halts at the first answer whose entropy, nats a token, is at most `parameter`."""

    name = "answer_entropy"
    probes = True

    def signal(self, traces: Traces) -> Signal | None:
        """Entropy, infinite where there is no answer or it is unknown; None if never known."""
        known = (traces.answer != "") & ~np.isnan(traces.answer_entropy)
        return np.where(known, traces.answer_entropy, np.inf) if known.any() else None


class Entropy(_AtMost):
    """Halts where the LM's own mean entropy since the last point is at most `parameter`, nats."""

    name = "entropy"
    probes = False

    def signal(self, traces: Traces) -> Signal | None:
        """Entropy of the next-token distribution, infinite where unknown; None if never known."""
        entropy = traces.signals.get("entropy")
        if entropy is None or np.isnan(entropy).all():
            return None
        return np.where(np.isnan(entropy), np.inf, entropy.astype(np.float64))


class EntropyVariance(_AtMost):
    """Halts where the moving variance of that entropy is at most `parameter`, nats squared.

    As EAT (Wang et al., arXiv 2509.26522) does with the entropy after the close text, which traces
    do not hold: mean m += w (x - m), variance v += w ((x - m)^2 - v), from m = x and v = 0 at the
    first point, w = 0.2, and no halting before the fourth point, while v is still small. Points of
    unknown entropy are passed over.
    """

    name = "entropy_variance"
    probes = False

    def signal(self, traces: Traces) -> Signal | None:
        """Moving variance, infinite where it may not halt; None if that is everywhere."""
        entropy = Entropy().signal(traces)
        if entropy is None:
            return None
        lengths = np.diff(traces.offsets)
        signal = np.full(traces.num_points, np.inf)
        mean, variance = np.zeros(len(traces)), np.zeros(len(traces))
        known = np.isfinite(entropy)
        num_known = np.zeros(len(traces), dtype=np.int64)
        for i in range(lengths.max(initial=0)):
            rows = np.flatnonzero(lengths > i)
            rows = rows[known[traces.offsets[rows] + i]]
            at = traces.offsets[rows] + i
            num_known[rows] += 1
            weight = np.where(num_known[rows] == 1, 1.0, _EAT_WEIGHT)
            mean[rows] += weight * (entropy[at] - mean[rows])
            variance[rows] += _EAT_WEIGHT * ((entropy[at] - mean[rows]) ** 2 - variance[rows])
            late = num_known[rows] >= _EAT_WARM_UP
            signal[at[late]] = variance[rows[late]]
        return signal if np.isfinite(signal).any() else None


class Stability:
    """Halts at the first answer that was forced `parameter` times in a row."""

    name = "stability"
    probes = True

    def signal(self, traces: Traces) -> Signal:
        """Length of the run of equal answers that ends at the point; 0 for no answer."""
        column = feature_names(["agreement"]).index("log_run")
        return np.rint(np.expm1(point_features(traces, ("agreement",))[:, column]))

    def grid(self, signal: Signal) -> list[float]:
        """1 to 30 times."""
        return [float(times) for times in range(1, 31)]

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """At least `parameter` times."""
        halts: Halts = signal >= parameter
        return halts


class Random:
    """Halts at each point with probability `parameter`; the control that looks at nothing."""

    name = "random"
    probes = False

    def signal(self, traces: Traces) -> Signal:
        """A number from [0, 1) a point, the same for the same traces."""
        return np.random.default_rng(0).random(traces.num_points)

    def grid(self, signal: Signal) -> list[float]:
        """60 probabilities from 1e-5 to 1."""
        probabilities: list[float] = np.logspace(-5, 0, 60).tolist()
        return probabilities

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Number below `parameter`."""
        halts: Halts = signal < parameter
        return halts


@dataclass(frozen=True)
class Head:
    """A trained head, which halts as it does beside an LM; its number is the price."""

    head: HaltHead
    """Judges every question that no other head is named for."""
    kept_back: Mapping[str, HaltHead] = field(default_factory=dict)
    """By question id: for a question that `head` learned from, one that never saw it."""
    name: str = "head"

    @property
    def probes(self) -> bool:
        """Whether its features need forced answers."""
        return self.head.config.halting.probing == "always"

    def judge(self, question_id: str) -> HaltHead:
        """The head that decides on a question."""
        return self.kept_back.get(question_id, self.head)

    def signal(self, traces: Traces) -> Signal:
        """(points, head, features) of each head that decides on some of the traces.

        Raises:
            InputError: If the traces lack a signal that the head needs.
        """
        judges = [self.judge(question_id) for question_id in traces.question_id.tolist()]
        signal = []
        for judge in {id(judge): judge for judge in judges}.values():
            rows = np.array([other is judge for other in judges])
            points = np.flatnonzero(rows[traces.trace_of_point])
            config = judge.config
            features = observed_features(traces.select(rows), config.observing, config.halting)
            signal.append((points, judge, features))
        return signal

    def grid(self, signal: Signal) -> list[float]:
        """60 prices over the range that the head was trained for."""
        return price_grid(self.head.config.observing)

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """The heads' own decisions at a price of `parameter`."""
        halts = np.zeros(sum(len(points) for points, _, _ in signal), dtype=bool)
        for points, judge, features in signal:
            halts[points] = judge.halts(features, parameter)
        return halts

    def log_odds(self, signal: Signal, price: float) -> Float:
        """The heads' log-odds of halting (P,)."""
        log_odds = np.zeros(sum(len(points) for points, _, _ in signal), dtype=np.float32)
        for points, judge, features in signal:
            log_odds[points] = judge.log_odds(features, price)
        return log_odds


def price_grid(observing: Observing) -> list[float]:
    """60 prices over the range that a head is trained for."""
    prices: list[float] = np.geomspace(*observing.price_range, 60).tolist()
    return prices


BASELINES: tuple[Policy, ...] = (
    Budget(),
    Confidence(),
    AnswerEntropy(),
    Entropy(),
    EntropyVariance(),
    Stability(),
    Random(),
)


def signal_under(policy: Policy, traces: Traces, probing: Probing) -> Signal | None:
    """What a policy looks at; None if the traces lack it, or if nobody forces the answers."""
    if policy.probes and probing == "at_halt":
        return None
    return policy.signal(traces)


def decisions(policy: Policy, signal: Signal) -> dict[float, Halts]:
    """Where a policy would halt (P,), by parameter over its grid."""
    return {parameter: policy.halts(signal, parameter) for parameter in policy.grid(signal)}


def hindsight(traces: Traces) -> Halts:
    """Halts (P,) at the first correct answer: the best EM, and the saving it could come with."""
    return traces.correct


def hindsight_give_up(traces: Traces) -> Halts:
    """As `hindsight`, but halts (P,) at once where no answer is ever correct, the last included."""
    return traces.correct | traces.hopeless[traces.trace_of_point]
