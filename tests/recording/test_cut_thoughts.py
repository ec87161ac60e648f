"""Thoughts are cut where a head halts them, if the answer there is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from haltwise import HaltHead, InputError
from lms.language_model import LanguageModel
from recording.cut_thoughts import cut_thoughts
from traces import Traces

TEXT = "9 + 3 = 11 so 11 . check 9 + 3 = 12 so 12 wait 9 + 3 = 12 so 12 ok </think> 12 <eos>"
THOUGHT: dict[str, Any] = {
    "question": "sum : 9 + 3",
    "text": TEXT,
    "num_tokens": len(TEXT.split()),
    "position": [7, 15, 23],
    "probe_tokens": [2, 2, 2],
    "answer": ["11", "12", "12"],
    "correct": [False, True, True],
    "final_answer": "12",
    "split": "train",
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load("embedded")


def said(lm: LanguageModel, ids: tuple[int, ...]) -> str:
    return str(lm.tokenizer.decode(list(ids)))


def test_a_thought_is_cut_by_hand(
    make_traces: Callable[..., Traces], tmp_path: Path, run_head: HaltHead, lm: LanguageModel
) -> None:
    """At a price of 1 the head halts where an answer has come twice in a row, at 23 tokens."""
    traces = make_traces([THOUGHT])
    path = tmp_path / "made.parquet"
    (cut,) = cut_thoughts(path, traces, run_head, 1.0, lm)
    words = TEXT.split()
    assert said(lm, cut.prompt) == "sum : 9 + 3 <think>"
    assert said(lm, cut.completion) == " ".join([*words[:23], "</think>", "12", "<eos>"])
    assert cut.num_tokens == len(words)
    (whole,) = cut_thoughts(path, traces, run_head, 0.0, lm)
    assert said(lm, whole.completion) == TEXT


def test_only_what_is_right_is_learned(
    make_traces: Callable[..., Traces], tmp_path: Path, run_head: HaltHead, lm: LanguageModel
) -> None:
    """At a price of 10 the head halts at the first answer, which is wrong in the first trace."""
    path = tmp_path / "made.parquet"
    wrong_end = THOUGHT | {"final_correct": False, "correct": [True, True, True]}
    traces = make_traces([THOUGHT, wrong_end])
    (cut,) = cut_thoughts(path, traces, run_head, 10.0, lm)
    assert said(lm, cut.completion).endswith("so 11 </think> 11 <eos>")
    (whole,) = cut_thoughts(path, traces, run_head, 0.0, lm)
    assert said(lm, whole.completion) == TEXT
    traces = make_traces([THOUGHT])
    with pytest.raises(InputError, match="no answer is right where the head halts"):
        cut_thoughts(path, traces, run_head, 10.0, lm)


def test_traces_without_texts_are_refused(
    make_traces: Callable[..., Traces], tmp_path: Path, run_head: HaltHead, lm: LanguageModel
) -> None:
    traces = make_traces([{}])
    with pytest.raises(InputError, match="has no question and no text, expected traces as"):
        cut_thoughts(tmp_path / "made.parquet", traces, run_head, 1.0, lm)
