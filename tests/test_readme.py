"""What the README says is true."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lms.gguf import write_gguf
from tests.proxy.llama_server import llama_server
from tests.proxy.proxies import spawned_proxy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
        ("generate_all", "(?m)^8 halted .*</think>"),
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


def test_the_proxy_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the ports, which may be taken."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^    haltwise (serve .*)$", README, re.MULTILINE)
    write_gguf(tmp_path / "embedded.gguf")
    with llama_server(tmp_path / "embedded.gguf") as server:
        command = line.replace("http://127.0.0.1:8080", server.url).split()
        assert server.url in command
        with spawned_proxy(*command[1:]) as proxy:
            client = snippet("OpenAI").replace("http://127.0.0.1:8700", proxy.url)
            assert proxy.url in client
            exec(compile(client, "client", "exec"), {})
    printed = capsys.readouterr().out
    assert re.match(r"18\b", printed.strip())
    # On a busy machine the LM may be left to think on, or not be known yet.
    assert "'halted': True" in printed or "fallback" in printed or "haltwise" not in printed


@pytest.mark.parametrize("script", ["train", "adapt", "evaluate", "calibrate", "collect"])
def test_scripts_know_the_flags_that_the_readme_uses(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    told = capsys.readouterr().out
    lines = [line for line in README.splitlines() if f"python {script}.py" in line]
    assert lines
    for flag in re.findall(r"--[a-z-]+", " ".join(lines)):
        assert flag in told


def test_the_file_tree_names_what_is_there() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    for folder, names in re.findall(r"^(\w+)/ .*\n((?:  \S+\.py.*\n)*)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()
        for name in re.findall(r"^  (\S+\.py)", names, re.MULTILINE):
            assert (ROOT / folder / name).is_file()
