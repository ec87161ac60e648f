"""What the proxy adds to a server's streams: time to the first token, and time a token.

The server is a fake in a process of its own. It sends tokens as fast as it can, so that the machine
is full, and what a token costs the proxy is not hidden behind an LM at work. The processes wait for
each other: time is the wall clock's, and only what was measured in one round is compared. The
proxy's own CPU time stands beside it; it is disturbed less by whatever else runs.

A client asks in four ways. It asks the fake directly, and through the proxy with halting off,
where bytes are passed on; both times it asks for the 20 likeliest tokens in each place. It also
asks through the proxy with a head that watches every token and never halts: then the proxy asks for
those tokens, and the client gets none. It asks once more through one whose control observes, with 5
of 100 requests audited.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.timing import BenchResult, take_turns
from haltwise import InputError
from tests.heads import sure_head
from tests.proxy.fake_upstream import Plan
from tests.proxy.proxies import Fetched, Proxy, fetch, saved_head, spawned_fake, spawned_proxy

# At this price the head watches and never halts.
_NEVER_HALTS = {"X-Haltwise-Price": "0.1"}
_OFF = {"X-Haltwise-Off": "1"}


@dataclass(frozen=True)
class ProxyBenchConfig:
    """What the proxy adds to the server that it stands before."""

    num_streams: tuple[int, ...] = (1, 100, 1_000)
    """The numbers of streams at once."""
    num_tokens: int = 10_000
    """The number of thinking tokens of all streams together; each has at least 10."""
    every: int = 32
    """The number of thinking tokens between decision points."""


def measure(config: ProxyBenchConfig, repeats: int) -> list[BenchResult]:
    """Measures the times of each way to ask.

    Returns:
        The times, what the proxy adds to them, ratios, and the proxy's own CPU times.

    Raises:
        InputError: If a stream breaks off.
    """
    results: list[BenchResult] = []
    with TemporaryDirectory() as folder, spawned_fake() as server:
        head = saved_head(Path(folder), sure_head(rule=f"every {config.every} tokens"))
        flags = ["--head", str(head), "--upstream", server]
        flags += ["--max-streams", str(2 * max(config.num_streams))]
        # A thousand streams at once keep a small machine busy for longer than the default.
        flags += ["--connect-timeout", "60"]
        looks = ["--control", "observe", "--state", str(Path(folder) / "state")]
        with spawned_proxy(*flags) as proxy, spawned_proxy(*flags, *looks) as observing:
            for num in config.num_streams:
                size = num, max(config.num_tokens // num, 10)
                ways = {
                    "server alone": _WayToAsk(server, {}, *size),
                    "proxy, off": _WayToAsk(proxy.url, _OFF, *size, proxy),
                    "proxy, watching": _WayToAsk(proxy.url, _NEVER_HALTS, *size, proxy),
                    "proxy, observing": _WayToAsk(observing.url, _NEVER_HALTS, *size, observing),
                }
                results += _compared(f"proxy, {num:,} streams", ways, repeats)
    return results


@dataclass
class _WayToAsk:
    """A way to ask for some streams at once; each call of it is measured."""

    url: str
    """The address to ask."""
    headers: dict[str, str]
    """The headers of a request."""
    num_streams: int
    """The number of streams at once."""
    num_tokens: int
    """The number of thinking tokens of a stream."""
    proxy: Proxy | None = None
    """The proxy that is asked; None if the server is asked directly."""
    first: list[float] = field(default_factory=list)
    """The milliseconds to the first token, the median of all streams, one a call."""
    cpu: list[float] = field(default_factory=list)
    """The microseconds that the proxy computes for a token, its share of a request included, one a
    call."""

    def __call__(self) -> float:
        """Asks, and returns the microseconds from one token to the next of any stream."""
        num = self.num_streams * self.num_tokens
        before = self.proxy.cpu_seconds() if self.proxy else 0.0
        found = self.ask(self.num_tokens)
        if self.proxy:
            self.cpu.append(1e6 * (self.proxy.cpu_seconds() - before) / num)
        self.first.append(1e3 * median(each.first - each.started for each in found))
        start, end = min(each.started for each in found), max(each.ended for each in found)
        return 1e6 * (end - start) / num

    def ask(self, num_tokens: int) -> list[Fetched]:
        """Asks for all streams, and checks that every one is whole.

        Raises:
            InputError: If a stream breaks off.
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


def _compared(part: str, ways: dict[str, _WayToAsk], repeats: int) -> list[BenchResult]:
    for way in ways.values():
        way.ask(1)  # connections are opened, and code is warm
    each = take_turns(part, "us", ways, repeats)
    first = {name: BenchResult(part, name, "ms", tuple(way.first)) for name, way in ways.items()}
    found = [*_beside("first token", first), *_beside("a token", each)]
    for name, way in ways.items():
        if way.cpu:
            found.append(BenchResult(part, f"CPU time a token: {name}", "us", tuple(way.cpu)))
    return found


def _beside(what: str, results: dict[str, BenchResult]) -> list[BenchResult]:
    """Returns all results, and those of the proxy less the server's, and divided by them."""
    named = [
        BenchResult(result.part, f"{what}: {name}", result.unit, result.values)
        for name, result in results.items()
    ]
    direct, *proxied = named
    for other in proxied:
        pairs = zip(other.values, direct.values, strict=True)
        added = tuple(own - others for own, others in pairs)
        named.append(BenchResult(other.part, f"{other.name}, added", other.unit, added))
        named.append(other.over(direct))
    return named
