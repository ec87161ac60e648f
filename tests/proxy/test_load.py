"""A thousand streams at once, through sockets and processes, halted here and there."""

import asyncio
import json
import resource
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from benchmarks import proxy
from benchmarks.proxy import ProxyBenchConfig
from haltwise import Certificate, HaltHead
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import Plan
from tests.proxy.proxies import (
    PATHS,
    PATIENCE,
    Fetched,
    Proxy,
    Reply,
    fetch,
    saved_head,
    spawned_fake,
    spawned_proxy,
    wait_until,
)

NUM_STREAMS = 1_000
#: Of these prices, and where a thought of 14 tokens is halted; None is never.
HALTED_AT = {"100": 4, "10": 8, "1": 12, "0.1": None, "0": None}


@dataclass(frozen=True)
class Case:
    """One stream."""

    number: int

    @property
    def price(self) -> str:
        return list(HALTED_AT)[self.number % len(HALTED_AT)]

    @property
    def chat(self) -> bool:
        return self.number % 2 == 0

    @property
    def stream(self) -> bool:
        return self.number % 7 != 0

    @property
    def shadow(self) -> bool:
        return self.number % 4 == 3

    @property
    def form(self) -> str:
        """How the server answers; what is only passed on is passed on as it is."""
        forms = ("", "null", "text/plain", "whole")
        return forms[self.number % 11 % len(forms)] if self.price != "0" else ""

    @property
    def is_refused(self) -> bool:
        """Whether the server takes no request for so many log probabilities."""
        return self.number % 13 == 5 and self.price != "0" and not self.form

    @property
    def repeats(self) -> bool:
        """Whether the LM closes a thought once more that was closed for it."""
        return self.number % 3 == 0

    @property
    def plan(self) -> Plan:
        # Each waits after its second token until all others are there.
        steps = ((0, -3.0), (4, -1.5), (8, -0.5))
        return Plan(
            f"s{self.number}",
            14,
            3,
            steps,
            top="500" if self.is_refused else "sound",
            form=self.form,
            trouble="crowds",
            at=2,
            legs=(1,),
            closes="repeats" if self.repeats else "",
        )

    @property
    def is_halted(self) -> bool:
        """Whether its thought is to be halted."""
        return not self.shadow and self.is_watched and HALTED_AT[self.price] is not None

    @property
    def is_watched(self) -> bool:
        """Whether the server shows its thought as it is written."""
        return not self.is_refused and self.form != "whole"

    def seen(self, halted: bool) -> int:
        """Thinking tokens that the LM sees when it answers."""
        position = HALTED_AT[self.price] if halted else None
        return self.plan.thinking if position is None else position


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    """Every stream takes three sockets; the processes that are started inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * NUM_STREAMS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def everything(cases: Sequence[Case], acting: str, shadow: str) -> list[Fetched]:
    async def one(case: Case) -> Fetched:
        body: dict[str, Any] = {"model": "fake", "stream": case.stream}
        plan = case.plan
        if case.chat:
            body["messages"] = plan.messages()
        else:
            body |= {"prompt": plan.prompt(), "max_tokens": 99}
        if case.stream:
            body["stream_options"] = {"include_usage": True}
        url = shadow if case.shadow else acting
        return await fetch(url, PATHS[case.chat], body, {"X-Haltwise-Price": case.price})

    return await asyncio.gather(*map(one, cases))


@pytest.mark.whole
@pytest.mark.parametrize("num", [300, pytest.param(NUM_STREAMS, marks=pytest.mark.slow)])
def test_many_streams_lose_and_mix_up_nothing(num: int, tmp_path: Path) -> None:
    cases = [Case(number) for number in range(num)]
    head = str(saved_head(tmp_path / "head"))
    with spawned_fake("--crowd", str(num)) as upstream:
        # On a busy machine a thousand connections take their time.
        flags = ["--head", head, "--upstream", upstream]
        for name in ("connect", "read", "send", "drain"):
            flags += [f"--{name}-timeout", str(PATIENCE)]
        logs = tmp_path / "acting", tmp_path / "shadow"
        with (
            spawned_proxy(*flags, log=logs[0]) as acting,
            spawned_proxy(*flags, "--shadow", log=logs[1]) as shadow,
        ):
            found = asyncio.run(everything(cases, acting.url, shadow.url))
            reports = [check(case, each.reply) for case, each in zip(cases, found, strict=True)]
            check_metrics(cases, reports, [acting, shadow])
            asked = httpx2.get(upstream + "/asked", timeout=PATIENCE).json()
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert sum(line.get("outcome") in ("ok", "relayed") for line in lines) == num
    streams = [ended for path, ended in asked if path in PATHS.values()]
    num_halted = sum(report["halted"] for report in reports)
    num_given_up = sum("fallback" in report for report in reports)
    num_asked = num + num_halted + sum(case.is_refused for case in cases)
    assert num_asked <= len(streams) <= num_asked + num_given_up
    assert set(streams) <= {"done", "closed"}


@dataclass(frozen=True)
class GovernedCase(Case):
    """One stream whose price the control sets."""

    audited: bool = False

    @property
    def shadow(self) -> bool:
        return False

    @property
    def is_halted(self) -> bool:
        return not self.audited and super().is_halted


@pytest.mark.whole
@pytest.mark.parametrize("num", [150, pytest.param(NUM_STREAMS, marks=pytest.mark.slow)])
def test_many_streams_under_control_lose_and_mix_up_nothing(num: int, tmp_path: Path) -> None:
    certificate = Certificate(
        "net-em-loss", 0.5, 0.9, 100.0, 0.2, 0.0, 10, 10, "t", "lm", sure_head().digest, None, "c"
    )
    certified = replace(sure_head().config, certificate=certificate)
    head = saved_head(tmp_path / "head", HaltHead(certified, sure_head().weights))
    state, cases = tmp_path / "state", [GovernedCase(number) for number in range(num)]
    with spawned_fake("--crowd", str(num)) as upstream:
        flags = ["--head", str(head), "--upstream", upstream, "--state", str(state)]
        flags += ["--control", "apply", "--target", "0.9", "--audit", "0.2"]
        for name in ("connect", "read", "send", "drain"):
            flags += [f"--{name}-timeout", str(PATIENCE)]
        with spawned_proxy(*flags) as proxy:
            found = asyncio.run(everything(cases, proxy.url, proxy.url))

            def status() -> Any:
                return proxy.client.get("/v1/haltwise/control").json()

            asked = sum(case.price != "0" for case in cases)
            wait_until(lambda: len(rows(state, "SELECT id FROM request")) == asked)
            wait_until(lambda: status()["under_way"] == 0)
            told = status()
    audited = rows(state, "SELECT id FROM request WHERE audited = 1")
    answered = rows(state, "SELECT request FROM answer")
    # A fifth of what was asked is to be audited; one run in 100,000 draws less than a sixteenth.
    assert len(audited) > asked / 16 and answered <= audited
    assert told["groups"]["everything"]["audits"] == len(answered)
    assert told["rows_dropped"] == told["refused"] == 0
    for case, each in zip(cases, found, strict=True):
        request = each.reply.headers.get("x-haltwise-request")
        check(replace(case, audited=request in audited), each.reply)
        told_all = request in answered or request not in audited or each.reply.is_late
        assert told_all or not case.is_watched, case


def rows(state: Path, query: str) -> set[str]:
    with sqlite3.connect(state) as file:
        return {name for (name,) in file.execute(query)}


def check(case: Case, reply: Reply) -> Any:
    """Holds if a client got its own stream, whole.

    A busy machine may be late: what was to be halted is then left alone, and the reason is told.

    Returns:
        What the proxy tells of it.
    """
    plan, usage = case.plan, reply.usage
    assert reply.status == 200 and reply.streamed == case.stream, (case, reply.body)
    assert not case.stream or reply.done
    told = usage.get("haltwise") or json.loads(reply.headers["x-haltwise"])
    assert (told["reason"] == "off") == (case.price == "0")
    halted = told["halted"]
    assert halted == case.is_halted or reply.is_late, (case, told)
    seen = case.seen(halted)
    close = CLOSE if halted else "</think>"
    before = close.split("</think>")[0]
    if case.chat:
        expected = plan.thought(seen) + before, plan.answer_text(seen)
    else:
        expected = "", plan.thought(seen) + close + plan.answer_text(seen)
    assert (reply.thought, reply.text, reply.finish) == (*expected, "stop"), case
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if "legs" not in told:
        return told  # it was relayed
    legs = told["legs"]
    assert len(legs) == 1 + halted, case
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage[name] == sum(leg[name] for leg in legs), case
    if halted:
        assert told["position"] == seen <= legs[0]["completion_tokens"] <= 19
        assert legs[1]["completion_tokens"] == plan.answer + 1 + 3 * case.repeats
        num_between = legs[1]["prompt_tokens"] - legs[0]["prompt_tokens"] - seen
        # The close text, unless the server's kind was not known yet.
        assert num_between in (0, 2, 3)
    else:
        assert legs[0]["completion_tokens"] == plan.thinking + 1 + plan.answer + 1
    expected_shadow = HALTED_AT[case.price] if case.shadow else None
    # Of a whole answer the head sees what the server puts where it can be told from the rest.
    assert case.form == "whole" or told.get("shadow", {}).get("position") == expected_shadow
    return told


def check_metrics(cases: list[Case], reports: list[Any], proxies: list[Proxy]) -> None:
    acting, shadow = proxies
    for each in proxies:
        assert each.metric("haltwise_streams_in_flight") == 0
        assert each.metric("haltwise_upstream_errors_total") == 0
        own = [case for case in cases if case.shadow == (each is shadow)]
        assert each.metric("haltwise_requests_total") == len(own)
        off = sum(case.price == "0" for case in own)
        assert each.metric("haltwise_thoughts_total", reason="off") == off
    num_halted = sum(report["halted"] for report in reports)
    num_given_up = sum("fallback" in report for report in reports)
    assert acting.metric("haltwise_thoughts_total", reason="halted") == num_halted
    assert acting.metric("haltwise_fallbacks_total") == num_given_up
    assert shadow.metric("haltwise_thoughts_total", reason="halted") == 0
    assert shadow.metric("haltwise_fallbacks_total") == 0


@pytest.mark.whole
def test_the_benchmark_tells_times_and_what_the_proxy_adds() -> None:
    results = proxy.measure(ProxyBenchConfig((1, 3), 60), repeats=2)
    assert {result.part for result in results} == {"proxy, 1 streams", "proxy, 3 streams"}
    names = [result.name for result in results if result.part == "proxy, 3 streams"]
    assert names[:10] == [
        "first token: server alone",
        "first token: proxy, off",
        "first token: proxy, watching",
        "first token: proxy, observing",
        "first token: proxy, off, added",
        "first token: proxy, off / first token: server alone",
        "first token: proxy, watching, added",
        "first token: proxy, watching / first token: server alone",
        "first token: proxy, observing, added",
        "first token: proxy, observing / first token: server alone",
    ]
    assert len(names) == 23 and names[10] == "a token: server alone"
    ways = ("off", "watching", "observing")
    assert names[20:] == [f"CPU time a token: proxy, {way}" for way in ways]
    for result in results:
        assert len(result.values) == 2
        assert "added" in result.name or "CPU" in result.name or min(result.values) > 0
        if result.name.endswith("watching, added"):
            by_name = {other.name: other for other in results if other.part == result.part}
            mine = by_name[result.name.removesuffix(", added")]
            other = by_name[mine.name.partition(":")[0] + ": server alone"]
            assert result.values == tuple(np.subtract(mine.values, other.values))
