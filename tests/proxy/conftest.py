"""Proxies that tests share, and what they ask.

No test depends on how fast a proxy is: what is given up early is given up late here.
"""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from haltwise.proxy import app, lm_server, second_leg, upstream
from haltwise.proxy.completion import WatchedCompletion
from haltwise.proxy.wire import StreamEvent, texts_of
from tests.proxy.fake_upstream import DECIDED, Plan
from tests.proxy.proxies import PATIENCE, Pair, Pairs


@pytest.fixture(scope="session", autouse=True)
def patient() -> Iterator[None]:
    """A busy machine makes no proxy of this process give up what comes for sure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "_CALL_TIMEOUT", PATIENCE)
        patch.setattr(lm_server, "_NAMES_TIMEOUT", PATIENCE)
        patch.setattr(second_leg, "_SOON", PATIENCE)
        patch.setattr(app, "_CHECK_LASTS", PATIENCE)
        yield


@pytest.fixture(scope="session", autouse=True)
def soon_ended() -> Iterator[None]:
    """uvicorn looks ten times a second whether it is to end; thousands of tests wait for that."""

    async def briefly(seconds: float) -> None:
        await asyncio.sleep(seconds / 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            uvicorn.server, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": briefly})
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def paced() -> Iterator[None]:
    """Tells fakes that are paced what has been decided."""
    take = WatchedCompletion._take

    async def telling(completion: WatchedCompletion, event: StreamEvent | None) -> Any:
        taken = await take(completion, event)
        reader = completion._reader
        probe = reader.prober.running
        is_decided = probe is None or probe.done() or not reader.is_thinking
        if is_decided and not reader.escalated:  # what a large LM says is none of the small one's
            texts = () if event is None or event.choice is None else texts_of(event.choice)
            newest = ("".join(texts), *map(str, reader.thought.tokens[-1:]))
            DECIDED.update(text.rstrip("é\ufffd") for text in newest)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WatchedCompletion, "_take", telling)
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    with Pairs(tmp_path_factory.mktemp("heads")) as found:
        yield found


@pytest.fixture
def vllm(pairs: Pairs) -> Pair:
    return pairs("vllm")


@pytest.fixture
def plan(request: pytest.FixtureRequest) -> Plan:
    """28 thinking tokens, halted at 20 at a price of 1; no other test has its name."""
    number = sum(ord(c) * 131**i for i, c in enumerate(request.node.nodeid)) % 10**9
    return Plan(f"p{number}")
