from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Cache,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from haltwise import InputError
from haltwise.engine.fork import Fork, check_forkable
from tests.tiny_lm import CLOSE, IDS, tiny_lm
from tests.transformers.hf_cases import ATTENTIONS, HAS_FP8, lm_with

# Three rows that are padded on the left; each is fed whole but for two tokens.
ROWS = [[7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [9, 8, 7, 6, 12, 20]]
LENGTH = max(map(len, ROWS))
IDS_IN = torch.tensor([[0] * (LENGTH - len(row)) + row for row in ROWS])
MASK = torch.tensor([[0] * (LENGTH - len(row)) + [1] * len(row) for row in ROWS])
CLOSING = [IDS["so"], CLOSE]


@torch.no_grad()
def feed(model: Any, cache: Cache, start: int, end: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token logits after columns start to end, as `generate` runs an LM."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits: Tensor = model(
        input_ids=ids[:, start:end],
        attention_mask=mask[:, :end],
        position_ids=positions[:, start:end],
        past_key_values=cache,
        use_cache=True,
    ).logits[:, -1]
    return logits


def running(model: Any, cache: Cache) -> Cache:
    feed(model, cache, 0, LENGTH - 2, IDS_IN, MASK)
    for column in (LENGTH - 2, LENGTH - 1):
        feed(model, cache, column, column + 1, IDS_IN, MASK)
    return cache


@torch.no_grad()
def reference(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


@torch.no_grad()
def next_of(fork: Fork, rows: list[int], tokens: list[list[int]]) -> Tensor:
    return fork.feed(np.array(rows), np.array(tokens))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_fork_continues_its_rows_and_leaves_the_batch_alone(attention: str, kind: str) -> None:
    model = lm_with(attention)

    def cache() -> Cache:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        # No room is left for what the fork is fed.
        return StaticCache(config=model.config, max_cache_len=LENGTH + 1)

    batch, untouched = running(model, cache()), running(model, cache())
    fork = Fork(model, batch, MASK, np.array([2, 0]))
    logits = next_of(fork, [0, 1], [CLOSING, CLOSING])
    for found, row in zip(logits, (2, 0), strict=True):
        expected = reference(model, ROWS[row] + CLOSING)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # The first row drops out.
    for num, token in enumerate((9, 10), start=1):
        found = next_of(fork, [1], [[token]])[0]
        expected = reference(model, ROWS[0] + CLOSING + [9, 10][:num])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    ids = torch.cat([IDS_IN, torch.tensor([[4], [5], [6]])], dim=1)
    mask = torch.nn.functional.pad(MASK, (0, 1), value=1)
    after, expected = (
        feed(model, held, LENGTH, LENGTH + 1, ids, mask) for held in (batch, untouched)
    )
    assert torch.equal(after, expected)


@pytest.mark.skipif(not HAS_FP8, reason="this transformers has no cache in fp8")
def test_a_quantised_cache_is_forked_as_it_is() -> None:
    model = tiny_lm(seed=3)
    batch = running(model, QuantizedCache("fp8", model.config))
    twin = copy.deepcopy(batch)
    found = next_of(Fork(model, batch, MASK, np.array([1])), [0], [[9]])
    ids = torch.cat([IDS_IN, torch.tensor([[9], [9], [9]])], dim=1)
    mask = torch.nn.functional.pad(MASK, (0, 1), value=1)
    for held in (batch, twin):
        after = feed(model, held, LENGTH, LENGTH + 1, ids, mask)
        torch.testing.assert_close(found[0], after[1], atol=1e-5, rtol=1e-5)


def test_a_layer_of_both_kinds_is_forked_if_its_cache_is_dynamic() -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "mamba_n_heads": 2}
    shape |= {"mamba_d_ssm": 16, "mamba_d_head": 8, "mamba_d_state": 4}
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(FalconH1Config(vocab_size=27, **shape)).eval()
    batch = running(model, DynamicCache(config=model.config))
    found = next_of(Fork(model, batch, MASK, np.array([1])), [0], [CLOSING])[0]
    torch.testing.assert_close(found, reference(model, ROWS[1] + CLOSING), atol=1e-4, rtol=1e-4)
    static = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(InputError, match="StaticFullAttentionLayer, expected a dynamic cache"):
        check_forkable(model, static)


def test_a_batch_without_padding_has_no_mask() -> None:
    model = tiny_lm(seed=3)
    cache = DynamicCache(config=model.config)
    feed(model, cache, 0, 3, torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.long))
    found = next_of(Fork(model, cache, None, np.array([0])), [0], [CLOSING])[0]
    torch.testing.assert_close(found, reference(model, [7, 8, 9, *CLOSING]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_heads=2)), "T5For"),
        (BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1)), "BloomFor"),
    ],
)
def test_lms_without_positions_are_refused(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"{message}.*: expected a decoder-only LM"):
        check_forkable(model, DynamicCache())


def test_without_a_cache_there_is_nothing_to_fork() -> None:
    with pytest.raises(InputError, match="cache is NoneType, expected one of transformers'"):
        check_forkable(tiny_lm(), None)
