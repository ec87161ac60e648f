"""Proof on live traffic: a promise that is kept while questions change, before a real llama-server.

    python -m benchmarks.live --out checkpoints/live

The embedded LM is served by llama-server, and `haltwise serve --control apply` stands before it.
Clients ask some thousands of questions, from the middle on of another kind too. The right answers
are known to the driver alone, which tells them as an operator would: of the audits that wait for a
label. What is lost in truth is measured aside: a sample of the questions is answered once more, in
full, by the server itself. All answers are sampled, as the embedded LM makes no mistakes otherwise.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from command import run, write_json
from haltwise import InputError
from haltwise.policy.answers import READERS
from lms.embedded import EMBEDDED, prompt_of
from lms.gguf import write_gguf
from lms.questions import Question
from lms.tasks import TASKS, each_question
from tests.browser import CHROMIUM, browser
from tests.proxy.llama_server import NAME, llama_server
from tests.proxy.proxies import Proxy, spawned_proxy

_KEY = "HALTWISE_LIVE_KEY"
_OPERATOR = {"Authorization": "Bearer operator"}
# Seconds between two looks of the operator.
_PAUSE = 0.5


@dataclass(frozen=True)
class LiveConfig:
    """A promise that is kept while questions change, before a real server."""

    out: Path = Path("checkpoints") / "live"
    """The folder for the result and the picture of the live page."""
    requests: int = 2_400
    """The number of requests."""
    before: str = "sum"
    """The task of the first half: sum, let or leap."""
    after: str = "let"
    """The task of half of the requests from the middle on."""
    target: float = 0.05
    """The mean loss that is promised."""
    audit: float = 0.1
    """The share of requests that is audited until the governor is settled."""
    at_once: int = 8
    """The number of requests at a time."""
    sample: int = 600
    """The number of requests of each half whose loss is measured in truth."""
    head: Path = EMBEDDED.parent / "embedded-blind-head"
    """The folder of the head."""

    def check(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is out of its range.
        """
        for name in ("requests", "at_once", "sample"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1")
        for name in ("before", "after"):
            if getattr(self, name) not in TASKS:
                told = f"--{name} is {getattr(self, name)!r}"
                raise InputError(f"{told}, expected one of {', '.join(TASKS)}")


@dataclass
class Served:
    """What one request came to."""

    question: Question
    answer: str
    """As the rule of the embedded LM reads it."""
    halted: bool
    tokens: int
    """All that were generated for it."""

    @property
    def is_right(self) -> bool:
        """Whether the answer is right."""
        return self.answer == self.question.gold


@dataclass
class Look:
    """What the operator saw."""

    num: int
    """Requests that had been answered."""
    price: float
    epoch: int
    audits: int
    loss: dict[str, float]
    saving: dict[str, float]


@dataclass
class Run:
    """All that came of it."""

    served: dict[int, Served] = field(default_factory=dict)
    """By the number of the request."""
    looks: list[Look] = field(default_factory=list)
    golds: dict[str, str] = field(default_factory=dict)
    """By the request's id, the right answer."""
    num_labels: int = 0
    seconds: float = 0.0


def _message(question: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt_of(question).removesuffix("<think>").strip()}]


def _read(text: str) -> str:
    return READERS["number"](text)


async def _ask(
    client: httpx2.AsyncClient, question: Question, **headers: str
) -> tuple[Served, str]:
    """Asks a question; returns what came of it, and the request's id."""
    body = {"model": NAME, "messages": _message(question), "temperature": 1}
    found = await client.post("/v1/chat/completions", json=body, headers=headers)
    told = found.raise_for_status().json()
    usage = told["usage"]
    halted = bool(usage.get("haltwise", {}).get("halted"))
    text = told["choices"][0]["message"]["content"] or ""
    served = Served(question, _read(text), halted, usage["completion_tokens"])
    return served, found.headers.get("x-haltwise-request", "")


def _stream(config: LiveConfig) -> Iterator[Question]:
    """The questions, in order; from the middle on every second one is of the other task."""
    usual = each_question(config.before, "test", 2 * config.requests)
    other = each_question(config.after, "test", config.requests)
    for n in range(config.requests):
        late = 2 * n >= config.requests
        yield next(other if late and n % 2 else usual)


async def _drive(config: LiveConfig, proxy: Proxy, page: Path | None) -> Run:
    """Asks all questions, and labels what waits for it."""
    found, questions = Run(), enumerate(_stream(config))
    limits = httpx2.Limits(max_connections=config.at_once + 2)
    async with httpx2.AsyncClient(base_url=proxy.url, timeout=600, limits=limits) as client:

        async def worker() -> None:
            for n, question in questions:
                found.served[n], request = await _ask(client, question)
                found.golds[request] = question.gold

        began = time.perf_counter()
        operator = asyncio.create_task(_operate(client, found))
        await asyncio.gather(*(worker() for _ in range(config.at_once)))
        found.seconds = time.perf_counter() - began
        if page is not None:
            await asyncio.to_thread(_picture, proxy.url, page)
        operator.cancel()
        with suppress(asyncio.CancelledError):
            await operator
    return found


async def _operate(client: httpx2.AsyncClient, found: Run) -> None:
    """Looks at the status and labels what waits, until it is cancelled."""
    while True:
        told = (await client.get("/v1/haltwise/control", headers=_OPERATOR)).json()
        group = told["groups"]["everything"]
        at = group["at_price"]
        found.looks.append(
            Look(
                len(found.served),
                group["price"],
                group["epoch"],
                group["audits"],
                at["loss"],
                at["saving"],
            )
        )
        for one in (await client.get("/v1/haltwise/labels", headers=_OPERATOR)).json():
            gold = found.golds.get(one["request"])
            if gold is not None:
                body = {"request": one["request"], "gold": gold}
                said = await client.post("/v1/haltwise/labels", json=body, headers=_OPERATOR)
                found.num_labels += said.is_success
        await asyncio.sleep(_PAUSE)


async def _losses(
    config: LiveConfig, url: str, served: Sequence[Served]
) -> tuple[np.ndarray, np.ndarray]:
    """What a sample lost and saved in truth: the server itself answers it in full."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(served), min(config.sample, len(served)), replace=False)
    lost, shares = [], []
    todo = iter([served[int(i)] for i in chosen])
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

        async def worker() -> None:
            for one in todo:
                full, _ = await _ask(client, one.question)
                lost.append(float(full.is_right) - float(one.is_right))
                shares.append((full.tokens, one.tokens))

        await asyncio.gather(*(worker() for _ in range(config.at_once)))
    return np.array(lost), np.array(shares, dtype=float)


@contextmanager
def _started(config: LiveConfig, folder: Path) -> Iterator[tuple[str, Proxy]]:
    """A llama-server and the proxy before it."""
    write_gguf(folder / "embedded.gguf")
    os.environ[_KEY] = "operator"
    state = folder / "live.db"
    flags: dict[str, Any] = {"head": config.head.resolve(), "control": "apply", "state": state}
    flags |= {"target": config.target, "audit": config.audit, "label-hours": 1, "context": 1024}
    flags |= {"operator-key-env": _KEY}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with (
        llama_server(folder / "embedded.gguf", config.at_once) as server,
        spawned_proxy(*words, "--upstream", server.url, log=folder / "proxy.log") as proxy,
    ):
        yield server.url, proxy


def _picture(url: str, path: Path) -> None:
    """Takes a picture of the live page, where there is a browser."""
    if CHROMIUM is None:
        print("no Chromium here: no picture of the live page")
        return
    with browser() as page:
        page.look(1280)
        page.open(f"{url}/haltwise")
        page.run("sessionStorage.setItem('haltwise.operator-key', 'operator')")
        page.open(f"{url}/haltwise")
        page.until("document.getElementById('state').textContent.includes('live')")
        page.picture(path)


def live(config: LiveConfig) -> dict[str, Any]:
    """Runs it and returns what came of it as a JSON object; prints the table."""
    config.check()
    shutil.rmtree(config.out, ignore_errors=True)
    config.out.mkdir(parents=True)
    with _started(config, config.out) as (server, proxy):
        found = asyncio.run(_drive(config, proxy, config.out / "page.png"))
        middle = config.requests // 2
        halves = {"before": range(middle), "after": range(middle, config.requests)}
        told = {
            name: _half(config, server, [found.served[n] for n in numbers])
            for name, numbers in halves.items()
        }
    told |= _reaction(found, config)
    print(_table(told, config))
    write_json(config.out / "live.json", told)
    return told


def _half(config: LiveConfig, server: str, served: list[Served]) -> dict[str, Any]:
    lost, tokens = asyncio.run(_losses(config, server, served))
    saving = 1 - tokens[:, 1].sum() / tokens[:, 0].sum()
    width = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
    return {
        "requests": len(served),
        "halted": float(np.mean([one.halted for one in served])),
        "em": float(np.mean([one.is_right for one in served])),
        "loss": float(lost.mean()),
        "loss_low": float(lost.mean() - width),
        "loss_high": float(lost.mean() + width),
        "saving": float(saving),
    }


def _reaction(found: Run, config: LiveConfig) -> dict[str, Any]:
    """When the price fell after the middle, and when the breaker opened."""
    middle = config.requests // 2
    late = [look for look in found.looks if look.num >= middle]
    at = next((look for look in reversed(found.looks) if look.num < middle), found.looks[0])
    fell = next((look.num - middle for look in late if look.price < at.price), None)
    opened = next((look.num - middle for look in late if look.epoch > at.epoch), None)
    halts = next((look.num for look in found.looks if look.price > 0), None)
    last = found.looks[-1]
    return {
        "seconds": found.seconds,
        "first_halt_after": halts,
        "price_at_shift": at.price,
        "price_fell_after": fell,
        "breaker_opened_after": opened,
        "price_at_end": last.price,
        "audits": last.audits,
        "labels": found.num_labels,
        "told_loss": last.loss,
        "told_saving": last.saving,
    }


def _table(told: dict[str, Any], config: LiveConfig) -> str:
    lines = [
        f"{config.requests} requests in {told['seconds']:.0f} s, target {config.target:g}; "
        f"{told['audits']} audits, {told['labels']} labels",
        f"{'':8}{'requests':>10}{'halted, %':>11}{'EM, %':>8}{'loss, points':>24}{'saving, %':>11}",
    ]
    for name in ("before", "after"):
        half = told[name]
        ends = ", ".join(f"{100 * half[f'loss_{end}']:.1f}" for end in ("low", "high"))
        lost = f"{100 * half['loss']:.1f} [{ends}]"
        lines.append(
            f"{name:8}{half['requests']:>10}{100 * half['halted']:>11.1f}{100 * half['em']:>8.1f}"
            f"{lost:>24}{100 * half['saving']:>11.1f}"
        )
    before, end = told["price_at_shift"], told["price_at_end"]
    fell, opened = told["price_fell_after"], told["breaker_opened_after"]
    lines += [
        f"halting began after {told['first_halt_after']} requests",
        f"price {before:.3g} at the shift, {end:.3g} at the end",
        f"from the shift until the price fell: {fell} requests; until the breaker opened: {opened}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(live, LiveConfig)
