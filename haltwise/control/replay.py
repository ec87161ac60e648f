"""Where each price would have halted a thought that runs to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from haltwise.control.answers import GivenAnswer
from haltwise.control.betting import Float
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Index, Signals
from haltwise.session.request import ThoughtReport
from haltwise.session.session import HaltMonitor
from haltwise.session.thought import NEVER

#: How the answer is called that what is saved and lost is measured against.
FULL = "full"

# Prices of a grid: fewer miss the best one, more cost time and tell little.
_NUM_PRICES = 36


def prices_of(head: HaltHead) -> Float:
    """Returns the prices (K,) that a head is governed by, the strictest first.

    They are spaced evenly in their log over the range that the head is trained for; the one that
    its certificate names is among them.
    """
    grid = np.geomspace(*head.config.observing.price_range, _NUM_PRICES)
    certificate = head.config.certificate
    if certificate is None or certificate.price is None:
        return grid
    return np.unique(np.append(grid, certificate.price))


@dataclass(frozen=True)
class Look:
    """What is known of an audit at one decision point."""

    signals: Signals
    """What was seen there, (1,)."""
    reached: int
    """Tokens of the thought when the head was asked: beside a look at an answer it goes on."""
    num_probe_tokens: int
    """Tokens that were generated to look at answers until then."""


@dataclass(frozen=True)
class Outcome:
    """What one price would have come to in an audit."""

    answer: GivenAnswer
    """What would have been answered."""
    cost: float
    """The tokens that it would have taken, in those of the LM that thinks."""
    place: str
    """Where its answer was forced, in tokens of the thought; `FULL` is not forced."""


@dataclass(frozen=True)
class Answers:
    """What has been answered in an audit, and what was seen on the way."""

    full: GivenAnswer
    """The answer that the client got."""
    halted: Mapping[int, GivenAnswer | None]
    """By position, the answer if its thought is closed there; None where the LM would have been
    left to think on."""
    looks: Mapping[int, Look]
    """By position, what is known of its decision points."""
    thought: ThoughtReport | None
    """What happened to the thought that all prices are replayed on."""

    @property
    def num_probe_tokens(self) -> int:
        """Tokens that were generated to look at answers while the thought ran."""
        return self.thought.num_probe_tokens if self.thought else 0

    def spent_until(self, position: int) -> int:
        """Tokens of looks at answers until a position: all of them where nothing was looked at."""
        look = self.looks.get(position)
        return self.num_probe_tokens if look is None else look.num_probe_tokens


class Replay:
    """Shows the decision points of one thought to a head at K prices at once.

    Args:
        head: The policy.
        prices: (K,) in exact match per 1,000 tokens.
        min_tokens: Thinking tokens before which nothing is halted.
    """

    def __init__(self, head: HaltHead, prices: Float, min_tokens: int) -> None:
        """Stands before the first decision point."""
        self._monitor = HaltMonitor(head, len(prices), prices)
        self._rows, self._min_tokens = np.arange(len(prices)), min_tokens
        #: (K,) tokens at which each price halts; `NEVER` where it has not.
        self.positions: Index = np.full(len(prices), NEVER)

    def add(self, signals: Signals, place: int) -> None:
        """Takes in the next decision point.

        Args:
            signals: Those of some rows.
            place: Of this thought among them.
        """
        halts = self._monitor.observe(signals.rows(np.full(len(self._rows), place)), self._rows)
        position = int(signals.position[place])
        if position >= self._min_tokens:
            self.positions[halts & (self.positions == NEVER)] = position

    def outcomes(self, answers: Answers) -> list[Outcome]:
        """Returns what each price (K,) would have come to.

        A head that looks at answers pays for every look until it halts.
        """
        return [self._outcome(at, answers) for at in self.positions.tolist()]

    def full_cost(self, full: GivenAnswer) -> float:
        """Returns the tokens of the full answer."""
        return float(full.num_tokens)

    def _outcome(self, position: int, answers: Answers) -> Outcome:
        """Returns what halting at a position would have come to."""
        halted = answers.halted.get(position)
        if halted is None:
            full = answers.full
            return Outcome(full, full.num_tokens + answers.num_probe_tokens, FULL)
        cost = halted.num_tokens + answers.spent_until(position)
        return Outcome(halted, cost, str(position))
