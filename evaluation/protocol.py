"""Chooses operating points, by one protocol for every policy with a number to tune.

Policies decide on the train and dev splits together, out of fold if they are trained. The number
with the largest saving within the gate is chosen, and then frozen. A test file tunes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from evaluation.outcome import Outcome, em_delta, saving
from haltwise import InputError
from policies.baselines import Random
from runs import Gates
from traces import Traces

#: How much mean EM an operating point may lose on the traces that it is chosen on.
GATES = (0.0, 0.01)

#: The control that is tuned to halt as often as the head.
RATE_MATCHED = Random.name

_ROUNDING = 1e-12


def folds(question_id: NDArray[np.str_], num_folds: int = 5, seed: int = 0) -> NDArray[np.int64]:
    """Returns the fold (N,) of every trace; all traces of a question are in the same one.

    Questions are shuffled, then dealt out, those with the most traces first.

    Raises:
        InputError: If there are fewer questions than folds.
    """
    _, question, count = np.unique(question_id, return_inverse=True, return_counts=True)
    if len(count) < num_folds:
        raise InputError(
            f"{len(count)} questions: expected at least {num_folds}, one a fold (--folds)"
        )
    shuffled = np.random.default_rng(seed).random(len(count))
    fold = np.empty(len(count), dtype=np.int64)
    fold[np.lexsort([shuffled, -count])] = np.arange(len(count)) % num_folds
    return fold[question]


def operating_point(traces: Traces, outcomes: Mapping[float, Outcome], gate: float) -> float | None:
    """Chooses the parameter with the largest saving whose mean EM change is at least -gate.

    Args:
        traces: N traces to choose on.
        outcomes: By parameter, the outcomes on those traces.
        gate: How much mean EM may be lost, in [0, 1].

    Returns:
        The parameter; None (never halt, which saves 0) if none within the gate saves anything.
    """
    best, best_saving = None, 0.0
    for parameter, outcome in outcomes.items():
        saved = saving(traces, outcome)
        if saved > best_saving and em_delta(traces, outcome) >= -gate - _ROUNDING:
            best, best_saving = parameter, saved
    return best


def same_rate(outcomes: Mapping[float, Outcome], rate: float) -> float | None:
    """Chooses the parameter that halts nearest to a given share of the traces; None for 0.

    A control that is to halt as often as another policy is tuned so.
    """
    if rate == 0:
        return None
    return min(outcomes, key=lambda parameter: abs(outcomes[parameter].halted.mean() - rate))


def own_price(gates: Gates) -> float:
    """Returns the price that a head has as its own: that of the strictest gate.

    It is 0, at which the head never halts, if no price is within that gate. A price of another gate
    loses more than it may, so that it has to be asked for.
    """
    return gates[min(gates)]["head"] or 0.0


def strictest_price(gates: Gates) -> float | None:
    """Returns the head's price at the strictest gate where it halts; None if it never does."""
    prices = [gates[gate]["head"] for gate in sorted(gates)]
    return next((price for price in prices if price is not None), None)
