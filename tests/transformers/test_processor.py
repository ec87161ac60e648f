from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from haltwise import HaltHead, HaltMonitor, InputError, Signals
from haltwise.engine.signal_reducer import MEASURED
from haltwise.policy.features import FEATURE_GROUPS
from haltwise.transformers import HaltProcessor, ProbingGeneration
from tests.engine.test_burst import NoHost
from tests.tiny_lm import CLOSE, EOS, IDS, ScriptedLM, tiny_lm
from tests.transformers.hf_cases import (
    ALWAYS,
    BLIND,
    CACHES,
    NEVER,
    PROMPTS,
    SAMPLING,
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

# Nothing but a budget ends a thought.
OPEN_END: dict[str, Any] = {"suppress_tokens": [EOS, CLOSE]}


def processor(model: Any, policy: HaltHead | None = None, **arguments: Any) -> HaltProcessor:
    return HaltProcessor(policy or blind_head(), model, TOKENIZER, **arguments)


@pytest.mark.parametrize("sampling", [{}, SAMPLING])
@pytest.mark.parametrize(("attention", "cache"), CACHES)
def test_any_cache_will_do(attention: str, cache: dict[str, Any], sampling: dict[str, Any]) -> None:
    model = lm_with(attention)
    arguments = cache | sampling | OPEN_END | {"max_new_tokens": 14}
    plain = generate(model, **arguments)
    looking = processor(model)
    assert torch.equal(generate(model, **arguments, logits_processor=[looking]), plain)
    looking = processor(model, price=[NEVER, ALWAYS, NEVER], max_tokens=[None, None, 6])
    out = generate(model, **arguments, logits_processor=[looking])
    assert [row.reason for row in looking.report] == ["token budget", "halted", "capped"]
    assert [row.position for row in looking.report[1:]] == [4, 6]
    assert torch.equal(out[0], plain[0])
    for i, position in ((1, 4), (2, 6)):
        assert out[i, : 6 + position].tolist() == plain[i, : 6 + position].tolist()
        assert out[i, 6 + position] == CLOSE


@pytest.mark.parametrize("rule", ["every 4 tokens", "every 1 tokens", "after 1"])
@pytest.mark.parametrize(
    "arguments", [{}, SAMPLING, {"repetition_penalty": 1.2, "use_cache": False}]
)
def test_a_head_that_never_halts_changes_nothing(rule: str, arguments: dict[str, Any]) -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **arguments)
    looking = processor(model, blind_head(rule))
    assert torch.equal(generate(model, **arguments, logits_processor=[looking]), plain)
    for row, tokens in zip(looking.report, plain, strict=True):
        # No processor sees the last token.
        generated = new_tokens(tokens[:-1])
        ends = [i for i, token in enumerate(generated, start=1) if token in (CLOSE, EOS)]
        expected = ("closed by the LM", ends[0]) if ends else ("token budget", len(generated))
        assert (row.reason, row.position) == expected


# A batch whose first row is halted at 4 tokens and whose last is capped at 6.
CLOSES: dict[str, Any] = {"price": [ALWAYS, NEVER, NEVER], "max_tokens": [None, None, 6]}


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampling"])
def test_a_halted_lm_answers_greedily_by_itself_while_others_think_on(
    sampling: dict[str, Any],
) -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **sampling)
    looking = processor(model, blind_head(close="so . </think>"), **CLOSES)
    out = generate(model, **sampling, logits_processor=[looking])
    assert new_tokens(out[1]) == new_tokens(plain[1])
    for i, start, position in ((0, 2, 4), (2, 0, 6)):
        closed = [*plain[i, 6 : 6 + position].tolist(), IDS["so"], IDS["."], CLOSE]
        answer = answer_to(model, [*plain[i, start:6].tolist(), *closed], 40 - len(closed))
        assert new_tokens(out[i]) == closed + answer
        assert looking.report[i].position == position
        assert looking.report[i].answer == ""


def test_free_answers_are_sampled_as_the_call_has_it() -> None:
    model, arguments = tiny_lm(seed=3), SAMPLING | OPEN_END

    class CloseAlone(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            for row, num_before in ((0, 10), (2, 12)):
                if input_ids.shape[1] == num_before:
                    scores[row] = -torch.inf
                    scores[row, CLOSE] = 0.0
            return scores

    free = processor(model, **CLOSES, free_answers=True)
    out = generate(model, **arguments, logits_processor=[free])
    assert torch.equal(out, generate(model, **arguments, logits_processor=[CloseAlone()]))
    likeliest = generate(model, **arguments, logits_processor=[processor(model, **CLOSES)])
    assert [torch.equal(*rows) for rows in zip(out, likeliest, strict=True)] == [False, True, False]


def test_the_likeliest_token_is_that_of_the_scores_that_other_processors_have_left() -> None:
    model, arguments = tiny_lm(seed=3), SAMPLING | OPEN_END | {"repetition_penalty": 1.5}
    looking = processor(model, price=ALWAYS)
    out = generate(model, PROMPTS[:1], **arguments, logits_processor=[looking])
    # The penalty looks at the prompt too, so the call may begin again behind the close text.
    greedy = arguments | {"do_sample": False, "max_new_tokens": 35}
    assert out[0, 4:9].tolist()[-1] == CLOSE
    going_on = model.generate(input_ids=out[:, :9], attention_mask=torch.ones(1, 9), **greedy)
    assert torch.equal(out, going_on)


def test_rows_are_halted_on_their_own_terms_and_in_their_own_time() -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **OPEN_END)
    looking = processor(model, price=ALWAYS, min_tokens=[0, 5, 9], max_tokens=[None, 7, None])
    out = generate(model, **OPEN_END, logits_processor=[looking])
    found = [(row.reason, row.position) for row in looking.report]
    assert found == [("halted", 4), ("capped", 7), ("halted", 12)]
    for i, position in enumerate((4, 7, 12)):
        assert out[i, 6 : 7 + position].tolist() == [*plain[i, 6 : 6 + position].tolist(), CLOSE]


def script(**tokens: str) -> Callable[[int, int], int]:
    """A "." everywhere but after some positions: p4="x" follows the token at position 4."""
    return lambda _, position: IDS[tokens.get(f"p{position}", ".")]


def test_positions_and_ends_by_hand() -> None:
    # Two prompt tokens: "p1" is the first of the thought.
    model = ScriptedLM(script(p6="</think>", p9="<eos>"))
    looking = processor(model)
    out = generate(model, ["5 <think>"], logits_processor=[looking])
    assert TOKENIZER.decode(out[0, 2:]) == ". . . . . </think> . . <eos>"
    (row,) = looking.report
    assert (row.reason, row.position, row.num_bad_signals) == ("closed by the LM", 6, 0)
    looking = processor(model, price=ALWAYS, min_tokens=5)
    generate(model, ["5 <think>"], logits_processor=[looking])
    assert looking.report == [replace(row, price=ALWAYS)]
    # The longer prompt's fifth token ends it. The other's sixth is the last of the call.
    model = ScriptedLM(script(p6="<eos>"))
    looking = processor(model, price=ALWAYS, min_tokens=5)
    generate(model, ["5 <think>", "5 5 <think>"], logits_processor=[looking])
    ends = [(row.reason, row.position) for row in looking.report]
    assert ends == [("token budget", 5), ("closed by the LM", 5)]


def test_a_thought_that_the_lm_opens_begins_there() -> None:
    model = ScriptedLM(script(p5="<think>"))
    looking = processor(model, price=ALWAYS, max_tokens=3)
    out = generate(model, ["5 5"], logits_processor=[looking], max_new_tokens=12)
    assert TOKENIZER.decode(out[0, 2:]) == ". . . . <think> </think> . . . . . ."
    assert looking.report[0].reason == "capped"


def test_a_thought_that_opens_behind_its_cap_is_closed_where_it_opens() -> None:
    said = {IDS["4"]: IDS["<think>"], IDS["<think>"]: IDS["."], IDS["."]: IDS["."]}
    model = ScriptedLM(lambda token, _: said.get(token, token + 1))
    for rule in ("every 16 tokens", "every 4 tokens", "after 1"):
        looking = processor(model, blind_head(rule), price=ALWAYS, max_tokens=3)
        out = generate(model, ["0"], logits_processor=[looking], max_new_tokens=12)
        assert TOKENIZER.decode(out[0, 1:7]) == "1 2 3 4 <think> </think>"
        assert (looking.report[0].reason, looking.report[0].position) == ("capped", 5)


def test_calls_in_other_threads_do_not_disturb_a_processor() -> None:
    model, inputs = tiny_lm(seed=3), TOKENIZER(PROMPTS, return_tensors="pt", padding=True)
    policy = picky_head(1, (*BLIND, "hidden"))

    def run(price: float, ready: Barrier) -> Any:
        looking = processor(model, policy, price=price)
        ready.wait()
        arguments: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
        out = model.generate(**inputs, **arguments, logits_processor=[looking])
        return out.tolist(), looking.report

    prices = [NEVER, ALWAYS]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, prices, [Barrier(2)] * 2))
    assert together == [run(price, Barrier(1)) for price in prices]


def test_a_rule_without_positions_is_looked_up_token_by_token() -> None:
    model = ScriptedLM(script(p4="wait", p8="wait"))
    looking = processor(model, blind_head("after ai"), price=ALWAYS, min_tokens=5)
    out = generate(model, ["5 <think>"], logits_processor=[looking], max_new_tokens=10)
    assert TOKENIZER.decode(out[0, 2:]) == ". . . wait . . . wait </think> ."
    assert looking.report[0].position == 8


def test_between_decision_points_nothing_is_copied_to_the_host() -> None:
    model, num_free = tiny_lm(seed=3), 0
    looking = processor(model, price=NEVER)

    class Watched(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            nonlocal num_free
            num = input_ids.shape[1] - 6  # of the prompts, with padding
            if num % 4 == 0:
                return looking(input_ids, scores)
            num_free += 1
            with NoHost():
                return looking(input_ids, scores)

    watched: Any = Watched()
    generate(model, logits_processor=[watched], **OPEN_END, max_new_tokens=14)
    assert num_free == 10


class Sharpen(LogitsProcessor):
    """Changes the scores in place, but not which is the largest."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.mul_(3)


@pytest.mark.parametrize("before", [[], [Sharpen()]])
def test_signals_are_the_lms_own(monkeypatch: pytest.MonkeyPatch, before: list[Any]) -> None:
    """Whatever is done to the scores, and by the formulas of their definitions."""
    monkeypatch.setattr(FEATURE_GROUPS["pace"], "signals", ("position", *MEASURED))
    seen: list[Signals] = []

    def spy(_: HaltMonitor, signals: Signals, rows: Any) -> Any:
        assert rows.tolist() == [0, 1, 2]
        seen.append(signals)
        return np.zeros(3, dtype=bool)

    monkeypatch.setattr(HaltMonitor, "observe", spy)
    model = tiny_lm(seed=3)
    looking = processor(model, picky_head(0, ("pace", "hidden")))
    out = generate(
        model,
        **OPEN_END,
        repetition_penalty=1.3,
        max_new_tokens=9,
        logits_processor=[*before, looking],
    )
    assert [signals.position.tolist() for signals in seen] == [[4] * 3, [8] * 3]
    for i, start in enumerate((2, 4, 0)):
        with torch.no_grad():
            whole = model(out[i : i + 1, start:], use_cache=False, output_hidden_states=True)
        logprobs = whole.logits[0].log_softmax(dim=-1)
        for signals, first in zip(seen, (5 - start, 9 - start), strict=True):
            table = logprobs[first : first + 4]
            chosen = out[i, start + first + 1 : start + first + 5]
            top = table.topk(2).values.exp()
            # 20 tokens one by one, and the other seven as one.
            likely = table.topk(20).values
            rest = 1 - likely.exp().sum(dim=-1)
            entropy = -(likely.exp() * likely).sum(dim=-1) - rest * rest.log()
            picked = table.gather(1, chosen[:, None])[:, 0]
            expected = {
                "entropy": entropy.mean(),
                "max_entropy": entropy.max(),
                "logprob": picked.mean(),
                "min_logprob": picked.min(),
                "margin": (top[:, 0] - top[:, 1]).mean(),
                "end_think_logprob": logprobs[first + 4, CLOSE],
                "num_reflections": (chosen == IDS["wait"]).sum(),
            }
            for name, value in expected.items():
                assert getattr(signals, name)[i] == pytest.approx(float(value), abs=1e-4), name
            state = whole.hidden_states[-1][0, first + 4].half().float()
            assert signals.hidden is not None
            np.testing.assert_allclose(signals.hidden[i], state, atol=1e-2)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_row_alone_is_halted_as_in_any_batch_and_as_by_a_probing_generation(seed: int) -> None:
    model, policy = tiny_lm(seed=seed), picky_head(seed, (*BLIND, "hidden"))
    prompts = [*PROMPTS, "1 1 1 <think>", "2 . <think>"]
    terms: dict[str, Any] = {"price": 1.0, "max_tokens": 30}
    together = processor(model, policy, **terms)
    out = generate(model, prompts, **OPEN_END, logits_processor=[together])
    for i, prompt in enumerate(prompts):
        alone = processor(model, policy, **terms)
        row = generate(model, [prompt], **OPEN_END, logits_processor=[alone])
        assert alone.report == [together.report[i]]
        assert torch.equal(row[0, -40:], out[i, -40:])
    generation = ProbingGeneration(policy, TOKENIZER, accepts=accept, **terms)
    generate(model, prompts, **OPEN_END, custom_generate=generation)
    for mine, theirs in zip(together.report, generation.report, strict=True):
        assert (mine.reason, mine.position) == (theirs.reason, theirs.position)
    assert "halted" in {row.reason for row in together.report}


class Mend(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.nan_to_num(nan=-torch.inf)


def test_logits_that_are_not_numbers_halt_nothing() -> None:
    model = tiny_lm(seed=3)
    with torch.no_grad():
        model.lm_head.weight[IDS["19"]] = torch.nan
    arguments: dict[str, Any] = OPEN_END | {"max_new_tokens": 14}
    plain = generate(model, **arguments, logits_processor=[Mend()])
    looking = processor(model, price=[ALWAYS, 0.0, ALWAYS])
    out = generate(model, **arguments, logits_processor=[Mend(), looking])
    assert torch.equal(out, plain)
    # At a price of 0 nobody looks.
    assert [row.num_bad_signals for row in looking.report] == [3, 0, 3]
    looking = processor(model, price=ALWAYS, max_tokens=10)
    generate(model, **arguments, logits_processor=[Mend(), looking])
    assert [row.reason for row in looking.report] == ["capped"] * 3


def test_several_answers_to_a_prompt_are_rows() -> None:
    model, prices = tiny_lm(seed=3), [NEVER, ALWAYS] * 2
    looking = processor(model, price=prices)
    generate(model, PROMPTS[:2], **SAMPLING, num_return_sequences=2, logits_processor=[looking])
    assert [row.price for row in looking.report] == prices
    assert [row.halted for row in looking.report] == [False, True, False, True]


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_are_served() -> None:
    model, streamer = tiny_lm(seed=3), Collect()
    looking = processor(model, price=ALWAYS)
    out = generate(model, PROMPTS[:1], logits_processor=[looking], streamer=streamer)
    assert CLOSE in streamer.tokens
    assert (streamer.tokens, streamer.ended) == (out[0].tolist(), True)


def test_the_lm_is_left_without_a_mark() -> None:
    model = tiny_lm(seed=3)

    def hooks() -> int:
        return len(model._forward_hooks) + len(model.lm_head._forward_pre_hooks)

    policy = picky_head(0, ("pace", "hidden"))
    looking = processor(model, policy, max_tokens=6)
    assert hooks() == 2
    generate(model, logits_processor=[looking])
    assert hooks() == 0  # since no thought is open any more
    generate(model, max_new_tokens=2, logits_processor=[processor(model, policy, price=0)])
    assert hooks() == 0  # since nothing can halt
    looking = processor(model, policy, min_tokens=100)
    generate(model, **OPEN_END, max_new_tokens=6, logits_processor=[looking])
    assert hooks() == 2
    del looking
    gc.collect()
    assert hooks() == 0


def test_what_is_passed_on_to_other_processors_is_not_written_into() -> None:
    model = tiny_lm(seed=3)
    looking = processor(model, price=ALWAYS)
    out = generate(
        model,
        logits_processor=[looking],
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    assert all(logits.isfinite().all() for logits in out.logits)
    assert out.scores[4].isfinite().sum(dim=-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam search"),
        ({"num_beams": 2, "repetition_penalty": 1.3}, "rows are not what they were"),
        ({"guidance_scale": 1.5}, "ran 2 times for a token"),
        ({"prompt_lookup_num_tokens": 3}, "ran 0 times for a token"),
        ({"assistant_model": tiny_lm(seed=4)}, "ran 0 times for a token"),
    ],
)
def test_generation_that_cannot_be_halted_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    model = tiny_lm(seed=3)
    looking = processor(model)
    with pytest.raises(InputError, match=message):
        generate(model, PROMPTS[:1], **arguments, logits_processor=[looking])


def test_a_processor_is_for_one_call_of_its_own_lm() -> None:
    model = tiny_lm(seed=3)
    looking = processor(model)
    assert looking.report == []
    generate(model, logits_processor=[looking])
    with pytest.raises(InputError, match="of its own for each call"):
        generate(model, logits_processor=[looking])
    # A prompt as long as if it went on: its tokens tell.
    looking = processor(model)
    generate(model, ["3 <think>"], **OPEN_END, max_new_tokens=1, logits_processor=[looking])
    with pytest.raises(InputError, match="of its own for each call"):
        generate(model, ["4 4 <think>"], **OPEN_END, logits_processor=[looking])
    with pytest.raises(InputError, match="ran 0 times for a token"):
        generate(model, logits_processor=[processor(tiny_lm())])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            head(),
            "looks at answers while it thinks: use haltwise.transformers.ProbingGeneration",
        ),
        (blind_head(tokenizer="0123"), "but the head was trained with 0123"),
        (blind_head("somewhere"), "is none that can be run"),
        (blind_head(close=""), "has no tokens"),
    ],
)
def test_heads_that_do_not_fit_are_refused(policy: HaltHead, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor(tiny_lm(), policy)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"price": -1.0}, "price is -1"),
        ({"price": float("nan")}, "price is nan"),
        ({"min_tokens": [1, 2, -3]}, "min_tokens is -3"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_terms_that_make_no_sense_are_refused(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):  # before any call
        processor(tiny_lm(), **terms)


def test_terms_of_other_rows_are_refused() -> None:
    model = tiny_lm()
    with pytest.raises(InputError, match="2 values of price for 3 rows"):
        generate(model, logits_processor=[processor(model, price=[1.0, 2.0])])


def test_an_lm_without_a_head_of_its_own_is_left_without_a_hook() -> None:
    model = tiny_lm(seed=3)
    model.get_output_embeddings = lambda: None
    hidden = picky_head(0, ("pace", "hidden"))
    with pytest.raises(InputError, match="no output embeddings"):
        HaltProcessor(hidden, model, TOKENIZER)
    assert not model._forward_hooks


def test_the_lm_may_be_used_otherwise_while_a_processor_is_kept() -> None:
    model = tiny_lm(seed=3)
    looking = processor(model)
    generate(model, logits_processor=[looking], max_new_tokens=4, **OPEN_END)
    model(torch.tensor([[IDS["3"]]]), return_dict=False)[0].sum().backward()
    assert looking.report[0].position == 3


def test_the_calls_own_end_tokens_end_a_row() -> None:
    model = tiny_lm(seed=3)
    plain = generate(model, **OPEN_END, max_new_tokens=12)
    end = next(token for token in plain[1, 6:9].tolist() if token not in plain[0].tolist())
    looking = processor(model, price=ALWAYS, eos_token_id=[end, EOS])
    arguments: dict[str, Any] = {"eos_token_id": [end, EOS], "max_new_tokens": 12}
    out = generate(model, **OPEN_END, **arguments, logits_processor=[looking])
    assert looking.report[1].reason == "closed by the LM" and not (out[1, 9:] == CLOSE).any()
    assert looking.report[0].reason == "halted"
