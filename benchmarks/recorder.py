"""What recording costs beside plain generation of the same tokens, on the embedded LM.

Nothing is forced to a length: to forbid an end token or a close marker would change what is
measured, and ragged rows would leave `generate` waiting for its longest one. Instead questions are
taken whose greedy thought fills the token budget by itself. So every contestant generates the same
tokens in full batches, by code that is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.synthetic import RECORDED
from benchmarks.timing import BenchResult, rate, take_turns
from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.engine.decoder import Decoder
from lms.embedded import CLOSE, EMBEDDED, prompt_of
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tasks import questions
from recording.hf_engine import record


@dataclass(frozen=True)
class RecorderConfig:
    """What recording costs beside plain generation, with the embedded LM on one core."""

    num_batches: int = 2
    """The number of batches of questions."""
    batch_size: int = 32
    """The number of questions at once."""
    every: int = 64
    """The number of thinking tokens between probes."""
    max_tokens: int = 257
    """The number of tokens of each question. The last token is no decision point, and so it is one
    more than 4 x 64."""


def measure(config: RecorderConfig, repeats: int) -> list[BenchResult]:
    """Measures tokens a second, without those of probes, and ratios of time.

    Raises:
        InputError: If too few questions fill the token budget.
    """
    lm = LanguageModel.load(EMBEDDED)
    halting = Halting("always", f"every {config.every} tokens", CLOSE, MEAN_LOGPROB)
    blind, seeing = (
        Decoder(
            lm.model, lm.tokenizer, halting, config.batch_size, config.max_tokens, signals=signals
        )
        for signals in ((), RECORDED)
    )
    asked = long_questions(lm, blind, config.num_batches * config.batch_size)
    works = {
        "transformers generate": partial(_generate, lm, asked, config),
        "Decoder without probes": partial(_decode, blind, asked),
        "record, probes only": partial(_record, lm, blind, asked),
        "record, probes and signals": partial(_record, lm, seeing, asked),
    }
    contestants = {name: partial(rate, work) for name, work in works.items()}
    *plain, probing, recording = take_turns("recorder", "tokens/s", contestants, repeats).values()
    ratios = [
        other.over(mine, f"time: {mine.name} / {other.name}")
        for mine in (probing, recording)
        for other in plain
    ]
    return [*plain, probing, recording, *ratios]


def long_questions(lm: LanguageModel, decoder: Decoder, num: int) -> list[Question]:
    """Returns questions whose greedy thought fills the decoder's token budget.

    Args:
        lm: The LM.
        decoder: The decoder, which runs it.
        num: The number of questions.

    Raises:
        InputError: If there are too few such questions.
    """
    pool = questions("let", "train", 20 * num)
    by_id = {question.question_id: question for question in pool}
    rows = record(lm, decoder, [(question, 0) for question in pool])
    full = (row["question_id"] for row in rows if row["num_tokens"] == decoder.max_tokens)
    found = [by_id[question_id] for question_id in islice(full, num)]
    if len(found) < num:
        raise InputError(
            f"max_tokens is {decoder.max_tokens}: {len(found)} questions in {len(pool)} take "
            f"so many, expected {num}"
        )
    return found


def _generate(lm: LanguageModel, asked: list[Question], config: RecorderConfig) -> int:
    model: Any = lm.model  # its `generate` has no type
    num = 0
    for i in range(0, len(asked), config.batch_size):
        prompts = [prompt_of(question) for question in asked[i : i + config.batch_size]]
        inputs = lm.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=config.max_tokens,
            )
        num += out[:, width:].numel()
    return num


def _decode(decoder: Decoder, asked: list[Question]) -> int:
    slots = np.arange(decoder.num_slots)
    num = 0
    for i in range(0, len(asked), decoder.num_slots):
        prompts = [prompt_of(question) for question in asked[i : i + decoder.num_slots]]
        decoder.start(slots, prompts, [0] * len(slots))
        thoughts = [decoder.thoughts[slot] for slot in slots.tolist()]
        while not all(thought.ended for thought in thoughts):
            decoder.advance(slots[[not thought.ended for thought in thoughts]])
        num += sum(thought.num_tokens for thought in thoughts)
    return num


def _record(lm: LanguageModel, decoder: Decoder, asked: list[Question]) -> int:
    work = [(question, 0) for question in asked]
    return sum(row["num_tokens"] for row in record(lm, decoder, work))
