"""Batch jobs on an engine that is like vLLM's; the real one runs in tests/vllm_engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from haltwise import HaltHead, InputError
from haltwise.engine.batch_job import BatchAnswer
from haltwise.session.control import ConstantControl
from haltwise.session.request import RunningRequest
from haltwise.transformers import generate_all
from tests.tiny_lm import IDS, ScriptedLM, tiny_lm
from tests.toy_control import RisingPrice
from tests.transformers.hf_cases import (
    ALWAYS,
    NEVER,
    TOKENIZER,
    accept,
    answer_to,
    blind_head,
    head,
    picky_head,
)
from tests.vllm.fake_vllm import FakeLLM, plugin

PROMPTS = [f"{n} {'. ' * (n % 4)}<think>" for n in range(6)]
NUM_TOKENS = 28
GROUPS = ("pace", "confidence", "tokens", "agreement", "distribution", "reflection")
BLIND = ("pace", "distribution", "reflection")
RULES = ("every 4 tokens", "after 1", "every 8 tokens, every 4 while the answer repeats, at most 3")


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    with plugin() as module:
        yield module


def fake(model: Any, seed: int = 0, **of_model: Any) -> FakeLLM:
    return FakeLLM(model, TOKENIZER, Random(seed), **of_model)


def done(vllm: Any, llm: FakeLLM, policy: HaltHead, **arguments: Any) -> list[BatchAnswer]:
    """The answers in order, after a look at the engine's own count of tokens."""
    before = llm.num_generated
    defaults: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": NUM_TOKENS}
    answers = list(vllm.generate_all(llm, policy, **defaults | arguments))
    assert not llm.requests
    if policy.config.halting.probing == "always" and "num_thoughts" not in arguments:
        thought = [a.report.position if a.report.halted else len(a.ids) for a in answers]
        looks = sum(answer.report.num_probe_tokens for answer in answers)
        assert llm.num_generated - before == sum(thought) + looks
    return sorted(answers, key=lambda answer: answer.index)


def beside(model: Any, policy: HaltHead, **arguments: Any) -> list[BatchAnswer]:
    """The same of transformers' batch job."""
    defaults: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": NUM_TOKENS, "num_slots": 4}
    answers = generate_all(model, TOKENIZER, policy, **defaults | arguments)
    return sorted(answers, key=lambda answer: answer.index)


@pytest.mark.whole
@pytest.mark.parametrize("rule", RULES)
def test_answers_are_those_of_transformers(vllm: Any, rule: str) -> None:
    model, policy = tiny_lm(seed=3), picky_head(3, GROUPS, head(rule=rule))
    places = set()
    for terms in (
        {"price": 0.0},
        {"price": 0.0, "max_tokens": 6},
        {"price": 1.0, "min_tokens": 7, "accepts": accept},
        {"price": 1.0, "max_tokens": 22},
        {"price": 0.5, "control": RisingPrice(), "accepts": accept},
    ):
        answers = done(vllm, fake(model), policy, num_slots=2, **terms)
        assert answers == beside(model, policy, **terms)
        places |= {(a.report.reason, a.report.position) for a in answers}
    assert len({reason for reason, _ in places}) >= 3


@pytest.mark.whole
@pytest.mark.parametrize("rule", RULES[:2])
def test_an_lm_whose_head_does_not_look_answers_by_itself(vllm: Any, rule: str) -> None:
    model, policy = tiny_lm(seed=3), blind_head(rule, groups=BLIND, close="so </think>")
    for terms in ({}, {"accepts": accept}, {"accepts": lambda text: False}, {"max_tokens": 6}):
        answers = done(vllm, fake(model), policy, price=ALWAYS, **terms)
        assert answers == beside(model, policy, price=ALWAYS, **terms)


def test_how_likely_the_lm_ends_its_thought_takes_a_token_a_look(vllm: Any) -> None:
    model, policy = tiny_lm(seed=3), picky_head(1, ("pace", "confidence", "ending"), head())
    terms: dict[str, Any] = {"price": 1.0, "accepts": accept}
    answers = done(vllm, fake(model), policy, **terms)
    for answer, other in zip(answers, beside(model, policy, **terms), strict=True):
        at_end = other.report.position == NUM_TOKENS  # there nobody looks
        looks = other.report.num_points - at_end
        told = replace(other.report, num_probe_tokens=other.report.num_probe_tokens + looks)
        assert (answer.ids, answer.report) == (other.ids, told)
    assert {answer.report.halted for answer in answers} == {True, False}


def test_signals_are_those_of_transformers(vllm: Any) -> None:
    model = tiny_lm(seed=3)
    policy = picky_head(3, (*GROUPS, "ending"), head())
    seen: list[dict[Any, Any]] = []
    for run in (partial(done, vllm, fake(model)), partial(beside, model)):
        watching = Watching()
        run(policy, control=watching, num_slots=2, accepts=accept)
        seen.append(watching.seen)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 20
    for place, values in seen[0].items():
        np.testing.assert_allclose(values, seen[1][place], atol=1e-4)


class Watching(ConstantControl):
    """Keeps what is seen of each prompt at each position."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], list[float]] = {}

    def price(self, running: RunningRequest) -> float:
        assert running.point
        signals, place = running.point
        numbers = [float(column[place]) for column in vars(signals).values() if column is not None]
        self.seen[running.report.request.about["prompt"], running.thought.position] = numbers
        return super().price(running)


def test_looks_of_some_run_beside_the_thoughts_of_others(vllm: Any) -> None:
    llm = fake(tiny_lm(seed=3))
    step, together = llm.step, []

    def watched() -> list[Any]:
        together.append({params.max_tokens for _, params, *_ in llm.requests.values()})
        return step()

    llm.step = watched  # type: ignore[method-assign]
    done(vllm, llm, head(), price=NEVER)
    assert {3, 4} in together  # a forced answer has 3 tokens at most, a thought 4 up to a point
    assert llm.most_at_once == 3  # as many as the engine runs at once


@pytest.mark.whole
def test_sampled_tokens_hang_on_the_prompt_the_seed_and_the_place(vllm: Any) -> None:
    terms: dict[str, Any] = {"temperature": 0.9, "price": NEVER}
    twice = [*PROMPTS, PROMPTS[0]]
    llm = fake(tiny_lm(seed=3))
    few = done(vllm, llm, head(), prompts=twice, num_slots=2, **terms)
    assert few == done(vllm, fake(tiny_lm(seed=3), 7), head(), prompts=twice, num_slots=7, **terms)
    assert few[0].ids == few[-1].ids
    num_alike = llm.seeds.count(llm.seeds[0])
    assert num_alike == 2 and len(set(llm.seeds)) < len(llm.seeds)
    others = done(vllm, fake(tiny_lm(seed=3)), head(), prompts=twice, **terms, seed=1)
    assert sum(a.ids != b.ids for a, b in zip(few, others, strict=True)) > 3


def test_behind_closed_thoughts_answers_are_the_likeliest_tokens_unless_they_are_free(
    vllm: Any,
) -> None:
    model, policy = tiny_lm(seed=3), picky_head(4, BLIND, blind_head(groups=BLIND))
    terms: dict[str, Any] = {"temperature": 0.9, "price": 1.0, "max_tokens": 18, "accepts": accept}
    jobs, seeds = [], []
    for is_free in (False, True):
        llm = fake(model)
        jobs.append(done(vllm, llm, policy, **terms, free_answers=is_free))
        seeds.append(set(llm.seeds))
    answering, nums = set(), []
    for answer, free in zip(*jobs, strict=True):
        assert answer.report == free.report
        num = answer.report.position + 1  # with the close text
        if answer.report.halted:
            prompt = PROMPTS[answer.index]
            known = TOKENIZER.encode(prompt, add_special_tokens=False) + free.ids[:num]
            greedy = answer_to(model, known, NUM_TOKENS - num)
            assert answer.ids == free.ids[:num] + greedy
            answering.add(vllm.engine_decoder.segment_seed(prompt, 0, num))
            nums.append(answer.ids != free.ids)
        else:
            assert answer.ids == free.ids
    assert seeds[1] - seeds[0] == answering and sum(nums) > 1
    reasons = {answer.report.reason for answer in jobs[0]}
    assert reasons == {"halted", "capped", "closed by the LM"}


@pytest.mark.whole
def test_several_thoughts_of_a_prompt_vote(vllm: Any) -> None:
    terms: dict[str, Any] = {"temperature": 0.9, "price": NEVER, "num_thoughts": 3}
    votes = [
        done(vllm, fake(tiny_lm(seed=3), num), head(), num_slots=num, **terms) for num in (2, 7)
    ]
    assert votes[0] == votes[1]
    assert {len(answer.thoughts) for answer in votes[0]} <= {2, 3}
    assert all(answer.report in answer.thoughts for answer in votes[0])


def test_the_trouble_of_a_prompt_is_its_own(vllm: Any) -> None:
    ill = tiny_lm(seed=3)
    ill.get_input_embeddings().weight.data[IDS["9"]] = float("nan")
    prompts = ["", "9 <think>", "1 " * 10_000, *PROMPTS]
    terms: dict[str, Any] = {"prompts": prompts, "price": ALWAYS}
    answers = sorted(
        vllm.generate_all(fake(ill), head(), max_new_tokens=NUM_TOKENS, **terms), key=str
    )
    others = sorted(beside(ill, head(), **terms), key=str)
    assert [(a.index, a.trouble) for a in answers] == [(a.index, a.trouble) for a in others]
    assert len([answer for answer in answers if answer.trouble]) >= 3


def test_who_leaves_a_job_leaves_an_idle_engine(vllm: Any) -> None:
    llm = fake(tiny_lm(seed=3))
    jobs = vllm.generate_all(llm, head(), PROMPTS, NUM_TOKENS, price=NEVER)
    next(jobs)
    other = vllm.generate_all(llm, head(), PROMPTS, NUM_TOKENS)
    with pytest.raises(InputError, match=r"the engine has . unfinished requests, a job expects"):
        next(other)
    jobs.close()
    assert not llm.requests
    assert len(done(vllm, llm, head())) == len(PROMPTS)


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_vllm_breaks_off_are_their_own_prompts_trouble(vllm: Any, seed: int) -> None:
    """Here both that look at the first prompt's thought, in one step or one after the other."""
    llm = fake(ScriptedLM(lambda token, _: IDS["."]), seed)
    extend = llm.extend

    def broken(name: str) -> Any:
        prompt, *_ = llm.requests[name]
        output = extend(name)
        if len(prompt) > 4 and prompt[0] == IDS["0"] and output.finished:
            output.outputs[0].finish_reason = "abort"
        return output

    llm.extend = broken  # type: ignore[method-assign]
    policy = head(groups=("pace", "confidence", "ending"))
    answers = list(vllm.generate_all(llm, policy, PROMPTS[:2], NUM_TOKENS, num_slots=1))
    assert [a.trouble for a in answers] == ["vLLM broke off a request: 'abort'", ""]


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        (head(tokenizer="0123"), {}, "but the head was trained with 0123"),
        (head(), {"price": -1.0}, "price is -1"),
        (head(), {"max_tokens": 0}, "max_tokens is 0"),
        (head(), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (head(), {"temperature": -1.0}, "temperature is -1"),
        (head(), {"num_slots": 0}, "num_slots is 0"),
        (picky_head(0, ("pace", "hidden")), {}, "head has groups hidden: expected none that vLLM"),
        (blind_head(), {}, "head has groups ending and looks at no answer: expected one that"),
    ],
)
def test_what_cannot_be_run_is_refused(
    vllm: Any, policy: HaltHead, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        done(vllm, fake(tiny_lm()), policy, **changes)


@pytest.mark.parametrize(
    ("of_model", "message"),
    [
        ({"max_logprobs": 5}, "max_logprobs is 5, expected at least 20"),
        ({"logprobs_mode": "processed_logits"}, "logprobs_mode is processed_logits, expected raw"),
    ],
)
def test_an_engine_that_does_not_show_the_lms_own_probabilities_is_refused(
    vllm: Any, of_model: dict[str, Any], message: str
) -> None:
    llm = fake(tiny_lm(seed=3), **of_model)
    with pytest.raises(InputError, match=message):
        done(vllm, llm, head(groups=GROUPS), price=1.0)
    assert len(done(vllm, llm, head(), price=ALWAYS)) == len(PROMPTS)  # it needs none of them


def test_an_engine_without_a_prefix_cache_is_told_of(
    vllm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    llm = fake(tiny_lm(seed=3))
    llm.vllm_config.cache_config.enable_prefix_caching = False
    with caplog.at_level(logging.WARNING, "vllm.haltwise"):
        done(vllm, llm, head(), prompts=PROMPTS[:1])
    assert "without prefix caching every look computes its whole thought anew" in caplog.text
