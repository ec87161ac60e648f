"""Proxies in processes of their own keep one state together, and outlive each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.fake_upstream import FakeUpstream, Plan
from tests.proxy.proxies import Proxy, ask, connected, saved_head, spawned_proxy, wait_until
from tests.proxy.proxies import request_bytes as bytes_of
from tests.stores import NewName

SAME = r"\boxed{7} "  # all answers agree


@contextmanager
def two_proxies(folder: Path, state: str) -> Iterator[tuple[Proxy, Proxy]]:
    head = saved_head(folder / "head")
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream("vllm"))
        flags = ["--head", str(head), "--upstream", upstream.url, "--control", "apply"]
        flags += ["--target", "0.5", "--audit", "1", "--state", state]
        flags += ["--state-key", str(folder / "key")]
        one, two = (stack.enter_context(spawned_proxy(*flags)) for _ in range(2))
        yield one, two


def status(proxy: Proxy) -> Any:
    return proxy.client.get("/v1/haltwise/control").raise_for_status().json()


def audits(proxy: Proxy) -> int:
    return int(status(proxy)["groups"]["everything"]["audits"])


def all_know(proxies: Sequence[Proxy], num: int) -> bool:
    return all(audits(proxy) == num for proxy in proxies)


@pytest.mark.whole
def test_proxies_certify_a_price_together(new_name: NewName, plan: Plan, tmp_path: Path) -> None:
    with two_proxies(tmp_path, new_name()) as both:
        num = 0
        while status(both[0])["audits_due"]:
            ask(both[num % 2].client, Plan(f"{plan.name}n{num}", mention=SAME))
            num += 1
            wait_until(partial(all_know, both, num))
        assert num >= 10
        one, two = (status(proxy)["groups"] for proxy in both)
        assert one == two and one["everything"]["price"] > 0


@pytest.mark.slow  # who is dead is known after half a minute
def test_a_proxy_that_is_killed_holds_up_nobody(
    new_name: NewName, plan: Plan, tmp_path: Path
) -> None:
    hanging = Plan(plan.name, trouble="hangs", at=10, legs=(1,))
    with two_proxies(tmp_path, new_name()) as (dead, alive):
        with connected(dead) as client:
            client.sendall(bytes_of(hanging, True, True, {}))
            wait_until(lambda: status(alive)["under_way"] == 1)
            assert dead.process is not None
            dead.process.kill()
            for n in range(5):
                reply = ask(alive.client, Plan(f"{plan.name}n{n}", mention=SAME))
                assert reply.status == 200 and reply.done
        wait_until(lambda: status(alive)["under_way"] == 0)
        assert audits(alive) == 5 and status(alive)["failures"] == 0
