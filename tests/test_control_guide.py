"""The blocks of the guide to control run as they stand."""

import re
from pathlib import Path

import pytest

from tests.guides import ROOT, blocks, commands, run
from tests.proxy.llama_server import llama_server
from tests.proxy.proxies import spawned_proxy


def test_the_guide_certifies_a_price_and_halts_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the ports, which may be taken."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (block,), (client,) = blocks("CONTROL", "sh"), blocks("CONTROL", "python")
    *before, (name, *arguments) = commands(block.text, tmp_path)
    for command in before:
        run(command, {}, monkeypatch)
    assert name == "haltwise" and arguments[-1] == "http://127.0.0.1:8080"
    place = arguments.index("--state") + 1
    arguments[place] = str(tmp_path / arguments[place])
    arguments[arguments.index("--head") + 1] = str(ROOT / "checkpoints/embedded-blind-head")
    with (
        llama_server(tmp_path / "embedded.gguf") as server,
        spawned_proxy(*arguments[1:-1], server.url) as proxy,
    ):
        text = client.text.replace("http://127.0.0.1:8700", proxy.url)
        assert proxy.url in text
        exec(compile(text, "client", "exec"), {})
    printed = capsys.readouterr().out
    reasons, status = printed.strip().splitlines()[-2:]
    assert re.match(r"\[('closed by the LM', ){11}", reasons) and "'halted'" in reasons
    assert status.startswith("0 {'price': ")
