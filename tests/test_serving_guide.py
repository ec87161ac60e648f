"""The snippets of the guide to serving run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from lms.gguf import write_gguf
from tests.guides import ROOT, blocks, commands, run
from tests.proxy.llama_server import llama_server
from tests.proxy.proxies import spawned_proxy

# The control is run by tests/test_control.py.
SNIPPETS = [block.text for block in blocks("SERVING", "python") if "HigherUnder" not in block.text]


def snippet(imported: str) -> str:
    """The one snippet that imports something."""
    (found,) = (text for text in SNIPPETS if f"import {imported}\n" in text)
    return str(found)


def test_every_integration_takes_ten_lines_at_most() -> None:
    assert max(len(text.splitlines()) for text in SNIPPETS) <= 10
    wanted = {
        "HaltProcessor",
        "ProbingGeneration",
        "generate_all",
        "export",
        "LLM, SamplingParams",
        "OpenAI",
    }
    for name in (*wanted, "HaltHead, HaltMonitor, Signals"):
        snippet(name)


@pytest.mark.parametrize(
    ("imported", "expected"),
    [
        ("HaltProcessor", "</think>.*reason='halted'"),
        ("ProbingGeneration", "</think>.*reason='halted'"),
        ("generate_all", "(?m)^6 halted .*</think> 22 <eos>"),
        ("export", "</think> "),
        ("HaltHead, HaltMonitor, Signals", r"^\[False +True\]$"),
    ],
)
def test_a_snippet_runs_as_it_stands(
    imported: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One after the other in this process, since each would load torch anew."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(snippet(imported), imported, "exec"), {})
    assert re.search(expected, capsys.readouterr().out.strip())


@pytest.mark.whole
def test_the_proxy_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the ports, which may be taken."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("SERVING", "sh")
    installed, (name, *arguments) = commands(block.text, tmp_path)
    assert name == "haltwise"
    run(installed, {}, monkeypatch)
    write_gguf(tmp_path / "embedded.gguf")
    with llama_server(tmp_path / "embedded.gguf") as server:
        assert arguments[-1] == "http://127.0.0.1:8080"
        with spawned_proxy(*arguments[1:-1], server.url) as proxy:
            client = snippet("OpenAI").replace("http://127.0.0.1:8700", proxy.url)
            assert proxy.url in client
            exec(compile(client, "client", "exec"), {})
    printed = capsys.readouterr().out
    assert re.match(r"18\b", printed.strip())
    # On a busy machine the LM may be left to think on, or not be known yet.
    assert "'halted': True" in printed or "fallback" in printed or "haltwise" not in printed
