"""Tiny LMs of each family's form: a template, a byte-level BPE tokenizer, random weights.

What they say is digits, blanks and, now and then, the end of a thought or of an answer: each token
has a fixed log odds to come next, on top of what the random weights say. An LM of Qwen3's form
opens a thought after the line end of its prompt. So thoughts begin and end, forced answers can be
read, and nothing that is said means anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

_WIDTH, _LARGE = 32, 4.0
_SENTENCES = (
    "What is the sum of 12 and 30? Think step by step, then answer.",
    "Wait, 7 times 8 is 56, so the answer is 56. Let me check: 56 / 8 = 7.",
    "sum : 7 + 12 - 5\n\nlet : b = a - 3 , c = b + 2 , a = 7 ; c\n\n**Final answer**\n\n",
)

# One turn in the words of ChatML, and what Qwen3's form does with thoughts: the last one is shown
# and earlier ones are dropped; without thinking an empty one is put into the prompt.
QWEN3_TEMPLATE = """
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' and loop.last and message.reasoning_content -%}
    {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
  {%- endif -%}
  {{- message.content.split('</think>')[-1] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

# R1's form drops every thought; `OPENING` is what its later revisions add to the prompt.
R1_TEMPLATE = """
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- message.content -}}
  {%- elif message.role == 'user' -%}{{- '<|User|>' + message.content -}}
  {%- else -%}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|>OPENING' -}}{%- endif -%}
"""

# Turns must alternate, and there is no system message.
INSTRUCT_TEMPLATE = """
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('roles must alternate between user and assistant') -}}
  {%- endif -%}
  {{- '<|turn|>' + message.role + '\\n' + message.content | trim + '<|eot|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Family:
    """An LM with its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerFast

    def save(self, folder: Path) -> Path:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


def byte_tokenizer(
    markers: Sequence[str] = (), *, special: Sequence[str], adds_bos: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learned from three sentences.

    Args:
        markers: Added tokens that decoding keeps.
        special: Added tokens that decoding may skip.
        adds_bos: Whether the first of `special` is put in front of a text.
        options: Of the tokenizer, such as its template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(markers))
    if adds_bos:
        bos = (special[0], tokenizer.token_to_id(special[0]))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options
    )


def tiny(
    config: Any,
    tokenizer: PreTrainedTokenizerFast,
    odds: dict[str, float],
    after_line: str = "",
    ends: int | None = None,
) -> Any:
    """An LM with random weights that prefers some tokens.

    A state's first number is large everywhere, its second after one line end alone: the output
    layer reads the log odds from the first, and from the second that `after_line` comes next.

    Args:
        config: Class of the architecture's config.
        tokenizer: Of the LM.
        odds: By token, added to its logit; of the others -12.
        after_line: Token that follows a line end.
        ends: End token of the generation config.
    """
    torch.manual_seed(0)
    made = config(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=ends,
    )
    if hasattr(made, "head_dim"):
        made.head_dim = _WIDTH // 4
    model: Any = AutoModelForCausalLM.from_config(made).eval()
    model.generation_config = GenerationConfig(eos_token_id=ends, do_sample=True, temperature=1.0)
    ids = tokenizer.get_vocab()
    tokens_in, tokens_out = model.get_input_embeddings().weight, model.lm_head.weight
    with torch.no_grad():
        for layer in model.model.layers:  # none of them writes these two numbers
            layer.self_attn.o_proj.weight[:2] = layer.mlp.down_proj.weight[:2] = 0.0
        tokens_in[:, :2] = torch.tensor([_LARGE, 0.0])
        tokens_out[:, :2] = torch.tensor([-12.0 / _LARGE, 0.0])
        for token, log_odds in odds.items():
            tokens_out[ids[token], 0] = log_odds / _LARGE
        if after_line:
            tokens_in[tokenizer.encode("\n", add_special_tokens=False), 1] = _LARGE
            tokens_out[ids[after_line], 1] = 30.0 / _LARGE
    return model


_DIGITS = dict.fromkeys("0123456789", 2.0) | {"Ġ": 1.0}


def qwen3_like() -> Family:
    """The LM opens a thought; its generation config does not know what ends a turn."""
    tokenizer = byte_tokenizer(
        ("<think>", "</think>"),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN3_TEMPLATE,
    )
    odds = _DIGITS | {"</think>": -1.0, "<|im_end|>": -1.5}
    eos = tokenizer.eos_token_id
    return Family(tiny(Qwen3Config, tokenizer, odds, "<think>", eos), tokenizer)


def r1_like(opening: str = "<think>\n") -> Family:
    """The prompt opens a thought, unless `opening` is empty; markers are special tokens."""
    bos, eos = "<|begin|>", "<|end|>"
    tokenizer = byte_tokenizer(
        special=(bos, eos, "<|User|>", "<|Assistant|>", "<think>", "</think>"),
        adds_bos=True,
        bos_token=bos,
        eos_token=eos,
        chat_template=R1_TEMPLATE.replace("OPENING", opening.replace("\n", "\\n")),
    )
    odds = _DIGITS | {"</think>": -1.0, eos: -1.5}
    return Family(tiny(Qwen2Config, tokenizer, odds, ends=tokenizer.eos_token_id), tokenizer)


def instruct_like() -> Family:
    """No think markers; the template refuses a system message."""
    tokenizer = byte_tokenizer(
        special=("<s>", "</s>", "<|turn|>", "<|eot|>"),
        adds_bos=True,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=INSTRUCT_TEMPLATE,
    )
    odds = _DIGITS | {"<|eot|>": -2.0}
    return Family(tiny(LlamaConfig, tokenizer, odds, ends=tokenizer.eos_token_id), tokenizer)


def base_like() -> Family:
    """No template; the tokenizer puts its first token in front of every text."""
    tokenizer = byte_tokenizer(
        special=("<s>", "</s>"), adds_bos=True, bos_token="<s>", eos_token="</s>"
    )
    odds = _DIGITS | {"</s>": -2.0}
    return Family(tiny(LlamaConfig, tokenizer, odds, ends=tokenizer.eos_token_id), tokenizer)


FAMILIES = {
    "qwen3": qwen3_like,
    "r1": r1_like,
    "instruct": instruct_like,
    "base": base_like,
}


def write_gguf(family: Family, path: Path) -> Path:
    """Writes a Llama with byte-level BPE as llama.cpp keeps it, in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_shape(writer, family.model.config)
    _add_tokenizer(writer, family.tokenizer)
    _add_weights(writer, family.model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    ids, added = range(len(tokenizer)), tokenizer.added_tokens_decoder
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(ids))
    writer.add_token_types([control if i in added else normal for i in ids])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _add_weights(writer: gguf.GGUFWriter, model: Any) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if heads := num_heads.get(name.split(".")[-2]):
            # RoPE turns pairs: here the halves of a head, in llama.cpp its neighbours.
            halves = weight.reshape(heads, 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known, f"llama.cpp has no name for {name}"
        writer.add_tensor(known, np.ascontiguousarray(weight))
