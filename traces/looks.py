"""Replays a coarser decision rule from traces that were recorded under a denser one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise import DecisionRule
from haltwise.policy.signals import SIGNAL_KINDS
from traces.arrays import Traces


def looked_at(traces: Traces, rule: DecisionRule) -> Traces:
    """Returns traces with those of their points alone at which another rule looks.

    An LM's tokens do not hang on where somebody looks, so this is exactly what would have been
    recorded under that rule: it skips the other points' probes, and what is seen of the tokens
    since the previous point is seen of all since the previous one that is left.

    Args:
        traces: Traces that were recorded under a rule that `DecisionRule.replays` this one.
        rule: A rule that can be run.
    """
    points = np.flatnonzero(_is_looked_at(traces, rule))
    num = np.bincount(traces.trace_of_point[points], minlength=len(traces))
    since, gaps = _since(traces, points), _gaps(traces)
    signals = {
        name: _of_tokens(values, SIGNAL_KINDS[name].since, points, since, gaps)
        for name, values in traces.signals.items()
    }
    return replace(
        traces.of_points(points, num),
        signals=signals,
        recorder=traces.recorder | {"decision_rule": rule.text},
    )


def _is_looked_at(traces: Traces, rule: DecisionRule) -> NDArray[np.bool_]:
    """Returns whether a rule looks at each point (P,), as `haltwise.session.Thought` does."""
    far, close, most = rule.every or 0, rule.every_repeated or 1, rule.max_points
    looked = np.zeros(traces.num_points, dtype=bool)
    position, answers = traces.position.tolist(), traces.answer.tolist()
    for start, stop in zip(traces.offsets[:-1].tolist(), traces.offsets[1:].tolist(), strict=True):
        due, latest, num = far, "", 0
        for point in range(start, stop):
            if position[point] < due or position[point] % close or num == most:
                continue
            looked[point] = True
            repeats = answers[point] and answers[point] == latest
            due, latest = position[point] + (close if repeats else far), answers[point]
            num += 1
    return looked


def _since(traces: Traces, points: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for some points (K,) the first one behind the previous of them in the same trace."""
    first = traces.offsets[traces.trace_of_point[points]]
    behind = np.concatenate([[0], points[:-1] + 1])[: len(points)]
    since: NDArray[np.int64] = np.maximum(first, behind)
    return since


def _gaps(traces: Traces) -> NDArray[np.int64]:
    """Returns the tokens (P,) since the previous point, or since the start."""
    gaps = np.diff(traces.position, prepend=0)
    starts = traces.offsets[:-1][np.diff(traces.offsets) > 0]
    gaps[starts] = traces.position[starts]
    return gaps


def _of_tokens(
    values: NDArray[Any],
    since: str,
    points: NDArray[np.int64],
    first: NDArray[np.int64],
    gaps: NDArray[np.int64],
) -> NDArray[Any]:
    """Returns what a signal (P,) or (P, D) is at some points (K,), of all tokens since `first`."""
    if not since or not len(points):
        return values[points]
    # Every other piece lies between two that are wanted; a last value ends the last one.
    pieces = np.stack([first, points + 1], axis=1).ravel()

    def over(reduce: np.ufunc, each: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = reduce.reduceat(np.append(each, each[-1:]), pieces)[::2]
        return found

    if since == "mean":
        total = over(np.add, values.astype(np.float64) * gaps)
        mean: NDArray[Any] = (total / over(np.add, gaps)).astype(values.dtype)
        return mean
    return over({"max": np.maximum, "min": np.minimum, "sum": np.add}[since], values)
