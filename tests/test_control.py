"""One control, seen to be obeyed in the middle of a thought by every adapter."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from haltwise import InputError, Session, Terms, ThoughtRequest
from haltwise.session.control import load_control
from haltwise.session.stream import StreamedThought
from haltwise.session.thought import PointRules
from haltwise.transformers import HaltProcessor, ProbingGeneration, generate_all, hub
from tests.tiny_lm import CLOSE, EOS, IDS, tiny_lm
from tests.toy_control import HALTS_FROM, BrokenControl, RisingPrice
from tests.transformers.hf_cases import ALWAYS, PROMPTS, TOKENIZER, blind_head, generate, head
from tests.vllm.fake_vllm import Request as EngineRequest
from tests.vllm.fake_vllm import V1Engine, V2Engine, config, plugin

OPEN_END: dict[str, Any] = {"suppress_tokens": [EOS, CLOSE]}
EVERYWHERE = [(HALTS_FROM, "halted", ALWAYS)] * len(PROMPTS)


@pytest.fixture(autouse=True)
def _no_reports() -> Iterator[None]:
    RisingPrice.reports.clear()
    yield


def told() -> list[tuple[int, str, float]]:
    """What the control was told: positions, reasons and prices."""
    return [(report.position, report.reason, report.price) for report in RisingPrice.reports]


def test_a_logits_processor_obeys() -> None:
    model = tiny_lm(seed=3)
    looking = HaltProcessor(blind_head(), model, TOKENIZER, control=RisingPrice())
    generate(model, **OPEN_END, logits_processor=[looking])
    assert looking.report == RisingPrice.reports
    assert told() == EVERYWHERE
    assert [report.request.about for report in RisingPrice.reports] == [
        {"row": i} for i in range(3)
    ]


@pytest.mark.parametrize("policy", [head(), blind_head()], ids=["probing", "blind"])
def test_a_probing_generation_obeys(policy: Any) -> None:
    generation = ProbingGeneration(policy, TOKENIZER, control=RisingPrice())
    generate(tiny_lm(seed=3), **OPEN_END, custom_generate=generation)
    assert generation.report == RisingPrice.reports
    assert told() == EVERYWHERE


def test_a_repository_of_the_hub_obeys(tmp_path: Path) -> None:
    hub.export(blind_head(), tmp_path)
    model = tiny_lm(seed=3)
    inputs = TOKENIZER(PROMPTS, return_tensors="pt", padding=True)
    asked: dict[str, Any] = {"head": str(tmp_path), "tokenizer": TOKENIZER, "max_new_tokens": 40}
    hub.generate(model, **inputs, **asked, **OPEN_END, control=RisingPrice())
    assert told() == EVERYWHERE


@pytest.mark.parametrize("policy", [head(), blind_head()], ids=["probing", "blind"])
def test_a_batch_job_obeys(policy: Any) -> None:
    model = tiny_lm(seed=3)
    with torch.no_grad():
        model.lm_head.weight[[EOS, CLOSE]] = 0.0  # they are never the likeliest
    control = RisingPrice()
    done = list(generate_all(model, TOKENIZER, policy, PROMPTS, 2, 40, control=control))
    assert {answer.report.request.about["prompt"] for answer in done} == {0, 1, 2}
    assert [answer.report for answer in done] == RisingPrice.reports
    assert told() == EVERYWHERE


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_vllm_obeys(runner: str, tmp_path: Path) -> None:
    blind_head(close="so </think>").save(tmp_path)
    logits = torch.zeros(len(TOKENIZER))
    logits[IDS["wait"]] = 5.0
    request = EngineRequest(0, [IDS["3"], IDS["<think>"]], 20)
    made = config(str(tmp_path), TOKENIZER, control="tests.toy_control:RisingPrice")
    with plugin() as module:
        if runner == "V1":
            processor = module.HaltProcessor(made, torch.device("cpu"), False)
            V1Engine(processor, lambda _: logits.clone(), Random(0)).run([request])
        else:
            V2Engine(
                lambda states: module.HaltProcessor(made, states),
                lambda _: logits.clone(),
                Random(0),
            ).run([request])
    expected = [IDS["wait"]] * HALTS_FROM + [IDS["so"], CLOSE]
    assert request.output[: HALTS_FROM + 2] == expected
    assert told() == EVERYWHERE[:1]


def streamed(control: Any, num: int = 20) -> list[int]:
    """The tokens after which a streamed thought is to be closed."""
    policy = blind_head(groups=("pace", "distribution", "reflection"))
    rules = PointRules(policy.config.halting)
    thought = StreamedThought(policy, rules, ThoughtRequest(Terms(ALWAYS)), "<think>", control)
    closes = [thought.add("a ", -0.1, [-0.1, *[-5.0] * 19]) for _ in range(num)]
    thought.finish()
    return [i for i, closed in enumerate(closes, start=1) if closed]


def test_a_stream_obeys() -> None:
    assert streamed(None) == [4]
    assert streamed(RisingPrice()) == [HALTS_FROM]
    assert told() == EVERYWHERE[:1]


def test_the_guides_control_runs() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "SERVING.md").read_text()
    block = guide.split("## Who sets the prices")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(block, names)
    control = names["HigherUnderLoad"]()
    assert streamed(control) == [4]
    control.num_running = 100
    assert streamed(control) == [4]
    assert control.num_running == 100


def test_a_control_that_fails_halts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert streamed(BrokenControl()) == []
    assert "the control failed" in caplog.text


class NoTerms(RisingPrice):
    def terms(self, request: ThoughtRequest) -> Terms:
        raise OSError("unreachable")


def test_a_request_without_terms_is_not_halted_at_any_price() -> None:
    assert streamed(NoTerms()) == []


def test_a_control_is_told_of_a_call_whose_report_nobody_reads() -> None:
    model = tiny_lm(seed=3)
    looking = HaltProcessor(blind_head(), model, TOKENIZER, control=RisingPrice())
    generate(model, **OPEN_END, logits_processor=[looking])
    assert told() == []
    del looking
    gc.collect()
    assert told() == EVERYWHERE


def test_what_is_no_control_is_refused() -> None:
    for name in ("collections:OrderedDict", "builtins:object"):
        with pytest.raises(InputError, match="expected one with terms, price, finished"):
            load_control(name)
    with pytest.raises(InputError, match="control is a str, expected"):
        Session(blind_head(), 1, "rising")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "nowhere:At", "tests.toy_control:None", "json:loads"])
def test_a_control_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"control is '.*', expected MODULE:NAME"):
        load_control(name)
