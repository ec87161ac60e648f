"""The real vLLM with the real embedded LM; see the Makefile for what it needs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from haltwise import HaltHead
from haltwise.transformers import HaltProcessor
from lms.embedded import prompt_of
from lms.tasks import questions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[2]
LM, HEAD = ROOT / "checkpoints/embedded", ROOT / "checkpoints/embedded-blind-head"
PROCESSOR = "haltwise.vllm:HaltProcessor"
CLOSE_TEXT = ". so </think>"
NUM_TOKENS = 96
# At NEVER the head of these tests halts nowhere.
NEVER, PRICES = 1e-9, (0.3, 1.0, 5.0)
PROMPTS = [prompt_of(q) for task in ("sum", "let", "leap") for q in questions(task, "test", 2)]
RUNNERS = ["v1", "v2"] if find_spec("triton") else ["v1"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}

Batch = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head with a close text of three tokens."""
    found = HaltHead.load(HEAD)
    halting = replace(found.config.halting, close_text=CLOSE_TEXT)
    folder = tmp_path_factory.mktemp("head")
    HaltHead(replace(found.config, halting=halting), found.weights).save(folder)
    return folder


def plugin(head: Path, **terms: Any) -> dict[str, Any]:
    return {
        "logits_processors": [PROCESSOR],
        "additional_config": {"haltwise": {"head": str(head)} | terms},
    }


def run(
    runner: str, batches: list[Batch], result: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    sizes = {"max_model_len": 512, "max_num_seqs": 6, "dtype": "float32"}
    job = {"runner": runner, "options": {"model": str(LM)} | sizes | options, "batches": batches}
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py")), result],
        input=json.dumps(job),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def generated(runner: str, batches: list[Batch], **options: Any) -> list[list[list[int]]]:
    with NamedTemporaryFile() as result:
        done = run(runner, batches, result.name, **options)
        assert done.returncode == 0, done.stderr[-4000:]
        found = json.load(result)
    assert found["runner"] == runner
    print(runner, options, [round(seconds, 2) for seconds in found["seconds"]], "s")
    rows: list[list[list[int]]] = found["batches"]
    return rows


def greedy(**terms: Any) -> dict[str, Any]:
    asked = {f"haltwise_{name}": value for name, value in terms.items()}
    return {"temperature": 0, "max_tokens": NUM_TOKENS, "extra_args": asked}


def beside_transformers(head: Path, price: float) -> list[tuple[list[int], int | None]]:
    """What transformers generates, and where the head halted it, if it did."""
    tokenizer = AutoTokenizer.from_pretrained(LM)
    model: Any = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        processor = HaltProcessor(HaltHead.load(head), model, tokenizer, price)
        out = model.generate(
            **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, logits_processor=[processor]
        )
        (report,) = processor.report
        tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
        found.append((tokens, report.position if report.halted else None))
    return found


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_head_that_never_halts_changes_no_token(runner: str, head: Path) -> None:
    # No top_p: its kernel does not run in the interpreter.
    sampling = {"temperature": 0.8, "repetition_penalty": 1.1, "max_tokens": NUM_TOKENS}
    never = {"extra_args": {"haltwise_price": NEVER}}
    batches = [
        [(prompt, greedy(price=NEVER)) for prompt in PROMPTS],
        [(prompt, sampling | never | {"seed": i}) for i, prompt in enumerate(PROMPTS)],
    ]
    assert generated(runner, batches, **plugin(head)) == generated(runner, batches)


@pytest.mark.parametrize("runner", RUNNERS)
def test_thoughts_are_halted_where_they_are_beside_transformers(runner: str, head: Path) -> None:
    batches = [[(prompt, greedy(price=price)) for prompt in PROMPTS] for price in PRICES]
    places = set()
    for price, rows in zip(PRICES, generated(runner, batches, **plugin(head)), strict=True):
        expected, halted_at = zip(*beside_transformers(head, price), strict=True)
        assert rows == list(expected)
        places |= set(halted_at)
    assert None in places and len(places) > 3


@pytest.mark.parametrize("runner", RUNNERS)
def test_sampled_requests_are_answered_greedily_behind_closed_thoughts_unless_answers_are_free(
    runner: str, head: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LM)
    model: Any = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32)
    terms = ({"haltwise_price": NEVER}, {"haltwise_price": PRICES[-1], "haltwise_max_tokens": 30})
    sampling = {"temperature": 1.5, "max_tokens": NUM_TOKENS}
    batch: Batch = [
        (prompt, sampling | {"seed": i, "extra_args": terms[i % 2]})
        for i, prompt in enumerate(PROMPTS * 3 + PROMPTS[::-1])
    ]
    (rows,) = generated(runner, [batch], **plugin(head))
    (free,) = generated(runner, [batch], **plugin(head, free_answers=True))
    close, num_closed = tokenizer.encode(CLOSE_TEXT), 0
    for (prompt, _), row, other in zip(batch, rows, free, strict=True):
        starts = [i for i in range(len(row)) if row[i : i + len(close)] == close]
        if not starts:
            assert row == other
            continue
        num_closed, end = num_closed + 1, starts[0] + len(close)
        assert row[:end] == other[:end]
        known = torch.tensor([tokenizer.encode(prompt) + row[:end]])
        answer = model.generate(known, max_new_tokens=NUM_TOKENS - end, do_sample=False)
        assert row[end:] == answer[0, known.shape[1] :].tolist()
    assert len(rows) - 5 > num_closed > 5
    assert sum(row != other for row, other in zip(rows, free, strict=True)) > 2


@pytest.mark.parametrize("runner", RUNNERS)
def test_load_changes_no_decision(runner: str, head: Path) -> None:
    """Chunked prefill; and in V1 so little memory that requests make way and come back."""
    batches = [[(prompt, greedy(price=PRICES[-1])) for prompt in PROMPTS]]
    calm = generated(runner, batches, **plugin(head), max_num_seqs=1)
    load = {"max_num_batched_tokens": 16, "max_model_len": 160}
    if runner == "v1":
        load |= {"num_gpu_blocks_override": 8, "block_size": 32}
    assert generated(runner, batches, **plugin(head), **load) == calm


@pytest.mark.parametrize("runner", RUNNERS)
def test_each_request_of_a_batch_has_its_own_terms(runner: str, head: Path) -> None:
    asked: list[dict[str, Any]] = [{}, {"price": 11}, {"off": 1}, {"max_tokens": 7}, {"price": "0"}]
    batch = [(PROMPTS[0], greedy(**terms)) for terms in asked]
    (rows,) = generated(runner, [batch], **plugin(head, price=0))
    free, dear, off, capped, zero = rows
    assert free == off == zero
    tokenizer = AutoTokenizer.from_pretrained(LM)
    close = tokenizer.encode(CLOSE_TEXT, add_special_tokens=False)
    assert capped[:10] == free[:7] + close
    (at,) = (i for i in range(0, NUM_TOKENS, 12) if dear[i : i + len(close)] == close)
    assert dear[:at] == free[:at]


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_engine_does_not_start_with_a_head_that_does_not_fit(runner: str) -> None:
    done = run(runner, [], os.devnull, **plugin(ROOT / "checkpoints/embedded-head"))
    assert done.returncode != 0
    assert "InputError: head probes always: expected at_halt" in done.stdout + done.stderr


def test_the_guides_snippet_runs_as_it_stands() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/SERVING.md").read_text(), re.DOTALL)
    (snippet,) = (block for block in blocks if "SamplingParams" in block)
    assert len(snippet.splitlines()) <= 10
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=ROOT,
        env=ENVIRONMENT | cpu,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "</think>" in done.stdout
    assert "haltwise halted a thought at" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def server(head: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running HTTP server: an engine in a process of its own, as it is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(LM)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512"]
    command += ["--dtype", "float32", "--enforce-eager", "--served-model-name", "lm"]
    command += ["--logits-processors", PROCESSOR]
    command += ["--additional-config", json.dumps({"haltwise": {"head": str(head), "price": 0}})]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = (tmp_path_factory.mktemp("server") / "log.txt").open("w+")
    process = subprocess.Popen(command, env=ENVIRONMENT | cpu, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health", process)
        yield address
    finally:
        process.terminate()
        process.wait(600)
        log.seek(0)
        print(log.read()[-6000:])
        log.close()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 1800
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(url, timeout=60):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not start")


def complete(address: str, **asked: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": "lm", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": NUM_TOKENS}
    request = Request(
        f"{address}/v1/completions",
        json.dumps(body | {"vllm_xargs": asked}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urlopen(request, timeout=1200) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def test_over_http_a_request_is_halted_on_its_own_terms(server: str, head: Path) -> None:
    def text(**asked: Any) -> str:
        status, answer = complete(server, **asked)
        assert status == 200
        found: str = answer["choices"][0]["text"]
        return found

    free = text()
    assert text(haltwise_off=True, haltwise_price=11) == free
    assert text(haltwise_max_tokens=7).split()[:10] == free.split()[:7] + CLOSE_TEXT.split()
    halted = text(haltwise_price="11")
    assert CLOSE_TEXT in halted and len(halted) < len(free)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"haltwise_price": "dear"}, "haltwise_*: price is 'dear', expected a number"),
        (
            {"haltwise_prize": 1},
            "haltwise_*: 'prize': expected price, off, min_tokens, max_tokens or segment",
        ),
    ],
)
def test_over_http_bad_terms_are_the_request_s_error(
    server: str, asked: dict[str, Any], message: str
) -> None:
    status, answer = complete(server, **asked)
    assert status == 400
    assert answer["error"]["message"] == message
