"""Which head serves a request: the champion, or a challenger that serves a share of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.canary import Arms, Canary, Harm
from haltwise.control.library import Note, experiment, promotion, rollback
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
        self.num_refused = 0
        """What a person wanted that makes no sense."""
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
            before = self._arms or Arms(canary.head)
            self._arms = before + one if before.head == canary.head else one

    def taken(self) -> Arms | None:
        """Returns what was counted since the last call; None if nothing was."""
        with self._counting:
            arms, self._arms = self._arms, None
        return arms

    # What a person wants

    def promote(self, /, head: Any = None, anyway: Any = False, **others: Any) -> None:
        """Lets a challenger serve step by step, from the next request on.

        Args:
            head: Its digest, or as much of it as tells it from others.
            anyway: Whether it serves all at once, whatever is known of it.
            others: There are none.

        Raises:
            InputError: If there is no such challenger, it is not loaded here, nobody knows yet
                that it is as good, or another one serves a share.
        """
        try:
            if others or not isinstance(head, str) or not isinstance(anyway, bool):
                raise InputError('expected {"head": "DIGEST"}, and perhaps "anyway": true')
            self._try_head(promotion(self._keeper.library, head, anyway))
        except InputError:
            self.num_refused += 1
            raise

    def begin_experiment(self, /, head: Any = None, share: Any = None, **others: Any) -> None:
        """Lets a challenger serve a share of all requests, from the next one until a rollback.

        Args:
            head: Its digest, or as much of it as tells it from others.
            share: Of sessions, users and requests, between 0 and 1.
            others: There are none.

        Raises:
            InputError: If there is no such challenger, it is not loaded here or known to be worse,
                another one serves a share, or that is none.
        """
        try:
            is_number = isinstance(share, int | float) and not isinstance(share, bool)
            if others or not isinstance(head, str) or not is_number:
                raise InputError('expected {"head": "DIGEST", "share": 0 to 1}')
            self._try_head(experiment(self._keeper.library, head, float(share)))
        except InputError:
            self.num_refused += 1
            raise

    def _try_head(self, note: Note) -> None:
        """Takes in that a head is to serve.

        Raises:
            InputError: If it is not loaded here.
        """
        head = note.promotes or (note.tries.head if note.tries else "")
        if head not in self._heads:
            raise InputError(f"head {head[:12]} is not loaded, expected one of --challenger")
        self._keeper.put(note)

    def roll_back(self, /, **others: Any) -> None:
        """Takes back the newest step of who serves, from the next request on.

        Args:
            others: There are none.

        Raises:
            InputError: If there is nothing to take back.
        """
        try:
            if others:
                raise InputError("expected {}")
            rollback(self._keeper.library)
        except InputError:
            self.num_refused += 1
            raise
        self._keeper.put(Note(rolls_back=True))

    def propose(self) -> None:
        """Lets a challenger begin to serve that is known to be better.

        One that has stopped before waits for a person.
        """
        library = self._keeper.library
        loaded = [pair for pair in library.shelf.items() if pair[0] in self._heads]
        for name, one in loaded if library.canary is None else ():
            is_new = name != library.champion and not one.stopped
            if is_new and library.is_ready(name):
                self._keeper.put(Note(tries=Canary.begin(name)))
                return
