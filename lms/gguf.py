"""Writes the embedded LM as a GGUF file for llama.cpp: `python -m lms.gguf --out FILE`.

In f32 llama.cpp then gives the same log probabilities, in a quantised type nearly so. It gives the
same ids for the same text as long as its words are separated by spaces. A word's text has its space
in front, a think marker none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file

from command import run, whole_file
from haltwise import InputError
from haltwise.errors import from_clone, needing
from lms.embedded import CHAT_TEMPLATE, CLOSE, EMBEDDED, EOS, PAD, THINK, UNKNOWN, VOCABULARY

with needing("lms.gguf", from_clone("gguf")):
    import gguf
    from gguf.quants import quantize

#: Names of weight types: float32, or integers of 8 or 4 bits in blocks of 32 that share a scale.
WeightType = Literal["f32", "q8_0", "q4_0"]

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_F32 = gguf.GGMLQuantizationType.F32
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
    type: WeightType = "f32"
    """The type of the weights: f32, or 8 or 4 bits a weight, which is rounded to the nearest."""
    lm: Path = EMBEDDED
    """The folder of the LM: the embedded one, or one that is made from it, such as lms.prune's."""


def write_gguf(path: Path, weight_type: WeightType = "f32", lm: Path = EMBEDDED) -> dict[str, int]:
    """Writes the embedded LM's weights, tokenizer and chat template as one GGUF file.

    The file appears whole or not at all.

    Args:
        path: The file; an earlier one is replaced.
        weight_type: The type of the weights. Vectors, and matrices whose rows are no whole number
            of blocks, stay in f32.
        lm: The folder of the LM, which has the embedded one's vocabulary.

    Returns:
        By type, how many tensors were written in it.

    Raises:
        InputError: If there is no such LM in the folder, or no place for the file.
        OSError: If the file cannot be written.
    """
    config = _shape(lm)
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise InputError(f"{path}: found no folder {path.parent}, expected one to write into")
    counts: Counter[str] = Counter()
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        _add_shape(writer, config, weight_type)
        _add_tokenizer(writer)
        for name, weight in _weights(lm, config):
            kind = _type_of(weight, weight_type)
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
            counts[kind.name.lower()] += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return dict(counts)


def _shape(lm: Path) -> dict[str, Any]:
    """Reads the shape of an LM.

    Raises:
        InputError: If the folder holds no LM with the embedded one's vocabulary.
    """
    try:
        config = dict(json.loads((lm / "config.json").read_text()))
    except (OSError, ValueError):
        config = {}
    found = config.get("model_type"), config.get("vocab_size")
    if found != ("llama", len(VOCABULARY)) or not (lm / "model.safetensors").is_file():
        raise InputError(f"{lm}: expected a folder with the embedded LM, or one made from it")
    return config


def _type_of(weight: np.ndarray, weight_type: WeightType) -> gguf.GGMLQuantizationType:
    """Returns the type that a tensor is written in."""
    kind, _ = _TYPES[weight_type]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if weight.ndim == 2 and weight.shape[1] % block == 0 else _F32


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], weight_type: WeightType) -> None:
    writer.add_file_type(_TYPES[weight_type][1])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
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


def _weights(lm: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each weight under llama.cpp's name; there is no output layer but the embedding."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(lm / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # RoPE turns pairs of rows: transformers pairs the two halves of a head, llama.cpp
            # pairs neighbours.
            halves = weight.reshape(config["num_attention_heads"], 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known, f"llama.cpp has no name for {name}"
        yield known, np.ascontiguousarray(weight)


def main(config: GgufConfig) -> None:
    """Writes the file that the settings name, and says what types its tensors have.

    Raises:
        InputError: If there is no such LM in the folder.
        OSError: If the file cannot be written.
    """
    counts = write_gguf(config.out, config.type, config.lm)
    kinds = ", ".join(f"{num} tensors in {kind}" for kind, num in counts.items())
    print(f"{config.out}: {kinds}, {config.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main, GgufConfig)
