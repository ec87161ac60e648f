"""A cascade as a head: where a head is asked whether to close a thought, it says why, too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from haltwise.policy.cascade import Act, Acts, Cascade
from haltwise.policy.head import HaltHead
from haltwise.policy.question import Question
from haltwise.policy.signals import Bools, Float

_PREFIX = "cascade-"


def is_cascade(digest: str) -> bool:
    """Tells whether a digest is that of a cascade between its two LMs, not of a head alone."""
    return digest.startswith(_PREFIX)


class CascadeHead(HaltHead):
    """The head of a cascade between two LMs, with the cascade's own price.

    A certificate is about the head alone: it is left out.

    Args:
        cascade: Decides.
        large_model: How the large LM's server calls it; empty for the name that clients use.
    """

    def __init__(self, cascade: Cascade, large_model: str = "") -> None:
        """Takes the head's conditions and weights."""
        config, price = cascade.head.config, cascade.config.default_price
        own = replace(config, certificate=None, default_price=price, segment_prices={})
        super().__init__(own, cascade.head.weights)
        self.cascade = cascade
        self._lms = [cascade.config.small_lm, cascade.config.large_lm, large_model]

    @property
    def price_ratio(self) -> float:
        """What a token of the large LM costs, in tokens of the small one."""
        return self.cascade.config.price_ratio

    @property
    def digest(self) -> str:
        """What tells apart everything that its decisions depend on, and which LMs they are about.

        It has the form of no head's digest.
        """
        told = json.dumps([self.cascade.digest, *self._lms])
        return _PREFIX + hashlib.sha256(told.encode()).hexdigest()

    def asked(self, question: Question, num_rows: int = 1) -> EscalatingHead:
        """Returns the head that decides about one question, at so many prices at once."""
        return EscalatingHead(self.cascade, question, num_rows)


class EscalatingHead(HaltHead):
    """A cascade's head, for one question: it closes the thought to answer, or to escalate.

    Args:
        cascade: Decides.
        question: What is asked.
        num_rows: B, rows that see the same question, such as prices.
    """

    def __init__(self, cascade: Cascade, question: Question, num_rows: int = 1) -> None:
        """Has seen nothing of the thought."""
        super().__init__(cascade.head.config, cascade.head.weights)
        self._cascade = cascade
        self._asked = cascade.reader.read([question]).repeat(num_rows, axis=0)
        shape = (num_rows, len(self.config.features))
        self._features: Float = np.full(shape, np.nan, dtype=np.float32)
        self.acts: Acts = np.full(num_rows, Act.CONTINUE)
        """(B,) what it said at the newest decision point."""

    def halts(self, features: Float, price: ArrayLike | None = None) -> Bools:
        """Tells whether to close the thought (B,), see `Cascade.at_point`; at a price of 0, never.

        Args:
            features: (B, F) at a decision point.
            price: (B,) or one for all, in exact match per 1,000 tokens of the small LM.
        """
        acts = self._cascade.at_point(features, self._asked, price)
        if price is not None:
            acts = np.where(np.asarray(price) > 0, acts, Act.CONTINUE)
        self._features, self.acts = features, acts
        closes: Bools = acts != Act.CONTINUE
        return closes

    def escalates_at_start(self, price: ArrayLike) -> Bools:
        """Whether the small LM is not asked at all (B,)."""
        escalates: Bools = self._cascade.at_start(self._asked, price) == Act.ESCALATE
        return escalates

    def escalates_here(self, price: ArrayLike, is_capped: bool) -> Bools:
        """Whether a thought that was just closed at a decision point or a cap is escalated (B,).

        Args:
            price: (B,) or one for all.
            is_capped: Whether its cap has closed it.
        """
        acts = self.acts
        if is_capped:
            acts = self._cascade.at_halt(self._features, self._asked, price)
        escalates: Bools = acts == Act.ESCALATE
        return escalates

    def escalates_at_end(self, price: ArrayLike, is_cut: bool) -> Bools:
        """Whether a thought that has ended is escalated (B,).

        Args:
            price: (B,) or one for all.
            is_cut: Whether its token budget has ended it.
        """
        acts = self._cascade.at_end(self._features, self._asked, price, is_cut)
        escalates: Bools = acts == Act.ESCALATE
        return escalates
