"""Proxies that tests share, and what they ask.

No test depends on how fast a proxy is: what is given up early is given up late here.
"""

from collections.abc import Iterator

import pytest

from haltwise.proxy import app, lm_server, second_leg, upstream
from tests.proxy.fake_upstream import Plan
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
