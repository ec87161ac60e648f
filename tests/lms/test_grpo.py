"""An LM learns from what its own answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lms.fine_tune import FineTuneConfig
from lms.grpo import GrpoConfig, reinforce
from lms.held_out import HeldOut
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tasks import questions
from tests.families import FAMILIES
from tests.tiny_lm import tiny_lm, tiny_tokenizer

ASKED = questions("sum", "train", 4)
CONFIG = GrpoConfig(steps=20, lr=1e-2, questions=2, generations=8)


def shortness(_: Question, tokens: Sequence[int]) -> float:
    return -len(tokens) / 8


@pytest.mark.whole
@pytest.mark.parametrize("rank", [0, 4])
def test_an_lm_finds_the_optimum(rank: int) -> None:
    """Where each of at most 8 tokens costs an eighth, the best answer is the end token alone."""
    lm = LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())
    shape = {name: weight.shape for name, weight in lm.model.state_dict().items()}
    told = reinforce(lm, ASKED, shortness, 8, CONFIG, FineTuneConfig(lora_rank=rank))
    assert told["steps"] == 20
    assert told["first_return"] < -0.5 and told["last_return"] > -0.2
    prompt = torch.tensor([lm.tokenizer.encode(lm.prompt(ASKED[0].text))])
    with torch.inference_mode():
        likeliest = int(lm.model(input_ids=prompt).logits[0, -1].argmax())
    assert likeliest == lm.tokenizer.eos_token_id
    assert {name: weight.shape for name, weight in lm.model.state_dict().items()} == shape


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_an_lm_reads_what_it_reads_when_it_is_recorded(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its tokenizer would put a first token before a prompt that has one."""
    made = FAMILIES[family]()
    lm = LanguageModel(family, made.model, made.tokenizer)
    lm.set_end_tokens()
    read: list[torch.Tensor] = []
    generate = made.model.generate

    def noting(**inputs: Any) -> Any:
        read.append(inputs["input_ids"][0])
        return generate(**inputs)

    monkeypatch.setattr(made.model, "generate", noting)
    once = GrpoConfig(steps=1, questions=1, generations=2)
    reinforce(lm, ASKED[:1], shortness, 8, once, FineTuneConfig())
    prompt = lm.prompt(ASKED[0].text)
    assert read[0].tolist() == lm.tokenizer.encode(prompt, add_special_tokens=False)


@pytest.mark.whole
def test_nothing_is_learned_where_all_answers_are_worth_the_same() -> None:
    lm = LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    reinforce(lm, ASKED, lambda *_: 1.0, 8, CONFIG, FineTuneConfig())
    after = lm.model.state_dict()
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_held_out_questions_end_the_training() -> None:
    """Their returns never change: by Student's interval of no spread, that is no gain at once."""
    lm = LanguageModel("tiny", tiny_lm(seed=1), tiny_tokenizer())
    flat = HeldOut(lambda: [0.0, 1.0, 0.5], span=2.0, least_gain=0.01)
    told = reinforce(lm, ASKED, shortness, 8, CONFIG, FineTuneConfig(), flat)
    steps, means = zip(*told["held_out_returns"], strict=True)
    # Evaluations at each step; two in a row without gain, and then a tenth of 20 steps.
    assert steps == (0, 1, 2, 3, 4) and told["steps"] == 4 and set(means) == {0.5}
    assert "the return has gained at most" in told["ended"]
