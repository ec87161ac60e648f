"""A task made of rows: their splits, and which of them are asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush

from haltwise import InputError
from lms.questions import SPLITS, Question, digest_of, split_of
from lms.scorers import scorer_of
from lms.sources.forms import Form, Item, cell
from lms.sources.rows import SPLIT_NAMES, Row, Rows
from lms.sources.task import asked, check_draw


@dataclass
class _Survey:
    """What all rows together are like."""

    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows by the split they stand in, and the one that the hash of their question gives."""
    digests: dict[str, set[str]] = field(default_factory=lambda: {"dev": set(), "test": set()})
    """Shortened digests of the questions that stand in these splits."""
    num_skipped: int = 0
    """Rows that have no answer."""

    def split(self, own: str, digest: str) -> str | None:
        """The split of a question; None if a later split has it too.

        Data with two splits or more keep them; what they lack of dev and test is taken from train
        by the hash. One split alone divides nothing.
        """
        owns = {split for split, _ in self.rows}
        if len(owns) > 1:
            for later in SPLITS[SPLITS.index(own) + 1 :]:
                if digest[:16] in self.digests[later]:
                    return None
        return _split(own, split_of(digest), owns)

    def num_rows(self) -> dict[str, int]:
        """Rows of every split, repeated questions counted again."""
        owns = {split for split, _ in self.rows}
        found: Counter[str] = Counter()
        for (own, hashed), num in self.rows.items():
            found[_split(own, hashed, owns)] += num
        return {split: found[split] for split in SPLITS}


def _split(own: str, hashed: str, owns: set[str]) -> str:
    if len(owns) < 2:
        return hashed
    return hashed if own == "train" and hashed not in owns else own


@dataclass(frozen=True)
class Table:
    """A task made of rows; they are read anew for every draw, and only what is taken is kept."""

    name: str
    scorer: str
    instruction: str
    rows: Rows
    form: Form
    split_column: str | None = None

    @property
    def cue(self) -> str:
        """See `Task`."""
        return scorer_of(self.scorer).cue

    @property
    def answer_end(self) -> str:
        """See `Task`."""
        return scorer_of(self.scorer).answer_end

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """See `Task`: the first `num` in an order that the seed and their texts decide."""
        check_draw(split, num)
        taken: dict[int, Question] = {}
        last: list[int] = []  # negated, so that the heap's first is the last in order
        for own, digest, item in self._each():
            if item is None or self._survey.split(own, digest) != split:
                continue
            place = int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()[:32], 16)
            if place in taken or (len(last) == num and place > -last[0]):
                continue
            if len(last) == num:
                del taken[-heappop(last)]
            heappush(last, -place)
            taken[place] = self._question(item, digest, split)
        if not taken:
            found = ", ".join(f"{name} {n:,}" for name, n in self._survey.num_rows().items())
            raise InputError(
                f"{self.name}: no question of split {split}, found rows: {found}: expected more "
                "rows, --split-column, or --split with those there are"
            )
        yield from (taken[place] for place in sorted(taken))

    def describe(self) -> str:
        """See `Task`."""
        survey = self._survey
        rows = ", ".join(f"{split} {num:,}" for split, num in survey.num_rows().items())
        skipped = f", {survey.num_skipped:,} skipped without an answer" * bool(survey.num_skipped)
        asked_by = f"scorer {self.scorer}; instruction {self.instruction!r}"
        return f"{self.name}: {rows} rows{skipped}; {asked_by}"

    @cached_property
    def _survey(self) -> _Survey:
        survey = _Survey()
        for own, digest, item in self._each():
            if item is None:
                survey.num_skipped += 1
                continue
            survey.rows[own, split_of(digest)] += 1
            if own in survey.digests:
                survey.digests[own].add(digest[:16])
        return survey

    def _each(self) -> Iterator[tuple[str, str, Item | None]]:
        """Every row: the split it stands in, the digest of its question, and what it asks.

        Raises:
            InputError: If a row cannot be asked; the message says which.
        """
        compare = scorer_of(self.scorer)
        for own, place, row in self.rows():
            try:
                own = self._own_split(own, row)
                item = self.form(row)
                if item:
                    compare("", item.gold)  # refuses a gold answer that is none
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            # The same words have the same digest, whatever the instruction or the blanks.
            yield own, digest_of(" ".join(item.text.split())) if item else "", item

    def _own_split(self, own: str, row: Row) -> str:
        if not self.split_column:
            return own
        found = cell(row, self.split_column)
        name = SPLIT_NAMES.get(str(found).strip().lower())
        if name is None:
            raise InputError(f"{self.split_column} is {found!r}, expected train, dev or test")
        return name

    def _question(self, item: Item, digest: str, split: str) -> Question:
        return Question(
            question_id=f"{self.name}-{digest[:16]}",
            task=self.name,
            segment=item.segment,
            text=asked(item.text, self.instruction),
            gold=item.gold,
            split=split,
            scorer=self.scorer,
        )
