"""A task made of rows of data: their splits, and which of them are asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush

from haltwise import InputError
from lms.questions import SPLITS, Question, question_digest, split_of
from lms.scorers import scorer_of
from lms.sources.data_rows import SPLIT_NAMES, DataRow, DataRows, columns_of
from lms.sources.forms import Form, NoColumnError, RowQuestion, cell
from lms.sources.task import NoQuestionError, check_draw, with_instruction

# The column that most data sets name their splits in.
_USUAL_COLUMN = "split"
# Libraries write these for an answer that is not there. They can be answers, too.
_LIKE_NOTHING = ("nan", "NaN", "None", "null", "NULL", "<NA>")


@dataclass
class _RowSurvey:
    """What one pass over all rows has found."""

    has_column: bool = False
    """Whether a column states the splits."""
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The number of rows by the split that they stand in and the split that the hash of their
    question gives."""
    golds: dict[str, dict[str, str]] = field(default_factory=lambda: {"dev": {}, "test": {}})
    """The gold answers in dev and test, by the shortened digests of their questions."""
    num_skipped: int = 0
    """The number of rows that have no answer."""
    num_repeated: int = 0
    """The number of rows whose question stands in a row before."""
    like_nothing: Counter[str] = field(default_factory=Counter)
    """The number of rows by an answer that looks like none."""

    def split(self, own: str, digest: str) -> str | None:
        """Returns the split of a question; None if a later split has the same question.

        Data with two splits or more, or with a column of them, keep them; what they lack of dev and
        test is taken from train by the hash. Data with one split alone, as sets of the hub often
        are, are divided by the hash.

        Args:
            own: The split that the row stands in; "" if none is stated.
            digest: The digest of its question.
        """
        return None if self.later(own, digest) else self._split(own, split_of(digest))

    def later(self, own: str, digest: str) -> str:
        """Returns the gold answer of the same question in a later split; "" if there is none."""
        later = SPLITS[SPLITS.index(own) + 1 :] if self._keeps else ()
        return next((gold for split in later if (gold := self.golds[split].get(digest[:16]))), "")

    def num_rows(self) -> dict[str, int]:
        """Returns the number of rows of every split; a repeated question counts each time."""
        found: Counter[str] = Counter()
        for (own, hashed), num in self.rows.items():
            found[self._split(own, hashed)] += num
        return {split: found[split] for split in SPLITS}

    @property
    def divided(self) -> str:
        """The one split that all rows stand in and that is divided; "" if there is none."""
        return "" if self._keeps else next(iter(self._owns), "")

    @property
    def is_hashed(self) -> bool:
        """Whether nothing but the hash decides the splits."""
        return not self._keeps and self._owns == {""}

    @property
    def _owns(self) -> set[str]:
        return {split for split, _ in self.rows}

    @property
    def _keeps(self) -> bool:
        return self.has_column or len(self._owns) > 1

    def _split(self, own: str, hashed: str) -> str:
        is_taken = not self._keeps or (own == "train" and hashed not in self._owns)
        return hashed if is_taken else own


@dataclass(frozen=True)
class TableTask:
    """A task made of rows of data.

    The rows are read anew for every draw, and only what is taken is kept in memory.
    """

    name: str
    """The name of the task."""
    scorer: str
    """The answer rule: a key of `haltwise.policy.answers.READERS`."""
    instruction: str
    """The text that follows every question; it may be empty."""
    rows: DataRows
    """Begins a pass over the rows."""
    form: Form
    """Reads what a row asks."""
    split_column: str | None = None
    """The column that states the split of a row, if there is one."""

    @property
    def cue(self) -> str:
        """The words after a closed thought that lead the LM to its answer: the scorer's."""
        return scorer_of(self.scorer).cue

    @property
    def answer_end(self) -> str:
        """The text that ends a forced answer: the scorer's."""
        return scorer_of(self.scorer).answer_end

    def questions(self, split: str, num: int, seed: int) -> Iterator[Question]:
        """Yields the first `num` questions in an order that the seed and their texts decide.

        Args:
            split: train, dev or test.
            num: The largest number of questions, at least 1.
            seed: The number of the draw.

        Raises:
            InputError: If there is no such split, `num` is below 1, the split has no question, a
                row cannot be asked, or a question that is drawn stands there with two answers.
        """
        check_draw(split, num)
        taken: dict[int, Question] = {}
        last: list[int] = []  # ranks negated, so that the heap's first is the last in order
        for own, place, digest, item in self._each():
            if item and (gold := self._survey.later(own, digest)):
                self._check_same(gold, item, place, "another split")
            if item is None or self._survey.split(own, digest) != split:
                continue
            rank = int(hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()[:32], 16)
            if rank in taken:
                self._check_same(taken[rank].gold, item, place, "a row before")
                continue
            if len(last) == num and rank > -last[0]:
                continue
            if len(last) == num:
                del taken[-heappop(last)]
            heappush(last, -rank)
            taken[rank] = self._question(item, digest, split)
        if not taken:
            found = ", ".join(f"{name} {n:,}" for name, n in self._survey.num_rows().items())
            column = (
                "no --split-column, so that a hash divides"
                if self.split_column
                else ("--split-column")
            )
            raise NoQuestionError(
                f"{self.name}: no question of split {split}, found rows: {found}: expected more "
                f"rows, {column}, or --split with those there are"
            )
        yield from (taken[rank] for rank in sorted(taken))

    def _check_same(self, gold: str, item: RowQuestion, place: str, beside: str) -> None:
        """Raises InputError if a question has another answer where it stands once more."""
        same = item.gold == gold or scorer_of(self.scorer)(item.gold, gold)
        if not same:
            raise InputError(
                f"{place}: {' '.join(item.text.split())[:80]!r} has the answer {item.gold!r}, and "
                f"{gold!r} in {beside}: expected one answer of a question"
            )

    def describe(self) -> str:
        """Returns one line for a person: how many rows there are, and how they are asked.

        Raises:
            InputError: If a row cannot be asked.
        """
        survey = self._survey
        rows = ", ".join(f"{split} {num:,}" for split, num in survey.num_rows().items())
        skipped = f", {survey.num_skipped:,} skipped without an answer" * bool(survey.num_skipped)
        if survey.num_repeated:
            skipped += f", {survey.num_repeated:,} repeat a question, which is asked once"
        for gold, num in survey.like_nothing.items():
            skipped += f", {num:,} answered {gold!r}, which is to be left empty where it means none"
        if survey.divided:
            skipped += f", all of them named {survey.divided}, which is divided by a hash"
        if survey.is_hashed and (column := self._states_splits()):
            skipped += (
                f", divided by a hash whatever column {column!r} says: --split-column {column} "
                "keeps that"
            )
        asked_by = f"scorer {self.scorer}; instruction {self.instruction!r}"
        return f"{self.name}: {rows} rows{skipped}; {asked_by}"

    def _states_splits(self) -> str:
        """Returns the column, not named by the settings, in which rows name splits; "" if none."""
        _, _, first = next(iter(self.rows()))
        column = next((name for name in first if str(name).lower() == _USUAL_COLUMN), "")
        stated = (str(row.get(column)).strip().lower() for _, _, row in self.rows() if column)
        return column if any(name in SPLIT_NAMES for name in stated) else ""

    @cached_property
    def _survey(self) -> _RowSurvey:
        survey, seen = _RowSurvey(bool(self.split_column)), set[int]()
        for own, _, digest, item in self._each():
            if item is None:
                survey.num_skipped += 1
                continue
            survey.rows[own, split_of(digest)] += 1
            if item.gold in _LIKE_NOTHING:
                survey.like_nothing[item.gold] += 1
            key = int(digest[:16], 16)
            survey.num_repeated += key in seen
            seen.add(key)
            if own in survey.golds:
                survey.golds[own].setdefault(digest[:16], item.gold)
        return survey

    def _each(self) -> Iterator[tuple[str, str, str, RowQuestion | None]]:
        """Yields of every row its split, its place, the digest of its question, and what it asks.

        Raises:
            InputError: If a row cannot be asked; the message says which.
        """
        for own, place, row in self.rows():
            try:
                own = self._own_split(own, row)
                item = self.form(row)
                if item:
                    self._check_gold(item.gold)
            except NoColumnError as error:
                raise InputError(f"{columns_of(place)}: {error}") from None
            except InputError as error:
                raise InputError(f"{place}: {error}") from None
            # The same words have the same digest, whatever the instruction or the blanks.
            digest = question_digest(" ".join(item.text.split())) if item else ""
            yield own, place, digest, item

    def _check_gold(self, gold: str) -> None:
        """Raises InputError if no answer can be compared with a gold answer."""
        try:
            scorer_of(self.scorer)("", gold)
        except InputError as error:
            raise InputError(f"{error}, as --scorer {self.scorer} reads it") from None

    def _own_split(self, own: str, row: DataRow) -> str:
        if not self.split_column:
            return own
        found = cell(row, self.split_column)
        name = SPLIT_NAMES.get(str(found).strip().lower())
        if name is None:
            raise InputError(f"{self.split_column} is {found!r}, expected train, dev or test")
        return name

    def _question(self, item: RowQuestion, digest: str, split: str) -> Question:
        return Question(
            question_id=f"{self.name}-{digest[:16]}",
            task=self.name,
            segment=item.segment,
            text=with_instruction(item.text, self.instruction),
            gold=item.gold,
            split=split,
            scorer=self.scorer,
        )
