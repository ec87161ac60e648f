"""The trade-off over a training: what a head comes to, step by step, on questions kept from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.frontier import swept_area
from evaluation.outcome import sweep
from evaluation.trials import balanced_returns
from haltwise.policy.halting import Probing
from traces import Traces

#: The thirds of the prices, for each of which exact match and tokens are told.
THIRDS = ("low", "middle", "high")


@dataclass(frozen=True)
class CurvePoint:
    """What heads come to after some steps, in the mean over trainings."""

    ppo: bool
    """Whether the steps are decisions of PPO; else they are gradient steps of the start."""
    step: int
    em: dict[str, float]
    """By third of the prices, the mean EM."""
    tokens: dict[str, float]
    """By third of the prices, the mean tokens of a trace, probes included."""
    balanced_return: float
    """The return, in the mean over prices that count alike."""
    area: float
    """The area under the frontier of the prices, see `frontier_area`."""
    taken: bool
    """Whether it is the checkpoint that the run's head was trained to."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CurvePoint:
        """Rebuilds what was written with `evaluation.rows.to_json`."""
        return cls(**content)

    @property
    def scalars(self) -> dict[str, float]:
        """The numbers by name, as TensorBoard has them."""
        each = {"return": self.balanced_return, "area": self.area}
        for third in THIRDS:
            each[f"em_{third}_price"] = self.em[third]
            each[f"tokens_{third}_price"] = self.tokens[third]
        return each


def curve_point(
    traces: Traces,
    decided: Sequence[NDArray[np.bool_]],
    prices: Sequence[float],
    weights: NDArray[np.float64],
    probing: Probing,
    *,
    ppo: bool,
    step: int,
    taken: bool = False,
) -> CurvePoint:
    """Judges heads as they are after some steps.

    Args:
        traces: N traces with P points.
        decided: By training, the decisions (number of prices, P) about them.
        prices: Those prices, the lowest first, three at least.
        weights: Their weights in the return.
        probing: "always" or "at_halt", see `haltwise.Halting`.
        ppo: Whether PPO has begun.
        step: The steps so far.
        taken: Whether it is the checkpoint that the run's head was trained to.
    """
    each = [sweep(traces, dict(zip(prices, halts, strict=True)), probing) for halts in decided]
    thirds = dict(zip(THIRDS, np.array_split(np.array(prices), 3), strict=True))

    def mean(of: str) -> dict[str, float]:
        """Returns the mean of a column of the outcomes, by third of the prices."""
        return {
            third: float(np.mean([[getattr(swept[at], of) for at in here] for swept in each]))
            for third, here in thirds.items()
        }

    return CurvePoint(
        ppo,
        step,
        mean("em"),
        mean("cost"),
        float(np.mean([balanced_returns(swept, weights) for swept in each])),
        float(np.mean([swept_area(traces, swept) for swept in each])),
        taken,
    )
