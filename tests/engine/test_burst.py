from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import haltwise.engine.burst
import haltwise.engine.slots
from haltwise import MEAN_LOGPROB, Halting, InputError
from haltwise.engine.burst import Burst, DeviceWork, capture
from haltwise.engine.decoder import Decoder
from haltwise.engine.signal_reducer import MEASURED
from haltwise.engine.slots import SequenceSlots
from haltwise.engine.token_rules import TokenRules
from tests.tiny_lm import CLOSE, EOS, IDS, PAD, ScriptedLM, tiny_config, tiny_lm, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
HALTING = Halting("always", "every 4 tokens", "so </think>", MEAN_LOGPROB, 6)
# Two thoughts are open, two are for the LM to open.
PROMPTS = ["3 . 4 <think>", "5 5", "7 so 8 wait 9 <think>", "1 . 1"]


def tiny_qwen() -> Any:
    shape = tiny_config().to_dict()
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id"]
    names += ["num_attention_heads", "num_key_value_heads", "initializer_range", "eos_token_id"]
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**{name: shape[name] for name in names}, head_dim=8))
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return model.eval()


def think_often(model: Any) -> Any:
    """Thoughts begin and end now and then, and so do answers."""
    words = [IDS["<think>"], CLOSE, EOS]
    model.lm_head.weight.data[words] *= 1.5
    return model


def lived(
    model: Any, burst: int, num_rounds: int = 12, cap: int | None = None, **settings: Any
) -> Iterator[dict[str, Any]]:
    """All that can be seen of some thoughts, round by round; now and then one is closed."""
    arguments: dict[str, Any] = {"halting": HALTING, "max_tokens": 30, "temperature": 0.0}
    lm = Decoder(
        model,
        TOKENIZER,
        num_slots=len(PROMPTS) + 1,
        signals=MEASURED,
        burst=burst,
        **arguments | settings,
    )
    slots = np.array([4, 0, 2, 1])
    lm.start(slots, PROMPTS, range(len(PROMPTS)))
    for thought in lm.thoughts.values():
        thought.cap = cap
    for i in range(num_rounds):
        running = slots[[not lm.thoughts[slot].ended for slot in slots.tolist()]]
        if not len(running):
            return
        here = running[lm.advance(running)]
        probes = lm.force(here)
        yield {
            "thoughts": [
                (t.tokens.copy(), t.position, t.begun, t.closed, t.finished)
                for t in (lm.thoughts[slot] for slot in slots.tolist())
            ],
            "points": here.tolist(),
            "answers": [(probe.tokens, probe.num_tokens, probe.answer) for probe in probes],
            "logprobs": [probe.logprobs for probe in probes],
            "signals": lm.signals(here, probes) if len(here) else None,
        }
        capped = [slot for slot in running.tolist() if lm.thoughts[slot].at_cap]
        closed = {*capped, *(here[-1:].tolist() if i == 3 else [])}
        lm.close(np.array(sorted(closed), dtype=np.int64))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("thoughts", "points", "answers"):
        assert found[name] == expected[name], name
    for mine, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    if expected["signals"] is not None:
        for name, value in vars(expected["signals"]).items():
            if value is not None:
                mine = getattr(found["signals"], name)
                np.testing.assert_allclose(mine, value, atol=2e-3, rtol=1e-3, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 50),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    rule=st.sampled_from(
        ["every 1 tokens", "every 4 tokens", "every 7 tokens, at most 2", "after 1"]
    ),
    max_tokens=st.integers(1, 40),
    cap=st.sampled_from([None, 1, 6, 9]),
    answer_end=st.sampled_from(["", "7", "."]),
    burst=st.sampled_from([1, 2, 3, 5, 64]),
)
@pytest.mark.whole
def test_any_burst_gives_what_token_by_token_gives(
    seed: int,
    temperature: float,
    rule: str,
    max_tokens: int,
    cap: int | None,
    answer_end: str,
    burst: int,
) -> None:
    model = think_often(tiny_lm(seed))
    asked: dict[str, Any] = {
        "halting": replace(HALTING, decision_rule=rule, answer_end=answer_end),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "cap": cap,
    }
    rounds = zip(lived(model, burst, **asked), lived(model, 0, **asked), strict=True)
    for found, expected in rounds:
        assert_same(found, expected)


def test_the_examples_have_all_that_a_burst_could_get_wrong() -> None:
    seen = set()
    for seed in range(8):
        for state in lived(think_often(tiny_lm(seed)), 64, temperature=1.3):
            for (tokens, _, begun, closed, finished), prompt in zip(
                state["thoughts"], PROMPTS, strict=True
            ):
                opened = begun and not prompt.endswith("<think>")
                seen |= {"opened"} if opened else set()
                seen |= {"closed"} if closed and CLOSE in tokens else set()
                seen |= {"ended inside of a burst"} if finished and len(tokens) % 4 else set()
                seen |= {"out of budget"} if len(tokens) == 30 and not finished else set()
    assert seen == {"opened", "closed", "ended inside of a burst", "out of budget"}


def test_a_thought_that_begins_after_its_cap_waits_where_it_began() -> None:
    # Five tokens of prompt and talk, then the marker; the cap was two tokens before.
    model = ScriptedLM(
        lambda token, position: IDS["<think>" if position == 5 else str(position % 20)]
    )
    halting = replace(HALTING, decision_rule="every 40 tokens")
    for burst in (0, 64):
        lm = Decoder(model, TOKENIZER, halting, 2, 60, burst=burst)
        lm.start(np.array([1]), ["5 5"], [0])
        lm.thoughts[1].cap = 3
        assert not lm.advance(np.array([1]))[0]
        thought = lm.thoughts[1]
        assert (thought.num_tokens, thought.at_cap) == (5, True)
        lm.advance(np.array([1]))
        assert (thought.num_tokens, thought.at_cap) == (6, True)
        assert thought.text() == "1 2 3 4 <think> 6"


def test_bursts_end_where_something_is_to_be_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_again(*_: Any) -> None:
        raise AssertionError("a token was fed twice")

    monkeypatch.setattr(SequenceSlots, "step", not_again)
    model = ScriptedLM(lambda token, position: IDS["."])
    lm = Decoder(model, TOKENIZER, HALTING, 2, 11, burst=64)
    slots = np.arange(2)
    lm.start(slots, ["<think>"] * 2, [0, 0])
    lm.thoughts[0].cap = 6
    for expected in ([4, 4], [6, 8], [11, 11]):
        lm.advance(slots)
        assert [lm.thoughts[slot].num_tokens for slot in slots.tolist()] == expected
        if lm.thoughts[0].at_cap:
            lm.close(slots[:1])  # two tokens


def test_idle_rows_are_untouched_and_rows_may_lie_anywhere() -> None:
    model, rng = tiny_lm(seed=4), np.random.default_rng(0)
    ahead, plain = SequenceSlots(model, 6, True, burst=8), SequenceSlots(model, 6, True)
    texts = [rng.integers(len(IDS), size=num).tolist() for num in (250, 3, 120, 7, 255, 1)]
    for slots in (ahead, plain):
        slots.prefill(np.arange(6), texts)
    for num in (1, 3, 8, 8, 2, 8):
        rows = rng.permutation(6)[: rng.integers(1, 6)]
        tokens, logprobs = ahead.burst(rows, num, num_logprobs=1)
        assert (tokens.shape, logprobs.shape) == ((num, len(rows)), (num, len(rows), 1))
        for s in range(num):
            best = plain.next_logits(rows).log_softmax(dim=-1).max(dim=-1)
            assert tokens[s].tolist() == best.indices.tolist()
            np.testing.assert_allclose(logprobs[s, :, 0], best.values, atol=1e-4)
            plain.step(rows, tokens[s])
        everyone = np.arange(6)
        assert ahead.lengths.tolist() == plain.lengths.tolist()
        for see in (SequenceSlots.next_logits, SequenceSlots.last_hidden):
            mine, theirs = see(ahead, everyone), see(plain, everyone)
            assert mine is not None and theirs is not None
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logits_that_are_not_numbers_are_an_error_after_the_burst(temperature: float) -> None:
    model = tiny_lm(seed=1)
    lm = Decoder(model, TOKENIZER, HALTING, 2, 40, temperature, burst=64)
    lm.start(np.arange(2), ["5 <think>", "1 1 1 <think>"], [0, 1])
    lm.advance(np.arange(2))
    num = min(lm.thoughts[i].num_tokens for i in range(2))
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(InputError, match="LM gave NaN logits at position"):
        lm.force(np.arange(2))
    # The logits of the first token were there before.
    with pytest.raises(InputError, match=f"LM gave NaN logits at position {num + 1}"):
        lm.advance(np.arange(2))


class NoHost(TorchDispatchMode, TorchFunctionMode):
    """Refuses what waits for the device: its numbers, or sizes that depend on them."""

    waits = ("item", "_local_scalar_dense", "is_nonzero", "equal")
    sized = ("nonzero", "masked_select", "_unique", "unique")
    #: Of tensors: a CPU's memory is read without any operator.
    reads = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        TorchFunctionMode.__enter__(self)
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        TorchFunctionMode.__exit__(self, *error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.reads:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **kwargs or {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.name().removeprefix("aten::").split(".")[0], kwargs or {}
        if name in self.waits or name.startswith(self.sized):
            raise AssertionError(f"{name} waits for the device")
        devices = {x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)}
        if name in ("to", "_to_copy") and devices - {args[0].device}:
            raise AssertionError("a copy to another device")
        if name.strip("_").startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], Sequence) else ())
        ):
            raise AssertionError("as many as are true: that waits for the device")
        return func(*args, **kwargs)


@pytest.mark.parametrize("make", [tiny_lm, tiny_qwen])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_step_of_a_burst_waits_for_the_device(
    make: Callable[[], Any], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, num = Burst.step, 0

    def watched(burst: Burst, *args: Any) -> None:
        nonlocal num
        with NoHost():
            step(burst, *args)
        num += 1

    monkeypatch.setattr(Burst, "step", watched)
    for state in lived(make(), 64, temperature=temperature, num_rounds=5):
        assert state["thoughts"]
    assert num > 12


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.max().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_fill_(x > 0, 1.0).unique(),
        lambda x: x.to("meta"),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    ],
)
def test_what_waits_for_the_device_is_found(work: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="device"), torch.inference_mode(), NoHost():
        work(torch.randn(3))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[DeviceWork]:
    """Makes captures of steps as they are made on a GPU, but what they replay is the step."""
    found: list[DeviceWork] = []

    def fake(work: DeviceWork, device: torch.device, pool: Any) -> DeviceWork:
        work()  # as capturing does, to warm up
        found.append(work)
        return work

    monkeypatch.setattr(haltwise.engine.slots, "_has_graphs", lambda model: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(haltwise.engine.burst, "capture", fake)
    return found


def test_capturing_leaves_no_mark(captured: list[DeviceWork]) -> None:
    model = think_often(tiny_lm(seed=5))
    asked: dict[str, Any] = {"temperature": 0.7}
    for found, expected in zip(lived(model, 5, **asked), lived(model, 0, **asked), strict=True):
        assert_same(found, expected)
    assert captured


def test_a_step_is_captured_once_for_each_shape_and_again_when_buffers_move(
    captured: list[DeviceWork],
) -> None:
    slots, rows = SequenceSlots(tiny_lm(), 4, burst=8), np.arange(4)
    slots.prefill(rows, [[2, 3]] * 4)
    for num in (8, 1, 8):
        slots.burst(rows, num)
    assert len(captured) == 1
    slots.burst(rows, 8, num_logprobs=1)  # another reduction
    slots.burst(rows[:3], 8)  # as wide as four
    assert len(captured) == 2
    slots.burst(rows[2:3], 8)
    assert len(captured) == 3
    slots.prefill(rows, [[5] * 215] * 4)
    assert slots.lengths.tolist() == [250, 250, 258, 242]
    slots.rollback(rows, 10)
    slots.burst(rows, 8)  # the same shape, but the buffers have grown
    assert len(captured) == 4


def test_a_step_that_cannot_be_captured_is_run_and_a_person_is_told_once(
    captured: list[DeviceWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: DeviceWork, device: torch.device, pool: Any) -> DeviceWork:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(haltwise.engine.burst, "capture", fail)
    model = think_often(tiny_lm(seed=5))
    with pytest.warns(RuntimeWarning, match="no CUDA graph of this LM.*is capturing more$") as told:
        rounds = list(lived(model, 5))
    assert len(told) == 1
    for found, expected in zip(rounds, lived(model, 0), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 256), (256, 256), (257, 384), (384, 384), (385, 512), (513, 768), (1500, 1536)],
)
def test_windows_have_few_lengths(length: int, expected: int) -> None:
    assert haltwise.engine.slots._window_length(length) == expected


def test_bursts_have_few_widths() -> None:
    assert [haltwise.engine.slots._width(num) for num in (1, 2, 8, 9, 64, 65)] == [
        1,
        8,
        8,
        16,
        64,
        128,
    ]


def test_forced_answers_of_a_burst_end_where_they_end() -> None:
    # The answer is 7 8 9 ..., and "9" ends it.
    model = ScriptedLM(lambda token, position: IDS["7"] if token == CLOSE else token + 1)
    for max_tokens, words in ((10, "7 8 9"), (2, "7 8"), (3, "7 8 9")):
        halting = replace(HALTING, answer_end="9", max_answer_tokens=max_tokens)
        slots = SequenceSlots(model, 2, burst=4)
        slots.prefill(np.array([1]), [[IDS["5"]]])
        (answer,) = slots.force(np.array([1]), TokenRules(TOKENIZER, halting), [EOS])
        assert answer.tokens == [IDS[word] for word in words.split()]
        assert answer.num_tokens == len(answer.tokens)
        assert slots.lengths.tolist() == [0, 1]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_graphs_on_a_gpu_give_what_token_by_token_gives(temperature: float) -> None:
    model = think_often(tiny_lm(seed=5)).cuda()
    asked: dict[str, Any] = {"temperature": temperature}
    for found, expected in zip(lived(model, 64, **asked), lived(model, 0, **asked), strict=True):
        assert_same(found, expected)
    total = torch.zeros(1, device="cuda")

    def count() -> None:
        total.add_(1)

    replay = capture(count, total.device, torch.cuda.graph_pool_handle())
    replay()
    assert total.item() == 2  # once to warm up, and capturing itself runs nothing
