from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from haltwise import (
    MEAN_LOGPROB,
    HaltHead,
    Halting,
    HeadConfig,
    InputError,
    Observing,
    feature_names,
)
from haltwise.answers import read_answer
from haltwise.halting import Probing
from haltwise.hf import Halter, tokenizer_fingerprint
from tests.tiny_lm import CLOSE, EOS, IDS, PAD, tiny_lm, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["3 . 4 <think>", "5 <think>", "7 so 8 wait 9 <think>"]
# At NEVER no head of these tests halts, at ALWAYS each does.
NEVER, ALWAYS = 0.1, 10.0


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
    halting = Halting(probing, rule, close, MEAN_LOGPROB, 3)
    weights = {
        "w0": np.zeros((1, size + 1)),
        "b0": np.zeros(1),
        "w1": np.eye(1),
        "b1": np.zeros(1),
        "w2": np.full((1, 1), 50.0),
        "b2": np.zeros(1),
    }
    weights["w0"][0, -1] = 3.0
    config = HeadConfig(observing, halting, default_price=NEVER, tokenizer=tokenizer)
    return HaltHead(config, {name: w.astype(np.float32) for name, w in weights.items()})


def generate(model: Any, prompts: list[str] = PROMPTS, **arguments: Any) -> Any:
    torch.manual_seed(5)
    inputs = TOKENIZER(prompts, return_tensors="pt", padding=True)
    return model.generate(**inputs, **{"max_new_tokens": 40, "do_sample": False} | arguments)


def new_tokens(row: Tensor, prompt_len: int = 6, ends: Sequence[int] = (EOS,)) -> list[int]:
    """What was generated, up to an end token."""
    tokens: list[int] = row[prompt_len:].tolist()
    return tokens[: min(tokens.index(end) + 1 if end in tokens else len(tokens) for end in ends)]


SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "pad_token_id": EOS}


@pytest.mark.parametrize("rule", ["every 4 tokens", "every 1 tokens", "after 1"])
@pytest.mark.parametrize(
    "arguments", [{}, SAMPLING, {"repetition_penalty": 1.2, "eos_token_id": [EOS, IDS["7"]]}]
)
def test_a_head_that_never_halts_changes_nothing(rule: str, arguments: dict[str, Any]) -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **arguments)
    halter = Halter(head(rule=rule), TOKENIZER)
    assert torch.equal(generate(model, **arguments, custom_generate=halter), plain)
    assert sum(row.num_probe_tokens for row in halter.report) > 0
    for row, tokens in zip(halter.report, plain, strict=True):
        ends = arguments.get("eos_token_id", [EOS])
        generated = new_tokens(tokens, ends=ends)
        closed = generated[-1] in ends or CLOSE in generated
        assert row.reason == ("closed by the LM" if closed else "token budget")
        stop = generated.index(CLOSE) + 1 if CLOSE in generated else len(generated)
        assert (row.halted, row.answer, row.position) == (False, "", stop)


@pytest.mark.parametrize("probing", ["always", "at_halt"])
@pytest.mark.parametrize("arguments", [{}, SAMPLING])
def test_a_halted_row_gets_its_forced_answer_and_others_go_on(
    probing: Probing, arguments: dict[str, Any]
) -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **arguments)
    groups = ("pace",) if probing == "at_halt" else ("pace", "confidence", "agreement")
    price = np.array([NEVER, ALWAYS, NEVER])
    halter = Halter(head(probing, groups=groups, close="so </think>"), TOKENIZER, price=price)
    out = generate(model, **arguments, custom_generate=halter)
    for i in (0, 2):
        assert new_tokens(out[i]) == new_tokens(plain[i])
        assert not halter.report[i].halted
    thought = new_tokens(plain[1])[:4]
    prefix = [IDS["5"], IDS["<think>"], *thought, IDS["so"], CLOSE]
    forced = model.generate(
        input_ids=torch.tensor([prefix]),
        attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
        do_sample=False,
        max_new_tokens=3,
    )
    answer = new_tokens(forced[0], len(prefix))
    expected = [*thought, IDS["so"], CLOSE, *answer]
    assert new_tokens(out[1]) == expected + [EOS] * (answer[-1] != EOS)
    report = halter.report[1]
    assert (report.reason, report.position, report.price) == ("halted", 4, ALWAYS)
    assert report.answer == read_answer(str(TOKENIZER.decode(answer, skip_special_tokens=True)))
    assert report.num_probe_tokens == len(answer)
    if probing == "at_halt":
        assert halter.report[0].num_probe_tokens == 0


def test_when_all_is_known_the_lm_runs_no_more() -> None:
    model = tiny_lm(seed=3)
    halter = Halter(head(), TOKENIZER, price=ALWAYS)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(0))
    out = generate(model, custom_generate=halter)
    handle.remove()
    # The prompt and four tokens; the close text and at most two more answer tokens.
    assert len(calls) <= 5 + 3
    assert [row.reason for row in halter.report] == ["halted"] * 3
    slow = generate(model, custom_generate=halter, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(slow.sequences, out)
    assert len(slow.scores) == out.shape[1] - 6


def test_max_new_tokens_holds_for_halted_rows() -> None:
    model = tiny_lm(seed=3)
    for budget in (5, 6):
        halter = Halter(head(), TOKENIZER, price=ALWAYS)
        out = generate(model, custom_generate=halter, max_new_tokens=budget)
        assert out.shape[1] == 6 + budget
        assert out[:, 10].tolist() == [CLOSE] * 3
    halter = Halter(head(), TOKENIZER, price=ALWAYS)
    plain = generate(model, max_new_tokens=4)
    assert torch.equal(generate(model, custom_generate=halter, max_new_tokens=4), plain)
    assert [row.reason for row in halter.report] == ["token budget"] * 3


def test_answers_that_are_not_numbers_halt_nothing() -> None:
    model = tiny_lm(seed=3)
    arguments: dict[str, Any] = {"bad_words_ids": [[CLOSE]]}
    plain = generate(model, **arguments)
    with torch.no_grad():
        model.model.embed_tokens.weight[CLOSE] = torch.nan
    halter = Halter(head(), TOKENIZER, price=ALWAYS)
    assert torch.equal(generate(model, **arguments, custom_generate=halter), plain)
    for row, tokens in zip(halter.report, plain, strict=True):
        assert row.num_bad_signals == (len(new_tokens(tokens)) - 1) // 4
    assert sum(row.num_bad_signals for row in halter.report) > 0


def test_a_batch_without_padding_and_a_single_row() -> None:
    model = tiny_lm(seed=3)
    for prompts in (["3 <think>"], ["3 <think>", "4 <think>"]):
        plain = generate(model, prompts, **SAMPLING)
        halter = Halter(head(), TOKENIZER)
        assert torch.equal(generate(model, prompts, **SAMPLING, custom_generate=halter), plain)
        halter = Halter(head(), TOKENIZER, price=ALWAYS)
        out = generate(model, prompts, **SAMPLING, custom_generate=halter)
        for row, reference in zip(out, plain, strict=True):
            assert new_tokens(row, 2)[:5] == [*new_tokens(reference, 2)[:4], CLOSE]


class StopAtClose(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids[:, -1] == CLOSE


def test_other_stopping_criteria_hold_for_halted_rows_too() -> None:
    model = tiny_lm(seed=3)
    arguments: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([StopAtClose()])}
    plain = generate(model, **arguments)
    halter = Halter(head(), TOKENIZER)
    assert torch.equal(generate(model, **arguments, custom_generate=halter), plain)
    halter = Halter(head(), TOKENIZER, price=np.array([ALWAYS, NEVER, ALWAYS]))
    out = generate(model, **arguments, custom_generate=halter)
    assert out[[0, 2], 10].tolist() == [CLOSE] * 2
    assert (out[[0, 2], 11:] == PAD).all()
    assert new_tokens(out[1]) == new_tokens(plain[1])
    halter = Halter(head(), TOKENIZER, price=ALWAYS)
    assert torch.equal(
        generate(model, **arguments, custom_generate=halter)[[0, 2]], out[[0, 2], :11]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "0123"}, "but the head was trained with 0123"),
        ({"rule": "somewhere"}, "can be replayed but not run"),
        ({"close": ""}, "has no tokens"),
        ({"probing": "at_halt"}, "need a forced answer"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    Halter(head(tokenizer=tokenizer_fingerprint(TOKENIZER)), TOKENIZER)
    with pytest.raises(InputError, match=message):
        Halter(head(**changes), TOKENIZER)


@pytest.mark.parametrize(
    ("price", "arguments", "message"),
    [
        (NEVER, {"num_beams": 2}, "num_beams is 2"),
        (NEVER, {"use_cache": False}, "expected a DynamicCache"),
        (NEVER, {"cache_implementation": "static"}, "expected a DynamicCache"),
        (np.array([1.0, 2.0]), {}, "2 prices for 3 rows"),
        (-1.0, {}, "price is -1"),
    ],
)
def test_generation_that_cannot_be_halted_is_refused(
    price: Any, arguments: dict[str, Any], message: str
) -> None:
    halter = Halter(head(), TOKENIZER, price=price)
    with pytest.raises(InputError, match=message):
        generate(tiny_lm(), **arguments, custom_generate=halter)


def test_fingerprints_follow_the_vocabulary() -> None:
    other = tiny_tokenizer()
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(TOKENIZER)
    other.add_tokens(["new"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(TOKENIZER)
