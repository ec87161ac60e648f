"""Writes the embedded LM as a GGUF file for llama.cpp: `python -m lms.gguf --out FILE`.

llama.cpp then gives the same log probabilities, and the same ids for the same text as long as its
words are separated by spaces. A word's text has its space in front, a think marker none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from command import run
from haltwise.errors import needing
from lms.embedded import CHAT_TEMPLATE, CLOSE, EMBEDDED, EOS, PAD, THINK, UNKNOWN, VOCABULARY

with needing("lms.gguf", "-e '.[gguf]'"):
    import gguf

_MARKERS = {
    PAD: gguf.TokenType.CONTROL,
    EOS: gguf.TokenType.CONTROL,
    UNKNOWN: gguf.TokenType.UNKNOWN,
    THINK: gguf.TokenType.USER_DEFINED,
    CLOSE: gguf.TokenType.USER_DEFINED,
}
"""The tokens that are not words: they are found anywhere in a text, also without spaces."""


@dataclass(frozen=True)
class GgufConfig:
    """Write the embedded LM as a GGUF file, for llama.cpp."""

    out: Path
    """The GGUF file; an earlier one is replaced."""


def write_gguf(path: Path) -> None:
    """Writes the embedded LM's float32 weights, tokenizer and chat template as one GGUF file.

    The file appears whole or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    config = json.loads((EMBEDDED / "config.json").read_text())
    temporary = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(temporary, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer)
    for name, weight in _weights(config):
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    # A tokenizer of T5's kind: every word is one piece, merged from no smaller pieces.
    writer.add_tokenizer_model("t5")
    writer.add_token_list([word if word in _MARKERS else "▁" + word for word in VOCABULARY])
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([_MARKERS.get(w, gguf.TokenType.NORMAL) for w in VOCABULARY])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_pad_token_id(VOCABULARY.index(PAD))
    writer.add_eos_token_id(VOCABULARY.index(EOS))
    writer.add_unk_token_id(VOCABULARY.index(UNKNOWN))
    writer.add_chat_template(CHAT_TEMPLATE)


def _weights(config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each weight under llama.cpp's name; there is no output layer but the embedding."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(EMBEDDED / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # RoPE turns pairs of rows: transformers pairs the two halves of a head, llama.cpp
            # pairs neighbours.
            halves = weight.reshape(config["num_attention_heads"], 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known, f"llama.cpp has no name for {name}"
        yield known, np.ascontiguousarray(weight)


def main(config: GgufConfig) -> None:
    """Writes the file that the settings name.

    Raises:
        OSError: If it cannot be written.
    """
    write_gguf(config.out)


if __name__ == "__main__":
    run(main, GgufConfig)
