"""The books of several heads: one serves, and the others are audited beside it.

Every audit is replayed by all heads, so each has books of its own: what its prices would have lost
and saved, what it would be served, and a certificate. The one that serves is the champion, an alias
in the same fold of entries as all else: to promote another one is an entry, and so is to take that
back. How a challenger compares with the champion is told by pairs: what each would have lost and
cost on the same audit, at the price that each would have been served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.betting import STAKES, Float, growth, log_mean_exp
from haltwise.control.books import Books, Entry
from haltwise.control.estimates import LOSSES
from haltwise.control.groups import Gone, Told
from haltwise.errors import InputError

#: How much more a challenger may lose than the champion, and the evidence that is wanted.
MARGIN = 0.01
ENOUGH = 20.0
_DISAGREEMENT = LOSSES.index("disagreement")


@dataclass(frozen=True, eq=False)
class Trial:
    """Pairs of a challenger and the champion, from the challenger's first audit on.

    Each capital is (S,), in logs, of who bets against a claim about the mean of the pairs; it
    reaches `ENOUGH` with a probability of at most 1 / `ENOUGH` if the claim holds, whenever one
    looks.
    """

    num: int = 0
    """Pairs."""
    worse: Float = field(default_factory=lambda: np.zeros(len(STAKES)))
    """Against "the challenger loses `MARGIN` more, or more than that"."""
    dearer: Float = field(default_factory=lambda: np.zeros(len(STAKES)))
    """Against "the challenger saves no more"."""
    as_good: Float = field(default_factory=lambda: np.zeros(len(STAKES)))
    """Against "the challenger loses at most `MARGIN` more"."""
    lost: float = 0.0
    """Sum of what the challenger has lost more."""
    saved: float = 0.0
    """Sum of the shares of the full tokens that it has saved more."""

    def after(self, lost: float, saved: float) -> Trial:
        """Returns the trial after a pair.

        Args:
            lost: What the challenger lost more, in [-1, 1].
            saved: The share of the full answer's tokens that it saved more; cut to [-1, 1].
        """
        saved = float(np.clip(saved, -1, 1))
        return Trial(
            self.num + 1,
            self.worse + growth(lost, MARGIN),
            self.dearer + growth(-saved, 0.0),
            self.as_good + np.log1p(STAKES / (1 + MARGIN) * (lost - MARGIN)),
            self.lost + lost,
            self.saved + saved,
        )

    @property
    def is_ready(self) -> bool:
        """Whether it is known that the challenger loses less than `MARGIN` more, and saves more."""
        return self._enough(self.worse) and self._enough(self.dearer)

    @property
    def is_worse(self) -> bool:
        """Whether it is known that it loses more than that."""
        return self._enough(self.as_good)

    def _enough(self, log_capital: Float) -> bool:
        return bool(log_mean_exp(log_capital) >= np.log(ENOUGH))

    def status(self) -> dict[str, Any]:
        """Returns, as a JSON object, what the pairs tell."""
        num = max(self.num, 1)
        known = "worse" if self.is_worse else "ready" if self.is_ready else "not known yet"
        evidence = {
            name: round(float(np.exp(min(float(log_mean_exp(logs)), 50.0))), 3)
            for name, logs in (
                ("worse", self.worse),
                ("dearer", self.dearer),
                ("as_good", self.as_good),
            )
        }
        means = {"loses_more": self.lost / num, "saves_more": self.saved / num}
        return {"pairs": self.num, "known": known, "evidence": evidence, **means}

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Rebuilds a trial from parsed JSON."""
        values: dict[str, Any] = {
            name: np.array(value) if isinstance(value, list) else value
            for name, value in data.items()
        }
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Shelved:
    """One head's books."""

    books: Books
    prices: tuple[float, ...]
    """(K,) that its steps stand for."""
    trial: Trial = field(default_factory=Trial)
    """How it compares with the champion."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        told = {"books": self.books.to_json(), "prices": list(self.prices)}
        return told | {"trial": self.trial.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shelved:
        """Rebuilds it from parsed JSON.

        Raises:
            InputError: If it is not readable.
        """
        trial = Trial.from_json(data["trial"])
        return cls(Books.from_json(data["books"]), tuple(data["prices"]), trial)


@dataclass(frozen=True, eq=False)
class Note:
    """What all books take in at once."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    """By head; those of heads that are not there are passed over."""
    joins: Mapping[str, Shelved] = field(default_factory=dict)
    """By head that begins as a challenger; one that is there is left as it is."""
    promotes: str = ""
    """The head that is to serve from now on; empty for none."""
    learned: frozenset[str] = frozenset()
    """The heads that may have learned from the question of the audit, so that it is no pair of
    theirs."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "entries": {head: entry.to_json() for head, entry in self.entries.items()},
            "joins": {head: one.to_json() for head, one in self.joins.items()},
            "promotes": self.promotes,
            "learned": sorted(self.learned),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Note:
        """Rebuilds a note from parsed JSON.

        Raises:
            InputError: If it is none.
        """
        try:
            entries = {head: Entry.from_json(one) for head, one in data["entries"].items()}
            joins = {head: Shelved.from_json(one) for head, one in data["joins"].items()}
            learned = frozenset(data.get("learned", ()))  # notes are older than this
            return cls(entries, joins, data["promotes"], learned)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"note of the books is not readable ({error!r})") from None


@dataclass(frozen=True, eq=False)
class Library:
    """The books of all heads."""

    champion: str
    """The digest of the head that serves."""
    shelf: Mapping[str, Shelved]
    """By head."""
    previous: str = ""
    """The head that served before; empty if there was none."""

    @classmethod
    def begin(cls, head: str, books: Books, prices: tuple[float, ...]) -> Library:
        """Returns the library of who begins with one head."""
        return cls(head, {head: Shelved(books, prices)})

    @property
    def books(self) -> Books:
        """The champion's."""
        return self.shelf[self.champion].books

    def gone(self, process: str) -> Note:
        """Returns that a process has ended, for all heads."""
        return Note({head: Entry(Gone(process)) for head in self.shelf})

    def after(self, note: Note) -> Library:
        """Returns the library after a note."""
        shelf = {**note.joins, **self.shelf}
        for head, trial in self._trials(note).items():
            shelf[head] = replace(shelf[head], trial=trial)
        for head, entry in note.entries.items():
            if head in shelf:
                shelf[head] = replace(shelf[head], books=shelf[head].books.after(entry))
        moved = replace(self, shelf=shelf)
        return moved._promoted(note.promotes) if note.promotes else moved

    def _promoted(self, head: str) -> Library:
        """Returns it with another champion, and every trial begun anew; unknown ones are none."""
        if head not in self.shelf or head == self.champion:
            return self
        shelf = {name: replace(one, trial=Trial()) for name, one in self.shelf.items()}
        return Library(head, shelf, self.champion)

    def _trials(self, note: Note) -> dict[str, Trial]:
        """Returns, by challenger that an audit tells of, its trial after the pair."""
        champion = self._outcome(self.champion, note)
        if champion is None:
            return {}
        trials = {}
        for head in note.entries.keys() - {self.champion}:
            outcome = self._outcome(head, note)
            if outcome is not None:
                lost, saved = (new - old for new, old in zip(outcome, champion, strict=True))
                trials[head] = self.shelf[head].trial.after(lost, saved)
        return trials

    def _outcome(self, head: str, note: Note) -> tuple[float, float] | None:
        """Returns what a head would have lost and saved on an audit; None if that is not told."""
        entry = note.entries.get(head)
        if entry is None or entry.audit is None or not isinstance(entry.event, Told):
            return None
        known = self.shelf.get(head)
        audit = None if known is None else known.books.groups.under_way.get(entry.event.request)
        if audit is None or audit.told or head in note.learned:
            return None
        told, at = entry.audit, audit.step - 1
        if at < 0 or not told.full_cost:
            return 0.0, 0.0
        lost = float(told.losses[_DISAGREEMENT, at])
        return lost, 1 - float(told.cost[at]) / told.full_cost

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        shelf = {head: one.to_json() for head, one in self.shelf.items()}
        return {"champion": self.champion, "previous": self.previous, "shelf": shelf}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Library:
        """Rebuilds a library from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            shelf = {head: Shelved.from_json(one) for head, one in data["shelf"].items()}
            return cls(data["champion"], shelf, data["previous"])
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"books are not readable ({error!r})") from None


def promotable(library: Library, head: str, anyway: bool) -> str:
    """Returns the digest of a challenger that is to serve.

    Args:
        library: The books.
        head: As much of its digest as tells it from others; "previous" is the head before.
        anyway: Whether no evidence is needed. None is for the head before.

    Raises:
        InputError: If there is no such challenger, or nobody knows yet that it is as good.
    """
    name = library.previous if head == "previous" else head
    found = [one for one in library.shelf if name and one.startswith(name)]
    if len(found) != 1 or found[0] == library.champion:
        others = ", ".join(one[:12] for one in library.shelf if one != library.champion)
        expected = f"expected one of {others}" if others else "there are no others"
        raise InputError(f"head is {head!r:.80}, {expected}")
    trial = library.shelf[found[0]].trial
    if not (trial.is_ready or anyway or found[0] == library.previous):
        told = trial.status()
        raise InputError(
            f"head {found[0][:12]} is {told['known']} after {told['pairs']} audits, expected one "
            f'that is known to lose less than {MARGIN:g} more and to save more, or "anyway"'
        )
    return found[0]
