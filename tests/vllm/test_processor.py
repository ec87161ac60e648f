from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haltwise import (
    MEAN_LOGPROB,
    HaltHead,
    Halting,
    HaltMonitor,
    HeadConfig,
    InputError,
    Observing,
)
from haltwise.engine.signal_reducer import SignalReducer
from haltwise.engine.token_rules import TokenRules, tokenizer_fingerprint
from haltwise.policy.features import signals_of
from haltwise.policy.head import NEVER_HALTS
from haltwise.session.request import Terms
from haltwise.session.thought import Thought
from tests.engine.test_burst import NoHost
from tests.heads import random_head
from tests.projections import some_projection
from tests.tiny_lm import CLOSE, EOS, IDS, WORDS, tiny_tokenizer
from tests.toy_control import RisingPrice
from tests.vllm.fake_vllm import (
    PLACEHOLDER,
    BatchUpdate,
    Request,
    V1Engine,
    V1Processor,
    V2Engine,
    V2Processor,
    config,
    forget_plugin,
    params,
    plugin,
)

TOKENIZER = tiny_tokenizer()
CLOSE_TEXT = "so </think> 7"
CLOSE_IDS = [IDS[word] for word in CLOSE_TEXT.split()]
THINKS = [IDS["3"], IDS["<think>"]]
RULE = "every 4 tokens"
GROUPS = ("pace", "distribution", "ending", "reflection")
# At NEVER no head of these tests halts, at ALWAYS each does.
NEVER, ALWAYS = 0.1, 10.0


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    with plugin() as module:
        yield module


def head_of(
    rule: str = RULE, groups: tuple[str, ...] = GROUPS, seed: int | None = None
) -> HaltHead:
    """Halts wherever the price is high; or with a seed, where random weights say so."""
    head = random_head(seed or 0, groups)
    weights = head.weights
    if seed is None:
        weights = {name: np.zeros_like(weight) for name, weight in weights.items()}
        weights["w0"][0, -1] = weights["w1"][0, 0] = 3.0
        weights["w2"][0, 0] = 50.0
    halting = Halting("at_halt", rule, CLOSE_TEXT, MEAN_LOGPROB)
    return HaltHead(replace(head.config, halting=halting, default_price=NEVER), weights)


def saved(head: HaltHead, tmp_path: Path) -> str:
    head.save(tmp_path)
    return str(tmp_path)


def dice(request: Request) -> Tensor:
    """An LM: logits that hang on the request, on how far it is and on its newest token."""
    newest = (request.output or request.prompt)[-1]
    rng = np.random.default_rng([request.name, len(request.output), newest])
    logits = rng.normal(0, 2, len(WORDS)).astype(np.float32)
    logits[[IDS["<think>"], CLOSE]] -= 2
    return torch.from_numpy(logits)


def dull(request: Request) -> Tensor:
    """An LM that says "wait" for ever."""
    logits = torch.zeros(len(WORDS))
    logits[IDS["wait"]] = 5.0
    return logits


def alone(head: HaltHead, request: Request, free_answers: bool) -> list[int]:
    """What a request gives by itself: one row, token by token, nothing kept in slots."""
    terms = Terms.read(request.asked, Terms(head.config.default_price))
    rules = TokenRules(TOKENIZER, head.config.halting)
    monitor, halted, row = HaltMonitor(head, 1, terms.price), False, np.array([0])
    signals = signals_of(head.config.observing.groups)
    reducer = SignalReducer(rules, signals, 1, torch.device("cpu"))
    thought = Thought(rules, rules.decode(request.prompt, skip_special_tokens=False))
    pending: list[int] = []
    while not request.is_done:
        logits = dice(request)[None]
        is_open = thought.begun and not thought.closed and not halted
        if thought.at_point and is_open and terms.price > 0:
            wants = monitor.observe(reducer.read(row, [thought], logits), row)[0]
            halted = wants and thought.position >= terms.min_tokens
        cap = terms.max_tokens
        halted |= is_open and cap is not None and thought.num_tokens > 0 and thought.position >= cap
        if is_open and halted:
            pending = list(CLOSE_IDS)
        if pending:
            token = pending.pop(0)
        else:
            is_free = free_answers or not halted
            token = request.choose(logits[0]) if is_free else int(logits.argmax())
        reducer.add(row, logits, torch.tensor([token]))
        request.output.append(token)
        thought.add(token)
    return request.output


def v1_engine(
    module: Any,
    head: HaltHead,
    tmp_path: Path,
    lm: Any = dice,
    order: Random | None = None,
    is_async: bool = False,
    **stated: Any,
) -> V1Engine:
    """With the engine's own terms by keyword."""
    made = config(saved(head, tmp_path), TOKENIZER, **stated)
    processor = module.HaltProcessor(made, torch.device("cpu"), False)
    return V1Engine(processor, lm, order or Random(0), is_async)


def v2_engine(
    module: Any, head: HaltHead, tmp_path: Path, lm: Any = dice, seed: int = 0, **stated: Any
) -> V2Engine:
    """With the engine's own terms by keyword."""
    made = config(saved(head, tmp_path), TOKENIZER, **stated)
    return V2Engine(lambda states: module.HaltProcessor(made, states), lm, Random(seed))


def asking(**terms: Any) -> dict[str, Any]:
    return {f"haltwise_{name}": value for name, value in terms.items()}


def quiet(
    request: Request, engine_class: type, module: Any, head: HaltHead, path: Path
) -> list[int]:
    """One request in an engine of either kind, beside another one that is never halted."""
    make = v1_engine if engine_class is V1Engine else v2_engine
    other = Request(99, THINKS, 30, asking(off=1))
    make(module, head, path, dull).run([request, other])
    assert other.output == [IDS["wait"]] * 30
    return request.output


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    made = []
    for name in range(draw(st.integers(1, 7))):
        marks = draw(st.sampled_from([[], THINKS, [*THINKS, CLOSE], [CLOSE, *THINKS]]))
        asked: dict[str, Any] = {}
        if draw(st.booleans()):
            asked["price"] = draw(st.sampled_from([0.0, 0.3, 3.0]))
        if draw(st.booleans()):
            asked["min_tokens"] = draw(st.integers(0, 12))
        if draw(st.booleans()):
            asked["max_tokens"] = draw(st.integers(max(asked.get("min_tokens", 0), 1), 25))
        if draw(st.integers(0, 5)) == 0:
            asked["off"] = "true"
        num, temperature = draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 1.0]))
        made.append(Request(name, [IDS["5"], *marks], num, asked, temperature=temperature))
    return made


def as_asked(made: list[Request]) -> list[Request]:
    """The same requests anew, in vLLM's spelling."""
    return [replace(r, asked=asking(**r.asked), output=[]) for r in made]


RULES = st.sampled_from([RULE, "every 3 tokens, at most 2", "after 1"])


@given(
    made=requests(),
    rule=RULES,
    seed=st.integers(1, 9),
    order=st.randoms(),
    is_async=st.booleans(),
    is_free=st.booleans(),
)
@pytest.mark.whole
@settings(max_examples=20, deadline=None)
def test_v1_requests_go_as_each_does_alone(
    vllm: Any,
    tmp_path_factory: pytest.TempPathFactory,
    made: list[Request],
    rule: str,
    seed: int,
    order: Random,
    is_async: bool,
    is_free: bool,
) -> None:
    head, batch = head_of(rule, seed=seed), as_asked(made)
    path = tmp_path_factory.mktemp("head")
    stated: dict[str, Any] = {"is_async": is_async, "free_answers": is_free}
    v1_engine(vllm, head, path, order=order, **stated).run(batch)
    assert [r.output for r in batch] == [alone(head, r, is_free) for r in made]


@given(
    made=requests(),
    rule=RULES,
    seed=st.integers(1, 9),
    order=st.integers(),
    is_free=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_v2_requests_go_as_each_does_alone(
    vllm: Any,
    tmp_path_factory: pytest.TempPathFactory,
    made: list[Request],
    rule: str,
    seed: int,
    order: int,
    is_free: bool,
) -> None:
    head, batch = head_of(rule, seed=seed), as_asked(made)
    path = tmp_path_factory.mktemp("head")
    v2_engine(vllm, head, path, seed=order, free_answers=is_free).run(batch)
    assert [r.output for r in batch] == [alone(head, r, is_free) for r in made]


@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
def test_a_sampled_request_is_answered_with_likeliest_tokens_behind_a_closed_thought(
    vllm: Any, tmp_path: Path, engine: Any, is_free: bool
) -> None:
    """Halted, capped, capped where it opens; whoever gets such a slot next is sampled."""

    def lm(request: Request) -> Tensor:
        logits = dull(request)
        if request.name == 3 and len(request.output) == 5:
            logits[IDS["<think>"]] = 99.0
        return logits

    made = engine(vllm, head_of("every 16 tokens"), tmp_path, lm, free_answers=is_free)
    closed = [
        Request(1, THINKS, 60, asking(price=ALWAYS), temperature=2.0),
        Request(2, THINKS, 60, asking(max_tokens=3), temperature=2.0),
        Request(3, [IDS["3"]], 60, asking(max_tokens=2), temperature=2.0),
    ]
    others = [Request(name, THINKS, 60, asking(off=1), temperature=2.0) for name in range(4, 9)]
    made.run([*closed, *others])
    for request, start in zip(closed, (16, 3, 6), strict=True):
        behind = start + len(CLOSE_IDS)
        assert request.output[start:behind] == CLOSE_IDS
        drawn = sampled(request, behind, lm)
        assert request.output[behind:] == (drawn if is_free else [IDS["wait"]] * len(drawn))
    for request in others:
        assert request.output == sampled(request, 0, lm)


def sampled(request: Request, start: int, lm: Any) -> list[int]:
    """What follows the first tokens of a request if the LM goes on as it asks; not all the same."""
    plain = replace(request, output=request.output[:start])
    while not plain.is_done:
        plain.take(lm(plain))
    assert len(set(plain.output[start:])) > 1
    return plain.output[start:]


@pytest.mark.parametrize("engine", [V1Engine, V2Engine])
@pytest.mark.parametrize(
    ("asked", "halted_at"),
    [
        ({}, None),  # the head's own price
        (asking(price=ALWAYS), 4),
        (asking(price=str(ALWAYS)), 4),
        (asking(price=0), None),
        (asking(price=ALWAYS, off=1), None),
        (asking(price=ALWAYS, min_tokens=4), 4),
        (asking(price=ALWAYS, min_tokens=5), 8),
        (asking(max_tokens=6), 6),
        (asking(price=0, max_tokens=1), 1),
        (asking(price=ALWAYS, max_tokens=6), 4),
        (asking(max_tokens=6, off=True), 6),
        ({"of_another_plugin": 1}, None),
    ],
)
def test_a_request_is_halted_on_its_own_terms(
    vllm: Any, tmp_path: Path, engine: type, asked: dict[str, Any], halted_at: int | None
) -> None:
    request = Request(0, THINKS, 14, asked)
    wait = [IDS["wait"]]
    expected = wait * 14 if halted_at is None else wait * halted_at + CLOSE_IDS
    output = quiet(request, engine, vllm, head_of(), tmp_path)
    assert output == (expected + wait * 14)[:14]


@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
def test_the_engine_s_config_has_the_terms_of_those_who_ask_for_nothing(
    vllm: Any, tmp_path: Path, engine: Any
) -> None:
    batch = [
        Request(0, THINKS, 9),
        Request(1, THINKS, 9, asking(price=NEVER)),
        # Against the engine's max_tokens: its cap holds.
        Request(2, THINKS, 16, asking(min_tokens=11)),
        Request(3, THINKS, 16, asking(max_tokens=12, price=0)),
        Request(4, THINKS, 16, asking(off=True)),
    ]
    engine(vllm, head_of(), tmp_path, dull, price=ALWAYS, max_tokens=10).run(batch)
    assert [CLOSE in r.output and r.output.index(CLOSE) - 1 for r in batch] == [
        4,
        False,
        10,
        10,
        10,
    ]


@pytest.mark.parametrize("asked", [{}, asking(max_tokens=8)], ids=["no cap", "a cap"])
def test_a_thought_that_never_opens_is_looked_at_no_oftener_with_a_cap(
    vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    reads: list[Any] = []
    engine = v2_engine(vllm, head_of(), tmp_path, dull)
    slots = engine.processor._slots
    generated = slots.generated

    def counted(spans: Any) -> Any:
        reads.append(spans)
        return generated(spans)

    monkeypatch.setattr(slots, "generated", counted)
    request = Request(0, [IDS["5"]], 90, asked)
    engine.run([request])
    # A point every 4 tokens; from the 64th on it is known that there is no thought.
    assert len(reads) == 64 / 4
    assert request.output == [IDS["wait"]] * 90


@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
def test_a_late_mention_of_a_thought_is_no_thought_to_cap(
    vllm: Any, tmp_path: Path, engine: Any
) -> None:
    def lm(request: Request) -> Tensor:
        logits = dull(request)
        if len(request.output) == 66:
            logits[IDS["<think>"]] = 9.0
        return logits

    request = Request(0, [IDS["5"]], 90, asking(max_tokens=8))
    engine(vllm, head_of("every 100 tokens"), tmp_path, lm).run([request])
    wait = [IDS["wait"]]
    assert request.output == wait * 66 + [IDS["<think>"]] + wait * 23


# What an LM says at some places, "wait" elsewhere, to whom asks for 12 tokens, and how that ends.
ENDINGS: dict[str, tuple[str, dict[int, str], dict[str, Any], int | None, tuple[Any, ...]]] = {
    "the device closed it": ("3", {5: "<think>"}, {"max_tokens": 2}, 12, ("capped", 6)),
    "it began too late to be closed": (
        "3",
        {11: "<think>"},
        {"max_tokens": 2},
        12,
        ("token budget", 12),
    ),
    "the LM closed it": ("3 <think>", {3: "</think>"}, {}, 12, ("closed by the LM", 4)),
    "the LM ended in it": ("3 <think>", {3: "<eos>"}, {}, 12, ("closed by the LM", 4)),
    "it met its limit": ("3 <think>", {}, {}, 12, ("token budget", 12)),
    "it never began": ("3", {3: "<eos>"}, {}, 12, ("no thought", 4)),
    "nobody listens any more": ("3 <think>", {}, {}, None, ("cut off", 12)),
}


@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
@pytest.mark.parametrize(
    ("prompt", "says", "asked", "limit", "expected"), ENDINGS.values(), ids=ENDINGS
)
def test_a_control_is_told_how_a_request_ended_after_its_latest_look(
    vllm: Any,
    tmp_path: Path,
    engine: Any,
    prompt: str,
    says: dict[int, str],
    asked: dict[str, Any],
    limit: int | None,
    expected: tuple[Any, ...],
) -> None:
    def lm(request: Request) -> Tensor:
        logits = dull(request)
        if request.name == 0 and len(request.output) in says:
            logits[IDS[says[len(request.output)]]] = 9.0
        return logits

    RisingPrice.reports.clear()
    made = engine(
        vllm, head_of("every 100 tokens"), tmp_path, lm, control="tests.toy_control:RisingPrice"
    )
    ids = [IDS[word] for word in prompt.split()]
    request = Request(0, ids, 12, asking(**asked) | {"mine": True}, ends=(EOS,))
    request.params.max_tokens = limit
    made.run([request])
    if engine is v2_engine or expected[0] == "cut off":
        made.run([Request(name, THINKS, 1) for name in range(1, 80)])  # the slot goes to another
    told = [(r.reason, r.position) for r in RisingPrice.reports if "mine" in r.request.about]
    assert told == [expected]
    assert made.processor.counts.num_capped == (expected[0] == "capped")


def test_a_control_that_moves_prices_is_refused_where_each_process_asks_its_own(
    vllm: Any, tmp_path: Path
) -> None:
    made = config(saved(head_of(), tmp_path), TOKENIZER, control="tests.toy_control:RisingPrice")
    made.parallel_config.tensor_parallel_size = 2
    with pytest.raises(InputError, match="expected one GPU an LM"):
        vllm.HaltProcessor(made, torch.device("cpu"), False)


@pytest.mark.parametrize("engine", [V1Engine, V2Engine])
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("3 <think>", "halted"),
        ("3", "free"),
        ("3 <think> 4 </think>", "free"),
        ("3 </think> 4 <think> 5", "halted"),
    ],
)
def test_only_a_thought_is_halted(
    vllm: Any, tmp_path: Path, engine: type, prompt: str, expected: str
) -> None:
    ids = [IDS[word] for word in prompt.split()]
    output = quiet(
        Request(0, ids, 10, asking(price=ALWAYS, max_tokens=9)), engine, vllm, head_of(), tmp_path
    )
    assert ("halted" if CLOSE in output else "free") == expected


@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
def test_a_thought_that_the_lm_begins_and_ends_itself_is_left_to_it(
    vllm: Any, tmp_path: Path, engine: Any
) -> None:
    def lm(request: Request) -> Tensor:
        logits = dull(request)
        at = {2: "<think>", 7: "</think>"} if request.name == 0 else {5: "<think>"}
        if len(request.output) in at:
            logits[IDS[at[len(request.output)]]] = 9.0
        return logits

    terms = asking(price=ALWAYS, min_tokens=8, max_tokens=9)
    batch = [Request(0, [IDS["3"]], 20, terms), Request(1, [IDS["3"]], 20, terms)]
    engine(vllm, head_of(), tmp_path, lm).run(batch)
    wait = [IDS["wait"]]
    assert batch[0].output == wait * 2 + [IDS["<think>"]] + wait * 4 + [CLOSE] + wait * 12
    assert batch[1].output == wait * 5 + [IDS["<think>"]] + wait * 2 + CLOSE_IDS + wait * 9


@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
def test_logits_that_are_no_numbers_never_halt_and_are_counted(
    vllm: Any, tmp_path: Path, engine: Any
) -> None:
    def lm(request: Request) -> Tensor:
        logits = dull(request)
        if request.name == 0 and len(request.output) == 2:
            logits[IDS["7"]] = torch.nan
        return logits

    batch = [Request(name, THINKS, 12, asking(price=ALWAYS)) for name in range(2)]
    made = engine(vllm, head_of(), tmp_path, lm)
    made.run(batch)
    assert batch[0].output[3:8] == [IDS["wait"]] * 5
    assert batch[0].output[8:11] == CLOSE_IDS  # at the next point
    assert batch[1].output[4:7] == CLOSE_IDS
    assert made.processor.counts == vllm.HaltCounts(2, num_halted=2, num_bad_signals=1)


@pytest.mark.parametrize("place", range(len(CLOSE_IDS)))
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("engine", [v1_engine, v2_engine])
def test_a_token_that_is_forbidden_is_not_forced_nor_is_what_follows(
    vllm: Any, tmp_path: Path, engine: Any, temperature: float, place: int
) -> None:
    def lm(request: Request) -> Tensor:
        logits = dull(request)
        logits[CLOSE_IDS[place]] = -torch.inf
        return logits

    request = Request(0, THINKS, 40, asking(price=ALWAYS), temperature=temperature)
    engine(vllm, head_of(), tmp_path, lm).run([request])
    expected = replace(request, output=[])
    while not expected.is_done:
        at = len(expected.output) - 4
        if 0 <= at < place:
            expected.output.append(CLOSE_IDS[at])
        else:
            expected.take(lm(expected))
    assert request.output == expected.output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_likeliest_tokens_need_no_copy_to_the_host_and_greedy_requests_none_of_them(
    vllm: Any, tmp_path: Path, temperature: float
) -> None:
    output: list[int] = []
    asked = params(asking(price=ALWAYS), temperature=temperature)
    processor = joined(vllm, tmp_path, asked, output)
    for step in range(12):
        logits = dull(Request(0, THINKS, 9))[None]
        with NoHost() if step > 4 else nullcontext():
            given = processor.apply(logits)
        is_given = step >= 4 and (temperature > 0 or step < 4 + len(CLOSE_IDS))
        assert int((given > -torch.inf).sum()) == (1 if is_given else len(WORDS))
        output.append(int(given.argmax()))
    assert output == [IDS["wait"]] * 4 + CLOSE_IDS + [IDS["wait"]] * 5


def joined(module: Any, tmp_path: Path, params: Any, output: list[int]) -> Any:
    """A V1 processor with one request at row 0."""
    processor = v1_engine(module, head_of(), tmp_path).processor
    processor.update_state(BatchUpdate(1, [], [(0, params, THINKS, output)], []))
    return processor


def test_tokens_that_v1_does_not_show_yet_do_not_double_the_close_text(
    vllm: Any, tmp_path: Path
) -> None:
    output: list[int] = []
    processor = joined(vllm, tmp_path, params(asking(price=ALWAYS)), output)
    taken = []
    for step in range(10):
        logits = dull(Request(0, THINKS, 9))[None]
        taken.append(int(processor.apply(logits).argmax()))
        output.append(taken[-1] if step < 4 else PLACEHOLDER)
    assert taken == [IDS["wait"]] * 4 + CLOSE_IDS + [IDS["wait"]] * 3


def test_a_request_whose_tokens_v1_hides_is_left_alone_and_counted(
    vllm: Any, tmp_path: Path
) -> None:
    output: list[int] = []
    terms = asking(price=ALWAYS, max_tokens=5)
    processor = joined(vllm, tmp_path, params(terms), output)
    for step in range(10):
        logits = dull(Request(0, THINKS, 9))[None]
        assert processor.apply(logits).argmax() == IDS["wait"]
        output.append(PLACEHOLDER if step == 1 else IDS["wait"])
    assert processor.counts == vllm.HaltCounts(num_requests=1, num_lost=1)


def test_v2_leaves_a_request_that_it_takes_up_again_to_the_lm_and_its_cap(
    vllm: Any, tmp_path: Path
) -> None:
    engine = v2_engine(vllm, head_of(), tmp_path, dull)
    batch = [
        Request(0, THINKS, 20, asking(price=ALWAYS), output=[IDS["wait"]] * 2),
        Request(1, THINKS, 20, asking(price=ALWAYS, max_tokens=6), output=[IDS["wait"]] * 2),
        Request(2, THINKS, 20, asking(price=ALWAYS, max_tokens=2), output=[IDS["wait"]] * 2),
    ]
    engine.run(batch)
    assert batch[0].output == [IDS["wait"]] * 20
    assert batch[1].output == [IDS["wait"]] * 6 + CLOSE_IDS + [IDS["wait"]] * 11
    assert batch[2].output == [IDS["wait"]] * 2 + CLOSE_IDS + [IDS["wait"]] * 15
    assert engine.processor.counts == vllm.HaltCounts(num_capped=2, num_lost=3)
    answered = [*[IDS["wait"]] * 4, *CLOSE_IDS, IDS["wait"]]
    back = Request(3, THINKS, 40, asking(price=ALWAYS), output=answered.copy(), temperature=2.0)
    engine.run([back])
    assert back.output == answered + sampled(back, len(answered), dull)


def test_v2_reads_tokens_on_the_host_at_decision_points_only(vllm: Any, tmp_path: Path) -> None:
    engine = v2_engine(vllm, head_of(), tmp_path, dull)
    reads: list[Any] = []

    class Tokens:
        def __getitem__(self, place: Any) -> Tensor:
            reads.append(place)
            return engine.tokens[place]

    engine.states.all_token_ids.gpu = Tokens()
    engine.run([Request(0, THINKS, 18)])
    # The prompt once, and what is new at 4, 8, 12 and 16 tokens.
    assert len(reads) == 1 + 4


def test_v2_warms_up_without_requests(vllm: Any, tmp_path: Path) -> None:
    engine = v2_engine(vllm, head_of(), tmp_path)
    assert engine.processor.add_request(0, params(None))
    ctx = SimpleNamespace(
        idx_mapping_np=np.arange(2), seq_lens_upper_bound_np=np.ones(2), input_ids=torch.zeros(2)
    )
    logits = torch.randn(2, len(WORDS))
    assert torch.equal(engine.processor.apply(logits.clone(), ctx), logits)
    assert engine.processor.counts == vllm.HaltCounts()


def test_what_cannot_be_halted_needs_no_processing(vllm: Any, tmp_path: Path) -> None:
    engine = v2_engine(vllm, head_of(), tmp_path)
    asks: list[dict[str, Any] | None] = [None, asking(price=0), asking(price=0, max_tokens=9)]
    needs = [engine.processor.add_request(0, params(a)) for a in asks]
    assert needs == [True, False, True]


def test_a_halted_request_has_one_line_in_the_log_without_content(
    vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.haltwise")
    batch = [
        Request(0, THINKS, 9, asking(price=ALWAYS)),
        Request(1, THINKS, 9, asking(max_tokens=5)),
    ]
    engine = v1_engine(vllm, head_of(), tmp_path, dull)
    engine.run(batch)
    texts = sorted(record.getMessage().partition(" (")[0] for record in caplog.records)
    assert texts == [
        "haltwise capped a thought at 5 tokens, decision point 1, price 0.1",
        "haltwise halted a thought at 4 tokens, decision point 1, price 10",
    ]
    assert engine.processor.counts == vllm.HaltCounts(2, num_halted=1, num_capped=1)


def test_a_price_of_0_that_nobody_asked_for_is_told_at_start(
    vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = head_of()
    never = HaltHead(replace(head.config, default_price=0.0), head.weights)
    v1_engine(vllm, never, tmp_path, dull)
    assert [record.getMessage() for record in caplog.records] == [NEVER_HALTS]


@pytest.mark.parametrize(
    ("rank", "sharded", "num_lines"), [(0, False, 1), (1, False, 0), (2, False, 1), (1, True, 1)]
)
def test_of_processes_that_sample_the_same_requests_one_logs(
    vllm: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rank: int,
    sharded: bool,
    num_lines: int,
) -> None:
    caplog.set_level(logging.INFO, "vllm.haltwise")
    stated = config(saved(head_of(), tmp_path), TOKENIZER, price=ALWAYS)
    stated.parallel_config = SimpleNamespace(
        rank=rank, tensor_parallel_size=2, enable_batch_sharded_sampling=sharded
    )
    processor = vllm.HaltProcessor(stated, torch.device("cpu"), False)
    V1Engine(processor, dull, Random(0)).run([Request(0, THINKS, 9)])
    assert len(caplog.records) == num_lines


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"haltwise_price": "dear"}, "haltwise_*: price is 'dear', expected a number"),
        ({"haltwise_price": -1}, "haltwise_*: price is -1.0, expected 0 or more, and finite"),
        ({"haltwise_price": [1]}, "haltwise_*: price is [1], expected a number"),
        (
            {"haltwise_max_tokens": 1.5},
            "haltwise_*: max_tokens is 1.5, expected a whole number, 0 or more",
        ),
        (
            {"haltwise_min_tokens": 9, "haltwise_max_tokens": 8},
            "haltwise_*: max_tokens is 8, expected at least 9",
        ),
        ({"haltwise_off": "perhaps"}, "haltwise_*: off is 'perhaps', expected true or false"),
        (
            {"haltwise_prize": 1},
            "haltwise_*: 'prize': expected price, off, min_tokens, max_tokens or segment",
        ),
    ],
)
def test_bad_terms_are_the_request_s_error(vllm: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        vllm.HaltProcessor.validate_params(params(asked))
    assert str(error.value) == message


@pytest.mark.parametrize("asked", [None, {}, {"other": "x"}, asking(price="0.5", off=0)])
def test_sound_terms_pass(vllm: Any, asked: dict[str, Any] | None) -> None:
    vllm.HaltProcessor.validate_params(params(asked))


def refusal(module: Any, stated: Any, *args: Any) -> str:
    with pytest.raises(InputError) as error:
        module.HaltProcessor(stated, *(args or (torch.device("cpu"), False)))
    return str(error.value)


def test_heads_that_vllm_cannot_serve_are_refused(vllm: Any, tmp_path: Path) -> None:
    head = head_of()
    always = replace(head.config, halting=replace(head.config.halting, probing="always"))
    other = replace(head.config, tokenizer="0" * 16)
    named = replace(head.config.halting, decision_rule="boundaries")
    mute = replace(head.config.halting, close_text="")
    cases = {
        "head probes always: expected at_halt": always,
        f"tokenizer is {tokenizer_fingerprint(TOKENIZER)}, but the head was trained": other,
        "decision rule 'boundaries' is none that can be run": replace(head.config, halting=named),
        "close text '' has no tokens": replace(head.config, halting=mute),
    }
    for expected, changed in cases.items():
        stated = config(saved(HaltHead(changed, head.weights), tmp_path), TOKENIZER)
        assert expected in refusal(vllm, stated)


def test_a_head_that_reads_hidden_states_is_refused(vllm: Any, tmp_path: Path) -> None:
    halting = head_of().config.halting
    observing = Observing(("hidden",), (0.0,) * 16, (1.0,) * 16, (0.1, 10.0), some_projection(20))
    weights = head_of().weights | {"w0": np.zeros((8, 17), dtype=np.float32)}
    head = HaltHead(HeadConfig(observing, halting, default_price=1.0), weights)
    stated = config(saved(head, tmp_path), TOKENIZER)
    assert "head has features 'hidden': expected none" in refusal(vllm, stated)


def test_the_head_may_be_named_in_the_environment(
    vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = config(None, TOKENIZER)
    monkeypatch.delenv("HALTWISE_HEAD", raising=False)
    assert refusal(vllm, stated) == (
        "no head: expected additional-config {'haltwise': {'head': FOLDER}}, or HALTWISE_HEAD"
    )
    monkeypatch.setenv("HALTWISE_HEAD", saved(head_of(), tmp_path))
    vllm.HaltProcessor(stated, torch.device("cpu"), False)
    stated.additional_config = None  # or an object of the platform's own
    vllm.HaltProcessor(stated, torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"speculative_config": object()},
            "speculative decoding: expected none, a head decides token by token",
        ),
        (
            {"additional_config": {"haltwise": "FOLDER"}},
            "haltwise in additional-config is 'FOLDER', expected {'head': FOLDER}",
        ),
        ({"price": "dear"}, "haltwise in additional-config: price is 'dear', expected a number"),
        ({"think_begin": "<t>"}, "haltwise in additional-config: 'think_begin': expected price,"),
        ({"free_answers": "no"}, "free_answers is 'no', expected true or false"),
        ({"head": ""}, "haltwise in additional-config: head is '', expected text"),
        ({"tokenizer": None}, "the engine has no tokenizer: expected one"),
        ({"is_diffusion": True}, "a diffusion LM: expected one that generates token by token"),
        ({"logits_processors": None}, "loaded as a plugin, V1 with async scheduling hides"),
    ],
)
def test_an_engine_that_cannot_be_halted_is_refused_at_start(
    vllm: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stated = config(saved(head_of(), tmp_path), TOKENIZER)
    for name, value in changes.items():
        if hasattr(stated, name):
            setattr(stated, name, value)
        elif name in ("tokenizer", "is_diffusion", "logits_processors"):
            setattr(stated.model_config, name, value)
        else:
            stated.additional_config["haltwise"][name] = value
    assert message in refusal(vllm, stated)


def test_as_a_plugin_it_goes_where_tokens_are_shown(vllm: Any, tmp_path: Path) -> None:
    stated = config(saved(head_of(), tmp_path), TOKENIZER)
    stated.model_config.logits_processors = None
    V2Engine(lambda states: vllm.HaltProcessor(stated, states), dull, Random(0))
    stated.scheduler_config.async_scheduling = False
    vllm.HaltProcessor(stated, torch.device("cpu"), False)


def test_the_head_names_the_lm_s_own_markers(vllm: Any, tmp_path: Path) -> None:
    head = head_of()
    halting = replace(head.config.halting, think_start="wait so")
    head = HaltHead(replace(head.config, halting=halting), head.weights)
    stated = config(saved(head, tmp_path), TOKENIZER, price=ALWAYS)
    processor = vllm.HaltProcessor(stated, torch.device("cpu"), False)
    thinks = [IDS["wait"], IDS["so"]]
    batch = [Request(0, thinks, 8), Request(1, THINKS, 8)]
    V1Engine(processor, dull, Random(0)).run(batch)
    assert [CLOSE in request.output for request in batch] == [True, False]


def test_it_is_a_processor_of_both_runners_and_never_skipped_for_greedy(
    vllm: Any, tmp_path: Path
) -> None:
    assert issubclass(vllm.HaltProcessor, V1Processor)
    assert issubclass(vllm.HaltProcessor, V2Processor)
    assert not v1_engine(vllm, head_of(), tmp_path).processor.is_argmax_invariant()


def test_a_vllm_without_the_second_runner_will_do(tmp_path: Path) -> None:
    with plugin(has_v2=False) as module:
        assert not issubclass(module.HaltProcessor, V2Processor)
        request = Request(0, THINKS, 8, asking(price=ALWAYS))
        v1_engine(module, head_of(), tmp_path, dull).run([request])
        assert CLOSE in request.output


def test_without_vllm_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm.tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    forget_plugin()
    with pytest.raises(ImportError, match="vllm"):
        import_module("haltwise.vllm")
