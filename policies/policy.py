"""Says what a policy is, to whoever evaluates it.

A policy halts a trace at the first point where `halts` is true. Each policy has one number to
tune. The head is one of them; its number is the price. Shapes: P points of all traces.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from haltwise.policy.halting import Probing
from traces import Traces

Halts = NDArray[np.bool_]
Signal = Any


class Policy(Protocol):
    """A rule with one number: a signal seen at every point, and what to halt at."""

    @property
    def name(self) -> str:
        """The policy's name in tables, operating points and JSON; no two policies share it."""
        ...

    @property
    def title(self) -> str:
        """The policy's readable name, for the page and its figures."""
        ...

    @property
    def sentence(self) -> str:
        """What the policy does, in a sentence for the page."""
        ...

    @property
    def probes(self) -> bool:
        """Whether the policy looks at forced answers."""
        ...

    def signal(self, traces: Traces) -> Signal | None:
        """Returns what the policy looks at, mostly (P,); None if the traces lack it."""
        ...

    def grid(self, signal: Signal) -> list[float]:
        """Returns the numbers to try."""
        ...

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Returns whether the policy would halt at each point (P,), had it got there."""
        ...


def signal_under(policy: Policy, traces: Traces, probing: Probing) -> Signal | None:
    """Returns what a policy looks at; None if it is not available.

    It is not if the traces lack it, or if the policy looks at answers that nobody forces under
    this probing.
    """
    if policy.probes and probing == "at_halt":
        return None
    return policy.signal(traces)


def decisions(policy: Policy, signal: Signal) -> dict[float, Halts]:
    """Returns, by each parameter of a policy's grid, where it would halt (P,)."""
    return {parameter: policy.halts(signal, parameter) for parameter in policy.grid(signal)}


def first_halts(traces: Traces, halts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the index (N,) of the point that each trace is halted at, -1 if never.

    It is an index among the points of all traces.
    """
    points = np.flatnonzero(halts)[::-1]
    first = np.full(len(traces), -1, dtype=np.int64)
    # The points come last first, and of several values for a trace the last one stays.
    first[traces.trace_of_point[points]] = points
    return first
