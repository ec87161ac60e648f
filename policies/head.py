"""A trained head as a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from envs.replay import observed_features
from haltwise import HaltHead, Observing
from haltwise.policy.signals import Float
from policies.policy import Halts, Signal
from traces import Traces

# Prices of the grid within the range that a head is trained for, and below it.
_NUM_WITHIN, _NUM_BELOW = 60, 15


@dataclass(frozen=True)
class HeadPolicy:
    """A trained head, which halts as it does beside an LM; its number is the price.

    Shapes: P points of all traces.
    """

    head: HaltHead
    """The head that decides on every question that `kept_back` does not name."""
    kept_back: Mapping[str, HaltHead] = field(default_factory=dict)
    """By question id, for questions that `head` learned from, a head that never saw them."""

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "haltwise head"
    sentence: ClassVar[str] = "The trained head; its one number is the price of tokens."

    @property
    def probes(self) -> bool:
        """Whether the head looks at forced answers."""
        return self.head.config.halting.probing == "always"

    def judge(self, question_id: str) -> HaltHead:
        """Returns the head that decides on a question."""
        return self.kept_back.get(question_id, self.head)

    def signal(self, traces: Traces) -> Signal:
        """Returns what each head that decides on some of the traces is fed.

        Returns:
            For each head: the indices of the points that it decides on, the head, and the features
            (points, F) there.

        Raises:
            InputError: If the traces lack a signal that the head needs.
        """
        judges = [self.judge(question_id) for question_id in traces.question_id.tolist()]
        signal = []
        for judge in {id(judge): judge for judge in judges}.values():
            rows = np.array([other is judge for other in judges])
            points = np.flatnonzero(rows[traces.trace_of_point])
            config = judge.config
            features = observed_features(traces.select(rows), config.observing, config.halting)
            signal.append((points, judge, features))
        return signal

    def grid(self, signal: Signal) -> list[float]:
        """Returns the prices that the head is judged at, the strictest first."""
        return price_grid(self.head.config.observing)

    def halts(self, signal: Signal, parameter: float) -> Halts:
        """Halts (P,) where the heads halt at a price of `parameter`."""
        halts = np.zeros(sum(len(points) for points, _, _ in signal), dtype=bool)
        for points, judge, features in signal:
            halts[points] = judge.halts(features, parameter)
        return halts

    def log_odds(self, signal: Signal, price: float) -> Float:
        """Returns the heads' log-odds of halting (P,) at a price."""
        log_odds = np.zeros(sum(len(points) for points, _, _ in signal), dtype=np.float32)
        for points, judge, features in signal:
            log_odds[points] = judge.log_odds(features, price)
        return log_odds


def price_grid(observing: Observing) -> list[float]:
    """Returns 75 prices, evenly spaced in their log, of which 15 lie below a head's range.

    There the head goes on becoming stricter, as its log-odds go on falling with the log price. At
    the lowest price that it was trained for it may still lose something: where questions are few,
    or of another LM.
    """
    low, high = observing.price_range
    below = (high / low) ** (_NUM_BELOW / (_NUM_WITHIN - 1))
    prices: list[float] = np.geomspace(low / below, high, _NUM_BELOW + _NUM_WITHIN).tolist()
    return prices


def judging_heads(
    head: HaltHead,
    kept_back: Mapping[tuple[int, int], HaltHead],
    folds: Mapping[int, Mapping[str, int]],
) -> list[HeadPolicy]:
    """Returns a run's head, with the heads of its folds for questions that it learned from.

    Args:
        head: The head that was trained on all questions.
        kept_back: By seed and fold, a head that never saw the fold's questions.
        folds: By seed and question id, the fold that kept the question back.

    Returns:
        One policy for each seed; the bare head alone if nothing was trained by folds.
    """
    judges = [
        HeadPolicy(head, {question: kept_back[seed, k] for question, k in fold.items()})
        for seed, fold in folds.items()
    ]
    return judges or [HeadPolicy(head)]
