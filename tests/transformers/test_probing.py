from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from haltwise import InputError
from haltwise.engine.token_rules import tokenizer_fingerprint
from haltwise.policy.answers import read_answer
from haltwise.policy.halting import Probing
from haltwise.transformers import ProbingGeneration
from tests.tiny_lm import CLOSE, EOS, IDS, PAD, tiny_lm, tiny_tokenizer
from tests.transformers.hf_cases import (
    ALWAYS,
    CACHES,
    NEVER,
    SAMPLING,
    TOKENIZER,
    answer_to,
    generate,
    head,
    lm_with,
    new_tokens,
)


@pytest.mark.parametrize("rule", ["every 4 tokens", "every 1 tokens", "after 1"])
@pytest.mark.parametrize(
    "arguments", [{}, SAMPLING, {"repetition_penalty": 1.2, "eos_token_id": [EOS, IDS["7"]]}]
)
def test_a_head_that_never_halts_changes_nothing(rule: str, arguments: dict[str, Any]) -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **arguments)
    generation = ProbingGeneration(head(rule=rule), TOKENIZER)
    assert torch.equal(generate(model, **arguments, custom_generate=generation), plain)
    assert sum(row.num_probe_tokens for row in generation.report) > 0
    for row, tokens in zip(generation.report, plain, strict=True):
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
    generation = ProbingGeneration(
        head(probing, groups=groups, close="so </think>"), TOKENIZER, price=price
    )
    out = generate(model, **arguments, custom_generate=generation)
    for i in (0, 2):
        assert new_tokens(out[i]) == new_tokens(plain[i])
        assert not generation.report[i].halted
    thought = new_tokens(plain[1])[:4]
    prefix = [IDS["5"], IDS["<think>"], *thought, IDS["so"], CLOSE]
    answer = answer_to(model, prefix, 3)
    expected = [*thought, IDS["so"], CLOSE, *answer]
    assert new_tokens(out[1]) == expected + [EOS] * (answer[-1] != EOS)
    report = generation.report[1]
    assert (report.reason, report.position, report.price) == ("halted", 4, ALWAYS)
    assert report.answer == read_answer(str(TOKENIZER.decode(answer, skip_special_tokens=True)))
    assert report.num_probe_tokens == len(answer)
    if probing == "at_halt":
        assert generation.report[0].num_probe_tokens == 0


@pytest.mark.parametrize("sampling", [{}, SAMPLING])
@pytest.mark.parametrize(("attention", "cache"), CACHES)
def test_any_cache_will_do(attention: str, cache: dict[str, Any], sampling: dict[str, Any]) -> None:
    # Nothing but a budget ends a thought.
    open_end: dict[str, Any] = {"suppress_tokens": [EOS, CLOSE], "max_new_tokens": 12}
    model, arguments = lm_with(attention), cache | sampling | open_end
    plain = generate(model, **arguments)
    generation = ProbingGeneration(head(), TOKENIZER)
    assert torch.equal(generate(model, **arguments, custom_generate=generation), plain)
    assert sum(row.num_probe_tokens for row in generation.report) > 5
    terms: dict[str, Any] = {
        "price": np.array([NEVER, ALWAYS, NEVER]),
        "accepts": lambda text: True,
    }
    generation = ProbingGeneration(head(groups=("pace", "confidence")), TOKENIZER, **terms)
    out = generate(model, **arguments, custom_generate=generation)
    for i in (0, 2):
        assert new_tokens(out[i]) == new_tokens(plain[i])
    if "cache_config" not in cache:  # what is quantised gives other logits
        closed = [*new_tokens(plain[1])[:4], CLOSE]
        answer = answer_to(model, [IDS["5"], IDS["<think>"], *closed], 3)
        assert new_tokens(out[1]) == [*closed, *answer] + [EOS] * (answer[-1] != EOS)


@pytest.mark.parametrize("probing", ["always", "at_halt"])
def test_a_cap_closes_a_thought_between_decision_points_too(probing: Probing) -> None:
    model = tiny_lm(seed=3)
    plain = generate(model)
    groups = ("pace",) if probing == "at_halt" else ("pace", "confidence")
    policy = head(probing, groups=groups)
    generation = ProbingGeneration(policy, TOKENIZER, max_tokens=[6, None, 8])
    out = generate(model, custom_generate=generation)
    assert [row.reason for row in generation.report] == ["capped", "closed by the LM", "capped"]
    assert [generation.report[i].position for i in (0, 2)] == [6, 8]
    assert new_tokens(out[1]) == new_tokens(plain[1])
    for i, (start, position) in {0: (2, 6), 2: (0, 8)}.items():
        closed = [*new_tokens(plain[i])[:position], CLOSE]
        answer = answer_to(model, [*plain[i, start:6].tolist(), *closed], 3)
        assert new_tokens(out[i]) == [*closed, *answer] + [EOS] * (answer[-1] != EOS)


def test_before_min_tokens_no_head_halts() -> None:
    model = tiny_lm(seed=3)
    generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS, min_tokens=[0, 5, 8])
    generate(model, custom_generate=generation)
    assert [row.position for row in generation.report] == [4, 8, 8]


def test_at_a_price_of_zero_nobody_looks_at_answers() -> None:
    model = tiny_lm(seed=3)
    generation = ProbingGeneration(head(), TOKENIZER, price=[0, NEVER, 0], max_tokens=9)
    out = generate(model, custom_generate=generation)
    assert torch.equal(out[:, :15], generate(model)[:, :15])
    assert [row.halted for row in generation.report] == [True] * 3
    few = [row.num_probe_tokens <= 3 for row in generation.report]
    assert few == [True, False, True]


def test_when_all_is_known_the_lm_runs_no_more() -> None:
    model = tiny_lm(seed=3)
    generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(0))
    out = generate(model, custom_generate=generation)
    handle.remove()
    # The prompt and four tokens; the close text and at most two more answer tokens.
    assert len(calls) <= 5 + 3
    assert [row.reason for row in generation.report] == ["halted"] * 3
    slow = generate(
        model, custom_generate=generation, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(slow.sequences, out)
    assert len(slow.scores) == out.shape[1] - 6


def test_max_new_tokens_holds_for_halted_rows() -> None:
    model = tiny_lm(seed=3)
    for budget in (5, 6):
        generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS)
        out = generate(model, custom_generate=generation, max_new_tokens=budget)
        assert out.shape[1] == 6 + budget
        assert out[:, 10].tolist() == [CLOSE] * 3
    generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS)
    plain = generate(model, max_new_tokens=4)
    assert torch.equal(generate(model, custom_generate=generation, max_new_tokens=4), plain)
    assert [row.reason for row in generation.report] == ["token budget"] * 3


def test_answers_that_are_not_numbers_halt_nothing() -> None:
    model = tiny_lm(seed=3)
    arguments: dict[str, Any] = {"bad_words_ids": [[CLOSE]]}
    plain = generate(model, **arguments)
    with torch.no_grad():
        model.model.embed_tokens.weight[CLOSE] = torch.nan
    generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS)
    assert torch.equal(generate(model, **arguments, custom_generate=generation), plain)
    for row, tokens in zip(generation.report, plain, strict=True):
        assert row.num_bad_signals == (len(new_tokens(tokens)) - 1) // 4
    assert sum(row.num_bad_signals for row in generation.report) > 0


def test_a_batch_without_padding_and_a_single_row() -> None:
    model = tiny_lm(seed=3)
    for prompts in (["3 <think>"], ["3 <think>", "4 <think>"]):
        plain = generate(model, prompts, **SAMPLING)
        generation = ProbingGeneration(head(), TOKENIZER)
        assert torch.equal(generate(model, prompts, **SAMPLING, custom_generate=generation), plain)
        generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS)
        out = generate(model, prompts, **SAMPLING, custom_generate=generation)
        for row, reference in zip(out, plain, strict=True):
            assert new_tokens(row, 2)[:5] == [*new_tokens(reference, 2)[:4], CLOSE]


class StopAtClose(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids[:, -1] == CLOSE


def test_other_stopping_criteria_hold_for_halted_rows_too() -> None:
    model = tiny_lm(seed=3)
    arguments: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([StopAtClose()])}
    plain = generate(model, **arguments)
    generation = ProbingGeneration(head(), TOKENIZER)
    assert torch.equal(generate(model, **arguments, custom_generate=generation), plain)
    generation = ProbingGeneration(head(), TOKENIZER, price=np.array([ALWAYS, NEVER, ALWAYS]))
    out = generate(model, **arguments, custom_generate=generation)
    assert out[[0, 2], 10].tolist() == [CLOSE] * 2
    assert (out[[0, 2], 11:] == PAD).all()
    assert new_tokens(out[1]) == new_tokens(plain[1])
    generation = ProbingGeneration(head(), TOKENIZER, price=ALWAYS)
    assert torch.equal(
        generate(model, **arguments, custom_generate=generation)[[0, 2]], out[[0, 2], :11]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "0123"}, "but the head was trained with 0123"),
        ({"rule": "somewhere"}, "is none that can be run"),
        ({"close": ""}, "has no tokens"),
        ({"probing": "at_halt"}, "shows no forced answer"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    ProbingGeneration(head(tokenizer=tokenizer_fingerprint(TOKENIZER)), TOKENIZER)
    with pytest.raises(InputError, match=message):
        ProbingGeneration(head(**changes), TOKENIZER)


@pytest.mark.parametrize(
    ("price", "arguments", "message"),
    [
        (NEVER, {"num_beams": 2}, "num_beams is 2"),
        (NEVER, {"use_cache": False}, "cache is NoneType"),
        (np.array([1.0, 2.0]), {}, "2 values of price for 3 rows"),
    ],
)
def test_generation_that_cannot_be_halted_is_refused(
    price: Any, arguments: dict[str, Any], message: str
) -> None:
    generation = ProbingGeneration(head(), TOKENIZER, price=price)
    with pytest.raises(InputError, match=message):
        generate(tiny_lm(), **arguments, custom_generate=generation)


def test_terms_that_make_no_sense_are_refused_before_any_call() -> None:
    for price, told in ((-1.0, "price is -1"), ([1.0, -1.0], "price is -1"), ("dear", "a number")):
        with pytest.raises(InputError, match=told):
            ProbingGeneration(head(), TOKENIZER, price=price)


def test_terms_are_one_or_one_a_row() -> None:
    for terms in ({"min_tokens": [1, 2]}, {"max_tokens": [[5]]}):
        with pytest.raises(InputError, match=f"values of {next(iter(terms))} for [13] rows"):
            generate(tiny_lm(), custom_generate=ProbingGeneration(head(), TOKENIZER, **terms))
    with pytest.raises(InputError, match="max_tokens is 3, expected at least 4"):
        generation = ProbingGeneration(head(), TOKENIZER, min_tokens=4, max_tokens=3)
        generate(tiny_lm(), custom_generate=generation)


def test_fingerprints_follow_the_vocabulary() -> None:
    other = tiny_tokenizer()
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(TOKENIZER)
    other.add_tokens(["new"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(TOKENIZER)


@pytest.mark.parametrize("probing", ["always", "at_halt"])
def test_a_thought_goes_on_where_its_answer_is_refused(probing: Probing) -> None:
    """A row whose answer is refused has the tokens of plain `generate`, and is halted no more."""
    model, groups = tiny_lm(seed=3), ("pace",) if probing == "at_halt" else ("pace", "confidence")
    plain, policy = generate(model), head(probing, groups=groups)
    asked: list[str] = []

    def refuses(text: str) -> bool:
        asked.append(text)
        return False

    generation = ProbingGeneration(policy, TOKENIZER, price=ALWAYS, accepts=refuses)
    assert torch.equal(generate(model, custom_generate=generation), plain)
    assert [row.fallback for row in generation.report] == ["answer refused"] * len(asked)
    assert len(asked) == 3 and all(row.num_probe_tokens for row in generation.report)
    capped = ProbingGeneration(policy, TOKENIZER, price=ALWAYS, max_tokens=3, accepts=refuses)
    generate(model, custom_generate=capped)
    assert {row.reason for row in capped.report} == {"capped"}
