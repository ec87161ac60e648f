"""A real vLLM server with the embedded LM: recorded from, and behind a proxy that looks at answers.

See the Makefile for what it needs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from haltwise.proxy import ServeConfig
from lms.embedded import CLOSE, prompt_of
from lms.tasks import questions
from tests.heads import place_head, sure_head
from tests.proxy.proxies import PATIENCE, proxied, saved_head, wait_until
from tests.recordings import assert_same
from tests.vllm_engine.recorder import CPU, ROOT, recorded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ENVIRONMENT = os.environ | CPU | {"PYTHONPATH": str(ROOT)}
PROMPTS = [prompt_of(q) for task in ("sum", "let", "leap") for q in questions(task, "test", 4)]
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose context is short, as a person may have set it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(ROOT / "checkpoints/embedded"), "--served-model-name", "embedded"]
    command += ["--host", "127.0.0.1", "--max-model-len", "512", "--block-size", "32"]
    command += ["--dtype", "float32", "--enforce-eager"]
    log = (tmp_path_factory.mktemp("server") / "log.txt").open("w+")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None, "the server did not start"
        try:
            return httpx2.get(f"{address}/health", timeout=60).status_code == 200
        except httpx2.TransportError:
            return False

    try:
        wait_until(is_up)
        yield address
    finally:
        process.terminate()
        process.wait(600)
        log.seek(0)
        print(log.read()[-6000:])
        log.close()


def test_a_recording_from_a_busy_server_is_that_of_transformers(
    server: str, tmp_path: Path
) -> None:
    """All questions at once, so that the server tells several tokens at a time."""
    asked = ["--lm=embedded", "--num=24", "--every=12", "--max-tokens=300", "--temperature=0"]
    asked.append(f"--close-text={CLOSE}")
    rows = recorded(tmp_path / "vllm", "--engine=openai", f"--base-url={server}", *asked)
    expected = recorded(tmp_path / "hf", *asked)
    assert rows.keys() == expected.keys() and len(rows) == 24
    for name, row in rows.items():
        other = expected[name]
        del other["end_think_logprob"]
        own, its = row.pop("text"), other.pop("text")
        assert own.split() == its.removesuffix("<eos>").split()
        assert_same(row, other, tolerance=1e-3)


def complete(client: httpx2.Client, prompt: str, price: float = 0.0, most: int = NUM_TOKENS) -> Any:
    asked = {"model": "embedded", "prompt": prompt, "max_tokens": most, "temperature": 0}
    asked["skip_special_tokens"] = False
    headers = {"X-Haltwise-Price": str(price)}
    answer = client.post("/v1/completions", json=asked, headers=headers).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"].get("haltwise", {})


@pytest.mark.parametrize("has_numbers", [True, False], ids=["", "without log probabilities"])
@pytest.mark.parametrize("answers", ["seen", "free"])
def test_a_head_that_looks_at_answers_halts_behind_the_proxy(
    server: str, answers: Any, has_numbers: bool, tmp_path: Path
) -> None:
    head = sure_head(CLOSE, "every 12 tokens", probing="always")
    if not has_numbers:
        head = place_head(24, ("pace", "confidence"), head.config.halting)
    folder = saved_head(tmp_path, head)
    config = ServeConfig(folder, server, answers=answers, probe_timeout=PATIENCE)
    direct = httpx2.Client(base_url=server, timeout=PATIENCE)
    num_halted = 0
    with proxied(config) as proxy:
        for prompt in PROMPTS:
            whole, _ = complete(direct, prompt)
            text, told = complete(proxy.client, prompt, price=1e-9)
            assert text == whole and not told["halted"] and told["probes"]["failed"] == 0
            text, told = complete(proxy.client, prompt, price=10.0)
            if not told["halted"]:  # the thought had ended before an answer was there
                assert text == whole
                continue
            num_halted += 1
            thought, _, answer = text.partition(CLOSE)
            words, position = thought.split(), told["position"]
            assert whole.split()[: len(words)] == words and len(words) >= position
            assert position % 12 == 0 and told["probes"]["num"] >= 1
            seen = words[:position] if answers == "seen" else words
            forced, _ = complete(direct, " ".join([prompt, *seen, CLOSE]), most=16)
            assert answer.split() == forced.removesuffix("<eos>").split()
    assert num_halted
