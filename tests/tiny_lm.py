"""Small LMs for tests: one with random weights, one that follows a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from lms.embedded import CHAT_TEMPLATE

WORDS = ("<pad>", "<eos>", "<think>", "</think>", "wait", "so", ".", *(str(n) for n in range(20)))
IDS = {word: i for i, word in enumerate(WORDS)}
PAD, EOS, CLOSE = IDS["<pad>"], IDS["<eos>"], IDS["</think>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(**changes: Any) -> LlamaConfig:
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    return LlamaConfig(**shape | changes)


def tiny_lm(seed: int = 0, **changes: Any) -> Any:
    """An LM with random weights; its thoughts are noise that ends now and then."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return model


class ScriptedLM(LlamaForCausalLM):
    """An LM whose next token is a function of its newest token and that token's position."""

    def __init__(self, next_token: Callable[[int, int], int]) -> None:
        super().__init__(tiny_config(hidden_size=8, num_attention_heads=1, num_key_value_heads=1))
        self.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
        self.next_token = next_token

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        logits = torch.zeros(len(input_ids), 1, len(WORDS))
        for row, (token, position) in enumerate(
            zip(input_ids[:, -1].tolist(), position_ids[:, -1].tolist(), strict=True)
        ):
            logits[row, 0, self.next_token(token, position)] = 5.0
        return CausalLMOutputWithPast(logits=logits)
