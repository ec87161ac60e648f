from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.engine.burst import choose
from haltwise.engine.decoder import Decoder, sampling_uniforms
from haltwise.session.thought import ForcedAnswer, Thought
from tests.tiny_lm import CLOSE, EOS, IDS, ScriptedLM, tiny_lm, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["3 . 4 <think>", "5 <think>", "7 so 8 wait 9 <think>", "1 1 1 <think>", "2 <think>"]


def halting(rule: str = "every 4 tokens", close: str = "</think>", length: int = 3) -> Halting:
    return Halting("always", rule, close, MEAN_LOGPROB, length)


def decoder(**changes: Any) -> Decoder:
    arguments: dict[str, Any] = {
        "model": tiny_lm(seed=1),
        "tokenizer": TOKENIZER,
        "halting": halting(),
        "num_slots": 3,
        "max_tokens": 40,
        "temperature": 0.9,
    }
    return Decoder(**arguments | changes)


def answer_all(
    decoder: Decoder, prompts: Sequence[str], seeds: Sequence[int], num_slots: int, probes: bool
) -> list[Thought]:
    """Answers questions in refilled slots."""
    done: dict[int, Thought] = {}
    waiting = list(range(len(prompts)))
    question_in: dict[int, int] = {}
    while waiting or question_in:
        free = [slot for slot in range(num_slots) if slot not in question_in][: len(waiting)]
        started = {slot: waiting.pop(0) for slot in free}
        decoder.start(
            np.array(list(started), dtype=np.int64),
            [prompts[i] for i in started.values()],
            [seeds[i] for i in started.values()],
        )
        question_in |= started
        slots = np.array(list(question_in))
        at_point = decoder.advance(slots)
        if probes:
            decoder.force(slots[at_point])
        for slot in slots[~at_point].tolist():
            if decoder.thoughts[slot].ended:
                done[question_in.pop(slot)] = decoder.thoughts[slot]
    return [done[i] for i in range(len(prompts))]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_depend_on_neither_slots_nor_probes(temperature: float) -> None:
    seeds = list(range(len(PROMPTS)))
    alone = [
        answer_all(decoder(temperature=temperature), [prompt], [seed], 1, probes=False)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    for rule in ("every 4 tokens", "every 1 tokens", "after wait"):
        batch = decoder(temperature=temperature, halting=halting(rule))
        together = answer_all(batch, PROMPTS, seeds, 3, probes=True)
        assert [g.tokens for g in together] == [g.tokens for g in alone]
        assert [g.finished for g in together] == [g.finished for g in alone]
    assert len({g.num_tokens for g in alone}) > 1


def test_greedy_tokens_are_those_of_generate() -> None:
    model = tiny_lm(seed=1)
    (thought,) = answer_all(decoder(temperature=0.0), PROMPTS[:1], [0], 1, probes=True)
    ids = TOKENIZER(PROMPTS[0], return_tensors="pt")
    reference = model.generate(**ids, max_new_tokens=40, do_sample=False)
    assert thought.tokens == reference[0, ids["input_ids"].shape[1] :].tolist()


def test_seeds_and_questions_differ() -> None:
    same = answer_all(decoder(), ["3 <think>"] * 2, [5, 5], 2, probes=False)
    assert same[0].tokens == same[1].tokens
    uniforms = sampling_uniforms("3 <think>", 5, 40)
    for prompt, seed in (("3 <think>", 6), ("4 <think>", 5)):
        assert not np.isin(sampling_uniforms(prompt, seed, 40), uniforms).any()


def test_sampling_inverts_the_distribution() -> None:
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    uniforms = torch.arange(0, 1, 0.001)
    tokens, sound = choose(probabilities.log().expand(1000, 4), 1.0, uniforms)
    assert sound.all()
    assert torch.bincount(tokens, minlength=4).tolist() == pytest.approx([200, 0, 500, 300], abs=1)
    assert (tokens.diff() >= 0).all()
    cold, _ = choose(probabilities.log().expand(1000, 4), 0.01, uniforms)
    assert (cold[1:] == 2).all()


def script(**words: int | str) -> Callable[[int, int], int]:
    """Thinks ".", but says other words at some positions: script(p5="wait")."""
    spoken = {int(key[1:]): IDS[str(word)] for key, word in words.items()}
    return lambda token, position: spoken.get(position + 1, IDS["."])


def points(decoder: Decoder, prompt: str) -> list[int]:
    """Positions of all decision points of one question."""
    slot, found = np.arange(1), []
    decoder.start(slot, [prompt], [0])
    while not decoder.thoughts[0].ended:
        if decoder.advance(slot)[0]:
            found.append(decoder.thoughts[0].position)
    return found


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("every 3 tokens", [3, 6]), ("every 1 tokens", [1, 2, 3, 4, 5, 6, 7]), ("after ai", [2, 5])],
)
def test_decision_points_lie_inside_the_thought(rule: str, expected: list[int]) -> None:
    # Two prompt tokens; the thought is 7 tokens and its close.
    model = ScriptedLM(script(p3="wait", p6="wait", p9="</think>", p10="wait", p12="<eos>"))
    lm = decoder(model=model, halting=halting(rule), temperature=0.0)
    assert points(lm, "5 <think>") == expected
    thought = lm.thoughts[0]
    assert (thought.finished, thought.num_tokens) == (True, 11)
    assert thought.closed
    assert thought.answer_text() == "wait ."
    assert thought.text().split()[-3:] == ["wait", ".", "<eos>"]


def test_nobody_waits_for_a_long_answer() -> None:
    model = ScriptedLM(script(p4="</think>"))
    lm = decoder(model=model, halting=halting("every 5 tokens"), temperature=0.0)
    lm.start(np.arange(1), ["5 <think>"], [0])
    for num in (5, 10, 15):
        assert not lm.advance(np.arange(1))[0]
        assert (lm.thoughts[0].num_tokens, lm.thoughts[0].ended) == (
            num,
            False,
        )


def test_a_thought_that_the_lm_opens_begins_there() -> None:
    model = ScriptedLM(script(p4="<think>", p9="</think>", p10="<eos>"))
    assert points(decoder(model=model, temperature=0.0), "5 5") == [4]
    again = "<think> . </think> 5 5"  # an earlier thought, closed
    model = ScriptedLM(script(p7="<think>", p12="</think>", p13="<eos>"))
    assert points(decoder(model=model, temperature=0.0), again) == [4]


def test_the_budget_ends_a_thought() -> None:
    lm = decoder(model=ScriptedLM(script(p4="9")), max_tokens=8, temperature=0.0)
    assert points(lm, "5 <think>") == [4]
    thought = lm.thoughts[0]
    assert (thought.finished, thought.num_tokens) == (False, 8)
    assert thought.answer_text() == ". . 9 . . . . ."


def test_forced_answers_are_read_from_the_box_that_the_close_text_opens() -> None:
    model = ScriptedLM(lambda token, position: IDS["7"] if token == CLOSE else EOS)
    lm = decoder(model=model, halting=halting("every 1 tokens"), temperature=0.0)
    lm.start(np.arange(1), ["5 <think>"], [0])
    (probe,) = lm.force(np.arange(1))
    assert (probe.text, probe.answer, probe.num_tokens) == ("7", "7", 2)
    lm.rules._opening = r"\boxed{"
    assert lm.rules.read(ForcedAnswer([IDS["7"]], [-0.5], 2)).text == r"\boxed{7"
    assert lm.rules.read(ForcedAnswer([], [], 1)).text == ""


def test_logits_that_are_not_numbers_are_an_error() -> None:
    model = tiny_lm(seed=1)
    lm = decoder(model=model)
    lm.start(np.arange(2), PROMPTS[:2], [0, 1])
    assert lm.advance(np.arange(2)).all()
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(InputError, match="LM gave NaN logits at position 4"):
        lm.force(np.arange(2))
    with pytest.raises(InputError, match="LM gave NaN logits at position 5"):
        lm.advance(np.arange(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halting": halting("somewhere")}, "is none that can be run"),
        ({"halting": halting("every 0 tokens")}, "is none that can be run"),
        ({"halting": halting(close="")}, "has no tokens"),
        (
            {"halting": replace(halting(), confidence_rule="source")},
            "rule 'source' is none that can be run",
        ),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"burst": -1}, "burst is -1"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder(**changes)


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="has 0 tokens"):
        decoder().start(np.arange(1), [""], [0])
    with pytest.raises(InputError, match="has 9 tokens, expected 1 to 4"):
        decoder(max_tokens=2040).start(np.arange(1), ["1 " * 8 + "<think>"], [0])


def test_an_lm_without_an_end_token_is_refused() -> None:
    model = tiny_lm()
    model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="no eos_token_id"):
        decoder(model=model)
