"""The embedded LM in a real llama-server says what it says in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from haltwise import InputError
from lms.embedded import CLOSE, EMBEDDED, EOS, VOCABULARY, prompt_of
from lms.gguf import GgufConfig, WeightType, _type_of, _weights, main, write_gguf
from lms.gguf_file import folder_of
from lms.language_model import LanguageModel
from lms.questions import Question
from lms.tasks import TASKS, questions
from tests.proxy.llama_server import LlamaServer, llama_server

MESSAGES = [{"role": "user", "content": "sum : 9 + 3 + 6"}]
PROMPT = "sum : 9 + 3 + 6 <think>"
ASKED = [questions(task, "test", 1)[0] for task in TASKS]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(EMBEDDED)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    path = tmp_path_factory.mktemp("llama") / "embedded.gguf"
    write_gguf(path)
    with llama_server(path) as running:
        yield running


def encode(lm: LanguageModel, text: str) -> list[int]:
    ids: list[int] = lm.tokenizer.encode(text)
    return ids


def complete(server: LlamaServer, prompt: str, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """The streamed text, and what is told about each token."""
    body = {"prompt": prompt, "max_tokens": 768, "logprobs": 20, "stream": True} | options
    choices = [event["choices"][0] for event in server.post("/v1/completions", body)]
    tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
    return "".join(choice["text"] for choice in choices), tokens


def test_every_word_and_every_question_has_the_same_ids(
    lm: LanguageModel, server: LlamaServer
) -> None:
    for text in ["", " ".join(VOCABULARY), *(prompt_of(q) for q in questions("all", "test", 60))]:
        assert server.post("/tokenize", {"content": text})["tokens"] == encode(lm, text)


@pytest.mark.whole
@pytest.mark.parametrize("question", ASKED, ids=TASKS)
def test_greedy_answers_are_the_same_tokens_and_their_text_has_the_same_ids(
    lm: LanguageModel, server: LlamaServer, question: Question
) -> None:
    inputs = lm.tokenizer(prompt_of(question), return_tensors="pt")
    generate: Any = lm.model.generate  # a mixin annotated for another class
    expected = generate(**inputs, do_sample=False)[0].tolist()
    text, tokens = complete(server, prompt_of(question), temperature=0)
    assert encode(lm, prompt_of(question)) + [token["id"] for token in tokens] == expected
    assert encode(lm, prompt_of(question) + text + EOS) == expected


def test_log_probabilities_of_samples_are_those_of_transformers_at_temperature_1(
    lm: LanguageModel, server: LlamaServer
) -> None:
    _, tokens = complete(server, PROMPT, temperature=1.5, top_k=5, seed=0, max_tokens=200)
    before, chosen = encode(lm, PROMPT), [token["id"] for token in tokens]
    with torch.no_grad():
        logits = lm.model(torch.tensor([before + chosen])).logits[0, len(before) - 1 : -1]
    expected = logits.log_softmax(-1)
    rows = torch.arange(len(chosen))
    told = [token["logprob"] for token in tokens]
    np.testing.assert_allclose(told, expected[rows, chosen], atol=1e-3)
    top = [[(t["id"], t["logprob"]) for t in token["top_logprobs"]] for token in tokens]
    ids, likeliest = np.moveaxis(np.array(top), -1, 0)
    np.testing.assert_allclose(likeliest, expected.topk(20).values, atol=1e-3)
    np.testing.assert_allclose(
        likeliest, expected.gather(1, torch.tensor(ids, dtype=torch.int64)), atol=1e-3
    )


def test_a_chat_asks_the_question_and_its_thought_is_told_from_its_answer(
    server: LlamaServer,
) -> None:
    assert server.post("/apply-template", {"messages": MESSAGES}) == {"prompt": PROMPT}
    text, _ = complete(server, PROMPT, temperature=0)
    asked = {"messages": MESSAGES, "temperature": 0}
    message = server.post("/v1/chat/completions", asked)["choices"][0]["message"]
    assert message["reasoning_content"] + CLOSE + message["content"] == text
    assert message["content"] == " 18"


def test_the_server_can_close_a_thought(server: LlamaServer) -> None:
    asked = {"messages": MESSAGES, "temperature": 0, "reasoning_budget_tokens": 9}
    message = server.post("/v1/chat/completions", asked)["choices"][0]["message"]
    assert message["reasoning_content"] == " 9 + 3 = 12 + 6 = 18"
    assert message["content"] == " 18"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROMPT + "9 + 3 = 12"),
        (
            {"continue_final_message": "content", "add_generation_prompt": False},
            PROMPT + "9 + 3 = 12" + CLOSE,
        ),
    ],
    ids=["its thought", "its answer"],
)
def test_a_begun_message_goes_on(
    server: LlamaServer, options: dict[str, Any], expected: str
) -> None:
    begun = {"role": "assistant", "reasoning_content": "9 + 3 = 12", "content": ""}
    body = {"messages": [*MESSAGES, begun], **options}
    assert server.post("/apply-template", body) == {"prompt": expected}


def test_transformers_reads_the_same_weights_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTWISE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "embedded.gguf")
    unpacked = load_file(folder_of(tmp_path / "embedded.gguf") / "model.safetensors")
    for name, weight in load_file(EMBEDDED / "model.safetensors").items():
        np.testing.assert_array_equal(unpacked[name], weight, name)
    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda writer, num: None)
    write_gguf(tmp_path / "vague.gguf")
    with pytest.raises(
        InputError, match=r"wrongly: expected llama\.attention\.head_count_kv in it"
    ):
        folder_of(tmp_path / "vague.gguf")


def test_an_earlier_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "embedded.gguf"
    path.write_text("an earlier file")
    write_gguf(path)
    assert path.read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("weight_type", "steps"), [("f32", None), ("q8_0", 127), ("q4_0", 8)])
def test_weights_are_rounded_to_their_types_steps(
    weight_type: WeightType, steps: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "embedded.gguf"
    main(GgufConfig(path, weight_type))
    config = json.loads((EMBEDDED / "config.json").read_text())
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, weight in _weights(EMBEDDED, config):
        found = gguf.quants.dequantize(read[name].data, read[name].tensor_type)
        error = np.abs(found.reshape(weight.shape) - weight)
        if steps is None or weight.ndim == 1:  # a vector stays as it is
            assert not error.any()
            continue
        # A block of 32 has the scale of its largest weight, in half precision. Of 4 bits, -8 to 7,
        # the largest is -8, and a weight as large on the other side is a whole step off.
        largest = np.abs(weight).reshape(-1, 32).max(axis=1).repeat(32).reshape(weight.shape)
        off = 1.0 if weight_type == "q4_0" else 0.5
        assert (error <= largest / steps * off * 1.01 + largest * 2**-11).all()
        assert error.any()
    told = {
        "f32": "38 tensors in f32",
        "q8_0": "29 tensors in q8_0, 9 tensors in f32",
        "q4_0": "29 tensors in q4_0, 9 tensors in f32",
    }
    assert f"embedded.gguf: {told[weight_type]}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "expected"), [((4, 64), "Q4_0"), ((4, 48), "F32"), ((64,), "F32")]
)
def test_what_is_no_whole_number_of_blocks_stays_in_f32(
    shape: tuple[int, ...], expected: str
) -> None:
    assert _type_of(np.ones(shape, dtype=np.float32), "q4_0").name == expected


@pytest.mark.parametrize("weight_type", ["q8_0", "q4_0"])
def test_a_server_answers_from_a_quantised_file(weight_type: WeightType, tmp_path: Path) -> None:
    write_gguf(tmp_path / "embedded.gguf", weight_type)
    with llama_server(tmp_path / "embedded.gguf") as running:
        text, _ = complete(running, PROMPT, temperature=0)
    assert text.endswith(CLOSE + " 18")


@pytest.mark.parametrize("config", [None, "no JSON", '{"model_type": "llama", "vocab_size": 9}'])
def test_a_folder_without_the_embedded_lm_is_told(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="expected a folder with the embedded LM, or one made"):
        write_gguf(tmp_path / "x.gguf", lm=tmp_path)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("name", "told"), [("", "is a folder, expected a file"), ("no/x.gguf", "found no folder")]
)
def test_a_place_for_no_file_is_refused_and_nothing_is_left(
    tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=told):
        write_gguf(tmp_path / "out" / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
