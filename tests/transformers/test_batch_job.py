from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from haltwise import HaltHead, InputError
from haltwise.engine.decoder import Decoder, sampling_uniforms
from haltwise.engine.token_rules import TokenRules
from haltwise.policy.votes import elected, is_settled
from haltwise.transformers import BatchAnswer, HaltProcessor, ProbingGeneration, generate_all
from tests.tiny_lm import CLOSE, EOS, IDS, ScriptedLM, tiny_lm
from tests.transformers.hf_cases import (
    ALWAYS,
    NEVER,
    TOKENIZER,
    accept,
    answer_to,
    blind_head,
    generate,
    head,
    lm_with,
    new_tokens,
    picky_head,
)

PROMPTS = [f"{n} {'. ' * (n % 4)}<think>" for n in range(11)]


def answers(
    model: Any, policy: HaltHead, num_slots: int = 3, **arguments: Any
) -> list[BatchAnswer]:
    defaults: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 40}
    done = generate_all(model, TOKENIZER, policy, num_slots=num_slots, **defaults | arguments)
    return sorted(done, key=lambda answer: answer.index)


def alone(model: Any, prompt: str, **arguments: Any) -> list[int]:
    return new_tokens(generate(model, [prompt], **arguments)[0], len(prompt.split()))


@pytest.mark.whole
@pytest.mark.parametrize("num_slots", [1, 4, 20])
@pytest.mark.parametrize("policy", [head(), blind_head("after 1")], ids=["probing", "blind"])
@pytest.mark.parametrize("price", [0, NEVER])
def test_a_head_that_never_halts_changes_nothing(
    policy: HaltHead, price: float, num_slots: int
) -> None:
    model = tiny_lm(seed=3)
    done = answers(model, policy, num_slots, price=price)
    assert [answer.index for answer in done] == list(range(11))
    for answer, prompt in zip(done, PROMPTS, strict=True):
        assert answer.ids == alone(model, prompt)
        closed = CLOSE in answer.ids or answer.ids[-1] == EOS
        assert answer.report.reason == ("closed by the LM" if closed else "token budget")
        end = answer.ids.index(CLOSE) + 1 if CLOSE in answer.ids else len(answer.ids)
        assert (answer.report.position, answer.report.price) == (end, price)
    looked = sum(answer.report.num_probe_tokens for answer in done)
    assert (looked > 0) == (price > 0 and policy.config.halting.probing == "always")


@pytest.mark.whole
@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rows_are_halted_as_beside_generate(seed: int, num_slots: int) -> None:
    terms: dict[str, Any] = {"price": 1.0, "min_tokens": 5, "max_tokens": 30}
    model, policy = tiny_lm(seed=seed), picky_head(seed)
    for answer in answers(model, policy, num_slots, accepts=accept, **terms):
        looking = HaltProcessor(policy, model, TOKENIZER, **terms)
        prompt = PROMPTS[answer.index]
        assert answer.ids == alone(model, prompt, logits_processor=[looking])
        (expected,) = looking.report
        if expected.halted:
            assert answer.report == expected
    probing = head(groups=("pace", "confidence", "tokens", "agreement"))
    for answer in answers(model, probing, num_slots, **terms | {"price": ALWAYS}):
        generation = ProbingGeneration(probing, TOKENIZER, **terms | {"price": ALWAYS})
        assert answer.ids == alone(model, PROMPTS[answer.index], custom_generate=generation)
        assert [answer.report] == generation.report
        assert answer.report.halted == bool(answer.report.answer) or answer.report.position == 30


def test_a_rule_looks_closer_while_the_answer_repeats() -> None:
    follows = {CLOSE: IDS["7"], IDS["7"]: EOS}
    model = ScriptedLM(lambda token, _: follows.get(token, IDS["."]))
    policy, prompt = head(rule="every 12 tokens, every 4 while the answer repeats"), "5 <think>"
    (looked,) = answers(model, policy, prompts=[prompt], price=NEVER, max_new_tokens=43)
    # At 12, 24, 28, 32, 36 and 40 tokens, each time for a 7 and its end.
    assert (looked.report.num_points, looked.report.num_probe_tokens) == (6, 12)
    generation = ProbingGeneration(policy, TOKENIZER, price=NEVER)
    generate(model, [prompt], custom_generate=generation, max_new_tokens=43)
    assert generation.report == [looked.report]


def test_answers_by_hand() -> None:
    # A thought is "." and more; a closed one is answered by 7 and the end.
    follows = {CLOSE: IDS["7"], IDS["7"]: EOS}
    model = ScriptedLM(lambda token, _: follows.get(token, IDS["."]))
    (looked,) = answers(model, head(), prompts=["5 <think>"], price=ALWAYS)
    assert TOKENIZER.decode(looked.ids) == ". . . . </think> 7 <eos>"
    assert (looked.report.answer, looked.report.num_probe_tokens) == ("7", 2)
    blind = blind_head(close="so </think>")
    (halted,) = answers(model, blind, prompts=["5 <think>"], price=ALWAYS, min_tokens=6)
    assert TOKENIZER.decode(halted.ids) == ". . . . . . . . so </think> 7 <eos>"
    assert (halted.report.reason, halted.report.position) == ("halted", 8)
    # A cap between decision points, and one at a point where nobody asks the head.
    for cap in (6, 8):
        for policy, num_probe_tokens in ((head(), 2), (blind, 0)):
            (capped,) = answers(model, policy, prompts=["5 <think>"], price=0, max_tokens=cap)
            close = "so " * (policy is blind) + "</think>"
            assert TOKENIZER.decode(capped.ids) == f"{'. ' * cap}{close} 7 <eos>"
            report = capped.report
            assert (report.reason, report.position) == ("capped", cap)
            assert report.num_probe_tokens == num_probe_tokens


@pytest.mark.parametrize("budget", [5, 6, 7])
@pytest.mark.parametrize("policy", [head(close="so </think>"), blind_head(close="so </think>")])
def test_the_budget_holds_for_halted_rows(policy: HaltHead, budget: int) -> None:
    follows = {CLOSE: IDS["7"], IDS["7"]: EOS}
    model = ScriptedLM(lambda token, _: follows.get(token, IDS["."]))
    done = answers(model, policy, price=ALWAYS, max_new_tokens=budget)
    for answer in done:
        whole = ". . . . so </think> 7"
        assert TOKENIZER.decode(answer.ids) == " ".join(whole.split()[:budget])
        assert answer.report.reason == "halted"


def test_prompts_are_taken_as_slots_become_free() -> None:
    num_taken = 0

    def prompts() -> Iterator[str]:
        nonlocal num_taken
        for prompt in PROMPTS:
            num_taken += 1
            yield prompt

    done = generate_all(tiny_lm(seed=3), TOKENIZER, head(), prompts(), 3, 40, price=ALWAYS)
    assert num_taken == 0
    for num_done, _ in enumerate(done):
        assert num_taken <= 3 + num_done
    assert (num_done, num_taken) == (10, 11)


@pytest.mark.whole
def test_sampled_answers_depend_on_the_prompt_and_the_seed_alone() -> None:
    model, arguments = tiny_lm(seed=3), {"temperature": 0.9, "price": NEVER}
    few, many = (answers(model, head(), num, **arguments) for num in (2, 7))
    assert few == many
    others = answers(model, head(), 2, **arguments, seed=1)
    assert sum(a.ids != b.ids for a, b in zip(few, others, strict=True)) > 6


@pytest.mark.whole
@pytest.mark.parametrize("burst", [0, 16])
def test_behind_closed_thoughts_answers_are_the_likeliest_tokens_and_free_ones_are_drawn(
    burst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other token is drawn, by the numbers that it has without a head."""
    monkeypatch.setattr("haltwise.transformers.batch_job.Decoder", partial(Decoder, burst=burst))
    model = tiny_lm(seed=3)
    policy = picky_head(2, policy=blind_head("every 8 tokens", close="so </think>"))
    sampled: dict[str, Any] = {"temperature": 0.9, "seed": 4}
    terms = sampled | {"price": 1.0, "max_tokens": 18, "accepts": accept}
    plain = answers(model, policy, price=0, **sampled)
    likeliest, free = (
        answers(model, policy, **terms, free_answers=is_free) for is_free in (False, True)
    )
    for answer, other, before in zip(likeliest, free, plain, strict=True):
        assert answer.report == other.report
        position, prompt = answer.report.position, PROMPTS[answer.index]
        if not answer.report.halted:
            assert answer.ids == other.ids == before.ids
            continue
        closed = [*before.ids[:position], IDS["so"], CLOSE]
        known = [*TOKENIZER.encode(prompt, add_special_tokens=False), *closed]
        assert answer.ids == closed + answer_to(model, known, 40 - len(closed))
        uniforms, drawn = sampling_uniforms(prompt, 4, 40), closed.copy()
        while len(drawn) < 40 and drawn[-1] != EOS:
            logits = model(torch.tensor([known])).logits[0, -1]
            cumulative = (logits / 0.9).softmax(-1).cumsum(-1)
            drawn.append(int((cumulative <= float(uniforms[len(drawn)])).sum()))
            known.append(drawn[-1])
        assert other.ids == drawn
    reasons = {answer.report.reason for answer in likeliest}
    assert reasons == {"halted", "capped", "closed by the LM"}
    assert sum(a.ids != b.ids for a, b in zip(likeliest, free, strict=True)) > 3


@pytest.mark.parametrize("policy", [head(), blind_head()])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_the_trouble_of_a_prompt_is_its_own(policy: HaltHead, num_slots: int) -> None:
    sound, ill = tiny_lm(seed=3), tiny_lm(seed=3)
    ill.get_input_embeddings().weight.data[IDS["9"]] = float("nan")
    prompts = ["", "9 <think>", "1 " * 10_000, *PROMPTS[:9]]
    troubled = answers(ill, policy, num_slots, prompts=prompts, price=ALWAYS)
    assert [answer.index for answer in troubled] == list(range(12))
    told = {answer.index: answer.trouble for answer in troubled if answer.trouble}
    assert told.pop(0).startswith("prompt '' has 0 tokens, expected 1 to")
    assert told.pop(2).startswith("prompt '1 1 1")
    assert set(told.values()) <= {f"LM gave NaN logits at position {n}" for n in range(40)}
    assert told[1].endswith("position 0")
    expected = answers(sound, policy, num_slots, prompts=prompts[3:], price=ALWAYS)
    for answer, other in zip(troubled[3:], expected, strict=True):
        if IDS["9"] not in other.ids:  # nor came upon it while it was looked at
            assert answer.trouble or (answer.ids, answer.report) == (other.ids, other.report)
    assert any(not answer.trouble for answer in troubled[3:])
    assert {answer.report.reason for answer in troubled[:3]} == {"cut off"}


@pytest.mark.whole
@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize("policy", [head(), blind_head()], ids=["probing", "blind"])
def test_the_answer_of_most_thoughts_is_given(policy: HaltHead, num_slots: int) -> None:
    """Thoughts are those of the next seeds, and none begins that could not change the answer."""
    model = tiny_lm(seed=3)
    arguments: dict[str, Any] = {"temperature": 0.9, "price": ALWAYS, "accepts": accept}
    each = [answers(model, policy, num_slots, seed=seed, **arguments) for seed in (4, 5, 6)]
    voted = answers(model, policy, num_slots, seed=4, num_thoughts=3, **arguments)
    rules, nums = TokenRules(TOKENIZER, policy.config.halting), set()
    for answer, *ones in zip(voted, *each, strict=True):
        texts = [str(TOKENIZER.decode(one.ids)).rpartition("</think>")[2] for one in ones]
        told = [rules.read_answer(text.removesuffix("<eos>")) for text in texts]
        num = next(n for n in (1, 2, 3) if is_settled(told[:n], 3))
        assert answer.thoughts == tuple(one.report for one in ones[:num])
        winner = ones[elected(told[:num])]
        assert (answer.ids, answer.report) == (winner.ids, winner.report)
        nums.add(num)
    assert nums == {2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": head(tokenizer="0123")}, "but the head was trained with 0123"),
        ({"price": -1.0}, "price is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_thoughts": 0}, "num_thoughts is 0"),
        ({"num_thoughts": 3}, "num_thoughts is 3 at a temperature of 0, where all thoughts are"),
        ({"model": lm_with("sliding")}, "expected full attention in every layer"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": tiny_lm(), "policy": head()}
    with pytest.raises(InputError, match=message):
        answers(**arguments | changes)


@pytest.mark.whole
@pytest.mark.parametrize("burst", [0, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thought_goes_on_where_its_answer_is_refused(
    temperature: float, burst: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused answer leaves what there would be without a head, and counts as a look."""
    monkeypatch.setattr("haltwise.transformers.batch_job.Decoder", partial(Decoder, burst=burst))
    arguments: dict[str, Any] = {"temperature": temperature}
    model = tiny_lm(seed=3)
    plain = answers(model, blind_head(), price=0, **arguments)
    taken = answers(model, blind_head(), price=ALWAYS, accepts=accept, **arguments)
    asked: list[str] = []

    def refuses(text: str) -> bool:
        asked.append(text)
        return False

    refused = answers(model, blind_head(), price=ALWAYS, accepts=refuses, **arguments)
    halted = [answer.index for answer in taken if answer.report.halted]
    assert len(halted) >= 4 and len(asked) == len(halted)
    for before, after, other in zip(plain, refused, taken, strict=True):
        assert after.ids == before.ids
        is_halted = after.index in halted
        assert after.report.fallback == ("answer refused" if is_halted else "")
        spent = other.ids[other.report.position :].index(CLOSE) + 1 if is_halted else 0
        dropped = len(other.ids) - other.report.position - spent if is_halted else 0
        assert after.report.num_probe_tokens == dropped
        assert after.report.reason == before.report.reason


def test_an_answer_that_is_not_read_is_refused_unless_the_cap_has_closed_its_thought() -> None:
    follows = {CLOSE: IDS["."], IDS["."]: EOS}  # it answers "."
    model = ScriptedLM(lambda token, _: follows.get(token, IDS["5"]))
    (gone_on,) = answers(model, blind_head(), prompts=["5 <think>"], price=ALWAYS)
    assert gone_on.report.fallback == "answer refused" and len(gone_on.ids) == 40
    (capped,) = answers(model, blind_head(), prompts=["5 <think>"], price=ALWAYS, max_tokens=3)
    assert (capped.report.reason, capped.report.fallback) == ("capped", "")
