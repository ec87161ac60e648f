from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.engine.slots import SequenceSlots
from haltwise.engine.token_rules import TokenRules
from tests.tiny_lm import CLOSE, EOS, WORDS, tiny_lm, tiny_tokenizer


def closing(tokens: list[int], max_tokens: int = 3) -> TokenRules:
    """Rules that close a thought with some tokens, and cut its answer."""
    text = " ".join(WORDS[token] for token in tokens)
    halting = Halting("always", "every 4 tokens", text, MEAN_LOGPROB, max_tokens)
    return TokenRules(tiny_tokenizer(), halting)


def reference_logits(model: Any, tokens: list[int]) -> Tensor:
    """Next-token logits without any cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return logits


def assert_holds(slots: SequenceSlots, model: Any, texts: dict[int, list[int]]) -> None:
    for row, tokens in texts.items():
        assert slots.lengths[row] == len(tokens)
        found = slots.next_logits(np.array([row]))[0]
        torch.testing.assert_close(found, reference_logits(model, tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_operations_equals_a_pass_without_a_cache(seed: int) -> None:
    model, rng = tiny_lm(seed), np.random.default_rng(seed)
    slots = SequenceSlots(model, 5)
    slots.prefill(np.arange(5), [[2]] * 5)
    texts = {row: [2] for row in range(5)}
    for _ in range(60):
        rows = rng.permutation(5)[: rng.integers(1, 6)]
        if rng.random() < 0.3:
            for row in rows:
                texts[row] = texts[row][: -rng.integers(1, 9)] or [2]
            slots.rollback(rows, np.array([len(texts[row]) - 1 for row in rows]))
            slots.step(rows, np.array([texts[row][-1] for row in rows]))
            continue
        chunks = [rng.integers(len(WORDS), size=rng.integers(1, 9)).tolist() for _ in rows]
        if rng.random() < 0.5:
            slots.prefill(rows, chunks)
        else:
            chunks = [chunk[:1] for chunk in chunks]
            slots.step(rows, np.array(chunks)[:, 0])
        for row, chunk in zip(rows, chunks, strict=True):
            texts[row] += chunk
    assert_holds(slots, model, texts)


def test_buffers_grow_without_losing_anything() -> None:
    model = tiny_lm()
    slots = SequenceSlots(model, 2)
    texts = {0: [5] * 250, 1: [7, 8, 9]}
    slots.prefill(np.arange(2), list(texts.values()))
    for _ in range(20):
        slots.step(np.arange(2), np.array([4, 6]))
        texts[0].append(4)
        texts[1].append(6)
    assert_holds(slots, model, texts)


def test_forced_answers_are_greedy_and_leave_no_mark() -> None:
    model = tiny_lm(seed=3)
    slots, rows = SequenceSlots(model, 4), np.array([2, 0, 3])
    texts = {2: [2, 9, 10], 0: [2, 11], 3: [2, 5, 6, 7, 8]}
    slots.prefill(rows, list(texts.values()))
    before = slots.next_logits(rows)
    answers = slots.force(rows, closing([6, CLOSE], 7), [EOS, 4])
    assert torch.equal(slots.next_logits(rows), before)
    assert_holds(slots, model, texts)
    for row, answer in zip(rows, answers, strict=True):
        tokens, logprobs = [*texts[row], 6, CLOSE], []
        for _ in range(7):
            best = reference_logits(model, tokens).log_softmax(dim=-1).max(dim=-1)
            if int(best.indices) in (EOS, 4):
                break
            tokens.append(int(best.indices))
            logprobs.append(float(best.values))
        assert answer.tokens == tokens[len(texts[row]) + 2 :]
        assert answer.num_tokens == min(7, len(answer.tokens) + 1)
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
        if logprobs:
            assert answer.confidence == pytest.approx(np.exp(np.mean(logprobs)), abs=1e-4)
    slots.step(rows, np.array([9, 9, 9]))
    assert_holds(slots, model, {row: [*tokens, 9] for row, tokens in texts.items()})


def test_last_layer_states_are_those_that_the_head_reads() -> None:
    model, rows = tiny_lm(seed=3), np.array([2, 0])
    slots = SequenceSlots(model, 3, keep_hidden=True)
    slots.prefill(rows, [[2, 9, 10], [2, 11]])
    slots.step(rows[:1], np.array([7]))
    slots.force(rows, closing([6, CLOSE]), [EOS])
    found = slots.last_hidden(rows)
    assert found is not None
    for state, tokens in zip(found, ([2, 9, 10, 7], [2, 11]), strict=True):
        with torch.no_grad():
            out = model(torch.tensor([tokens]), output_hidden_states=True)
        torch.testing.assert_close(state, out.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-5)
    assert not model.lm_head._forward_pre_hooks
    assert SequenceSlots(model, 3).last_hidden(rows) is None
    model.lm_head = None
    with pytest.raises(InputError, match="LlamaForCausalLM has no output embeddings"):
        SequenceSlots(model, 3, keep_hidden=True)


def test_an_empty_answer_has_no_confidence() -> None:
    slots = SequenceSlots(tiny_lm(), 1)
    slots.prefill(np.arange(1), [[2, 3]])
    (answer,) = slots.force(np.arange(1), closing([CLOSE]), list(range(len(WORDS))))
    assert (answer.tokens, answer.num_tokens, answer.confidence) == ([], 1, 0.0)
    assert np.isnan(answer.worst_logprob)


def test_logits_that_are_not_numbers_show_in_the_answer() -> None:
    model = tiny_lm()
    model.lm_head.weight.data[:] = torch.nan
    slots = SequenceSlots(model, 1)
    slots.prefill(np.arange(1), [[2, 3]])
    (answer,) = slots.force(np.arange(1), closing([CLOSE]), list(range(len(WORDS))))
    assert np.isnan(answer.logprobs).all()
    assert np.isnan(answer.confidence)


def test_a_half_precision_lm_gives_float32_logits() -> None:
    model = tiny_lm().bfloat16()
    slots = SequenceSlots(model, 2)
    slots.prefill(np.arange(2), [[2, 3, 4], [5]])
    logits = slots.next_logits(np.arange(2))
    assert logits.dtype == torch.float32
    reference = reference_logits(model, [2, 3, 4]).float()
    torch.testing.assert_close(logits[0], reference, atol=0.1, rtol=0.05)


def test_lms_that_cannot_be_rolled_back_are_refused() -> None:
    shape: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    sliding = MistralForCausalLM(MistralConfig(**shape, num_hidden_layers=1, sliding_window=4))
    with pytest.raises(InputError, match="DynamicSlidingWindowLayer: expected full attention"):
        SequenceSlots(sliding, 1)
    encoder = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(InputError, match="decoder-only"):
        SequenceSlots(encoder, 1)
    with pytest.raises(InputError, match="expected sdpa or eager"):
        SequenceSlots(tiny_lm(attn_implementation="flex_attention"), 1)


@pytest.mark.parametrize("burst", [0, 4])
def test_slots_that_nobody_holds_are_gone_at_once(burst: int) -> None:
    """Their cache may fill a GPU, whose allocator waits for no garbage collector."""
    gc.disable()
    try:
        slots = SequenceSlots(tiny_lm(), 2, burst=burst)
        slots.prefill(np.arange(2), [[2], [3]])
        slots.force(np.arange(2), closing([CLOSE]), [EOS])
        seen = weakref.ref(slots)
        del slots
        assert seen() is None
    finally:
        gc.enable()
