"""What the proxy adds to a server's streams: time to the first token, and time a token.

The server is a fake in a process of its own that sends tokens as fast as it can, so the machine is
full, and what a token costs the proxy is not hidden behind an LM at work. Processes wait for each
other: time is the wall clock's, and only what was measured in one round is compared. The proxy's
own CPU time stands beside it, which is disturbed less by whatever else runs.

A client asks the fake directly, through the proxy with halting off (bytes are passed on), both
times for the 20 likeliest tokens in each place, and through the proxy with a head that watches
every token and never halts: then the proxy asks for those, and the client gets none.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.timing import Result, take_turns
from haltwise import InputError
from tests.heads import sure_head
from tests.proxy.fake_upstream import Plan
from tests.proxy.proxies import Fetched, Proxy, fetch, saved_head, spawned_fake, spawned_proxy

# At this price the head watches and never halts.
_NEVER_HALTS = {"X-Haltwise-Price": "0.1"}
_OFF = {"X-Haltwise-Off": "1"}


@dataclass(frozen=True)
class ProxyBenchConfig:
    """The proxy beside the server that it stands before."""

    num_streams: tuple[int, ...] = (1, 100, 1_000)
    """Streams at once."""
    num_tokens: int = 10_000
    """Thinking tokens of all streams together, at least 10 of each."""
    every: int = 32
    """Thinking tokens between decision points."""


def measure(config: ProxyBenchConfig, repeats: int) -> list[Result]:
    """Times of each way to ask, what the proxy adds to them, ratios, and what it computes."""
    results: list[Result] = []
    with TemporaryDirectory() as folder, spawned_fake() as server:
        head = saved_head(Path(folder), sure_head(rule=f"every {config.every} tokens"))
        flags = ["--head", str(head), "--upstream", server]
        flags += ["--max-streams", str(2 * max(config.num_streams))]
        # A thousand streams at once keep a small machine busy for longer than the default.
        with spawned_proxy(*flags, "--connect-timeout", "60") as proxy:
            for num in config.num_streams:
                size = num, max(config.num_tokens // num, 10)
                ways = {
                    "server alone": _Way(server, {}, *size),
                    "proxy, off": _Way(proxy.url, _OFF, *size, proxy),
                    "proxy, watching": _Way(proxy.url, _NEVER_HALTS, *size, proxy),
                }
                results += _compared(f"proxy, {num:,} streams", ways, repeats)
    return results


@dataclass
class _Way:
    """A way to ask for some streams at once; each time it is gone, it is measured."""

    url: str
    headers: dict[str, str]
    num_streams: int
    num_tokens: int
    proxy: Proxy | None = None
    first: list[float] = field(default_factory=list)
    """Milliseconds to the first token, the median of all streams."""
    cpu: list[float] = field(default_factory=list)
    """Microseconds that the proxy computes for a token, its share of a request included."""

    def __call__(self) -> float:
        """Microseconds from one token to the next of any stream."""
        num = self.num_streams * self.num_tokens
        before = self.proxy.cpu_seconds() if self.proxy else 0.0
        found = self.ask(self.num_tokens)
        if self.proxy:
            self.cpu.append(1e6 * (self.proxy.cpu_seconds() - before) / num)
        self.first.append(1e3 * median(each.first - each.started for each in found))
        start, end = min(each.started for each in found), max(each.ended for each in found)
        return 1e6 * (end - start) / num

    def ask(self, num_tokens: int) -> list[Fetched]:
        """Asks, and checks that every stream is whole.

        Raises:
            InputError: If one is not.
        """
        numbers = {} if self.headers == _NEVER_HALTS else {"logprobs": True, "top_logprobs": 20}
        found = asyncio.run(self._asked(num_tokens, numbers))
        for reply in (each.reply for each in found):
            if reply.status != 200 or not reply.done:
                told = reply.body[-200:].decode(errors="replace")
                raise InputError(f"one of {len(found):,} streams broke off: {reply.status} {told}")
        return found

    async def _asked(self, num_tokens: int, numbers: dict[str, Any]) -> list[Fetched]:
        plans = [Plan(f"b{n}", num_tokens, 1, ((0, -3.0),)) for n in range(self.num_streams)]
        bodies = [
            {"model": "fake", "stream": True, "messages": plan.messages()} | numbers
            for plan in plans
        ]
        path = "/v1/chat/completions"
        return await asyncio.gather(*(fetch(self.url, path, b, self.headers) for b in bodies))


def _compared(part: str, ways: dict[str, _Way], repeats: int) -> list[Result]:
    for way in ways.values():
        way.ask(1)  # connections are opened, and code is warm
    each = take_turns(part, "us", ways, repeats)
    first = {name: Result(part, name, "ms", tuple(way.first)) for name, way in ways.items()}
    found = [*_beside("first token", first), *_beside("a token", each)]
    for name, way in ways.items():
        if way.cpu:
            found.append(Result(part, f"CPU time a token: {name}", "us", tuple(way.cpu)))
    return found


def _beside(what: str, results: dict[str, Result]) -> list[Result]:
    """The results, and those of the proxy less and over that of the server alone."""
    named = [
        Result(result.part, f"{what}: {name}", result.unit, result.values)
        for name, result in results.items()
    ]
    direct, *proxied = named
    for other in proxied:
        pairs = zip(other.values, direct.values, strict=True)
        added = tuple(own - others for own, others in pairs)
        named.append(Result(other.part, f"{other.name}, added", other.unit, added))
        named.append(other.over(direct))
    return named
