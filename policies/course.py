"""How questions leave a small LM, and what a large LM makes of those that are escalated to it.

A token of the large LM costs the price ratio in tokens of the small one. Both bills count what is
generated; prompts are not counted. Shapes: N pairs of traces, P points of the small LM's, K prices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from envs.reward import halt_costs, never_costs
from haltwise.policy.halting import Probing
from policies.policy import Signal, first_halts
from traces import Pairs, Traces

#: Stand for a point, where a question leaves the small LM before its first token or at its end.
AT_START, AT_END = -2, -1

#: A policy's numbers. The last one of a baseline is the price that the large LM is halted at.
Parameter = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Course:
    """Where N questions leave the small LM, and which of them go to the large one."""

    point: NDArray[np.int64]
    """(N,) the index among the points of all traces; `AT_START` or `AT_END` where it is none."""
    escalated: NDArray[np.bool_]
    """(N,) whether the large LM answers."""

    @classmethod
    def of_points(
        cls,
        traces: Traces,
        leaves: NDArray[np.bool_],
        escalates: NDArray[np.bool_],
        at_end: NDArray[np.bool_],
    ) -> Course:
        """Returns the course of leaving the small LM at the first point where something says so.

        Args:
            traces: N traces of the small LM.
            leaves: (P,) whether a question would leave it at each point.
            escalates: (P,) whether it would then be escalated.
            at_end: (N,) whether it is escalated where the thought has ended by itself.
        """
        point = first_halts(traces, leaves)
        escalated = at_end.copy()
        escalated[point >= 0] = escalates[point[point >= 0]]
        return cls(point, escalated)

    def routed(self, escalated: NDArray[np.bool_]) -> Course:
        """Returns the course where some questions (N,) go to the large LM before all of this."""
        return Course(np.where(escalated, AT_START, self.point), escalated | self.escalated)


@dataclass(frozen=True, eq=False)
class Bills:
    """What N pairs come to, wherever they leave the small LM."""

    halt_em: NDArray[np.bool_]
    """(P,) exact match of the answer at each point."""
    halt_cost: NDArray[np.int64]
    """(P,) tokens of the small LM where it is halted there."""
    leave_cost: NDArray[np.int64]
    """(P,) tokens of the small LM where it is left there without an answer."""
    end_em: NDArray[np.bool_]
    """(N,) exact match of the small LM's own answer."""
    end_cost: NDArray[np.int64]
    """(N,) its tokens then."""

    @classmethod
    def of(cls, small: Traces, probing: Probing) -> Bills:
        """Works out the bills of N traces of the small LM.

        Args:
            small: The traces.
            probing: "always" or "at_halt", see `haltwise.Halting`.
        """
        halted = halt_costs(small, probing)
        probes = 0 if probing == "always" else small.probe_tokens
        never = never_costs(small, probing)
        return cls(small.correct, halted, halted - probes, small.final_correct, never)


@dataclass(frozen=True, eq=False)
class LargeAnswers:
    """What the large LM answers to N questions, at each of K prices that it is halted at."""

    prices: NDArray[np.float64]
    """(K,) the prices of its own tokens, ascending; one price alone where nothing halts it."""
    em: NDArray[np.bool_]
    """(K, N) the exact match."""
    cost: NDArray[np.int64]
    """(K, N) its tokens."""

    @classmethod
    def unhalted(cls, large: Traces) -> LargeAnswers:
        """Returns the answers of traces that run to their ends, unprobed."""
        return cls(np.ones(1), large.final_correct[None], large.num_tokens[None])

    @classmethod
    def halted(
        cls, large: Traces, halts: NDArray[np.bool_], prices: NDArray[np.float64], probing: Probing
    ) -> LargeAnswers:
        """Returns the answers of traces that are halted.

        Args:
            large: N traces with P points.
            halts: (K, P) whether each point would be halted at, at each price.
            prices: (K,) the prices, ascending.
            probing: How the head that halts them probes.
        """
        bills, em, cost = Bills.of(large, probing), [], []
        for each in halts:
            first = first_halts(large, each)
            em.append(np.where(first >= 0, bills.halt_em[first], bills.end_em))
            cost.append(np.where(first >= 0, bills.halt_cost[first], bills.end_cost))
        return cls(prices, np.array(em), np.array(cost))

    @property
    def choices(self) -> list[float]:
        """Up to 8 of the prices, which policies that have no price of their own choose among."""
        places = np.unique(np.linspace(0, len(self.prices) - 1, 8).round().astype(int))
        chosen: list[float] = self.prices[places].tolist()
        return chosen

    def nearest(self, price: NDArray[np.float64] | float) -> NDArray[np.int64]:
        """Returns the index of the nearest price, in the logarithm, of each price (B,)."""
        logs = np.log(self.prices)
        nearest: NDArray[np.int64] = np.searchsorted(
            (logs[1:] + logs[:-1]) / 2, np.log(np.asarray(price, dtype=np.float64))
        )
        return nearest

    def select(self, rows: NDArray[np.bool_]) -> LargeAnswers:
        """Returns the answers to the questions in a mask (N,)."""
        return LargeAnswers(self.prices, self.em[:, rows], self.cost[:, rows])


class Escalating(Protocol):
    """A policy that says where questions leave the small LM, and which go to the large one."""

    @property
    def name(self) -> str:
        """The policy's name in tables and JSON."""
        ...

    @property
    def probing(self) -> Probing:
        """Whether the small LM is probed at every point, or only where it is halted."""
        ...

    def signal(self, pairs: Pairs) -> Signal:
        """Returns what the policy looks at."""
        ...

    def grid(self, signal: Signal) -> list[Parameter]:
        """Returns the numbers to try."""
        ...

    def course(self, pairs: Pairs, signal: Signal, parameter: Parameter) -> Course:
        """Returns the course of all pairs at some numbers."""
        ...

    def large_price(self, parameter: Parameter) -> float:
        """Returns the price of the large LM's own tokens at some numbers."""
        ...
