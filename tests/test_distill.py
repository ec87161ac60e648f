"""The command that teaches an LM to think no longer than a head would have let it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import DistillConfig, main
from haltwise import HaltHead, InputError
from lms.chat import ChatConfig
from lms.embedded import EMBEDDED
from lms.fine_tune import FineTuneConfig
from lms.grpo import GrpoConfig
from lms.language_model import LanguageModel
from tests.recording.test_cut_thoughts import THOUGHT
from traces import Traces


@pytest.fixture
def told(
    make_traces: Callable[..., Traces], tmp_path: Path, run_head: HaltHead
) -> Callable[..., DistillConfig]:
    def config(
        steps: int = 2,
        row: dict[str, Any] = THOUGHT,
        recorder: dict[str, Any] | None = None,
        **changes: Any,
    ) -> DistillConfig:
        make_traces([row] * 4, recorder)
        run_head.save(tmp_path / "head")
        tuning = FineTuneConfig(epochs=steps, lr=1e-3, batch_size=4)
        found = DistillConfig(tmp_path / "head", tmp_path / "made.parquet", tmp_path / "lm")
        settings: dict[str, Any] = {"price": 1.0, "fine_tune": tuning}
        return replace(found, **settings | changes)

    return config


def loss_of(lm: LanguageModel, text: str) -> float:
    ids = torch.tensor([lm.tokenizer.encode(text, add_special_tokens=False)])
    model: Any = lm.model
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.whole
@pytest.mark.parametrize("rank", [0, 4])
def test_an_lm_learns_its_own_cut_thoughts(
    told: Callable[..., DistillConfig], capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    config = told(steps=8)
    tuning = replace(config.fine_tune, lora_rank=rank, lora_targets="q_proj, v_proj", lr=5e-3)
    folder = main(replace(config, fine_tune=tuning))
    assert "4 of 4 thoughts are right where they end or are cut: 28 tokens each, 26" in (
        capsys.readouterr().out
    )
    before, after = LanguageModel.load(EMBEDDED), LanguageModel.load(folder)
    cut = "sum : 9 + 3 <think> 9 + 3 = 11 so 11 . check 9 + 3 = 12 so 12 wait 9 + 3 = 12 so 12"
    cut += " </think> 12 <eos>"
    assert loss_of(after, cut) < loss_of(before, cut)
    assert after.fingerprint == before.fingerprint and after.temperature == before.temperature
    assert after.model.num_parameters() == before.model.num_parameters()
    record = json.loads((folder / "distilled.json").read_text())
    assert record["fine_tune"]["thoughts"] == 4 and record["fine_tune"]["lora_rank"] == rank


@pytest.mark.whole
def test_an_lm_learns_from_its_own_answers_alone(
    told: Callable[..., DistillConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    own = GrpoConfig(steps=2, questions=2, generations=2)
    budget = {"max_tokens": 16}
    folder = main(told(steps=0, recorder=budget, row=THOUGHT | {"gold": "99"}, price=2.0, grpo=own))
    # No answer is right, and all take the 16 tokens that there are, which cost 0.032.
    assert "answers to 4 questions return -0.032 in the first tenth of 2 steps, -0.032 in" in (
        capsys.readouterr().out
    )
    before, after = LanguageModel.load(EMBEDDED), LanguageModel.load(folder)
    assert after.fingerprint == before.fingerprint and after.temperature == before.temperature
    record = json.loads((folder / "distilled.json").read_text())
    assert record["grpo"]["steps"] == 2 and "thoughts" not in record["fine_tune"]


@pytest.mark.whole
def test_held_out_questions_end_the_fine_tuning(told: Callable[..., DistillConfig]) -> None:
    """Two of four questions are held out: no evaluation is 10 points above all before it."""
    config = told(steps=40, recorder={"max_tokens": 32}, held_out=0.5, least_gain=10.0)
    folder = main(config)
    record = json.loads((folder / "distilled.json").read_text())["fine_tune"]
    assert record["thoughts"] == 2 and record["steps"] < 40
    assert record["held_out_returns"][0][0] == 0


def test_the_lm_is_asked_as_it_was_recorded(
    told: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "system", "content": "Be brief"}]

    def load(lm: str, device: str, chat: ChatConfig) -> None:
        raise InputError(repr(chat.before()))

    monkeypatch.setattr(LanguageModel, "load", load)
    with pytest.raises(InputError) as refused:
        main(told(recorder={"messages": messages}))
    assert str(refused.value) == repr(tuple(messages))


def test_what_cannot_be_learned_is_refused(
    told: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    def refused(expected: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=expected):
            main(told(**changes))
        assert not (tmp_path / "lm").exists()

    refused("no train questions", row=THOUGHT | {"split": "dev"})
    refused("cannot use device 'abacus'", row=THOUGHT | {"split": "dev"}, device="abacus")
    refused("answer_rule is 'number', the head expects", recorder={"answer_rule": "number"})
    refused("no answer is right", row=THOUGHT | {"correct": [False] * 3, "final_correct": False})
    refused("expected a folder", head=tmp_path / "nothing")
    lora = FineTuneConfig(lora_rank=2, lora_targets="no_such_layer")
    refused("LoRA targets 'no_such_layer'", fine_tune=lora)
    once = FineTuneConfig(epochs=0)
    refused("--fine-tune.epochs and --grpo.steps are 0", fine_tune=once)
    own: dict[str, Any] = {"fine_tune": once, "grpo": GrpoConfig(steps=1)}
    unknown = THOUGHT | {"gold": None, "final_correct": None, "correct": None}
    refused("no train question has a gold answer", row=unknown, **own)
    refused("--grpo.generations is 1, expected at least 2", grpo=GrpoConfig(generations=1))
    refused("--grpo.lr is nan, expected positive", grpo=GrpoConfig(lr=math.nan))
    refused("--fine-tune.epochs is -1, expected 0 or more", fine_tune=FineTuneConfig(epochs=-1))
    refused("--price is -1.0, expected 0 or more", price=-1.0)
    refused("--price is nan, expected 0 or more", price=math.nan)
    refused("--held-out is 0.1 of 4 questions, expected at least 1", held_out=0.1)
    (tmp_path / "there").mkdir()
    refused("exists: expected a new folder", out=tmp_path / "there")


def test_a_head_of_another_lm_is_refused(
    told: Callable[..., DistillConfig], run_head: HaltHead
) -> None:
    config = told()
    other = HaltHead(replace(run_head.config, tokenizer="0" * 16), run_head.weights)
    other.save(config.head)
    with pytest.raises(InputError, match="the head is of an LM with tokenizer 0000"):
        main(config)
