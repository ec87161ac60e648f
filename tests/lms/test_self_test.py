"""The dry run passes on LMs of every form, and says what to change where halting cannot work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from haltwise import Halting, InputError
from lms.ask import AskConfig
from lms.chat import ChatConfig
from lms.embedded import EMBEDDED
from lms.language_model import LanguageModel
from lms.self_test import SelfTest, self_test
from lms.tasks import questions
from tests.families import FAMILIES, Family, base_like, byte_tokenizer, qwen3_like, r1_like, tiny
from tests.tiny_lm import tiny_lm, tiny_tokenizer

PLAIN = """
{%- for m in messages -%}{{- m.role + ':' + m.content + '\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}
"""


def halting_of(lm: LanguageModel, every: int = 8, **changes: Any) -> Halting:
    config = AskConfig(every=every)
    return replace(config.halting(lm.chat, config.open()), **changes)


def run(lm: LanguageModel, max_tokens: int = 64, num: int = 4, **changes: Any) -> SelfTest:
    halting = halting_of(lm, **changes)
    asked = questions("all", "train", 4)
    return self_test(lm, asked, halting, max_tokens=max_tokens, temperature=1.0, num=num)


def lm_of(family: Family, **stated: Any) -> LanguageModel:
    return LanguageModel("tiny", family.model, family.tokenizer, ChatConfig(**stated))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_as_it_is_loaded(name: str, tmp_path: Path) -> None:
    lm = LanguageModel.load(FAMILIES[name]().save(tmp_path / name))
    test = run(lm)
    assert test.share(lambda one: one.thought.begun) == 1.0
    assert any(probe.answer for probe in test.probes)
    assert all(one.prompt == lm.prompt(one.question.text) for one in test.answered)
    report = str(test)
    assert report.startswith(lm.chat.describe())
    for part in ("4 questions: thought begun 100%", f"{len(test.probes)} forced answers", "gold"):
        assert part in report


def test_the_embedded_lm_passes_without_a_warning() -> None:
    test = run(LanguageModel.load(EMBEDDED), 768, num=2, every=12)
    assert not test.warnings
    assert test.share(lambda one: one.thought.finished) == 1.0
    assert len(test.answered) == 2
    for one in test.answered:
        assert 1 <= len(one.probes) <= 8


def test_settings_of_the_lm_that_are_left_out_are_told() -> None:
    lm = lm_of(qwen3_like())
    lm.model.generation_config.top_k = 20
    assert any("sets top_k 20, which is left out" in warning for warning in run(lm).warnings)


@pytest.mark.whole
def test_an_lm_that_is_never_right_is_warned_of() -> None:
    lm = LanguageModel.load(EMBEDDED)
    asked = [replace(question, gold="none") for question in questions("sum", "train", 2)]
    halting = halting_of(lm, every=12)
    test = self_test(lm, asked, halting, max_tokens=768, temperature=0.0)
    (warning,) = test.warnings
    assert (
        warning.startswith("none of 2 full answers is right") and "'none' was expected" in warning
    )


def test_an_lm_that_never_opens_its_thought_is_refused() -> None:
    with pytest.raises(InputError, match="no thought begins: '<think>' neither ends the prompt"):
        run(lm_of(r1_like(opening="")))


def test_a_thought_without_a_decision_point_is_refused() -> None:
    with pytest.raises(InputError, match=r"64 tokens, points are 'every 1000 tokens'; lower"):
        run(lm_of(only("7")), every=1000)


def test_a_decision_point_at_the_very_end_is_none() -> None:
    with pytest.raises(InputError, match="no thought comes to a decision point"):
        run(lm_of(only("7")), max_tokens=8, num=1)


def only(token: str) -> Family:
    """An LM that says one token for ever."""
    tokenizer = byte_tokenizer(special=("<s>", "</s>"), eos_token="</s>")
    model = tiny(LlamaConfig, tokenizer, {token: 8.0}, ends=tokenizer.eos_token_id)
    return Family(model, tokenizer)


def test_forced_answers_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(InputError, match=r"none of 28 forced answers can be read .* 'short'"):
        run(lm_of(only("Ġ")))


def test_a_close_text_that_closes_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"'So: ' does not close a thought: expected '</think>'"):
        run(lm_of(r1_like()), close_text="So: ")


def test_at_least_one_question_is_needed() -> None:
    with pytest.raises(InputError, match="no question"):
        run(lm_of(base_like()), num=0)


def test_what_never_ends_is_warned_of_and_an_answer_can_end_with_a_text() -> None:
    lm = lm_of(only("7"))
    thoughts, answers = run(lm).warnings
    assert "within 64 tokens: raise --max-tokens" in thoughts
    assert "within 16 tokens: raise --max-answer-tokens" in answers
    assert run(lm, answer_end="77").warnings == [thoughts]


def test_a_close_text_that_the_tokenizer_cannot_spell_is_warned_of() -> None:
    lm = LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())
    warnings = run(lm, every=4, close_text="</think> Therefore").warnings
    assert any("the LM sees another text" in warning for warning in warnings)
    assert not any("another text" in w for w in run(lm, every=4, close_text="</think>\n").warnings)


def test_markers_in_what_is_said_in_the_open_are_warned_of() -> None:
    family = qwen3_like()
    family.tokenizer.chat_template = PLAIN
    warnings = run(lm_of(family)).warnings
    assert any("--think-start '<think>' --think-end '</think>'" in text for text in warnings)
    stated = lm_of(family, think_start="<think>", think_end="</think>")
    assert not any("in the open" in text for text in run(stated).warnings)


def test_a_report_shortens_long_texts() -> None:
    test = run(lm_of(only("7")), max_tokens=300)
    assert all(len(line) < 300 for line in str(test).splitlines())
