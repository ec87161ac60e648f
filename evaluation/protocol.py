"""Operating points: one protocol for every policy with a number to tune.

Decisions on the train and dev splits together, out of fold where a policy is trained; the number
with the largest saving within the gate; then frozen. A test file tunes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.outcome import Outcome, em_delta, saving
from haltwise import InputError
from traces import Traces

#: How much mean EM an operating point may lose on the traces that it is chosen on.
GATES = (0.0, 0.01)

#: The control that is tuned to halt as often as the head.
RATE_MATCHED = "random"

#: Parameter by policy; None is never halting.
Points = dict[str, float | None]

_FILE = "operating_points.json"
_ROUNDING = 1e-12


def folds(question_id: NDArray[np.str_], num_folds: int = 5, seed: int = 0) -> NDArray[np.int64]:
    """The fold (N,) of every trace, all traces of a question in the same one.

    Questions are shuffled, then dealt out, those with the most traces first.

    Raises:
        InputError: If there are fewer questions than folds.
    """
    _, question, count = np.unique(question_id, return_inverse=True, return_counts=True)
    if len(count) < num_folds:
        raise InputError(f"{len(count)} questions: expected at least {num_folds}, one a fold")
    shuffled = np.random.default_rng(seed).random(len(count))
    fold = np.empty(len(count), dtype=np.int64)
    fold[np.lexsort([shuffled, -count])] = np.arange(len(count)) % num_folds
    return fold[question]


def operating_point(traces: Traces, outcomes: Mapping[float, Outcome], gate: float) -> float | None:
    """The parameter with the largest saving whose mean EM change is at least -gate.

    Args:
        traces: N traces to choose on.
        outcomes: By parameter, on those traces.
        gate: Mean EM that may be lost, in [0, 1].

    Returns:
        None (never halt, which saves 0) if no parameter within the gate saves anything.
    """
    best, best_saving = None, 0.0
    for parameter, outcome in outcomes.items():
        saved = saving(traces, outcome)
        if saved > best_saving and em_delta(traces, outcome) >= -gate - _ROUNDING:
            best, best_saving = parameter, saved
    return best


def same_rate(outcomes: Mapping[float, Outcome], rate: float) -> float | None:
    """The parameter that halts nearest to a given share of the traces; None for a rate of 0.

    How a control is tuned that is to halt as often as another policy.
    """
    if rate == 0:
        return None
    return min(outcomes, key=lambda parameter: abs(outcomes[parameter].halted.mean() - rate))


def strictest_price(gates: Mapping[float, Points]) -> float | None:
    """The head's price at the strictest gate where it halts at all; None if there is none."""
    prices = [gates[gate]["head"] for gate in sorted(gates)]
    return next((price for price in prices if price is not None), None)


def save_operating_points(run: Path, gates: Mapping[float, Points]) -> None:
    """Writes the frozen points of every gate into a run folder."""
    content = {"gates": {str(gate): points for gate, points in gates.items()}}
    (run / _FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_operating_points(run: Path) -> dict[float, Points]:
    """Reads the frozen points of a run, by gate.

    Raises:
        InputError: If the run has none, or they are not numbers by gate and policy.
    """
    path = run / _FILE
    if not path.is_file():
        raise InputError(f"no {_FILE} in {run}: expected a folder written by train.py")
    try:
        gates: dict[float, Points] = {
            float(gate): {
                str(policy): None if parameter is None else float(parameter)
                for policy, parameter in points.items()
            }
            for gate, points in json.loads(path.read_text())["gates"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: not readable ({error!r}), "
            'expected {"gates": {"0.0": {"head": price, "confidence": threshold, ...}, ...}}'
        ) from None
    if not gates or not all(0 <= gate <= 1 for gate in gates):
        raise InputError(f"{path}: gates are {list(gates)}, expected some from 0 to 1")
    if not all("head" in points for points in gates.values()):
        raise InputError(f"{path}: a gate has no 'head', expected its price or null")
    if not np.isfinite([p for points in gates.values() for p in points.values() if p]).all():
        raise InputError(f"{path}: a point is not finite, expected numbers or null")
    prices = [points.get("head") for points in gates.values()]
    if any(price is not None and price <= 0 for price in prices):
        raise InputError(f"{path}: a head's price is not positive, expected above 0, or null")
    return gates
