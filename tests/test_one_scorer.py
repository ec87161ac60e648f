"""An answer gets one verdict, whoever judges it: recorder, live environment, import, evaluation.

Halting can then win or lose nothing by giving the very answer that the LM would have given.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from haltwise.policy.answers import READERS
from haltwise.session.thought import Probe
from lms import scorers
from lms.questions import Question
from lms.scorers import agreeing, scorer_of
from recording.trace_row import UnfinishedTrace
from tests.conftest import trace_row
from tests.policy.answer_cases import CASES
from traces import import_json_lines, read_traces
from traces.verdicts import agreement


def read_cases(rule: str) -> list[tuple[str, str]]:
    """Answers as the rule reads them, and the right ones."""
    found = [(READERS[rule](text), gold) for name, text, gold, _ in CASES if name == rule]
    return [(answer, gold) for answer, gold in found if answer]


@pytest.mark.parametrize("rule", sorted({name for name, *_ in CASES}))
def test_an_answer_has_one_verdict_wherever_it_is_judged(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rule == "latex":
        pytest.importorskip("math_verify")
    monkeypatch.setattr(scorers, "_TIMEOUT_S", 600)
    cases, verdicts, lines = read_cases(rule), [], list[Any]()
    for n, (answer, gold) in enumerate(cases):
        question = Question(f"q{n}", "toy", "", "?", gold, "test", rule)
        row = recorded(question, answer)
        verdicts.append(question.is_right(answer))  # what a live environment pays for
        assert row["correct"] == [verdicts[-1]] and row["final_correct"] == verdicts[-1]
        full = np.array([READERS[rule](f"\\boxed{{{gold}}}")], dtype=object)
        if full[0]:
            agrees = agreement(np.array([answer], dtype=object), full, agreeing(rule))
            assert agrees.tolist() == [verdicts[-1]], (answer, gold)
        lines.append(unlabelled(f"t{n}", f"q{n}", answer))
        lines.append({"haltwise.label": {"trace_id": f"t{n}", "gold": gold}})
    path = tmp_path / "lines.jsonl"
    first = {"haltwise.recorder": {"answer_rule": rule}}
    path.write_text("\n".join(map(json.dumps, [first, *lines])))
    import_json_lines(path, tmp_path / "out", 1000, scorer_of)
    traces = read_traces(tmp_path / "out")
    assert traces.final_correct.tolist() == verdicts
    assert traces.correct.tolist() == [verdict for verdict in verdicts for _ in range(2)]
    assert any(verdicts) and (rule == "choice" or not all(verdicts))


def recorded(question: Question, answer: str) -> dict[str, Any]:
    """The trace of a question whose one forced answer is its final one."""
    rules: Any = SimpleNamespace(read_answer=lambda _: answer)
    thought: Any = SimpleNamespace(answer_text=str, text=str, num_tokens=9, finished=True)
    probe = Probe([1], [-0.5], 1, answer, answer)
    return UnfinishedTrace(question, 0, [4], [probe]).row("lm", rules, thought)


def unlabelled(trace_id: str, question_id: str, answer: str) -> dict[str, Any]:
    return trace_row(
        trace_id=trace_id,
        question_id=question_id,
        gold=None,
        correct=None,
        final_correct=None,
        final_answer=answer,
        position=[100, 250],
        probe_tokens=[1, 1],
        answer=[answer, answer],
        confidence=[0.5, 0.5],
        answer_logprobs=[[], []],
    )
