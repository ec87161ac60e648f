"""Reward: exact match minus a price on tokens. The token accounting of every environment.

    return = EM - price * cost / 1000

Costs count generated tokens. `probing` is "always" when an answer is forced at every point in
order to look at it, "at_halt" when it is forced only on halting.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltwise.policy.halting import Probing
from traces import Traces

Tokens = NDArray[np.int64]


def reward(em: ArrayLike, cost: ArrayLike, price: ArrayLike) -> NDArray[np.float64]:
    """EM - price * cost / 1000, for one step or for a whole episode.

    Args:
        em: Exact match gained, 0 or 1.
        cost: Tokens generated.
        price: Exact match per 1,000 tokens.
    """
    paid: NDArray[np.float64] = np.asarray(price) * np.asarray(cost) / 1000
    return np.asarray(em, dtype=np.float64) - paid


def halt_costs(traces: Traces, probing: Probing) -> Tokens:
    """Tokens (P,) spent on a trace that is halted at each of its points."""
    if probing == "at_halt":
        at_halt: Tokens = traces.position + traces.probe_tokens
        return at_halt
    total = np.concatenate([[0], np.cumsum(traces.probe_tokens)])
    before = total[traces.offsets[:-1]][traces.trace_of_point]
    always: Tokens = traces.position + total[1:] - before
    return always


def never_costs(traces: Traces, probing: Probing) -> Tokens:
    """Tokens (N,) spent on each trace that is never halted."""
    if probing == "at_halt":
        return traces.num_tokens
    total = np.concatenate([[0], np.cumsum(traces.probe_tokens)])
    return traces.num_tokens + np.diff(total[traces.offsets])


def step_costs(traces: Traces, probing: Probing) -> Tokens:
    """Tokens (P, 2) that a step at each point costs: column 0 to continue, column 1 to halt.

    A step pays for what was generated since the previous point; continuing at a trace's last
    point also pays for the rest. Along an episode the steps add up to `halt_costs` or
    `never_costs`.
    """
    first, last = _ends(traces)
    halted = halt_costs(traces, probing)
    # What halting at the point adds to the cost that earlier steps have paid already.
    shared = halted - (traces.probe_tokens if probing == "at_halt" else 0)
    delta = np.diff(shared, prepend=0)
    delta[first] = shared[first]
    costs = np.stack([delta, delta + (halted - shared)], axis=1)
    costs[last, 0] += never_costs(traces, probing)[traces.trace_of_point[last]] - shared[last]
    return costs


def step_ems(traces: Traces) -> NDArray[np.bool_]:
    """EM (P, 2) that a step at each point gains: column 0 to continue, column 1 to halt."""
    _, last = _ends(traces)
    ems = np.zeros((traces.num_points, 2), dtype=bool)
    ems[:, 1] = traces.correct
    ems[last, 0] = traces.final_correct[traces.trace_of_point[last]]
    return ems


def _ends(traces: Traces) -> tuple[Tokens, Tokens]:
    """Flat indices of the first and the last point of every trace that has any."""
    nonempty = np.diff(traces.offsets) > 0
    return traces.offsets[:-1][nonempty], traces.offsets[1:][nonempty] - 1
