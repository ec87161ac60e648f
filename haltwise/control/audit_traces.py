"""Dense audits as traces: what was seen and would have been answered at every decision point.

A head can learn from them. They are lines of JSON, which `collect.py --json-lines` imports, in a
folder: each process writes a file of its own, and a file is only ever written to at its end. A
label that comes later is a line of its own. Without content, questions, tasks and answers are
digests that only who has the installation's key can make.

Whoever puts a line never waits. What does not fit or cannot be written is counted and dropped.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from haltwise.control.answers import GivenAnswer
from haltwise.control.installation import is_kept_back, name_of, question_id_of
from haltwise.control.record import digest
from haltwise.errors import InputError, reason_of, what_failed
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Signals, signals_from

# How lines of a trace file are named that are no traces.
_RECORDER, _LABEL = "haltwise.recorder", "haltwise.label"
_ID = "trace_id"
# Lines that may wait to be written.
_ROOM = 1_000
# Newest traces that may still be labelled.
_MOST_KNOWN = 10_000
_LONGEST_NAME = 100
# The task of requests that name none.
_UNNAMED = "no task named"

Line = Mapping[str, Any]


@dataclass(frozen=True)
class DenseAudit:
    """An audit with an answer at every decision point."""

    id: str
    points: Sequence[Signals]
    """What was seen at each decision point, (1,) each."""
    halted: Sequence[GivenAnswer]
    """The answer if the thought is closed there."""
    full: GivenAnswer
    """The answer that the client got."""
    finished: bool
    """Whether the LM ended by itself."""
    model: str
    task: str
    question: str
    """What was asked, the same for equal questions."""
    text: str
    """All that was generated."""


class AuditTraces:
    """The traces of an installation's audits in a folder. To be closed.

    Args:
        folder: The folder, which is made if it is not there.
        head: The head under whose conditions traces are recorded.
        key: Of the installation.
        with_content: Whether questions, answers and texts are kept as they are.

    Raises:
        InputError: If the folder cannot be used, or holds traces of another recording.
    """

    def __init__(self, folder: Path, head: HaltHead, key: bytes, *, with_content: bool) -> None:
        """Reads which of the traces that are there may be labelled, and starts the writer."""
        self._key, self._with_content = key, with_content
        shown = signals_from("token_logprobs", "text")
        self._signals = [name for name in shown if name in head.config.observing.signals]
        recorder = asdict(head.config.halting) | {
            "engine": "haltwise serve",
            "signals": self._signals,
            "answers": "text" if with_content else "digests",
            "installation": name_of(key),
        }
        # By newest trace, whether nobody has labelled it.
        self._unlabelled: OrderedDict[str, bool] = OrderedDict()
        self._folder, self._recorder = folder, recorder
        self._look()
        self.writer = LineWriter(folder, {_RECORDER: recorder})
        """Where lines are on their way into the folder."""

    def put(self, audit: DenseAudit) -> None:
        """Writes the trace of an audit soon.

        Raises:
            ValueError: If there can be no such trace.
        """
        row = self._row(audit)
        if self.writer.put(row):
            self._unlabelled[audit.id] = True
            self._trim()

    def awaits(self, request: str) -> bool:
        """Returns whether a request has a trace that nobody has labelled yet."""
        if request not in self._unlabelled:
            self._look()  # it may be of another process
        return self._unlabelled.get(request, False)

    def _look(self) -> None:
        """Takes in the unlabelled traces of the folder, as far as they are not known."""
        for name in _unlabelled(self._folder, self._recorder):
            self._unlabelled.setdefault(name, True)
        self._trim()

    def _trim(self) -> None:
        while len(self._unlabelled) > _MOST_KNOWN:
            self._unlabelled.popitem(last=False)

    def label(self, request: str, gold: GivenAnswer) -> None:
        """Writes soon which answer is right, unless the answer rule reads none from it."""
        if gold.read and self.awaits(request):
            self._unlabelled[request] = False
            self.writer.put({_LABEL: {_ID: request, "gold": _printable(self._told(gold))}})

    def _row(self, audit: DenseAudit) -> dict[str, Any]:
        """Returns a trace by column name, unlabelled."""
        question_id = question_id_of(self._key, audit.question)
        is_test = is_kept_back(self._key, question_id)
        position = [int(seen.position[0]) for seen in audit.points]
        probe_tokens = [one.num_tokens - at for one, at in zip(audit.halted, position, strict=True)]
        _check(position, probe_tokens, audit.full.num_tokens)
        row: dict[str, Any] = {
            _ID: audit.id,
            "question_id": question_id,
            "task": self._task(audit.task),
            "segment": None,
            "model": audit.model[:_LONGEST_NAME],
            "seed": 0,
            "split": "test" if is_test else "train",
            "gold": None,
            "num_tokens": audit.full.num_tokens,
            "finished": audit.finished,
            "final_answer": self._told(audit.full),
            "final_correct": None,
            "position": position,
            "probe_tokens": probe_tokens,
            "answer": [self._told(one) for one in audit.halted],
            "correct": None,
            "confidence": [_confidence(seen) for seen in audit.points],
            "answer_logprobs": [list(one.logprobs) for one in audit.halted],
        }
        for name in self._signals:
            row[name] = [_number(getattr(seen, name)) for seen in audit.points]
        if self._with_content:
            row |= {"question": audit.question, "text": audit.text}
        return {name: _printable(value) for name, value in row.items()}

    def _task(self, task: str) -> str:
        if not task or self._with_content:
            return task[:_LONGEST_NAME] or _UNNAMED
        return digest(self._key, task)

    def _told(self, answer: GivenAnswer) -> str:
        if not answer.read or self._with_content:
            return answer.read
        return digest(self._key, answer.compared)

    def close(self) -> None:
        """Writes what waits."""
        self.writer.close()


class LineWriter:
    """Lines of JSON on their way into a file of a folder. To be closed.

    Args:
        folder: The folder.
        first: What the first line of the file tells.
        room: Lines that may wait.
    """

    def __init__(self, folder: Path, first: Line, room: int = _ROOM) -> None:
        """Starts the writer; there is a file once there is a line for it."""
        self._folder, self._first = folder, _encoded(first)
        self._lines: queue.Queue[Line | None] = queue.Queue(room)
        self._path = self._new_path()
        self._counting = threading.Lock()
        self.num_written = 0
        """Lines that are in the file."""
        self.num_lost = 0
        """Lines that are not, and never will be."""
        self.trouble = ""
        """Why, the last time; empty if the newest line is in the file."""
        self._thread = threading.Thread(target=self._run, name="haltwise traces", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> bool:
        """Returns at once whether a line is on its way; if it is not, it is counted."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lose("too many lines wait to be written")
            return False
        return True

    def lose(self, reason: str) -> None:
        """Counts a line that is not written."""
        with self._counting:
            self.num_lost, self.trouble = self.num_lost + 1, reason

    def close(self) -> None:
        """Writes what waits; lines put from now on are never written."""
        self._lines.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._append(_encoded(line))
            except Exception as error:
                self.lose(reason_of(error))
                self._path = self._new_path()  # behind half a line nothing can be read
            else:
                self.num_written, self.trouble = self.num_written + 1, ""

    def _append(self, line: bytes) -> None:
        """Writes a line whole, or as if it had not been written.

        The file is opened each time: one that was moved or deleted is begun anew.
        """
        with self._path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            content = line if before else self._first + line
            try:
                if file.write(content) != len(content):
                    raise OSError("there is no room for a whole line")
            except OSError:
                file.truncate(before)
                raise

    def _new_path(self) -> Path:
        """Returns the name of a file that nobody has; later ones come behind earlier ones."""
        return self._folder / f"{time.time_ns():020d}-{os.getpid()}.jsonl"


def _unlabelled(folder: Path, recorder: Line) -> list[str]:
    """Makes a folder, or reads the names of its newest traces without a label, the oldest first.

    Raises:
        InputError: If it cannot be used, or holds traces of another recorder.
    """
    known: list[str] = []
    labelled: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.jsonl"), reverse=True):
            lines = _lines(file)
            _check_recorder(file, next(lines, None), recorder)
            if len(known) < _MOST_KNOWN:
                known = _unlabelled_in(lines, labelled) + known
    except OSError as error:
        raise InputError(f"{what_failed(error)}, expected a folder for traces") from None
    return known[-_MOST_KNOWN:]


def _unlabelled_in(lines: Iterator[Line], labelled: set[str]) -> list[str]:
    """Returns the names of a file's newest traces without a label, the oldest first.

    Args:
        lines: Those of the file.
        labelled: The traces that newer files have labels of; those of this one are added.
    """
    found: dict[str, None] = {}
    for line in lines:
        if _LABEL in line:
            trace_id = line[_LABEL][_ID]
            labelled.add(trace_id)
            found.pop(trace_id, None)
        elif line[_ID] not in labelled:
            found[line[_ID]] = None
        if len(found) > _MOST_KNOWN:
            del found[next(iter(found))]
    return list(found)


def _lines(file: Path) -> Iterator[Line]:
    """Yields the lines that are ended.

    Raises:
        InputError: If one is no line of such a file.
    """
    with file.open("rb") as content:
        for text in content:
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict) or line.keys().isdisjoint({_RECORDER, _LABEL, _ID}):
                raise InputError(f"{file}: {text[:40]!r} is no trace of an audit, expected one")
            yield line


def _check_recorder(file: Path, first: Line | None, recorder: Line) -> None:
    """Refuses a file whose first line, if it has one, tells of another recorder.

    Raises:
        InputError: If it does.
    """
    if first is None:
        return
    found, expected = first.get(_RECORDER), json.loads(json.dumps(recorder))
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a first line that tells of the recorder")
    differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    if differ:
        raise InputError(
            f"{file}: recorded under another {', '.join(differ)}, expected a folder of its own for "
            "each recording"
        )


def _check(position: Sequence[int], probe_tokens: Sequence[int], num_tokens: int) -> None:
    """Refuses counts of tokens that no trace can have, but a server may tell.

    Raises:
        ValueError: If they are.
    """
    increases = all(before < after for before, after in pairwise([-1, *position]))
    if not increases or num_tokens < max([1, *position]) or min([0, *probe_tokens]) < 0:
        raise ValueError(f"tokens at {position!s:.80} of {num_tokens}, and {probe_tokens!s:.80}")


def _confidence(seen: Signals) -> float | None:
    return None if seen.confidence is None else _number(seen.confidence)


def _number(value: Any) -> float | None:
    """Returns the number of one point; None is an unknown one, as JSON has no NaN."""
    number = float(value[0])
    return number if math.isfinite(number) else None


def _printable(value: Any) -> Any:
    """Returns a text, or a list of texts, with nothing that a file cannot hold; else the value."""
    if isinstance(value, list):
        return [_printable(one) for one in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _encoded(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"
