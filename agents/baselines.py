"""Simple policies to compare a head with, and what is possible in hindsight.

A policy halts a trace at the first point where `halts` is true. Each has one number to tune; the
head is one of them, its number is the price. Shapes: P points of all traces, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.replay import point_features
from haltwise import HaltHead, Observing, feature_names
from haltwise.halting import Probing
from traces import Traces

Halts = NDArray[np.bool_]
Signal = NDArray[Any]


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
        """What it looks at, (P,) or (P, F); None if the traces lack it."""
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
        return signal >= parameter


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
        return signal > parameter


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
        return signal >= parameter


class Random:
    """Halts at each point with probability `parameter`; the control that looks at nothing."""

    name = "random"
    probes = False

    def signal(self, traces: Traces) -> Signal:
        """A number from [0, 1) a point, the same for the same traces."""
        return np.random.default_rng(0).random(traces.num_points)

    def grid(self, signal: Signal) -> list[float]:
        """40 probabilities from 0.001 to 1."""
        probabilities: list[float] = np.logspace(-3, 0, 40).tolist()
        return probabilities

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Number below `parameter`."""
        return signal < parameter


@dataclass(frozen=True)
class Head:
    """A trained head, which halts as it does beside an LM; its number is the price."""

    head: HaltHead
    name: str = "head"

    @property
    def probes(self) -> bool:
        """Whether its features need forced answers."""
        return self.head.config.halting.probing == "always"

    def signal(self, traces: Traces) -> Signal:
        """The head's features (P, F).

        Raises:
            InputError: If the traces lack a signal that the head needs.
        """
        observing, halting = self.head.config.observing, self.head.config.halting
        return point_features(traces, observing.groups, halting.max_points, observing.projection)

    def grid(self, signal: Signal) -> list[float]:
        """60 prices over the range that the head was trained for."""
        return price_grid(self.head.config.observing)

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """The head's own decision at a price of `parameter`."""
        return self.head.halts(signal, parameter)


def price_grid(observing: Observing) -> list[float]:
    """60 prices over the range that a head is trained for."""
    prices: list[float] = np.geomspace(*observing.price_range, 60).tolist()
    return prices


BASELINES: tuple[Policy, ...] = (Budget(), Confidence(), Stability(), Random())


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
