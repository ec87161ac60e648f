"""Which head serves a request: the champion, or a challenger that serves a share of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.canary import Arms, Canary, Harm
from haltwise.errors import InputError
from haltwise.policy.head import HaltHead
from haltwise.session.request import ThoughtReport

#: How a request ends that has failed.
FAILED = "cut off"


class Roster:
    """Says which head serves a request, and counts what became of those that either head serves.

    Args:
        heads: By digest, those that are loaded here.
        keeper: Has the books.
        key: Of the installation, by which is drawn who is served by a challenger.
    """

    def __init__(self, heads: Mapping[str, HaltHead], keeper: Bookkeeper, key: bytes) -> None:
        """Has counted nothing yet."""
        self._heads, self._keeper, self._key = heads, keeper, key
        self._counting = threading.Lock()
        self._arms: Arms | None = None

    @property
    def champion(self) -> str:
        """The digest of the champion."""
        return self._keeper.library.champion

    @property
    def serving(self) -> str:
        """The digest of the head that serves here: the champion's, unless that is not loaded."""
        return self.champion if self.champion in self._heads else next(iter(self._heads))

    @property
    def _canary(self) -> Canary | None:
        """The challenger that serves a share here: one that is not loaded serves none."""
        canary = self._keeper.library.canary
        return canary if canary is not None and canary.head in self._heads else None

    def head_for(self, about: Mapping[str, Any], unit: str) -> dict[str, Any]:
        """Returns what is to be known of a request that begins: its head, and how that was drawn.

        Args:
            about: What is known of it already.
            unit: Who asks; the same is always served by the same head. The request itself, where
                nobody knows.
        """
        canary = self._canary
        if canary is None:
            return {"head": self.serving}
        if canary.takes(self._key, unit or str(about.get("id"))):
            return {"head": canary.head, "head_probability": canary.share}
        return {"head": self.serving, "head_probability": 1 - canary.share}

    def head_of(self, about: Mapping[str, Any]) -> str:
        """Returns the head that watches a request: the champion, unless it began with another.

        Raises:
            InputError: If that is not loaded here.
        """
        head = str(about.get("head") or self.champion)
        if head not in self._heads:
            raise InputError(f"head {head[:12]} serves, expected it as --head or --challenger")
        return head if head in self._keeper.library.shelf else self.champion

    def ended(self, report: ThoughtReport) -> None:
        """Counts a request that has ended, if its head was drawn."""
        about, failed = report.request.about, report.spent.outcome == FAILED
        self._count(about.get("head"), about.get("head_probability"), failed=float(failed), num=1)

    def complained(self, head: str | None, probability: float | None, weight: float) -> None:
        """Counts a complaint about a request, if its head was drawn.

        Args:
            head: Which head has served it.
            probability: With which that was drawn.
            weight: How much is complained, in [0, 1].
        """
        self._count(head, probability, complained=weight)

    def _count(
        self,
        head: Any,
        probability: Any,
        failed: float = 0.0,
        complained: float = 0.0,
        num: int = 0,
    ) -> None:
        canary = self._canary
        if canary is None or probability is None or head not in (canary.head, self.champion):
            return
        is_canary = head == canary.head
        share = probability if is_canary else 1 - probability
        harms = (Harm.of(harm, is_canary, share) for harm in (failed, complained))
        one = Arms(canary.head, num * (not is_canary), num * is_canary, *harms)
        with self._counting:
            known = self._arms is not None and self._arms.head == canary.head
            self._arms = self._arms + one if known and self._arms else one

    def taken(self) -> Arms | None:
        """Returns what was counted since the last call; None if nothing was."""
        with self._counting:
            arms, self._arms = self._arms, None
        return arms
