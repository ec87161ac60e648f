"""The vLLM engine, on a stand-in for vLLM that runs a small LM.

tests/vllm_engine has the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from haltwise import InputError
from recording.collect import CollectConfig, seeded_questions
from recording.config import TaskFormat
from recording.engine import RecordingEngine
from recording.hf_engine import HfEngine
from recording.trace_row import TraceRow
from tests.recordings import assert_same, save_tiny_lm, small_config
from tests.tiny_lm import EOS, tiny_lm

SHORT = TaskFormat("short", "", "", "")
UP_TO_7 = TaskFormat("short", "", "7", "")


@dataclass
class Output:
    """What vLLM gives for one request, and what is changed in it."""

    token_ids: list[int]
    logprobs: Any
    finish_reason: str = "stop"


class FakeLLM:
    """vLLM's `LLM`, one greedy request at a time."""

    #: Applied to all that is generated.
    spoil: Callable[[Output], None] = staticmethod(lambda output: None)
    options: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        if options["dtype"] != "float32":
            raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
        FakeLLM.options = options
        self._model = tiny_lm(seed=1)

    def generate(self, requests: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm and len(requests) == len(params)
        answered = []
        for request, asked in zip(requests, params, strict=True):
            output = self._answer(request["prompt_token_ids"], asked)
            FakeLLM.spoil(output)
            answered.append(SimpleNamespace(outputs=[output]))
        return answered

    @torch.inference_mode()
    def _answer(self, prompt: list[int], asked: Any) -> Output:
        assert asked.temperature == 0 and asked.flat_logprobs and asked.ignore_eos
        assert len(prompt) + asked.max_tokens <= self.options["max_model_len"]
        tokens: list[int] = []
        numbers: list[float] = []
        while len(tokens) < asked.max_tokens and not set(tokens[-1:]) & set(asked.stop_token_ids):
            logits = self._model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            top = logits.float().log_softmax(-1).topk(asked.logprobs)
            tokens.append(int(top.indices[0]))
            numbers += [float(top.values[0]), *top.values.tolist()]
        return Output(tokens, SimpleNamespace(logprobs=numbers))


@pytest.fixture
def open_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RecordingEngine]]:
    """Opens the engine with what stands for vLLM in its place."""
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(device_type="cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    yield import_module("recording.vllm_engine").VllmEngine
    del sys.modules["recording.vllm_engine"]


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lms") / "tiny")


@pytest.fixture
def config(lm_folder: Path, tmp_path: Path) -> CollectConfig:
    return small_config(lm_folder, tmp_path / "traces", temperature=0.0, max_answer_tokens=6)


def recorded(engine: RecordingEngine, config: CollectConfig) -> dict[str, TraceRow]:
    return {row["trace_id"]: row for row in engine.record(seeded_questions(config))}


@pytest.mark.parametrize("task_format", [SHORT, UP_TO_7])
def test_a_greedy_recording_equals_that_of_transformers(
    open_vllm: Callable[..., RecordingEngine], config: CollectConfig, task_format: TaskFormat
) -> None:
    rows = recorded(open_vllm(config, task_format), config)
    expected = recorded(HfEngine(config, task_format), config)
    assert rows.keys() == expected.keys() and len(rows) == 14
    assert len({num for row in rows.values() for num in row["probe_tokens"]}) > 1
    for name, row in rows.items():
        del expected[name]["end_think_logprob"]
        assert_same(row, expected[name])


def test_what_vllm_cannot_tell_is_left_out_and_the_recorder_says_so(
    open_vllm: Callable[..., RecordingEngine], config: CollectConfig
) -> None:
    vllm, hf = open_vllm(config, SHORT).recorder, HfEngine(config, SHORT).recorder
    assert (vllm["engine"], hf["engine"]) == ("vllm", "hf")
    assert set(hf["signals"]) - set(vllm["signals"]) == {"end_think_logprob"}
    differ = {name for name in hf if hf[name] != vllm[name]}
    assert differ == {"engine", "signals", "revision"}
    assert FakeLLM.options["max_model_len"] == min(2048, 32 + 1 + 6 + 4096)
    assert FakeLLM.options["model"] == config.lm


def test_a_self_test_tells_what_it_found(
    open_vllm: Callable[..., RecordingEngine],
    config: CollectConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = open_vllm(config, SHORT)
    asked = list(seeded_questions(config))
    monkeypatch.setattr("recording.vllm_engine.left_out", lambda *_: ["top_k is left out"])
    report = engine.self_test(asked, 32)
    assert "\nwarning: top_k is left out" in report
    assert "14 questions: ended by the LM " in report and "\nprompt:     '" in report
    with pytest.raises(InputError, match="no thought comes to a decision point"):
        engine.self_test(asked, 4)
    monkeypatch.setattr(FakeLLM, "spoil", staticmethod(silence))
    silent = open_vllm(replace(config, max_answer_tokens=1), SHORT)
    with pytest.raises(InputError, match=r"none of \d+ forced answers can be read"):
        silent.self_test(asked, 32)


def silence(output: Output) -> None:
    """Makes the end token of a forced answer of one token."""
    if len(output.token_ids) == 1:
        output.token_ids = [EOS]


def drop_logprobs(output: Output) -> None:
    output.logprobs = None


def drop_one(output: Output) -> None:
    output.logprobs.logprobs.pop()


def cut(output: Output) -> None:
    output.token_ids, output.finish_reason = [2, 3], "abort"


def turn_nan(output: Output) -> None:
    output.logprobs.logprobs[-1] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_logprobs, r"vLLM gave 0 log probabilities with \d+ tokens, expected 21 a token"),
        (drop_one, r"vLLM gave \d+ log probabilities"),
        (cut, r"vLLM gave 2 tokens without an end \('abort'\), expected 32, or"),
        (turn_nan, r"LM gave NaN logits at position \d+"),
    ],
)
def test_an_output_that_is_not_whole_is_refused(
    open_vllm: Callable[..., RecordingEngine],
    config: CollectConfig,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Output], None],
    message: str,
) -> None:
    monkeypatch.setattr(FakeLLM, "spoil", staticmethod(spoil))
    with pytest.raises(InputError, match=message):
        recorded(open_vllm(config, SHORT), config)


def test_bad_settings_are_refused(
    open_vllm: Callable[..., RecordingEngine], config: CollectConfig, tmp_path: Path
) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"device": "cuda:1"}, "expected 'cuda', choose GPUs by CUDA_VISIBLE_DEVICES"),
        ({"device": "cuda"}, "device is 'cuda', but this vLLM runs on 'cpu'"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
        ({"lm": str(tmp_path / "nowhere")}, "cannot load an LM from"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=message):
            open_vllm(replace(config, **change), SHORT)
    engine = open_vllm(replace(config, close_text="so"), replace(SHORT, cue="so"))
    with pytest.raises(InputError, match="close text 'so' does not close a thought"):
        engine.self_test(list(seeded_questions(config)), 32)


def test_questions_that_are_too_long_are_left_out(
    open_vllm: Callable[..., RecordingEngine],
    config: CollectConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = open_vllm(replace(config, max_tokens=2035), SHORT)
    assert not list(engine.record(seeded_questions(config)))
    told = capsys.readouterr().out
    assert told.count("tokens, expected at most 6: left out") == 14
    with pytest.raises(InputError, match="none of 14 questions has at most 6 tokens"):
        engine.self_test(list(seeded_questions(config)), 32)


def test_an_engine_that_does_not_start_tells_why(
    open_vllm: Callable[..., RecordingEngine],
    config: CollectConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform = sys.modules["vllm.platforms"].current_platform
    monkeypatch.setattr(platform, "device_type", "cuda")
    with pytest.raises(InputError, match=r"vLLM does not start with .*tiny': Engine core init"):
        open_vllm(replace(config, device="cuda"), SHORT)
