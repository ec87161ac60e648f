"""What the proxy adds to a server's streams: time to the first token, and time a token.

The server is a fake in a process of its own that sends tokens as fast as it can, so the machine is
full, and what a token costs the proxy is not hidden behind an LM at work. Processes wait for each
other: time is the wall clock's, and only what was measured in one round is compared.

A client asks the fake directly, through the proxy with halting off (bytes are passed on), both
times for the 20 likeliest tokens in each place, and through the proxy with a head that watches
every token and never halts: then the proxy asks for those, and the client gets none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.timing import Result, take_turns
from haltwise import InputError
from tests.fake_upstream import Plan
from tests.proxies import Fetched, fetch, saved_head, spawned_fake, spawned_proxy

_CHAT = "/v1/chat/completions"
_DIRECT, _OFF, _WATCHED = "server alone", "proxy, off", "proxy, watching"
# At this price the head watches and never halts.
_NEVER_HALTS = {"X-Haltwise-Price": "0.1"}

#: Asks for some streams at once, of some tokens each.
Asks = Callable[[int, int], list[Fetched]]


@dataclass(frozen=True)
class ProxyBenchConfig:
    """The proxy beside the server that it stands before."""

    num_streams: tuple[int, ...] = (1, 100, 1_000)
    """Streams at once."""
    num_tokens: int = 20_000
    """Thinking tokens of all streams together, at least 20 of each."""


def measure(config: ProxyBenchConfig, repeats: int) -> list[Result]:
    """Times of each way to ask, what the proxy adds to them, and ratios."""
    results: list[Result] = []
    with TemporaryDirectory() as folder, spawned_fake() as server:
        head = str(saved_head(Path(folder)))
        most = str(2 * max(config.num_streams))
        with spawned_proxy("--head", head, "--upstream", server, "--max-streams", most) as proxy:
            ways: dict[str, Asks] = {
                _DIRECT: partial(_ask_all, server, {}),
                _OFF: partial(_ask_all, proxy.url, {"X-Haltwise-Off": "1"}),
                _WATCHED: partial(_ask_all, proxy.url, _NEVER_HALTS),
            }
            for num in config.num_streams:
                results += _compare(ways, num, max(config.num_tokens // num, 20), repeats)
    return results


def _compare(
    ways: dict[str, Asks],
    num_streams: int,
    num_tokens: int,
    repeats: int,
) -> list[Result]:
    part = f"proxy, {num_streams:,} streams"
    for ask in ways.values():
        ask(num_streams, 1)  # connections are opened, and code is warm
    first = {name: partial(_first, ask, num_streams) for name, ask in ways.items()}
    each = {name: partial(_each, ask, num_streams, num_tokens) for name, ask in ways.items()}
    found = []
    for what, unit, contestants in (("first token", "ms", first), ("a token", "us", each)):
        named = {f"{what}: {name}": contestant for name, contestant in contestants.items()}
        direct, *proxied = take_turns(part, unit, named, repeats).values()
        found += [direct, *proxied]
        for other in proxied:
            found += [_added(other, direct), other.over(direct)]
    return found


def _added(mine: Result, other: Result) -> Result:
    pairs = zip(mine.values, other.values, strict=True)
    values = tuple(own - others for own, others in pairs)
    return Result(mine.part, f"{mine.name}, added", mine.unit, values)


def _first(ask: Asks, num_streams: int) -> float:
    """Milliseconds to the first token, the median of all streams."""
    return 1e3 * median(found.first - found.started for found in ask(num_streams, 2))


def _each(ask: Asks, num_streams: int, num_tokens: int) -> float:
    """Microseconds from one token to the next of any stream."""
    found = ask(num_streams, num_tokens)
    start, end = min(f.started for f in found), max(f.ended for f in found)
    return 1e6 * (end - start) / (num_streams * num_tokens)


def _ask_all(url: str, headers: dict[str, str], num_streams: int, num_tokens: int) -> list[Fetched]:
    async def gathered() -> list[Fetched]:
        plans = [Plan(f"b{n}", num_tokens, 1, ((0, -3.0),)) for n in range(num_streams)]
        numbers = {"logprobs": True, "top_logprobs": 20} if headers != _NEVER_HALTS else {}
        bodies: list[dict[str, Any]] = [
            {"model": "fake", "stream": True, "messages": plan.messages()} | numbers
            for plan in plans
        ]
        return await asyncio.gather(*(fetch(url, _CHAT, body, headers) for body in bodies))

    found = asyncio.run(gathered())
    for reply in found:
        if reply.reply.status != 200 or not reply.reply.body.endswith(b"data: [DONE]\n\n"):
            raise InputError(f"a stream of {num_streams:,} did not come through: {url}")
    return found
