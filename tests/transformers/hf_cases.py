"""Heads, tiny LMs and caches for tests of what runs beside `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from haltwise import MEAN_LOGPROB, HaltHead, Halting, HeadConfig, Observing, feature_names
from haltwise.policy.halting import Probing
from tests.projections import some_projection
from tests.tiny_lm import EOS, PAD, tiny_config, tiny_lm, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["3 . 4 <think>", "5 <think>", "7 so 8 wait 9 <think>"]
# At NEVER no `head` halts, at ALWAYS each does.
NEVER, ALWAYS = 0.1, 10.0
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "pad_token_id": EOS}
BLIND = ("pace", "distribution", "ending", "reflection")


def head(
    probing: Probing = "always",
    rule: str = "every 4 tokens",
    groups: tuple[str, ...] = ("pace", "confidence", "agreement"),
    close: str = "</think>",
    tokenizer: str = "",
) -> HaltHead:
    """Halts wherever the price is high."""
    size = len(feature_names(groups))
    observing = Observing(groups, (0.0,) * size, (1.0,) * size, (NEVER, ALWAYS))
    weights = {
        "w0": np.zeros((1, size + 1)),
        "b0": np.zeros(1),
        "w1": np.eye(1),
        "b1": np.zeros(1),
        "w2": np.full((1, 1), 50.0),
        "b2": np.zeros(1),
    }
    weights["w0"][0, -1] = 3.0
    halting = Halting(probing, rule, close, MEAN_LOGPROB, 3)
    config = HeadConfig(observing, halting, default_price=NEVER, tokenizer=tokenizer)
    return HaltHead(config, {name: w.astype(np.float32) for name, w in weights.items()})


def blind_head(rule: str = "every 4 tokens", close: str = "</think>", **changes: Any) -> HaltHead:
    """As `head`, but without a look at answers."""
    return head("at_halt", rule, **{"groups": BLIND, "close": close} | changes)


def accept(text: str) -> bool:
    """Any answer can be given."""
    return True


def picky_head(
    seed: int, groups: tuple[str, ...] = BLIND, policy: HaltHead | None = None
) -> HaltHead:
    """As `policy`, a blind head if not told, with random weights: half of its decisions halt."""
    policy, rng = policy or blind_head(), np.random.default_rng(seed)
    num = len(feature_names(groups))
    projection = some_projection(32) if "hidden" in groups else None
    observing = replace(
        policy.config.observing,
        groups=groups,
        mean=tuple(rng.normal(size=num)),
        scale=(1.0,) * num,
        projection=projection,
    )
    weights = {
        "w0": rng.normal(size=(4, num + 1)),
        "b0": rng.normal(size=4),
        "w1": rng.normal(size=(4, 4)),
        "b1": rng.normal(size=4),
        "w2": rng.normal(size=(1, 4)),
        "b2": np.full(1, -1.0),
    }
    config = replace(policy.config, observing=observing)
    return HaltHead(config, {name: w.astype(np.float32) for name, w in weights.items()})


def generate(model: Any, prompts: Sequence[str] = PROMPTS, **arguments: Any) -> Any:
    torch.manual_seed(5)
    inputs = TOKENIZER(list(prompts), return_tensors="pt", padding=True)
    return model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False} | arguments)


def new_tokens(row: Tensor, prompt_len: int = 6, ends: Sequence[int] = (EOS,)) -> list[int]:
    """What was generated, up to an end token."""
    tokens: list[int] = row[prompt_len:].tolist()
    return tokens[: min(tokens.index(end) + 1 if end in tokens else len(tokens) for end in ends)]


def answer_to(model: Any, tokens: list[int], max_new_tokens: int) -> list[int]:
    """What an LM goes on with greedily after some tokens, without any cache."""
    out = model.generate(
        input_ids=torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False,
        use_cache=False,
        max_new_tokens=max_new_tokens,
    )
    return new_tokens(out[0], len(tokens))


def lm_with(attention: str) -> Any:
    """A tiny LM with random weights, by what its layers do."""
    if attention == "full":
        return tiny_lm(seed=3)
    shape = tiny_config().to_dict()
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id"]
    names += ["num_attention_heads", "num_key_value_heads", "initializer_range", "bos_token_id"]
    shape = {name: shape[name] for name in names} | {"eos_token_id": EOS}
    torch.manual_seed(3)
    model: Any
    if attention == "sliding":
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=6))
    elif attention == "full and sliding":
        shape |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8))
    elif attention == "full and linear":
        shape |= {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
        shape |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
        shape |= {"layer_types": ["linear_attention", "full_attention"]}
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**shape, head_dim=8))
    else:
        assert attention == "full and convolution"
        shape |= {"layer_types": ["conv", "full_attention"]}
        model = Lfm2ForCausalLM(Lfm2Config(**shape))
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return model.eval()


ATTENTIONS = ("full", "sliding", "full and sliding", "full and linear", "full and convolution")
#: LMs by their attention, and what makes `generate` use some kind of cache.
CACHES: list[tuple[str, dict[str, Any]]] = [
    *((attention, {}) for attention in ATTENTIONS),
    *((attention, {"cache_implementation": "static"}) for attention in ATTENTIONS),
]


def _has_fp8() -> bool:
    try:
        QuantizedCache("fp8", tiny_config())
    except ValueError:
        return False
    return True


#: Whether this transformers has a quantised cache that needs no other package.
HAS_FP8 = _has_fp8()
if HAS_FP8:
    CACHES.append(
        ("full", {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}})
    )
