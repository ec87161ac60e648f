"""What a recording must be before anything is learned from it, beyond what its columns must hold.

A wrong scorer, a question in two splits or a handful of questions leave every column in order, and
make every figure that follows worthless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from haltwise import InputError
from traces.arrays import target
from traces.store import read_tables
from traces.stream import TraceFiles

#: The exact match, never halted, below which nothing is to be learned or concluded: hardly an LM
#: is so weak on questions that somebody wants it to answer, but many a scorer is so wrong.
LEAST_EM = 0.1

# With fewer questions nothing is learned, and with fewer than the second number not much is known
# of what was: of 200, one is half a point of exact match.
_FEWEST_QUESTIONS, _FEW_QUESTIONS = 10, 200
# Shares above which answers are suspiciously often unreadable.
_UNREADABLE_FINAL, _UNREADABLE_FORCED = 0.1, 0.5
# Distinct pairs are kept for each relation; this many new ones are merged at a time.
_MERGED_AT = 1 << 20

_VERDICTS = ["trace_id", "question_id", "answer", "correct"]
_VERDICT_COLUMNS = (*_VERDICTS, "gold", "final_answer", "final_correct")
_COLUMNS = (
    *("question_id", "split", "gold", "finished", "final_answer", "final_correct"),
    *("answer", "correct"),
)


def check_sound(files: TraceFiles, min_em: float = LEAST_EM) -> list[str]:
    """Refuses a recording that nothing can be learned from.

    Args:
        files: The recording, with its train, dev and test splits.
        min_em: The exact match, never halted, that its train and dev splits must have at least.

    Returns:
        What may be wrong with it, a sentence each: whoever trains should know.

    Raises:
        InputError: If there are too few questions, the LM is hardly ever right where that is known
            or no answer can be read where it is not, a question has two reference answers, or is in
            two splits.
    """
    if not 0 <= min_em <= 1:
        raise InputError(f"--min-em is {min_em}, expected from 0 to 1")
    found = _Examined(files)
    found.refuse_contradictions()
    found.refuse_too_few()
    found.refuse_hardly_right(min_em)
    return list(found.doubts())


def two_verdicts(files: TraceFiles) -> str:
    """Returns what is to be told of equal answers with two verdicts; empty if there are none.

    Halting cannot win or lose anything by giving the very answer that the LM would have given, so
    that whatever is learned from such traces is the scorer's.

    Args:
        files: A recording; traces without a reference answer have no verdicts.
    """
    verdicts = _Relation()
    for answers in _verdicts(files):
        verdicts.add(answers.drop_columns("trace_id"))
    found = verdicts.contradictions()
    if not found:
        return ""
    keys = pa.table(
        {name: [key[place] for key, _ in found] for place, name in enumerate(_VERDICTS[1:3])}
    )
    of_both = (
        answers.join(keys, _VERDICTS[1:3], join_type="left semi") for answers in _verdicts(files)
    )
    traces = sorted({name for answers in of_both for name in answers["trace_id"].to_pylist()})
    (question, answer), _ = found[0]
    num = len(files.trace)
    return (
        f"{len(found)} answers are marked right in one place and wrong in another, for the same "
        f"question: the first is {answer!r:.30} to {question!r:.60}. They are in {len(traces)} "
        f"of {num} traces ({len(traces) / num:.1%}): {_listed(traces)}. Whatever halting wins "
        "there is the scorer's."
    )


def _verdicts(files: TraceFiles) -> Iterator[pa.Table]:
    """Yields tables trace_id, question_id, answer, correct, of final and of forced answers."""
    for shard in files.shards:
        for table in read_tables(shard, _VERDICT_COLUMNS):
            labelled = table.filter(table["gold"].is_valid())
            finals = labelled.select(["trace_id", "question_id", "final_answer", "final_correct"])
            for answers in (finals.rename_columns(_VERDICTS), _points(labelled)):
                yield answers.filter(pc.not_equal(answers["answer"], ""))


class _Relation:
    """Which values some keys have: the distinct rows of tables with the same columns."""

    def __init__(self) -> None:
        """Starts without a row."""
        self._parts: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Takes in rows; the last column is the value, the others are the key."""
        self._parts.append(_distinct(table))
        if sum(map(len, self._parts)) > _MERGED_AT:
            self._parts = [_distinct(pa.concat_tables(self._parts))]

    def contradictions(self) -> list[tuple[list[str], list[str]]]:
        """Returns the keys with several values, each with its values, in order."""
        rows = _distinct(pa.concat_tables(self._parts))
        *keys, value = rows.column_names
        several = rows.group_by(keys).aggregate([(value, "count"), (value, "list")])
        several = several.filter(pc.greater(several[f"{value}_count"], 1)).sort_by(keys[0])
        return [
            ([str(row[key]) for key in keys], sorted(map(str, row[f"{value}_list"])))
            for row in several.to_pylist()
        ]


def _distinct(table: pa.Table) -> pa.Table:
    return table.group_by(table.column_names, use_threads=False).aggregate([])


@dataclass
class _Counts:
    """What was counted in the train and dev splits."""

    num_traces: int = 0
    num_labelled: int = 0
    num_right: int = 0
    num_finished: int = 0
    num_unreadable_final: int = 0
    num_unlabelled_read: int = 0
    num_forced: int = 0
    num_unreadable_forced: int = 0


class _Examined:
    """What a pass over a recording has found."""

    def __init__(self, files: TraceFiles) -> None:
        """Reads the columns that tell questions, answers and verdicts, a piece at a time."""
        self._files = files
        self._golds, self._splits = _Relation(), _Relation()
        self._text_golds, self._text_splits = _Relation(), _Relation()
        self._text_ids = _Relation()
        self._counts = _Counts()
        self._questions: set[str] = set()
        self._examples: dict[str, str] = {}
        self._has_text = True
        for shard in files.shards:
            for table in read_tables(shard, (*_COLUMNS, "question")):
                self._add(table)

    def _add(self, table: pa.Table) -> None:
        labelled = table.filter(table["gold"].is_valid())
        self._golds.add(labelled.select(["question_id", "gold"]))
        self._splits.add(table.select(["question_id", "split"]))
        self._has_text &= "question" in table.column_names
        if self._has_text:
            self._text_golds.add(labelled.select(["question", "gold"]))
            self._text_splits.add(table.select(["question", "split"]))
            self._text_ids.add(table.select(["question", "question_id"]))
        learned = table.filter(pc.is_in(table["split"], pa.array(["train", "dev"])))
        if len(learned):
            self._count(learned)

    def _count(self, table: pa.Table) -> None:
        counts, forced = self._counts, table["answer"].combine_chunks().flatten()
        labelled = table.filter(table["gold"].is_valid())
        unlabelled = table.filter(table["gold"].is_null())
        self._questions.update(table["question_id"].to_pylist())
        finished = table.filter(table["finished"])
        counts.num_traces += len(table)
        counts.num_labelled += len(labelled)
        counts.num_right += pc.sum(labelled["final_correct"]).as_py() or 0
        counts.num_unlabelled_read += len(unlabelled) - _num_empty(unlabelled["final_answer"])
        counts.num_finished += len(finished)
        counts.num_unreadable_final += _num_empty(finished["final_answer"])
        counts.num_forced += len(forced)
        counts.num_unreadable_forced += _num_empty(forced)
        wrong = labelled.filter(pc.invert(labelled["final_correct"]))
        for gold, answer in zip(
            *(wrong[c].to_pylist() for c in ("gold", "final_answer")), strict=True
        ):
            if len(self._examples) < 3:
                self._examples.setdefault(gold, answer)

    def refuse_contradictions(self) -> None:
        """Refuses a question with two reference answers, or in two splits."""
        for relation, told in ((self._golds, "reference answers"), (self._splits, "splits")):
            found = relation.contradictions()
            if found:
                (question,), values = found[0]
                raise InputError(
                    f"question {question!r:.60} has the {told} {_listed(values)}, expected one "
                    f"({len(found)} questions have several)"
                )

    def refuse_too_few(self) -> None:
        """Refuses fewer questions than anything can be learned from."""
        num = len(self._questions)
        if num < _FEWEST_QUESTIONS:
            raise InputError(
                f"{num} questions to learn from, in the splits train and dev: expected at least "
                f"{_FEWEST_QUESTIONS}, and better some hundreds"
            )

    def refuse_hardly_right(self, min_em: float) -> None:
        """Refuses an LM, or a scorer, that is hardly ever right."""
        counts = self._counts
        if not counts.num_labelled:
            return self._refuse_unreadable()
        em = counts.num_right / counts.num_labelled
        if not counts.num_right or em < min_em:
            examples = "; ".join(
                f"expected {gold!r:.30}, found {answer!r:.30}"
                for gold, answer in self._examples.items()
            )
            raise InputError(
                f"never halted, {counts.num_right} of {counts.num_labelled} traces end with a "
                f"right answer ({em:.1%}): expected at least {max(min_em, 0.001):.1%}, see "
                f"--min-em. Is the scorer right? Wrong ones: {examples}"
            )

    def _refuse_unreadable(self) -> None:
        """Refuses answers that nobody can read, where nobody knows what is right either."""
        if not self._counts.num_unlabelled_read:
            raise InputError(
                f"none of {self._counts.num_traces} full answers could be read, expected some: "
                "nothing agrees with them. Does the answer rule fit what the LM writes?"
            )

    def doubts(self) -> Iterator[str]:
        """Yields what may be wrong, a sentence each."""
        num, counts = len(self._questions), self._counts
        if counted := target(counts.num_traces - counts.num_labelled, counts.num_traces):
            yield f"{counted} Whether the LM is right by itself is not known."
        if num < _FEW_QUESTIONS:
            yield (
                f"{num} questions to learn from are few: one of them is {100 / num:.1f} points of "
                f"exact match, and what is chosen may not hold. Expected {_FEW_QUESTIONS} or more."
            )
        yield from self._unreadable("final", counts.num_unreadable_final, counts.num_finished)
        yield from self._unreadable("forced", counts.num_unreadable_forced, counts.num_forced)
        if verdicts := two_verdicts(self._files):
            yield verdicts
        if self._has_text:
            yield from self._twins()

    def _unreadable(self, kind: str, num: int, of: int) -> Iterator[str]:
        limit = _UNREADABLE_FINAL if kind == "final" else _UNREADABLE_FORCED
        if num > limit * of:
            yield (
                f"{num} of {of} {kind} answers ({num / of:.0%}) could not be read: does the "
                "answer rule fit what the LM writes?"
            )

    def _twins(self) -> Iterator[str]:
        for relation, told in (
            (self._text_golds, "have several reference answers"),
            (self._text_splits, "are in several splits, under other ids"),
            (self._text_ids, "have several ids, and count as several questions"),
        ):
            found = relation.contradictions()
            if found:
                (text,), values = found[0]
                yield (
                    f"{len(found)} questions with the same text {told}: the first is "
                    f"{text[:60]!r}, {_listed(values)}."
                )


def _points(table: pa.Table) -> pa.Table:
    """Returns a row for each decision point: trace_id, question_id, answer, correct."""
    lengths: NDArray[np.int64] = table["answer"].combine_chunks().value_lengths().to_numpy()
    rows = pa.array(np.repeat(np.arange(len(table)), lengths))
    columns = {
        "trace_id": table["trace_id"].take(rows),
        "question_id": table["question_id"].take(rows),
        "answer": table["answer"].combine_chunks().flatten(),
        "correct": table["correct"].combine_chunks().flatten(),
    }
    return pa.table(columns)


def _num_empty(answers: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.equal(answers, "")).as_py() or 0)


def _listed(values: Sequence[str]) -> str:
    return ", ".join(f"{value!r:.30}" for value in values[:4])
