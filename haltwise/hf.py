"""Halting inside transformers' `generate`.

    halter = Halter(HaltHead.load(folder), tokenizer)
    ids = model.generate(**inputs, max_new_tokens=4096, custom_generate=halter)
    halter.report

Rows that are not halted get exactly the tokens that `generate` gives without a halter.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import LongTensor, Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from haltwise.decoder import Thought, ThoughtRules
from haltwise.errors import InputError
from haltwise.features import Index, Signals, answer_keys
from haltwise.head import HaltHead
from haltwise.monitor import HaltMonitor
from haltwise.slots import ForcedAnswer, check_supported, greedy_answers

Reason = Literal["halted", "closed by the LM", "token budget"]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give every token the same id: 16 hex digits of a SHA-256."""
    vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


@dataclass
class RowReport:
    """What happened to one row of a batch."""

    price: float
    """In exact match per 1,000 tokens."""
    reason: Reason = "token budget"
    """Why the thought ended; "token budget" stands for any stopping criterion."""
    position: int = 0
    """Tokens of the thought."""
    answer: str = ""
    """The forced answer, if the row was halted."""
    num_probe_tokens: int = 0
    """Tokens generated to look at answers; they are no part of the output."""
    num_bad_signals: int = 0
    """Decision points with signals that were not finite; the row went on."""

    @property
    def halted(self) -> bool:
        """Whether the head ended the thought."""
        return self.reason == "halted"


class Halter:
    """Lets a head halt the rows of `generate`: pass it as `custom_generate`.

    Works with greedy decoding and sampling, any logits processors and stopping criteria, and left
    padding. A halted row gets the close text, the answer that was probed, and the end token;
    max_new_tokens holds for them too. transformers passes no streamer on.

    Args:
        head: The policy.
        tokenizer: The LM's.
        price: In exact match per 1,000 tokens: one, or one a row; default the head's own.
        read_answer: Reads an answer from a forced answer's text, as the training traces' recorder
            did.
        think_start: Text after which a thought begins.
        think_end: Text with which the LM itself closes a thought.

    Raises:
        InputError: If the tokenizer is not the one that the head was trained with, or the head's
            halting conditions cannot be run.
    """

    def __init__(
        self,
        head: HaltHead,
        tokenizer: PreTrainedTokenizerBase,
        price: float | NDArray[np.float64] | None = None,
        read_answer: Callable[[str], str] = str.strip,
        think_start: str = "<think>",
        think_end: str = "</think>",
    ) -> None:
        """Checks that head and tokenizer fit."""
        expected, found = head.config.tokenizer, tokenizer_fingerprint(tokenizer)
        if expected and found != expected:
            raise InputError(f"tokenizer is {found}, but the head was trained with {expected}")
        self.head = head
        self.price = price
        self.read_answer = read_answer
        self.rules = ThoughtRules(tokenizer, head.config.halting, think_start, think_end)
        #: One entry a row, of the latest call.
        self.report: list[RowReport] = []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """Generates as `model._sample` does; called by `generate`.

        Raises:
            InputError: If this kind of generation cannot be halted.
        """
        cache = model_kwargs.get("past_key_values")
        _check(model, generation_config, cache)
        batch = _Batch(self, model, input_ids, generation_config, model_kwargs)
        self.report = [row.report for row in batch.rows]
        # transformers' own loop runs; a processor in the last place watches it and interferes.
        ids = model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([*logits_processor, batch]),
            stopping_criteria=StoppingCriteriaList([*stopping_criteria, _AllKnown(batch)]),
            generation_config=generation_config,
            **model_kwargs,
        )
        return ids
