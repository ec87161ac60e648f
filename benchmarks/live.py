"""Proof on live traffic: a promise that is kept while questions change, before a real llama-server.

    python -m benchmarks.live --out checkpoints/live

The embedded LM is served by llama-server, and `haltwise serve --control apply` stands before it.
Clients ask some thousands of questions, from one on all of a harder kind: there the price that has
been certified loses more than is promised, so that the governor has to take it back. The right
answers are known to the driver alone, which tells them as an operator would: of the audits that
wait for a label. What is lost in truth is measured aside: a sample of the questions is answered
once more, in full, by the server itself. All thoughts are sampled, as the embedded LM makes no
mistakes otherwise.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
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
from lms.tasks import TASKS, each_question, questions
from tests.browser import CHROMIUM, browser
from tests.proxy.llama_server import NAME, llama_server
from tests.proxy.proxies import Proxy, spawned_proxy

_KEY = "HALTWISE_LIVE_KEY"
_OPERATOR = {"Authorization": "Bearer operator"}
# Seconds between two looks of the operator.
_PAUSE = 0.5
# What the parts of a run are called in the table.
_NAMES = {
    "before": "before the shift",
    "after": "after it",
    "until": "  until it reacted",
    "since": "  from then on",
}
# Questions among which there is one of every kind, and more than are ever asked.
_SEEN, _ENDLESS = 100, 10**9


@dataclass(frozen=True)
class LiveConfig:
    """A promise that is kept while questions change, before a real server."""

    out: Path = Path("checkpoints") / "live"
    """The folder for the result and the picture of the live page."""
    requests: int = 2_300
    """The number of requests."""
    shift: int = 700
    """The number of requests until the questions become harder."""
    before: str = "sum:short"
    """What is asked at first: a task of the embedded LM, or TASK:SEGMENT."""
    after: str = "let:long"
    """What is asked from the shift on."""
    target: float = 0.03
    """The mean loss that is promised."""
    audit: float = 0.25
    """The share of requests that is audited until the governor is settled. The fewer requests there
    are, the larger it has to be: audits tell that something is wrong, and until they do it is
    served."""
    at_once: int = 8
    """The number of requests at a time."""
    sample: int = 400
    """The number of requests before and after the shift whose loss is measured in truth."""
    head: Path = EMBEDDED.parent / "embedded-blind-head"
    """The folder of the head."""

    def check(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is out of its range.
        """
        for name in ("shift", "at_once", "sample"):
            if (found := getattr(self, name)) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {found}, expected 1 at least")
        if self.requests <= self.shift:
            raise InputError(f"--requests is {self.requests}, expected more than {self.shift}")
        for name in ("before", "after"):
            if getattr(self, name) not in _kinds():
                told = f"--{name} is {getattr(self, name)!r}"
                raise InputError(f"{told}, expected one of {', '.join(_kinds())}")


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
    full: dict[int, Served] = field(default_factory=dict)
    """The same of those that were answered once more, in full."""
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


def _kinds() -> list[str]:
    """What can be asked: every task, and every segment of it."""
    seen = {(one.task, one.segment) for one in questions("all", "test", _SEEN)}
    return [*TASKS, *sorted(f"{task}:{segment}" for task, segment in seen)]


def _stream(config: LiveConfig) -> Iterator[Question]:
    """The questions, in order."""
    yield from islice(_of_kind(config.before), config.shift)
    yield from islice(_of_kind(config.after), config.requests - config.shift)


def _of_kind(kind: str) -> Iterator[Question]:
    """Questions of one task, or of one segment of it, without an end."""
    task, _, segment = kind.partition(":")
    every = each_question(task, "test", _ENDLESS)
    return (one for one in every if segment in ("", one.segment))


async def _drive(config: LiveConfig, proxy: Proxy, page: Path | None) -> Run:
    """Asks all questions, and labels what waits for it."""
    found, asked = Run(), enumerate(_stream(config))
    limits = httpx2.Limits(max_connections=config.at_once + 2)
    async with httpx2.AsyncClient(base_url=proxy.url, timeout=600, limits=limits) as client:

        async def worker() -> None:
            for n, question in asked:
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


async def _answer_in_full(config: LiveConfig, url: str, found: Run) -> None:
    """Has the server itself answer a sample in full, so that what was lost in truth is known."""
    rng, chosen = np.random.default_rng(0), list[int]()
    for numbers in (range(config.shift), range(config.shift, config.requests)):
        num = min(config.sample, len(numbers))
        chosen += rng.choice(numbers, num, replace=False).tolist()
    todo = iter(chosen)
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

        async def worker() -> None:
            for n in todo:
                found.full[n], _ = await _ask(client, found.served[n].question)

        await asyncio.gather(*(worker() for _ in range(config.at_once)))


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
        asyncio.run(_answer_in_full(config, server, found))
    told = _reaction(found, config)
    parts = {"before": range(config.shift), "after": range(config.shift, config.requests)}
    if reacted := told["breaker_opened_after"] or told["price_fell_after"]:
        parts["until"], parts["since"] = parts["after"][:reacted], parts["after"][reacted:]
    measured = {name: [n for n in numbers if n in found.full] for name, numbers in parts.items()}
    told["parts"] = {
        name: _part(found, numbers, measured[name])
        for name, numbers in parts.items()
        if len(measured[name]) > 1
    }
    print(_table(told, config))
    write_json(config.out / "live.json", told)
    return told


def _part(found: Run, numbers: Sequence[int], measured: Sequence[int]) -> dict[str, Any]:
    """What became of some requests, and what those that were measured lost and saved in truth."""
    served = [found.served[n] for n in numbers]
    pairs = [(found.full[n], found.served[n]) for n in measured]
    lost = np.array([float(full.is_right) - float(one.is_right) for full, one in pairs])
    saving = 1 - sum(one.tokens for _, one in pairs) / sum(full.tokens for full, _ in pairs)
    width = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
    return {
        "requests": len(served),
        "halted": float(np.mean([one.halted for one in served])),
        "em": float(np.mean([one.is_right for one in served])),
        "loss": float(lost.mean()),
        "loss_low": float(lost.mean() - width),
        "loss_high": float(lost.mean() + width),
        "saving": saving,
    }


def _reaction(found: Run, config: LiveConfig) -> dict[str, Any]:
    """When the price fell after the shift, and when the breaker opened."""
    shift = config.shift
    late = [look for look in found.looks if look.num >= shift]
    at = next((look for look in reversed(found.looks) if look.num < shift), found.looks[0])
    fell = next((look.num - shift for look in late if look.price < at.price), None)
    opened = next((look.num - shift for look in late if look.epoch > at.epoch), None)
    again = next((look.num - shift for look in late if look.epoch > at.epoch and look.price), None)
    halts = next((look.num for look in found.looks if look.price > 0), None)
    last = found.looks[-1]
    return {
        "seconds": found.seconds,
        "first_halt_after": halts,
        "price_at_shift": at.price,
        "price_fell_after": fell,
        "breaker_opened_after": opened,
        "certified_anew_after": again,
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
        f"{'':24}{'requests':>10}{'halted, %':>11}{'EM, %':>8}{'loss, points':>20}"
        f"{'saving, %':>11}",
    ]
    for name, part in told["parts"].items():
        ends = ", ".join(f"{100 * part[f'loss_{end}']:.1f}" for end in ("low", "high"))
        lost = f"{100 * part['loss']:.1f} [{ends}]"
        lines.append(
            f"{_NAMES[name]:24}{part['requests']:>10}{100 * part['halted']:>11.1f}"
            f"{100 * part['em']:>8.1f}{lost:>20}{100 * part['saving']:>11.1f}"
        )
    before, end = told["price_at_shift"], told["price_at_end"]
    events = {
        "the price fell": told["price_fell_after"],
        "the breaker opened": told["breaker_opened_after"],
        "a price was certified anew": told["certified_anew_after"],
    }
    after = (f"{what}: {'never' if num is None else num}" for what, num in events.items())
    lines += [
        f"halting began after {told['first_halt_after']} requests",
        f"price {before:.3g} at the shift, {end:.3g} at the end",
        f"requests from the shift until {'; until '.join(after)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(live, LiveConfig)
