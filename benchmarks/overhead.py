"""What a head costs beside `generate`: a head that never halts, so that the tokens are the same.

It is measured on the embedded LM, on random weights in the shape of a 135M LM, and on a GPU in that
of a 0.6B LM. Random weights cost what trained ones do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from benchmarks.timing import BenchResult, rate, take_turns
from haltwise import MEAN_LOGPROB, HaltHead, Halting, HeadConfig, InputError, Observing
from haltwise.policy.features import feature_names
from haltwise.transformers import HaltProcessor
from lms.embedded import CLOSE, EMBEDDED
from lms.language_model import LanguageModel

#: The feature groups that an LM shows without being asked for an answer.
GROUPS = ("pace", "distribution", "ending", "reflection")

_NUM_HIDDEN = 64
_NUM_PROMPT = 32


LMName = Literal["embedded", "135M", "0.6B"]


@dataclass(frozen=True)
class OverheadConfig:
    """What a head costs beside `generate`."""

    lms: tuple[LMName, ...] = ("embedded", "135M", "0.6B")
    """The LMs; without a GPU 0.6B is left out."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """The numbers of rows in a batch."""
    num_tokens: int = 64
    """The number of tokens of each row."""
    every: int = 16
    """The number of thinking tokens between decision points."""
    vocab_size: int = 49_152
    """The size of the 135M LM's vocabulary."""


def measure(config: OverheadConfig, repeats: int) -> list[BenchResult]:
    """Measures tokens a second with and without a head, and the ratio of times, for each LM.

    Raises:
        InputError: If a head that never halts changes the tokens.
    """
    load: dict[LMName, Callable[[], LanguageModel]] = {
        "embedded": partial(LanguageModel.load, EMBEDDED),
        "135M": partial(random_lm, _shape_135m(config.vocab_size), "cpu"),
        "0.6B": partial(random_lm, shape_600m(), "cuda"),
    }
    names = [name for name in config.lms if name != "0.6B" or torch.cuda.is_available()]
    return [result for name in names for result in _of_lm(name, load[name](), config, repeats)]


def _of_lm(name: str, lm: LanguageModel, config: OverheadConfig, repeats: int) -> list[BenchResult]:
    head = never_halting_head(config.every)
    results: list[BenchResult] = []
    for size in config.batch_sizes:
        label = f"{name}, batch {size}"
        works = {
            f"{label}: generate": partial(_generate, lm, size, config.num_tokens, None),
            f"{label}: with a head": partial(_generate, lm, size, config.num_tokens, head),
        }
        plain, with_head = (work() for work in works.values())  # this also warms up
        if not torch.equal(plain, with_head):
            raise InputError(f"{label}: a head that never halts changed the tokens")
        contestants = {
            key: partial(rate, partial(_count, work), clock=_clock(lm))
            for key, work in works.items()
        }
        alone, beside = take_turns("overhead", "tokens/s", contestants, repeats).values()
        results += [alone, beside, alone.over(beside, f"time: {label}: with a head / without")]
    return results


def _clock(lm: LanguageModel) -> Callable[[], float]:
    return time.process_time if lm.model.device.type == "cpu" else time.perf_counter


def _count(work: Callable[[], Tensor]) -> int:
    return work().numel()


def _generate(lm: LanguageModel, size: int, num_tokens: int, head: HaltHead | None) -> Tensor:
    """Generates tokens (size, num_tokens) of thoughts that follow random tokens."""
    model: Any = lm.model  # its `generate` has no type
    start = int(lm.tokenizer.get_vocab()["<think>"])
    drawn = torch.from_numpy(
        np.random.default_rng(size).integers(5, model.config.vocab_size, (size, _NUM_PROMPT))
    )
    ids = torch.cat([drawn, torch.full((size, 1), start)], dim=1).to(model.device)
    processors = [] if head is None else [HaltProcessor(head, model, lm.tokenizer)]
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        logits_processor=processors,
    )
    return out[:, ids.shape[1] :].cpu()


def never_halting_head(every: int) -> HaltHead:
    """Returns a head that looks at everything but answers, and never halts.

    Args:
        every: The number of thinking tokens between decision points.
    """
    num, rng = len(feature_names(GROUPS)), np.random.default_rng(0)
    observing = Observing(GROUPS, (0.0,) * num, (1.0,) * num, (0.1, 10.0))
    shapes = {
        "w0": (_NUM_HIDDEN, num + 1),
        "b0": (_NUM_HIDDEN,),
        "w1": (_NUM_HIDDEN, _NUM_HIDDEN),
        "b1": (_NUM_HIDDEN,),
        "w2": (1, _NUM_HIDDEN),
    }
    weights = {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()}
    weights["b2"] = np.full(1, -100.0)
    halting = Halting("at_halt", f"every {every} tokens", CLOSE, MEAN_LOGPROB)
    config = HeadConfig(observing, halting, default_price=1.0)
    return HaltHead(config, {name: array.astype(np.float32) for name, array in weights.items()})


def random_lm(config: Any, device: str) -> LanguageModel:
    """Returns an LM with random weights, and a tokenizer with a made-up word for every token.

    Args:
        config: The transformers config of the LM's shape.
        device: The device to make it on: in bfloat16 on a GPU, in float32 on a CPU.
    """
    words = ["<pad>", "<eos>", "<unk>", "<think>", CLOSE]
    words += [f"w{i}" for i in range(len(words), config.vocab_size)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lm.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    return LanguageModel(f"{config.model_type}-random", lm, tokenizer)


def _shape_135m(vocab_size: int) -> LlamaConfig:
    """Returns the shape of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def shape_600m() -> Qwen3Config:
    """Returns the shape of Qwen3-0.6B."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
