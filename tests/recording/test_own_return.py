"""What an LM's own answers return, by hand and as a recording has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from haltwise import Halting, InputError
from lms.language_model import LanguageModel
from lms.tasks import questions
from recording.own_return import OwnReturn, recorded_questions
from tests.recording.test_cut_thoughts import TEXT, THOUGHT
from traces import Traces

HALTING = Halting("always", "every 12 tokens", "</think>", "source", think_start="<think>")
(ASKED,) = (replace(questions("sum", "train", 1)[0], text="sum : 9 + 3", gold="12"),)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load("embedded")


def test_an_answer_is_judged_by_hand(lm: LanguageModel) -> None:
    """26 tokens, the end token included, cost 0.26 at a price of 10."""
    judge = OwnReturn(lm, HALTING, 100, price=10.0)
    tokens = lm.tokenizer.encode(TEXT, add_special_tokens=False)
    num = len(TEXT.split())
    assert judge.of_answer(ASKED, tokens) == pytest.approx(1 - num / 100)
    assert judge.of_answer(replace(ASKED, gold="11"), tokens) == pytest.approx(-num / 100)
    # A thought that never ends has no answer, but it has its price.
    assert judge.of_answer(replace(ASKED, gold="99"), tokens[:5]) == pytest.approx(-0.05)


@pytest.mark.whole
def test_an_lm_is_judged_as_each_of_its_answers_is(lm: LanguageModel) -> None:
    asked = questions("all", "train", 6)
    free, dear = (OwnReturn(lm, HALTING, 768, price) for price in (0.0, 1.0))
    right, worth = free.of_lm(asked), dear.of_lm(asked)
    assert set(right) <= {0.0, 1.0}
    assert worth == dear.of_lm(asked)  # the same draws each time
    tokens = [1000 * (em - value) for em, value in zip(right, worth, strict=True)]
    assert all(0 < num <= 768 and num == pytest.approx(round(num)) for num in tokens)


def test_questions_are_read_from_traces(make_traces: Callable[..., Traces], tmp_path: Path) -> None:
    path = tmp_path / "made.parquet"
    unknown = THOUGHT | {"gold": None, "final_correct": None, "correct": None}
    traces = make_traces([THOUGHT | {"gold": "12"}, unknown])
    (question,) = recorded_questions(path, traces, "number")
    assert (question.text, question.gold, question.scorer) == ("sum : 9 + 3", "12", "number")
    traces = make_traces([unknown])
    with pytest.raises(InputError, match="no train question has a gold answer"):
        recorded_questions(path, traces, "short")
