"""Dense audits become lines that can be imported as traces, or are counted as lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from haltwise import HaltHead, InputError, Signals
from haltwise.control import audit_traces as module
from haltwise.control.answers import GivenAnswer
from haltwise.control.audit_traces import AuditTraces, DenseAudit, LineWriter
from haltwise.control.draws import draw
from haltwise.control.record import digest
from lms.scorers import scorer_of
from tests.heads import sure_head
from traces import Traces, import_json_lines, read_traces

KEY = b"k" * 32
STEPWISE = ("entropy", "max_entropy", "logprob", "min_logprob", "margin")


def seen(position: int, logprob: float = -0.5) -> Signals:
    """A decision point at which all steps were alike."""
    numbers: dict[str, Any] = {name: np.full(1, 0.25, np.float32) for name in STEPWISE}
    numbers |= {"logprob": np.array([logprob]), "min_logprob": np.array([logprob])}
    return Signals(np.array([position]), num_reflections=np.array([2.0]), **numbers)


def audit(name: str = "r", **changes: Any) -> DenseAudit:
    """Halted after 4 tokens it answers 8 in 2 more, after 8 it answers 7 in 3, and 7 in full."""
    made = DenseAudit(
        id=name,
        points=[seen(4), seen(8, float("nan"))],
        halted=[GivenAnswer("8", "It is 8.", 6), GivenAnswer("7", "7!", 11)],
        full=GivenAnswer("7", "Seven: 7.", 20),
        finished=True,
        model="lm",
        task="sums",
        question="3 + 4 ?",
        text="Let me see. Seven: 7.",
    )
    return replace(made, **changes)


@contextmanager
def kept(
    folder: Path, content: bool = False, head: HaltHead | None = None
) -> Iterator[AuditTraces]:
    found = AuditTraces(folder, head or sure_head(), KEY, with_content=content)
    yield found
    found.close()


def imported(folder: Path) -> Traces:
    out = folder.with_name(f"imported {len(list(folder.parent.iterdir()))}")
    import_json_lines(folder, out, 100, scorer_of)
    return read_traces(out)


def lines(folder: Path) -> list[Any]:
    found = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in found for line in file.read_text().splitlines()]


@pytest.mark.parametrize("content", [True, False])
def test_an_audit_is_a_trace(content: bool, tmp_path: Path) -> None:
    with kept(tmp_path / "in", content) as folder:
        folder.put(audit())
        folder.put(audit("s", points=[], halted=[]))
    assert (folder.writer.num_written, folder.writer.num_lost) == (2, 0)
    traces = imported(tmp_path / "in")
    assert traces.trace_id.tolist() == ["r", "s"]
    assert traces.position.tolist() == [4, 8] and traces.probe_tokens.tolist() == [2, 3]
    assert traces.num_tokens.tolist() == [20, 20] and traces.finished.all()
    assert not traces.labelled.any() and traces.correct.tolist() == [False, True]
    read = ["8", "7"]
    told = read if content else [digest(KEY, f"read {answer}") for answer in read]
    assert traces.answer.tolist() == told
    np.testing.assert_array_equal(traces.signals["logprob"], np.array([-0.5, np.nan], np.float32))
    assert traces.signals["num_reflections"].tolist() == [2.0, 2.0]
    assert set(traces.signals) == {*STEPWISE, "num_reflections"}
    assert traces.recorder["probing"] == "at_halt"
    words = {"3 + 4 ?", "Let me see", "sums", "Seven"}
    found = "".join(map(json.dumps, lines(tmp_path / "in")))
    assert {word for word in words if word in found} == (words if content else set())


def test_a_question_is_in_one_split_and_half_of_them_are_kept_back(tmp_path: Path) -> None:
    with kept(tmp_path / "in") as folder:
        for n in range(200):
            folder.put(audit(f"r{n}", question=f"{n // 2} ?"))
    traces = imported(tmp_path / "in")
    assert len(np.unique(traces.question_id)) == 100
    assert (traces.split[::2] == traces.split[1::2]).all()
    assert 30 < (traces.split[::2] == "test").sum() < 70
    first = draw(KEY, digest(KEY, "0 ?"), "split")
    assert traces.split[0] == ("test" if first < 0.5 else "train")


@pytest.mark.parametrize(
    "impossible",
    [
        {"points": [seen(8), seen(4)]},
        {"points": [seen(4), seen(21)]},
        {"full": GivenAnswer("7", "", 0), "points": [], "halted": []},
        {"halted": [GivenAnswer("8", "", 3), GivenAnswer("7", "", 11)]},
    ],
)
def test_what_no_trace_can_be_is_none(impossible: dict[str, Any], tmp_path: Path) -> None:
    with kept(tmp_path) as folder:
        with pytest.raises(ValueError, match="tokens at"):
            folder.put(audit(**impossible))
        assert not folder.awaits("r")
    assert lines(tmp_path) == []


def test_what_no_file_can_hold_is_replaced(tmp_path: Path) -> None:
    odd = "\ud800" * 200
    with kept(tmp_path / "in", content=True) as folder:
        folder.put(audit(model=odd, task=odd, question=odd, full=GivenAnswer(odd, odd, 20)))
    assert imported(tmp_path / "in").model.tolist() == ["?" * 100]


@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize(("gold", "right"), [("7.0", [False, True]), ("8", [True, False])])
def test_a_label_becomes_the_traces_own(
    content: bool, gold: str, right: list[bool], tmp_path: Path
) -> None:
    told = GivenAnswer.of_label(gold, "short")
    with kept(tmp_path / "in", content) as folder:
        folder.put(audit())
        folder.put(audit("s", question="other"))
    with kept(tmp_path / "in", content) as folder:  # another process, of another day
        assert folder.awaits("r") and not folder.awaits("unknown")
        folder.label("r", GivenAnswer("", "no answer", 0))
        folder.label("r", told)
        assert not folder.awaits("r")
        folder.label("r", GivenAnswer("9", "9", 0))
        folder.label("unknown", told)
    traces = imported(tmp_path / "in")
    assert traces.labelled.tolist() == [True, False]
    assert traces.correct.tolist() == [*right, False, True]
    assert traces.final_correct.tolist() == [right[1], True]
    with kept(tmp_path / "in", content) as folder:
        assert not folder.awaits("r") and folder.awaits("s")


def test_the_oldest_traces_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KNOWN", 2)
    for names in ("abc", "d"):
        with kept(tmp_path) as folder:
            for name in names:
                folder.put(audit(name))
    assert [folder.awaits(name) for name in "abcd"] == [False, False, True, True]
    with kept(tmp_path) as folder:
        assert [folder.awaits(name) for name in "abcd"] == [False, False, True, True]


def test_a_folder_is_of_one_recording(tmp_path: Path) -> None:
    with kept(tmp_path) as folder:
        folder.put(audit())
    with pytest.raises(InputError, match="recorded under another answers, expected a folder of"):
        AuditTraces(tmp_path, sure_head(), KEY, with_content=True)
    with pytest.raises(InputError, match="recorded under another decision_rule"):
        AuditTraces(tmp_path, sure_head(rule="every 5 tokens"), KEY, with_content=False)
    (tmp_path / "y.jsonl").write_text('{"half')
    with kept(tmp_path) as folder:
        assert folder.awaits("r")


@pytest.mark.parametrize("content", ["[]\n", "x\n", '{"trace_id": "r"}\n', '{"seed": 0}\n'])
def test_a_folder_of_other_files_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"x\.jsonl: .*expected"):
        AuditTraces(tmp_path, sure_head(), KEY, with_content=False)
    with pytest.raises(InputError, match="expected a folder for traces"):
        AuditTraces(tmp_path / "x.jsonl", sure_head(), KEY, with_content=False)


class FullDisk:
    """A file on a disk that has room for 100 bytes more."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> int:
        return int(self._file.write(content[:100]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_line_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, num_full = Path.open, 0

    def limited(path: Path, *arguments: Any, **settings: Any) -> Any:
        nonlocal num_full
        file = opened(path, *arguments, **settings)
        if arguments[:1] != ("ab",):
            return file
        num_full -= 1
        return file if num_full < 0 else FullDisk(file)

    for before in ("", "a"):  # in a new file, and in one that has lines
        folder = tmp_path / f"in {before}"
        with kept(folder) as traces:
            for name in before:
                traces.put(audit(name))
            while traces.writer.num_written < len(before):
                pass
            with monkeypatch.context() as patch:
                num_full = 1
                patch.setattr(Path, "open", limited)
                for name in "bc":
                    traces.put(audit(name))
                while traces.writer.num_written + traces.writer.num_lost < len(before) + 2:
                    pass
        assert (traces.writer.num_lost, traces.writer.trouble) == (1, "")
        assert imported(folder).trace_id.tolist() == [*before, "c"]


def test_what_does_not_fit_or_cannot_be_written_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    writer = LineWriter(tmp_path / "folder", {"first": 1}, room=2)
    (tmp_path / "folder").rmdir()
    writer.put({"n": 0})
    while not writer.num_lost:
        pass
    assert "No such file" in writer.trouble
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(writer, "_append", lambda _: writer._thread.join(0.05))
    accepted = [writer.put({"n": n}) for n in range(20)]
    assert not all(accepted) and writer.num_lost == 1 + accepted.count(False)
    monkeypatch.undo()
    writer.close()


def test_a_trace_of_another_process_takes_a_label(tmp_path: Path) -> None:
    with kept(tmp_path) as one, kept(tmp_path) as other:
        one.put(audit("r"))
        while not one.writer.num_written:
            pass
        other.label("r", GivenAnswer("7", "7", 0))
        assert not other.awaits("r")
    with kept(tmp_path) as later:
        assert not later.awaits("r")
