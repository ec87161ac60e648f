"""The books of several heads: one serves, and the others are audited beside it.

Every audit is replayed by all heads, so each has books of its own: what its prices would have lost
and saved, what it would be served, and a certificate. The one that serves is the champion, an alias
in the same fold of entries as all else. How a challenger compares is told by pairs (`trial`).

A challenger that is known to be as good, and cheaper, takes over step by step: a canary serves 1 %,
5 % and 25 % of all requests, each until it has had its audits, and at last all. It goes on only
while the evidence stands, and stops by itself where it loses more, its breaker opens or what it
serves is harmed. No step hangs on a clock: where nothing is audited, nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.betting import Float
from haltwise.control.books import Books, Entry
from haltwise.control.canary import Arms, Canary
from haltwise.control.estimates import LOSSES
from haltwise.control.governor import is_open
from haltwise.control.group_names import Usual
from haltwise.control.groups import EVERYTHING, Expired, Gone, Told, UnderWay
from haltwise.control.trial import MARGIN, Pair, Side, Trial
from haltwise.errors import InputError

_NET, _DISAGREEMENT = LOSSES.index("net-em-loss"), LOSSES.index("disagreement")
_BY_HAND = "by hand"


@dataclass(frozen=True, eq=False)
class Shelved:
    """One head's books."""

    books: Books
    prices: tuple[float, ...]
    """(K,) that its steps stand for."""
    trial: Trial
    """How it compares with the champion."""
    stopped: str = ""
    """Why it has stopped serving as a canary, the last time; empty if it has not."""

    @classmethod
    def begin(
        cls, books: Books, prices: tuple[float, ...], champions: tuple[float, ...] = ()
    ) -> Shelved:
        """Returns the books of a head, as they are, and a trial that begins.

        Args:
            books: Its books.
            prices: (K,) that its steps stand for.
            champions: The prices that the champion's steps stand for; a head that joins a library
                is compared with the one that is champion there.
        """
        return cls(books, prices, Trial.begin(len(prices), len(champions)))

    @property
    def step(self) -> int:
        """The step that it would be served now."""
        return self.books.groups.step([])

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        told = {"books": self.books.to_json(), "prices": list(self.prices)}
        return told | {"trial": self.trial.to_json(), "stopped": self.stopped}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Shelved:
        """Rebuilds it from parsed JSON.

        Raises:
            InputError: If it is not readable.
        """
        trial = Trial.from_json(data["trial"])
        books = Books.from_json(data["books"])
        return cls(books, tuple(data["prices"]), trial, data["stopped"])


@dataclass(frozen=True, eq=False)
class Note:
    """What all books take in at once."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    """By head; those of heads that are not there are passed over."""
    joins: Mapping[str, Shelved] = field(default_factory=dict)
    """By head that begins as a challenger; one that is there is left as it is."""
    promotes: str = ""
    """The head that is to serve from now on; empty for none."""
    tries: Canary | None = None
    """The challenger that begins to serve a share; none while another one does."""
    rolls_back: bool = False
    """Whether the challenger that serves a share is to stop; if none does, whether the head before
    is to serve again."""
    arms: Arms | None = None
    """What became of requests since the note before, while a challenger serves a share."""
    learned: frozenset[str] = frozenset()
    """The heads that may have learned from the question of the audit, so that it is no pair of
    theirs."""
    usual: Usual | None = None
    """The usual prices from now on; None if they stay."""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "entries": {head: entry.to_json() for head, entry in self.entries.items()},
            "joins": {head: one.to_json() for head, one in self.joins.items()},
            "promotes": self.promotes,
            "tries": None if self.tries is None else asdict(self.tries),
            "rolls_back": self.rolls_back,
            "arms": None if self.arms is None else asdict(self.arms),
            "learned": sorted(self.learned),
            "usual": None if self.usual is None else asdict(self.usual),
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
            tries, arms, usual = data["tries"], data["arms"], data.get("usual")
            return cls(
                entries,
                joins,
                data["promotes"],
                None if tries is None else Canary.from_json(tries),
                data["rolls_back"],
                None if arms is None else Arms.from_json(arms),
                frozenset(data["learned"]),
                None if usual is None else Usual(**usual),
            )
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
    """The head that served before the newest promotion; empty if there was none, or it was taken
    back."""
    canary: Canary | None = None
    """The challenger that serves a share of all requests; None if none does."""
    usual: Usual | None = None
    """The usual prices of the process that has begun last; None where no process has told them."""

    @property
    def books(self) -> Books:
        """The champion's."""
        return self.shelf[self.champion].books

    def is_ready(self, head: str) -> bool:
        """Returns whether a challenger is known to lose little more, and to save more."""
        one = self.shelf[head]
        return one.trial.is_ready(one.step, self.shelf[self.champion].step)

    def known(self, head: str) -> str:
        """Returns what is known of a challenger: worse, ready or not known yet."""
        one = self.shelf[head]
        return one.trial.known(one.step, self.shelf[self.champion].step)

    def gone(self, process: str) -> Note:
        """Returns that a process has ended, for all heads."""
        return Note({head: Entry(Gone(process)) for head in self.shelf})

    def after(self, note: Note) -> Library:
        """Returns the library after a note."""
        champions = self.shelf[self.champion].prices
        joining = {
            name: Shelved.begin(one.books, one.prices, champions)
            for name, one in note.joins.items()
        }
        shelf = {**joining, **self.shelf}
        canary = self.canary
        if canary is not None and self._tells(self.champion, note):
            canary = replace(canary, audits=canary.audits + 1)
        for head, trial in self._trials(note).items():
            shelf[head] = replace(shelf[head], trial=trial)
        for head, entry in note.entries.items():
            if head in shelf:
                shelf[head] = replace(shelf[head], books=shelf[head].books.after(entry))
        if canary is not None and note.arms is not None:
            canary = replace(canary, arms=canary.arms + note.arms)
        usual = note.usual or self.usual
        return replace(self, shelf=shelf, canary=canary, usual=usual)._moved(note)

    def _moved(self, note: Note) -> Library:
        """Returns it after what a note wants of who serves, and what the canary has come to."""
        moved = self
        if note.promotes:
            moved = moved._promoted(note.promotes)
        if note.rolls_back:
            moved = moved._rolled_back()
        if note.tries is not None:
            moved = moved._tried(note.tries)
        return moved._stepped()

    def _promoted(self, head: str) -> Library:
        """Returns it with another champion, every trial begun anew, and without a canary."""
        if head not in self.shelf or head == self.champion:
            return self
        prices, shelf = self.shelf[head].prices, self.shelf.items()
        begun = {name: Shelved.begin(one.books, one.prices, prices) for name, one in shelf}
        return Library(head, begun, self.champion, usual=self.usual)

    def _rolled_back(self) -> Library:
        """Returns it without its canary, or with the head before as the champion."""
        if self.canary is not None:
            return self._stopped(_BY_HAND)
        if self.previous not in self.shelf:
            return self
        back = self._promoted(self.previous)._marked(self.champion, _BY_HAND)
        return replace(back, previous="")  # what was taken back is not to come back by that

    def _tried(self, canary: Canary) -> Library:
        """Returns it with a canary, if it knows the head and has none."""
        is_known = canary.head in self.shelf and canary.head != self.champion
        if self.canary is not None or not is_known:
            return self
        return replace(self._marked(canary.head, ""), canary=canary)

    def _stopped(self, why: str) -> Library:
        """Returns it without its canary, if it has one."""
        if self.canary is None:
            return self
        return replace(self._marked(self.canary.head, why), canary=None)

    def _marked(self, head: str, why: str) -> Library:
        return replace(self, shelf={**self.shelf, head: replace(self.shelf[head], stopped=why)})

    def _stepped(self) -> Library:
        """Returns it after its canary has stopped, gone on to a larger share, or neither."""
        canary = self.canary
        if canary is None:
            return self
        one = self.shelf[canary.head]
        if why := self._harm_of(canary, one):
            return self._stopped(why)
        if not (canary.is_due and self.is_ready(canary.head)):
            return self
        larger = canary.next()
        return self._promoted(canary.head) if larger is None else replace(self, canary=larger)

    @staticmethod
    def _harm_of(canary: Canary, one: Shelved) -> str:
        """Returns why a canary has to stop; empty if it has not."""
        if one.trial.is_worse:
            return "it loses more"
        if is_open(one.books.groups.groups[EVERYTHING]):
            return "its breaker has opened"
        return canary.harm

    def _trials(self, note: Note) -> dict[str, Trial]:
        """Returns, by challenger that a note tells of, its trial after it."""
        champion = self._side(self.champion, note)
        trials = {}
        for head in self.shelf.keys() - {self.champion}:
            trial, side = self._labelled(head, note), self._side(head, note)
            if champion is not None and side is not None:
                trial = trial.after(_request_of(note.entries[head]), Pair(side, champion))
            trials[head] = trial
        return trials

    def _labelled(self, head: str, note: Note) -> Trial:
        """Returns a challenger's trial after the labels that a note has of audits told before."""
        trial = self.shelf[head].trial
        for request in {_request_of(entry) for entry in note.entries.values()} & {*trial.unknown}:
            found = [_net_losses(note.entries.get(name)) for name in (head, self.champion)]
            if any(one is not None for one in found):
                trial = trial.labelled(request, *found)
            else:
                trial = trial.expired(request)
        return trial

    def _tells(self, head: str, note: Note) -> UnderWay | None:
        """Returns the audit of which a note tells a head's answers; None if there is none."""
        entry, known = note.entries.get(head), self.shelf.get(head)
        if entry is None or known is None or entry.audit is None:
            return None
        audit = known.books.groups.under_way.get(_request_of(entry))
        return None if audit is None or audit.told else audit

    def _side(self, head: str, note: Note) -> Side | None:
        """Returns what a head would have lost and saved on an audit; None if that is not told.

        Nor is it where the head may have learned from the question.
        """
        audit = self._tells(head, note)
        if audit is None or head in note.learned:
            return None
        entry = note.entries[head]
        told = entry.audit
        assert told is not None
        saved = 1 - told.cost / told.full_cost if told.full_cost else np.zeros(len(told.cost))
        if entry.awaited is None:
            losses = told.losses[_DISAGREEMENT].tolist()
            answers = ("",) * (len(losses) + 1)
        else:
            net = zip(told.losses[_NET].tolist(), told.due.tolist(), strict=True)
            losses = [None if due else loss for loss, due in net]
            answers = entry.awaited.answers
        return Side(tuple(losses), answers, tuple(saved.tolist()), audit.step)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        shelf = {head: one.to_json() for head, one in self.shelf.items()}
        canary = None if self.canary is None else asdict(self.canary)
        usual = None if self.usual is None else asdict(self.usual)
        told = {"champion": self.champion, "previous": self.previous, "canary": canary}
        return told | {"shelf": shelf, "usual": usual}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Library:
        """Rebuilds a library from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            shelf = {head: Shelved.from_json(one) for head, one in data["shelf"].items()}
            canary = None if data["canary"] is None else Canary.from_json(data["canary"])
            usual = None if data.get("usual") is None else Usual(**data["usual"])
            return cls(data["champion"], shelf, data["previous"], canary, usual)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"books are not readable ({error!r})") from None


def _request_of(entry: Entry) -> str:
    """Returns the audit that an entry tells of; empty if it tells of none."""
    return entry.event.request if isinstance(entry.event, Told | Expired) else ""


def _net_losses(entry: Entry | None) -> Float | None:
    """Returns what each price (K,) has lost by labels; None if an entry has none."""
    if entry is None or entry.audit is None or entry.audit.full_right is None:
        return None
    losses: Float = entry.audit.losses[_NET]
    return losses


def challenger_named(library: Library, name: str) -> str:
    """Returns the digest of a challenger.

    Args:
        library: The books.
        name: As much of the digest as tells it from others.

    Raises:
        InputError: If there is no such challenger.
    """
    found = [one for one in library.shelf if name and one.startswith(name)]
    if len(found) != 1 or found[0] == library.champion:
        others = ", ".join(one[:12] for one in library.shelf if one != library.champion)
        expected = f"expected one of {others}" if others else "there are no others"
        raise InputError(f"head is {name!r:.80}, {expected}")
    return found[0]


def promotion(library: Library, name: str, anyway: bool) -> Note:
    """Returns what lets a challenger serve: step by step, or all requests at once.

    Args:
        library: The books.
        name: As much of its digest as tells it from others.
        anyway: Whether it is to serve all at once, whatever is known of it.

    Raises:
        InputError: If there is no such challenger, nobody knows yet that it is as good, or another
            one serves a share.
    """
    head = challenger_named(library, name)
    if anyway:
        return Note(promotes=head)
    if not library.is_ready(head):
        num = library.shelf[head].trial.num
        raise InputError(
            f"head {head[:12]} is {library.known(head)} after {num} audits beside this champion, "
            f"expected one that is known to lose less than {MARGIN:g} more and to save more, or "
            '"anyway"'
        )
    return _begun(library, Canary.begin(head))


def experiment(library: Library, name: str, share: float) -> Note:
    """Returns what lets a challenger serve a share of all requests until it is stopped.

    Args:
        library: The books.
        name: As much of its digest as tells it from others.
        share: Of the sessions, users and requests.

    Raises:
        InputError: If there is no such challenger, it is known to be worse, another one serves a
            share, or that is none.
    """
    head = challenger_named(library, name)
    if library.shelf[head].trial.is_worse:
        raise InputError(f"head {head[:12]} is known to lose more, expected another one")
    return _begun(library, Canary.begin(head, share))


def _begun(library: Library, canary: Canary) -> Note:
    """Raises InputError if a challenger serves a share already."""
    if library.canary is not None:
        told = f"head {library.canary.head[:12]} serves {library.canary.share:g} of all requests"
        raise InputError(f"{told}, expected a rollback first")
    return Note(tries=canary)


def rollback(library: Library) -> tuple[str, str]:
    """Returns which head a rollback takes back, and which serves all after it.

    Raises:
        InputError: If there is nothing to take back.
    """
    if library.canary is not None:
        return library.canary.head, library.champion
    if not library.previous:
        raise InputError("no challenger serves, and no promotion is left that could be taken back")
    return library.champion, library.previous
