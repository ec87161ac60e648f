"""What a policy is, to whoever evaluates it.

A policy halts a trace at the first point where `halts` is true. Each has one number to tune; the
head is one of them, its number is the price. Shapes: P points of all traces.
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
        """Its name in tables, in operating points and in JSON; no two policies share it."""
        ...

    @property
    def title(self) -> str:
        """Its readable name, for the page and its figures."""
        ...

    @property
    def sentence(self) -> str:
        """What it does, in a sentence for the page."""
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


def signal_under(policy: Policy, traces: Traces, probing: Probing) -> Signal | None:
    """What a policy looks at; None if the traces lack it, or if nobody forces the answers."""
    if policy.probes and probing == "at_halt":
        return None
    return policy.signal(traces)


def decisions(policy: Policy, signal: Signal) -> dict[float, Halts]:
    """Where a policy would halt (P,), by parameter over its grid."""
    return {parameter: policy.halts(signal, parameter) for parameter in policy.grid(signal)}
