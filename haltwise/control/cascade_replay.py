"""Where each price would have taken a question that a small and a large LM share.

What is lost and saved is measured against the large LM alone: its answer, and its tokens times the
price ratio. Where a price escalates, the outcome is the large LM's answer, and nothing is lost.
"""

from __future__ import annotations

import numpy as np

from haltwise.control.answers import GivenAnswer
from haltwise.control.betting import Float
from haltwise.control.replay import FULL, Answers, Outcome, Replay
from haltwise.policy.cascade import Act
from haltwise.policy.cascade_head import CascadeHead
from haltwise.policy.head import HaltHead
from haltwise.policy.question import Question
from haltwise.policy.signals import Bools, Index, Signals
from haltwise.session.request import ThoughtReport, ThoughtRequest
from haltwise.session.thought import NEVER


def question_of(request: ThoughtRequest) -> Question:
    """Returns what a cascade knows of a question before the first token."""
    text, task = (str(request.about.get(name) or "") for name in ("question", "task"))
    return Question(text, task, request.terms.segment or "")


def replay_of(head: HaltHead, prices: Float, request: ThoughtRequest) -> Replay:
    """Returns what shows the thought of a request to a head, or to a cascade, at K prices.

    Args:
        head: The policy.
        prices: (K,) in exact match per 1,000 tokens.
        request: What is asked.
    """
    if isinstance(head, CascadeHead):
        return CascadeReplay(head, prices, request)
    return Replay(head, prices, request.terms.min_tokens)


class CascadeReplay(Replay):
    """Shows one thought of the small LM to a cascade at K prices at once.

    `positions` are where each price takes the small LM's answer: `NEVER` where it escalates.

    Args:
        head: That of the cascade.
        prices: (K,) in exact match per 1,000 tokens of the small LM.
        request: What is asked.
    """

    def __init__(self, head: CascadeHead, prices: Float, request: ThoughtRequest) -> None:
        """Stands before the first token, where it may escalate already."""
        self._asked = head.asked(question_of(request), len(prices))
        super().__init__(self._asked, prices, request.terms.min_tokens)
        self._ratio, self._prices, self._cap = head.price_ratio, prices, request.terms.max_tokens
        #: (K,) tokens of the small LM's thought where each price escalates; `NEVER` where it has
        #: not, 0 where that LM is not asked at all.
        self.escalated: Index = np.full(len(prices), NEVER)
        self.escalated[self._asked.escalates_at_start(prices)] = 0

    def add(self, signals: Signals, place: int) -> None:
        """Takes in the next decision point; at the cap, the thought's end decides.

        Args:
            signals: Those of some rows.
            place: Of this thought among them.
        """
        closes = self._monitor.observe(signals.rows(np.full(len(self._rows), place)), self._rows)
        position = int(signals.position[place])
        is_capped = self._cap is not None and position >= self._cap
        if position >= self._min_tokens and not is_capped:
            self._leave(closes, self._asked.acts == Act.ESCALATE, position)

    def end(self, report: ThoughtReport, is_cut: bool | None) -> None:
        """Takes in how the thought has ended.

        Args:
            report: What happened to it.
            is_cut: Whether its token budget has ended it; None where nobody would ask the cascade,
                and the small LM's answer holds.
        """
        all_prices = np.ones(len(self._prices), dtype=np.bool_)
        if report.reason == "capped":
            escalates = self._asked.escalates_here(self._prices, is_capped=True)
        elif is_cut is None:
            escalates = ~all_prices
        else:
            escalates = self._asked.escalates_at_end(self._prices, is_cut)
        self._leave(all_prices, escalates, report.position)

    def outcomes(self, answers: Answers) -> list[Outcome]:
        """Returns what each price (K,) would have come to, in tokens of the small LM.

        Where the LM would have been left to think on, that is its answer at its end.
        """
        courses = zip(self.positions.tolist(), self.escalated.tolist(), strict=True)
        return [self._outcome_of(at, left, answers) for at, left in courses]

    def full_cost(self, full: GivenAnswer) -> float:
        """Returns the large LM's tokens, in tokens of the small one."""
        return self._ratio * full.num_tokens

    def _leave(self, leaves: Bools, escalates: Bools, position: int) -> None:
        """Notes where prices leave the small LM that have not yet."""
        leaves = leaves & (self.positions == NEVER) & (self.escalated == NEVER)
        self.escalated[leaves & escalates] = position
        self.positions[leaves & ~escalates] = position

    def _outcome_of(self, position: int, escalated: int, answers: Answers) -> Outcome:
        """Returns what one price would have come to, by where it leaves the small LM."""
        if escalated != NEVER:
            look = answers.looks.get(escalated)
            small = escalated if look is None else look.reached
            small += answers.spent_until(escalated) if escalated else 0
            return Outcome(answers.full, small + self.full_cost(answers.full), FULL)
        end = answers.thought.position if answers.thought else 0
        return self._outcome(position if answers.halted.get(position) else end, answers)
