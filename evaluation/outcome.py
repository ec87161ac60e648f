"""Works out what a policy's halting decisions come to: exact match and tokens of every trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.reward import halt_costs, never_costs
from evaluation.rows import Interval, SweepRow
from haltwise.policy.halting import Probing
from policies.policy import first_halts
from traces import Traces


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one policy comes to on each of N traces.

    Where it is of several trainings, it holds their means.
    """

    em: NDArray[Any]
    """(N,) the exact match, a bool, or a mean."""
    cost: NDArray[Any]
    """(N,) the tokens generated, probes included."""
    halted: NDArray[Any]
    """(N,) whether the policy halts the trace, or how often."""

    def select(self, rows: NDArray[np.bool_]) -> Outcome:
        """Returns the outcome on the traces of a mask (N,)."""
        return Outcome(self.em[rows], self.cost[rows], self.halted[rows])


def never_outcome(traces: Traces) -> Outcome:
    """Returns the outcome of no halting and no probing, which everything is compared with."""
    return Outcome(traces.final_correct, traces.num_tokens, np.zeros(len(traces), dtype=bool))


def halt_outcome(traces: Traces, halts: NDArray[np.bool_], probing: Probing) -> Outcome:
    """Returns the outcome of halting every trace at the first point where `halts` is true.

    A policy that probes pays for its probes also where it never halts.

    Args:
        traces: N traces with P points.
        halts: (P,) whether the policy would halt at each point.
        probing: "always" or "at_halt", see `haltwise.Halting`.
    """
    first = first_halts(traces, halts)
    halted = first >= 0
    em, cost = traces.final_correct.copy(), never_costs(traces, probing).copy()
    em[halted] = traces.correct[first[halted]]
    cost[halted] = halt_costs(traces, probing)[first[halted]]
    return Outcome(em, cost, halted)


def sweep(
    traces: Traces, decisions: Mapping[float, NDArray[np.bool_]], probing: Probing
) -> dict[float, Outcome]:
    """Returns, by parameter, the outcome of a policy's decisions (P,)."""
    return {at: halt_outcome(traces, halts, probing) for at, halts in decisions.items()}


def average(outcomes: Sequence[Outcome]) -> Outcome:
    """Returns the mean outcome of several trainings of one policy, trace by trace."""
    return Outcome(
        np.mean([outcome.em for outcome in outcomes], axis=0),
        np.mean([outcome.cost for outcome in outcomes], axis=0),
        np.mean([outcome.halted for outcome in outcomes], axis=0),
    )


def em_delta(traces: Traces, outcome: Outcome) -> float:
    """Returns the mean EM minus that of never halting."""
    return float(outcome.em.sum() - traces.final_correct.sum()) / len(traces)


def saving(traces: Traces, outcome: Outcome) -> float:
    """Returns the share of the tokens that is not spent, 1 - sum(cost) / sum(num_tokens)."""
    return 1 - float(outcome.cost.sum()) / int(traces.num_tokens.sum())


def outcome_row(
    traces: Traces,
    outcome: Outcome,
    policy: str,
    parameter: float | None,
    split: str,
    em_delta_interval: Interval | None = None,
    saving_interval: Interval | None = None,
) -> SweepRow:
    """Makes the row that tells what a policy comes to at one parameter."""
    was_right = traces.final_correct
    saved_of_hopeless = (traces.num_tokens - outcome.cost)[traces.hopeless]
    return SweepRow(
        policy=policy,
        parameter=parameter,
        split=split,
        em=float(outcome.em.mean()),
        em_delta=em_delta(traces, outcome),
        tokens=float(outcome.cost.mean()),
        saving=saving(traces, outcome),
        halt_rate=float(outcome.halted.mean()),
        right_to_wrong=float((was_right * (1.0 - outcome.em)).mean()),
        wrong_to_right=float((~was_right * outcome.em).mean()),
        hopeless_saving=float(saved_of_hopeless.sum()) / int(traces.num_tokens.sum()),
        gave_up=float((outcome.halted * (1.0 - outcome.em)).mean()),
        em_delta_interval=em_delta_interval,
        saving_interval=saving_interval,
    )
