"""Comparing answers with gold answers."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.policy.answers import READERS
from lms import scorers
from lms.questions import question_digest, split_of
from lms.scorers import SCORERS, check_scorer, scorer_of
from lms.sources import DataConfig, open_task


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes no formula wrong: what math-verify cannot do is kept from it."""
    monkeypatch.setattr(scorers, "_TIMEOUT_S", 600)


def is_right(rule: str, text: str, gold: str) -> bool:
    """Whether what an LM has written holds the gold answer."""
    return scorer_of(rule)(READERS[rule](text), gold)


def test_a_scorer_belongs_to_a_rule_that_can_be_read() -> None:
    assert set(SCORERS) <= set(READERS)


def test_a_rule_is_added_by_its_reader_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = {"red", "crimson"}
    monkeypatch.setitem(
        READERS, "colour", lambda text: next((w for w in text.lower().split() if w in colours), "")
    )
    assert is_right("colour", "it is Red", "RED !")
    assert not is_right("colour", "it is crimson", "red")
    assert not is_right("colour", "no idea", "red")
    check_scorer("colour")
    path = tmp_path / "colours.jsonl"
    path.write_text(json.dumps({"question": "Which?", "answer": "Red"}))
    task = open_task(DataConfig(task=str(path), scorer="colour"))
    (question,) = task.questions(split_of(question_digest("Which?")), 1, 0)
    assert question.is_right("red") and question.text.endswith(scorer_of("text").instruction)
    assert (task.cue, task.answer_end) == ("Answer:", "\n")
    halting = Halting(
        "always", "every 8 tokens", f"</think>{task.cue}", MEAN_LOGPROB, answer_rule=task.scorer
    )
    assert halting.answer_rule == "colour"
    path = path.rename(tmp_path / "sounds.jsonl")  # a task is read once a process
    path.write_text(json.dumps({"question": "Which?", "answer": "loud"}))
    with pytest.raises(InputError, match=r"line 1: gold answer 'loud' cannot be compared: expect"):
        open_task(DataConfig(task=str(path), scorer="colour")).describe()


@pytest.mark.parametrize("rule", SCORERS)
def test_a_forced_answer_is_read_in_the_form_its_cue_asks_for(rule: str) -> None:
    scorer, gold = SCORERS[rule], {"choice": "B"}.get(rule, "42")
    # As a thought's rules put it: the box that the cue opens is in front.
    opening = r"\boxed{" if scorer.cue.endswith(r"\boxed{") else ""
    assert is_right(rule, f"{opening}{gold}{scorer.answer_end}", gold)
    assert is_right(rule, f"{opening} {gold}", gold)
    assert not is_right(rule, f"{opening}41{scorer.answer_end}", gold)


@pytest.mark.parametrize("rule", SCORERS)
def test_an_lm_that_does_as_it_is_told_is_understood(rule: str) -> None:
    scorer, gold = SCORERS[rule], {"choice": "B"}.get(rule, "42")
    said = f"\\boxed{{{gold}}}" if "boxed" in scorer.instruction else f"Answer: {gold}"
    assert is_right(rule, f"First 6 * 7, so A it is.\n\nBy 1999 that was known.\n{said}", gold)


@pytest.mark.parametrize("rule", SCORERS)
def test_no_answer_is_never_right(rule: str) -> None:
    assert not SCORERS[rule]("", "B" if rule == "choice" else "42")


@pytest.mark.parametrize(
    ("rule", "text", "gold", "expected"),
    [
        ("short", "\\boxed{New  York}", "new york", True),
        ("short", "0.5", "1/2", False),
        ("strict", "Answer: aB", "aB", True),
        ("strict", "Answer: ab", "aB", False),
        ("strict", "Answer: b c", "a\nb c", True),
        ("text", "Answer: The Hallin Yard.", "Hallin yard", True),
        ("text", "Answer: yard", "Hallin yard\nthe yard\n", True),
        ("text", "Answer: ship", "Hallin yard\nthe yard", False),
        ("text", "Answer: at the yard", "yard", False),
        ("number", "It is $1,000.00.", "1000", True),
        ("number", "\\boxed{\\frac{1}{2}}", "0.5", True),
        ("number", "\\boxed{-4}", "4", False),
        ("number", "0.333", "1/3", False),
        ("choice", "the answer is (B)", "B", True),
        ("choice", "the answer is (B)", "(b)", True),
        ("choice", "the answer is (C)", "B", False),
    ],
)
def test_exact_match(rule: str, text: str, gold: str, expected: bool) -> None:
    assert is_right(rule, text, gold) is expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("x+1", "1 + x", True),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", True),
        ("2^{10}", "1024", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("(1,2)", "(2,1)", False),
        ("\\pi", "3.14", False),
        ("46/262", "23/131", True),
        # What math-verify does not do, or does wrongly.
        ("mother", "mother", True),
        ("True", "true", True),
        ("mother", "father", False),
        ("\u22123", "-3", True),
        ("0x1854", "0x1999", False),
        ("0x1854", "0x1854", True),
        ("[0,1)", "[0,1)", True),
        ("}{{", "3", False),
        ("10^{10^{10}}", "3", False),
        ("99999!", "3", False),
        ("1+" * 200 + "1", "201", False),
    ],
)
def test_formulas_are_equal_if_math_verify_says_so(answer: str, gold: str, expected: bool) -> None:
    pytest.importorskip("math_verify")
    assert is_right("latex", f"\\boxed{{{answer}}}", gold) is expected


def test_formulas_are_compared_in_threads_too() -> None:
    pytest.importorskip("math_verify")
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(SCORERS["latex"]("x+1", "1+x")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("rule", "gold", "message"),
    [
        *((rule, " ", "is empty: expected") for rule in SCORERS),
        ("text", "the", "cannot be compared: expected a reference answer"),
        ("number", "many", "cannot be compared: expected a number"),
        ("choice", "Rome", "cannot be compared: expected the letter"),
        ("latex", "$.$", "is empty: expected a formula"),
    ],
)
def test_a_gold_answer_that_is_none_is_an_error(rule: str, gold: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SCORERS[rule]("3", gold)


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(InputError, match="'exact', expected one of short, strict, text, number"):
        check_scorer("exact")


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert SCORERS["latex"]("x+1", "x+1")
    with pytest.raises(InputError, match=r"math-verify is not installed.*-e '\.\[math\]'"):
        SCORERS["latex"]("x+1", "1+x")
    monkeypatch.setattr("lms.scorers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"-e '\.\[math\]'"):
        check_scorer("latex")
