"""A fortnight in minutes: from serving over learning to another champion, and back.

The embedded LM is behind a real llama-server, and all that decides is real. Only the margin of
evidence is larger and a step shorter than in earnest, so that dozens of requests do for thousands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from haltwise import HaltHead
from haltwise.control import canary, trial
from haltwise.proxy import ServeConfig
from lms.embedded import EMBEDDED
from lms.gguf import write_gguf
from tests.guides import run
from tests.proxy.llama_server import NAME, LlamaServer, llama_server
from tests.proxy.proxies import Proxy, proxied, wait_until
from tests.test_guides import QUICK

KEY = {"Authorization": "Bearer secret"}


def changed(run_of: Path, bias: float, folder: Path) -> Path:
    """A copy of a run whose head halts later, or sooner."""
    shutil.copytree(run_of, folder)
    head = HaltHead.load(run_of)
    last = max(name for name in head.weights if name.startswith("b"))
    weights = head.weights | {last: head.weights[last] + np.float32(bias)}
    HaltHead(head.config, weights).save(folder)
    return folder


class Fortnight:
    """An installation that goes on from day to day, with other heads."""

    def __init__(self, folder: Path, server: LlamaServer) -> None:
        self.folder, self.server, self.rng = folder, server, Random(0)

    @contextmanager
    def serving(self, head: Path, *challengers: Path, **settings: Any) -> Iterator[Proxy]:
        usual: dict[str, Any] = {
            "control": "apply", "target": 0.5, "audit": 1.0, "dense_audits": 1.0, "context": 1024,
        }  # fmt: skip
        config = ServeConfig(
            head,
            self.server.url,
            challenger=challengers,
            state=self.folder / "state.db",
            audit_traces=self.folder / "audits",
            operator_key_env="OPERATOR",
            **usual | settings,
        )
        with proxied(config) as proxy:
            yield proxy

    def ask(self, proxy: Proxy, num: int, until: Callable[[], bool] = lambda: False) -> int:
        """Asks so many questions at most, until something holds; returns how many."""
        for asked in range(num):
            if until():
                return asked
            numbers = " + ".join(str(self.rng.randint(1, 9)) for _ in range(4))
            content = f"sum : {numbers}"
            said = [{"role": "user", "content": content}]
            body: dict[str, Any] = {"model": NAME, "messages": said, "temperature": 0}
            body["user"] = f"user {asked}"
            proxy.client.post("/v1/chat/completions", json=body, headers=KEY).raise_for_status()
        return num


def told(proxy: Proxy) -> Any:
    return proxy.client.get("/v1/haltwise/control", headers=KEY).json()


def role(proxy: Proxy, head: str) -> str:
    return next(str(one["role"]) for one in told(proxy)["heads"] if one["head"] == head)


@pytest.mark.slow
def test_a_fortnight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPERATOR", "secret")
    monkeypatch.setattr(trial, "MARGIN", 0.2)
    monkeypatch.setattr(canary, "STEP_AUDITS", 5)
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "embedded.gguf")
    blind = EMBEDDED.parent / "embedded-blind-head"
    first = changed(blind, -1.5, tmp_path / "first")  # it could halt sooner
    with llama_server(tmp_path / "embedded.gguf") as server:
        days = Fortnight(tmp_path, server)
        with days.serving(first) as proxy:
            days.ask(proxy, 60)
            wait_until(lambda: told(proxy)["traces"]["written"] == 60)
        command = ["python", "train.py", "--state", "state.db", "--audit-traces", "audits"]
        command += ["--parent", str(first), "--run-dir", "second"]
        run(command, QUICK, monkeypatch)
        second = HaltHead.load(tmp_path / "second").digest
        with days.serving(first, tmp_path / "second", promotion="auto") as proxy:
            shares: list[float] = []

            def is_promoted() -> bool:
                found = told(proxy)
                if found["canary"] and found["canary"]["share"] not in shares:
                    shares.append(found["canary"]["share"])
                return role(proxy, second) == "champion"

            assert days.ask(proxy, 400, is_promoted) < 400
            assert shares == list(canary.SHARES)
            moves = [one["what"] for one in told(proxy)["moves"]]
            assert moves.count("head promoted") == 1
            assert sum("serves" in what for what in moves) == len(canary.SHARES)
        # Another one that halts at once, whatever it costs.
        bad = changed(tmp_path / "second", 20.0, tmp_path / "bad")
        name = HaltHead.load(bad).digest
        with days.serving(tmp_path / "second", first, bad, promotion="auto") as proxy:
            days.ask(proxy, 40)
            assert role(proxy, name) == "challenger"
            body: dict[str, Any] = {"head": name}
            post = proxy.client.post
            assert post("/v1/haltwise/promote", json=body, headers=KEY).status_code == 400
            body["anyway"] = True
            assert post("/v1/haltwise/promote", json=body, headers=KEY).status_code == 204
            wait_until(lambda: role(proxy, name) == "champion")
            days.ask(proxy, 10)
            assert post("/v1/haltwise/rollback", json={}, headers=KEY).status_code == 204
            wait_until(lambda: role(proxy, second) == "champion")
            stopped = {one["head"]: one.get("stopped") for one in told(proxy)["heads"]}
            assert stopped[name] == "by hand"
            assert told(proxy)["failures"] == 0
