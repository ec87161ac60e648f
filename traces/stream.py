"""Trace files of any size: read whole, as a sample of their questions, or a chunk at a time."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from command import warn
from haltwise import DecisionRule, HeadConfig, InputError
from traces.arrays import Traces, concatenate, digest_of_fingerprints
from traces.checks import check_unique
from traces.looks import looked_at
from traces.store import (
    check_together,
    read_columns,
    read_parts,
    read_recorder,
    read_tables,
    row_groups,
    shards_of,
)
from traces.verdicts import Agree

#: The largest number of traces in memory, by default. If they have 30 points each, training on two
#: cores takes less than 2 GB.
MAX_TRACES = 16_000

#: Some rows of the files: a mask (N,).
RowMask = NDArray[np.bool_]


#: Given a recording's answer rule, says which answers agree.
Scorer = Callable[[str], Agree]


def same_reading(answer_rule: str) -> Agree:
    """Returns what says that answers agree if the rule reads the same from them."""
    return operator.eq


def check_recorded(
    config: HeadConfig, recorder: Mapping[str, Any], path: Path | str, *, is_same_lm: bool = True
) -> None:
    """Refuses traces that a head is not valid for, and warns of what may shift its numbers there.

    Args:
        config: The head's conditions.
        recorder: How the traces were recorded.
        path: Their file or folder.
        is_same_lm: Whether they should be of the LM that the head was trained on.

    Raises:
        InputError: If they were recorded under other conditions.
    """
    config.halting.check_recorded(recorder, str(path))
    if told := config.recorded_otherwise(recorder, is_same_lm):
        warn(f"{path}: {told}")


class Chunks(Protocol):
    """Traces that are learned from a chunk at a time."""

    def __len__(self) -> int:
        """Returns the number of chunks in a pass."""
        ...

    def __iter__(self) -> Iterator[Traces]:
        """Begins a pass over all chunks."""
        ...


@dataclass(frozen=True)
class Words:
    """What a trace holds for a person to read."""

    gold: str
    """The reference answer; empty if nobody knows."""
    final_answer: str
    """The answer of the LM when it is never halted."""
    question: str = ""
    """The question; empty if it was not recorded."""
    text: str = ""
    """All that the LM generated; empty if it was not recorded."""

    def thought_before(self, share: float, length: int = 240) -> str:
        """Returns the last words of the thought before some share of the whole text is reached.

        Traces do not tell which token ends at which character, so that this is about the place.
        """
        place = round(share * len(self.text))
        start = max(place - length, 0)
        words = self.text[start:place].split()
        return " ".join(words[1:] if start else words)  # the first one may be cut


def read_traces(path: Path | str) -> Traces:
    """Reads a trace file, or all *.parquet shards in a folder.

    Raises:
        InputError: If there is nothing to read, a file is damaged or of another schema version,
            a column or value is not as the schema says, or shards do not belong together.
    """
    files = TraceFiles.open(path)
    return files.read(files.rows())


@dataclass(frozen=True, eq=False)
class TraceFiles:
    """N traces in files, of which only the ids are in memory: a few dozen bytes a trace.

    Rows are chosen by masks (N,) in the order of the files.
    """

    shards: tuple[Path, ...]
    """The files, in order."""
    groups: tuple[tuple[int, int, int], ...]
    """The row groups in order, each as its shard's index, its index in the shard, and its number of
    rows."""
    recorder: dict[str, Any]
    """How the traces were recorded; empty if the files do not tell."""
    trace: NDArray[np.uint64]
    """(N,) the keys of the trace ids."""
    question: NDArray[np.uint64]
    """(N,) the keys of the question ids."""
    split: NDArray[np.str_]
    """(N,) the splits."""
    agree: Agree
    """Says whether two answers agree, where nobody knows what is right."""
    rule: DecisionRule | None = None
    """The decision rule to read the traces under, if it is another than the recorder's."""

    @classmethod
    def open(cls, path: Path | str, scorer: Scorer = same_reading) -> TraceFiles:
        """Reads the ids of a trace file, or of all *.parquet shards in a folder.

        Args:
            path: The file or folder.
            scorer: Tells which answers agree where nobody knows what is right.

        Raises:
            InputError: If there is nothing to read, a file is damaged or of another schema
                version, shards are not of one recording, or a trace is there twice.
        """
        shards = shards_of(path)
        recorder = read_recorder(shards)
        groups, trace, question, split = [], [], [], []
        for k, shard in enumerate(shards):
            groups += [(k, i, num) for i, num in enumerate(row_groups(shard))]
            for ids, questions, splits in read_columns(shard, ("trace_id", "question_id", "split")):
                trace.append(_keys(ids))
                question.append(_keys(questions))
                split.append(np.array(splits, dtype=str))
        if len(trace) == 0 or sum(map(len, trace)) != sum(num for _, _, num in groups):
            raise InputError(f"{path}: damaged, the rows are not as many as the files say")
        files = cls(
            tuple(shards),
            tuple(groups),
            recorder,
            np.concatenate(trace),
            np.concatenate(question),
            np.concatenate(split),
            scorer(recorder.get("answer_rule", "short")),
        )
        files._check_unique()
        return files

    @classmethod
    def of_head(
        cls, path: Path | str, config: HeadConfig, scorer: Scorer, *, is_same_lm: bool = True
    ) -> TraceFiles:
        """Reads the ids of traces that a head is valid for, see `check_recorded`.

        Args:
            path: The file or folder.
            config: The head's conditions.
            scorer: Tells which answers agree where nobody knows what is right.
            is_same_lm: Whether the traces should be of the LM that the head was trained on.

        Raises:
            InputError: If they cannot be read, or were recorded under other conditions.
        """
        files = cls.open(path, scorer).under(config.halting.decision_rule)
        check_recorded(config, files.recorder, path, is_same_lm=is_same_lm)
        return files

    def under(self, rule: str) -> TraceFiles:
        """Returns the same files read under another decision rule, if they hold all of its points.

        Else they stay as they are, and `Halting.check_recorded` tells what does not fit.
        """
        recorded = DecisionRule(str(self.recorder.get("decision_rule", "")))
        if recorded.text == rule or not recorded.replays(DecisionRule(rule)):
            return self
        recorder = self.recorder | {"decision_rule": rule}
        return replace(self, recorder=recorder, rule=DecisionRule(rule))

    def replayed(self, rule: str) -> TraceFiles:
        """Returns the same files read under a decision rule.

        Raises:
            InputError: If the rule cannot be run, or the traces do not hold all of its points.
        """
        DecisionRule(rule).check_runnable()
        found, stated = self.under(rule), self.recorder.get("decision_rule", "")
        if found.recorder.get("decision_rule", "") != rule:
            raise InputError(
                f"--rule is {rule!r}, but the traces were recorded under {stated!r}: expected "
                "'every K tokens' there, and spacings that are multiples of K"
            )
        return found

    def rows(self, *splits: str) -> RowMask:
        """Returns the rows of some splits, or all rows if no split is named.

        Raises:
            InputError: If there is no such row.
        """
        if not splits:
            return np.ones(len(self.split), dtype=bool)
        rows: RowMask = np.isin(self.split, splits)
        if not rows.any():
            found = ", ".join(repr(str(name)) for name in np.unique(self.split))
            raise InputError(f"no trace has split {' or '.join(map(repr, splits))}: found {found}")
        return rows

    def rows_of_questions(self, question_ids: Iterable[str], texts: Iterable[str] = ()) -> RowMask:
        """Returns the rows of some questions, by their ids or by the digests of their texts."""
        by_text = np.isin(self._text, list(texts)) & (self._text != "")
        rows: RowMask = np.isin(self.question, _keys(question_ids)) | by_text
        return rows

    def texts(self, rows: RowMask) -> frozenset[str]:
        """Returns digests of the questions' texts in some rows; none of those not recorded."""
        return frozenset(self._text[rows].tolist()) - {""}

    def one_id_a_text(self, traces: Traces) -> Traces:
        """Returns traces in which questions with the same text have the same id, the first one."""
        keys = _keys(traces.question_id.tolist())
        text_of = dict(zip(self.question.tolist(), self._text.tolist(), strict=True))
        first: dict[str, str] = {}
        ids = [
            first.setdefault(text_of[key] or name, name)
            for key, name in zip(keys.tolist(), traces.question_id.tolist(), strict=True)
        ]
        return replace(traces, question_id=np.array(ids))

    def rows_of_trace(self, trace_id: str) -> RowMask:
        """Returns the row of a trace; no row if the trace is not there."""
        rows: RowMask = self.trace == _keys([trace_id])
        return rows

    def sample(self, rows: RowMask, max_traces: int) -> RowMask:
        """Returns some rows as they are if they are few; or else those of a sample of questions.

        The sample is always the same, whatever the order of rows: the questions whose keys, a hash
        of their ids, are smallest. They are as many as have no more than `max_traces` traces
        together, but at least one.

        Args:
            rows: The rows to choose from.
            max_traces: The largest number of rows.

        Raises:
            InputError: If `max_traces` is below 1.
        """
        if max_traces < 1:
            raise InputError(f"--max-traces is {max_traces}, expected at least 1")
        if rows.sum() <= max_traces:
            return rows
        keys, num = np.unique(self.question[rows], return_counts=True)
        taken = max(int(np.searchsorted(np.cumsum(num), max_traces, side="right")), 1)
        sample: RowMask = rows & (self.question <= keys[taken - 1])
        return sample

    def read(self, rows: RowMask) -> Traces:
        """Reads the traces in some rows.

        Raises:
            InputError: If a value in any row of the files is not as the schema says.
        """
        parts = [part.select(at) for part, at in self.parts(rows)]
        if not parts:
            raise InputError(f"{self.shards[0]}: damaged, there are no rows in it")
        return replace(concatenate(parts), recorder=self.recorder)

    def words(self, trace_ids: Sequence[str]) -> dict[str, Words]:
        """Reads what some traces hold for a person to read, by trace id."""
        wanted = np.isin(self.trace, _keys(trace_ids))
        starts = np.cumsum([0, *(num for _, _, num in self.groups)])
        found: dict[str, Words] = {}
        ids = pa.array(trace_ids, pa.string())
        for (k, index, num), start in zip(self.groups, starts[:-1], strict=True):
            if not wanted[start : start + num].any():
                continue
            names = ("trace_id", *(field.name for field in fields(Words)))
            for table in read_tables(self.shards[k], names, index):
                for row in table.filter(pc.is_in(table["trace_id"], ids)).to_pylist():
                    trace_id = row.pop("trace_id")
                    found[trace_id] = Words(**row | {"gold": row["gold"] or ""})
        return found

    def chunks(self, rows: RowMask, max_traces: int, seed: int) -> Chunks:
        """Returns the traces in some rows a chunk at a time.

        Args:
            rows: The rows, at least one.
            max_traces: The largest number of traces in a chunk.
            seed: The seed of the order in which row groups are read.
        """
        order = np.random.default_rng(seed).permutation(len(self.groups))
        return _FileChunks(self, rows, -(-int(rows.sum()) // max_traces), order)

    def digest(self, rows: RowMask) -> str:
        """Returns what `Traces.digest` is of the traces in some rows.

        Raises:
            InputError: If a value in any row of the files is not as the schema says.
        """
        return digest_of_fingerprints(self._fingerprint[rows])

    def question_ids(self, rows: RowMask) -> frozenset[str]:
        """Reads the question ids in some rows."""
        found: set[str] = set()
        row = 0
        for shard in self.shards:
            for (ids,) in read_columns(shard, ("question_id",)):
                mask = rows[row : row + len(ids)]
                found.update(np.array(ids, dtype=object)[mask].tolist())
                row += len(ids)
        return frozenset(found)

    @cached_property
    def _text(self) -> NDArray[np.str_]:
        """(N,) a digest of the text of each question; empty where it was not recorded."""
        found: list[str] = []
        for shard in self.shards:
            for table in read_tables(shard, ("question_id", "question")):
                told = "question" in table.column_names
                texts = table["question"].to_pylist() if told else [""] * len(table)
                found += [_text_digest(text) for text in texts]
        return np.array(found, dtype=str)

    @cached_property
    def _fingerprint(self) -> NDArray[np.uint64]:
        """(N, 4) the fingerprints of all traces, by a pass that checks every value."""
        return np.concatenate([part.fingerprint for part, _ in self.parts(self.rows())])

    def parts(
        self, rows: RowMask, order: Iterable[int] | None = None
    ) -> Iterator[tuple[Traces, RowMask]]:
        """Yields pieces of all row groups, and which of their traces are in some rows.

        Args:
            rows: The rows.
            order: The indices of the row groups in the order of reading; None for that of files.

        Raises:
            InputError: If a value is not as the schema says, or shards do not belong together.
        """
        starts = np.cumsum([0, *(num for _, _, num in self.groups)])
        first: tuple[Path, Traces] | None = None
        for group in range(len(self.groups)) if order is None else order:
            k, index, _ = self.groups[group]
            row = starts[group]
            for part in read_parts(self.shards[k], index, self.recorder, self.agree):
                first = first or (self.shards[k], part)
                check_together(self.shards[k], part, *first)
                if part.num_points and not first[1].num_points:
                    first = self.shards[k], part
                shown = part if self.rule is None else looked_at(part, self.rule)
                yield shown, rows[row : row + len(part)]
                row += len(part)

    def _check_unique(self) -> None:
        keys, num = np.unique(self.trace, return_counts=True)
        if num.max() > 1:  # two ids may also share a key
            twice = np.isin(self.trace, keys[num > 1])
            of_shard = np.repeat([k for k, _, _ in self.groups], [num for _, _, num in self.groups])
            ids = [
                i for s in self.shards for (some,) in read_columns(s, ("trace_id",)) for i in some
            ]
            names = np.array([str(shard) for shard in self.shards])
            check_unique(np.array(ids)[twice], names[of_shard[twice]])


@dataclass(frozen=True, eq=False)
class _FileChunks:
    """Chunks of one size, but for the last one, which may be a little smaller.

    A chunk without a decision point is left out: there is nothing to learn from it.
    """

    files: TraceFiles
    rows: RowMask
    num: int
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[Traces]:
        size = -(-int(self.rows.sum()) // self.num)
        for traces in self._of_size(size):
            if traces.num_points:
                yield replace(traces, recorder=self.files.recorder)

    def _of_size(self, size: int) -> Iterator[Traces]:
        waiting: list[Traces] = []
        for part, at in self.files.parts(self.rows, self.order):
            waiting.append(part.select(at))
            while sum(map(len, waiting)) >= size:
                traces = concatenate(waiting)
                waiting = [traces.select(np.arange(len(traces)) >= size)]
                yield traces.select(np.arange(len(traces)) < size)
        if sum(map(len, waiting)):
            yield concatenate(waiting)


def chunks_of(traces: Traces | Chunks) -> Chunks:
    """Returns chunks as they are, and traces in memory as one chunk."""
    return [traces] if isinstance(traces, Traces) else traces


def _text_digest(text: str) -> str:
    """Returns a digest of a text whose blanks and cases do not matter; none of an empty one."""
    words = " ".join(text.casefold().split())
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8)
    return digest.hexdigest() if words else ""


def _keys(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Returns keys (B,) of texts; two texts share a key with a probability of 2**-64."""
    digests = (
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), "<u8")
