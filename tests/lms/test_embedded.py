"""The embedded LM: its thoughts, its training rows and the shipped weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from haltwise import InputError
from haltwise.policy.answers import read_answer
from lms.embedded import (
    CLOSE,
    EMBEDDED,
    HABITS,
    THINK,
    UNKNOWN,
    VOCABULARY,
    Habits,
    WorkedThought,
    attempt,
    prompt_of,
    think,
)
from lms.questions import Question
from lms.scorers import short as exact_match
from lms.tasks import TASKS, questions
from lms.train_embedded import (
    IDS,
    EmbeddedTrainingConfig,
    batches,
    build_model,
    build_sequence,
    build_tokenizer,
    held_out_questions,
    learning_rate,
    loss_of,
    main,
    train,
)

SURE = Habits(0.0, 0.0, 1, 2, 9, 0.0, 0.0)
SUM = Question("q", "sum", "short", "sum : 7 + 12 - 5", "14", "train")
LET = Question("q", "let", "short", "let : b = a - 3 , c = b + 2 , a = 7 ; c", "6", "train")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_attempts_by_hand() -> None:
    assert " ".join(attempt(SUM, 0.0, 1, rng())) == "7 + 12 = 19 - 5 = 14 so 14"
    assert " ".join(attempt(LET, 0.0, 1, rng())) == ("a = 7 , b = a - 3 = 4 , c = b + 2 = 6 so 6")


def test_a_certain_slip_is_off_by_its_reach() -> None:
    words = attempt(SUM, 1.0, 1, rng())
    assert words[4] in {"18", "20"}
    assert words[-1] == words[-3]


@pytest.mark.parametrize("task", TASKS)
def test_without_slips_every_attempt_gives_gold(task: str) -> None:
    for question in questions(task, "train", 30):
        thought = think(question, SURE, rng())
        assert {value for _, value in thought.results} == {question.gold}
        assert 2 <= len(thought.results) <= 4
        assert thought.words[-1] == "ok"


@pytest.mark.parametrize("task", TASKS)
def test_verdicts_and_results_of_thoughts_with_slips(task: str) -> None:
    for i, question in enumerate(questions(task, "train", 30)):
        thought = think(question, HABITS[task], rng(i))
        values = [thought.words[place] for place, _ in thought.results]
        assert values == [value for _, value in thought.results]
        verdicts = [thought.words[place + 1] for place, _ in thought.results]
        agree = [a == b for a, b in zip(values[1:], values, strict=False)]
        assert verdicts == [".", *("ok" if same else "wait" for same in agree)]
        assert len(values) <= HABITS[task].attempts
        patient = think(question, replace(HABITS[task], impatient=0.0), rng(i))
        assert patient.words[-1] == "ok" or len(patient.results) == HABITS[task].attempts
        hasty = think(question, replace(HABITS[task], impatient=1.0), rng(i))
        assert "wait" not in hasty.words[:-1]


def test_latest_result() -> None:
    thought = WorkedThought(
        ("7", "so", "7", ".", "check", "8", "so", "8", "wait"), ((2, "7"), (7, "8"))
    )
    assert [thought.result_at(n) for n in (0, 2, 3, 7, 8, 9)] == [None, None, "7", "7", "8", "8"]


def test_tokenizer_round_trip_without_unknown_words() -> None:
    tokenizer = build_tokenizer()
    for question in questions("all", "dev", 30):
        thought = think(question, HABITS[question.task], rng())
        text = " ".join((prompt_of(question), *thought.words, CLOSE, thought.results[-1][1]))
        ids = tokenizer(text)["input_ids"]
        assert ids == [IDS[word] for word in text.split()]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_close_text_needs_no_blanks() -> None:
    assert build_tokenizer()(f"ok\n{CLOSE}\n17")["input_ids"] == [IDS["ok"], IDS[CLOSE], IDS["17"]]


def test_row_by_hand() -> None:
    row = build_sequence(SUM, replace(SURE, attempts=1), 2, rng())
    trunk = f"{prompt_of(SUM)} 7 + 12 = 19 - 5 = 14 so 14 . {CLOSE} 14".split()
    words = [VOCABULARY[i] for i in row.ids]
    assert words == [*trunk, CLOSE, "14", CLOSE, "14"]
    assert [VOCABULARY[i] for i in row.labels[:-4]] == [*trunk[1:], "<eos>"]
    assert [VOCABULARY[i] for i in row.labels[-4:]] == ["14", "<eos>", "14", "<eos>"]
    assert list(row.weights[:-4]) == [0.0] * 7 + [1.0] * (len(trunk) - 7)
    assert np.isnan(row.weights[-4:]).all()
    assert (row.positions[-4:] - row.reach[-4:]).tolist() == [1, 2, 1, 2]
    assert row.reach[-4:].min() >= 7


def test_a_forced_answer_is_what_the_appended_close_text_gives() -> None:
    model = build_model(EmbeddedTrainingConfig()).eval()
    row = build_sequence(SUM, SURE, 3, rng(1))
    rows: dict[str, torch.Tensor] = {}
    model.register_forward_hook(lambda _, __, out: rows.update(logits=out.logits))
    with torch.no_grad():
        loss_of(model, [row], 1.0)
    inside = rows["logits"][0].float()
    size = int((row.branch == 0).sum())
    for probe in range(3):
        start = size + 2 * probe
        alone = [*row.ids[: row.reach[start] + 1], *row.ids[start : start + 2]]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outside = model(input_ids=torch.tensor([alone])).logits[0, -2:].float()
        assert torch.allclose(inside[start : start + 2], outside, atol=0.05)


def test_stubborn_forced_answers_repeat_the_latest_result() -> None:
    wrong = replace(SURE, slip_first=1.0, attempts=1, stubborn=1.0)
    seen = set()
    for seed in range(30):
        row = build_sequence(SUM, wrong, 8, rng(seed))
        trunk = row.ids[row.branch == 0]
        result = len(trunk) - 4
        for place in range(len(trunk), len(row.ids), 2):
            told = row.labels[place]
            late = row.reach[place] >= result
            assert told == (trunk[-1] if late else IDS[SUM.gold])
            seen.add(bool(late))
    assert seen == {True, False}


def test_batches_depend_on_the_step_alone() -> None:
    config = EmbeddedTrainingConfig(steps=40, first_steps=32, rows=2, probes=2)
    whole = list(batches(config, 0))
    assert len(whole) == 40
    assert [len(rows) for rows in whole] == [4] * 32 + [2] * 8
    for resumed, rows in zip(batches(config, 35), whole[35:], strict=True):
        for a, b in zip(resumed, rows, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)


def test_learning_rate_rises_then_falls() -> None:
    config = EmbeddedTrainingConfig(steps=1000)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == config.lr / 100
    assert set(rates[99:600]) == {config.lr}
    assert rates[-1] == pytest.approx(0.0125 * config.lr, rel=0.01)


def test_a_finished_model_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="another --out"):
        main(EmbeddedTrainingConfig(out=tmp_path))


def test_a_device_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot use device 'abacus'"):
        main(EmbeddedTrainingConfig(out=tmp_path, device="abacus"))


def test_training_resumes_after_a_kill_and_writes_a_whole_model(tmp_path: Path) -> None:
    config = EmbeddedTrainingConfig(
        out=tmp_path / "lm", steps=3, first_steps=2, rows=1, width=16, layers=1, save_minutes=0.0
    )
    train(config)
    assert (tmp_path / "lm.work" / "state.pt").exists()
    main(replace(config, steps=4, check=1))
    record = json.loads((config.out / "training.json").read_text())
    assert record["steps"] == 4
    assert not (tmp_path / "lm.work").exists()
    assert AutoTokenizer.from_pretrained(config.out).get_vocab() == IDS
    assert AutoModelForCausalLM.from_pretrained(config.out).config.hidden_size == 16


@pytest.mark.whole
def test_held_out_questions_end_the_training(tmp_path: Path) -> None:
    """5 nats in each 100 steps are too much to ask: that is told twice, and a fifth follows."""
    config = EmbeddedTrainingConfig(
        out=tmp_path / "lm", steps=500, first_steps=0, rows=1, width=16, layers=1, probes=1,
        save_minutes=0.0, held_out=20, least_gain=5.0,
    )  # fmt: skip
    _, progress, _ = train(config)
    assert progress.step == 300 + 100
    assert train(config)[1].step == 400  # it goes on from its end, where there is nothing to do
    kept_back = {prompt_of(question) for question in held_out_questions(config)}
    words = {index: word for word, index in IDS.items()}
    learned = [" ".join(words[i] for i in row.ids) for rows in batches(config, 0) for row in rows]
    assert len(kept_back) == 20 and not any(
        text.startswith(prompt) for text in learned for prompt in kept_back
    )


@pytest.mark.whole
def test_shipped_model_is_small_and_answers() -> None:
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert tokenizer.get_vocab() == IDS
    assert {tokenizer.pad_token, tokenizer.unk_token, THINK} >= {"<pad>", UNKNOWN}
    assert model.generation_config.temperature >= 0.6
    asked = [q for q in questions("sum", "test", 24) if q.segment == "short"]
    inputs = tokenizer([prompt_of(q) for q in asked], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=300)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers = [read_answer(text.partition(CLOSE)[2]) for text in texts]
    right = [exact_match(a, q.gold) for a, q in zip(answers, asked, strict=True)]
    assert np.mean(right) >= 0.75
