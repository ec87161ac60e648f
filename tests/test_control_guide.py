"""The blocks of the guide to control run as they stand, but for the ports, which may be taken."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from haltwise import HaltHead
from haltwise.control.installation import name_of
from tests.guides import ROOT, Block, blocks, commands, run
from tests.proxy.llama_server import llama_server
from tests.proxy.proxies import Proxy, spawned_proxy, wait_until
from tests.test_guides import QUICK
from traces import read_traces

TRY, STRICT, LABEL, SPEND, KEEP, LEARN, RIVAL, UNSEEN, PRICES, MIX = blocks("CONTROL", "sh")
ASK, LOOK, PART, TELL, SAY, BUY, COMPARE = blocks("CONTROL", "python")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkpoints").mkdir()
    name = "checkpoints/embedded-blind-head"
    (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def served(command: list[str], folder: Path) -> Iterator[Proxy]:
    """What `haltwise serve` serves by a command, before a server with the LM in the folder."""
    assert command[:2] == ["haltwise", "serve"] and command[-1] == "http://127.0.0.1:8080"
    paths = {"--state", "--head", "--challenger", "--audit-traces", "--tariffs", "--budgets"}
    placed = [str(folder / word) if before in paths else word for before, word in pairwise(command)]
    with (
        llama_server(folder / "embedded.gguf") as server,
        spawned_proxy(*placed[1:-1], server.url) as proxy,
    ):
        yield proxy


def ask(proxy: Proxy, client: Block = ASK) -> None:
    text = client.text.replace("http://127.0.0.1:8700", proxy.url)
    assert proxy.url in text
    exec(compile(text, "client", "exec"), {})


@pytest.mark.whole
def test_the_guide_certifies_a_price_and_halts_at_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *before, serve = commands(TRY.text, folder)
    for command in before:
        run(command, {}, monkeypatch)
    with served(serve, folder) as proxy:
        ask(proxy)
        ask(proxy, LOOK)
    printed = capsys.readouterr().out
    reasons, status = printed.strip().splitlines()[-2:]
    assert re.match(r"\[('closed by the LM', ){11}", reasons) and "'halted'" in reasons
    assert status.startswith("0 {'price': ")


@pytest.mark.whole
def test_the_guide_halts_nothing_of_a_stricter_group_yet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(commands(TRY.text, folder)[1], {}, monkeypatch)
    (serve,) = commands(STRICT.text, folder)
    with served(serve, folder) as proxy:
        ask(proxy, PART)
    everything, strict = capsys.readouterr().out.splitlines()[-2:]
    assert everything == "everything 0.5 True 0" and strict == "task:strict 0.3 False 23"
    assert "23 more are due" in (ROOT / "docs" / "CONTROL.md").read_text()


@pytest.mark.whole
def test_the_guide_labels_what_differs_and_opens_the_breaker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(commands(TRY.text, folder)[1], {}, monkeypatch)
    monkeypatch.setenv("OPERATOR_KEY", "secret")
    (serve,) = commands(LABEL.text, folder)
    with served(serve, folder) as proxy:
        ask(proxy, TELL)
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed == ["True", "0 True", "open 0.0"]


@pytest.mark.whole
def test_the_guide_spends_no_more_than_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(commands(TRY.text, folder)[1], {}, monkeypatch)
    exec(compile(SAY.text, "files", "exec"), {})
    (serve,) = commands(SPEND.text, folder)
    with served(serve, folder) as proxy:
        ask(proxy, BUY)
    refused, spent = capsys.readouterr().out.splitlines()[-2:]
    assert refused.startswith("True the budget of session has too little left for this request, wh")
    assert spent == "True"


@pytest.mark.whole
def test_the_guide_learns_from_what_it_has_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(commands(TRY.text, folder)[1], {}, monkeypatch)
    (serve,) = commands(KEEP.text, folder)
    (folder / "audits.db.key").write_bytes(b"k" * 32)  # by which the questions are split
    with served(serve, folder) as proxy:
        ask(proxy)

        def num_kept() -> int:
            status = proxy.client.get("/v1/haltwise/control").json()
            assert status["traces"]["lost"] == 0
            return int(status["traces"]["written"])

        wait_until(lambda: num_kept() == 40)
    capsys.readouterr()
    for command in commands(LEARN.text, folder):
        run(command, {} if "--look" in command else QUICK, monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("What has changed: ") == 2 and "Certified: price" in printed
    assert "beside that of its parent" in printed
    assert printed.count("No trace has a reference answer:") == 2  # of judging, and of certifying
    assert len(read_traces(folder / "checkpoints/learned/audits")) == 40
    head = HaltHead.load(folder / "checkpoints/learned")
    assert head.config.installation == name_of(b"k" * 32)
    assert head.config.halting.probing == "at_halt" and head.config.lm == "embedded"
    judged = json.loads((folder / "checkpoints/learned/test.json").read_text())["traces"]
    assert judged["target"].startswith("No trace has a reference answer:")

    monkeypatch.setenv("OPERATOR_KEY", "secret")
    (serve,) = commands(RIVAL.text, folder)
    with served(serve, folder) as proxy:
        ask(proxy)
        ask(proxy, COMPARE)

        def told() -> Any:
            key = {"Authorization": "Bearer secret"}
            return proxy.client.get("/v1/haltwise/control", headers=key).json()

        begin, compare = commands(UNSEEN.text.replace("DIGEST", told()["heads"][1]["head"]), folder)
        said = [haltwise(begin)]
        wait_until(lambda: bool(told()["canary"]))
        ask(proxy)
        said.append(haltwise(compare))
    (prices,) = commands(PRICES.text, folder)
    assert "is told from 100 requests on" in haltwise(prices)
    (mixing,) = commands(MIX.text, folder)
    assert haltwise(mixing).startswith("checkpoints/mixed: 0.")
    assert HaltHead.load(folder / "checkpoints/mixed").config.certificate is None
    found = capsys.readouterr().out.splitlines()[-6:]
    assert found[0] == "challenger True" and "is not known yet after" in found[1]
    assert found[2:4] == ["['champion', 'canary']", "['champion', 'previous']"]
    assert found[4] == "['champion', 'challenger']"
    assert "serves 50 % from now on" in said[0] and "No winner yet: " in said[1]
    assert "No winner yet: " in (folder / "two-heads.html").read_text()


def haltwise(command: list[str]) -> str:
    """What a command prints."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
