"""While too many requests wait at the server, thoughts are halted sooner, as far as certified."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from haltwise.proxy import ServeConfig, create_app, load
from haltwise.proxy.load import Load, waiting_in
from lms.embedded import EMBEDDED, prompt_of
from lms.gguf import write_gguf
from lms.tasks import questions
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan
from tests.proxy.llama_server import NAME, llama_server
from tests.proxy.proxies import ask, proxied, saved_head, wait_until


def queue(load: Load, rate: float, seconds: int = 3_000) -> list[int]:
    """Those who wait, second by second, at a server that ends 10 requests a second, or 18 halted.

    Args:
        load: Decides how urgent it is.
        rate: Requests that come in a second.
        seconds: For how long.
    """
    waiting, found = 0.0, deque[int]()
    for _ in range(seconds):
        waiting = max(waiting + rate - 10 - 8 * load.urgency, 0.0)
        load.take(round(waiting))
        found.append(round(waiting))
    return list(found)


def test_a_queue_is_kept_bounded_where_prices_allow_it() -> None:
    for rate in (12.0, 15.0, 17.0):
        eased = Load(20)
        waiting = queue(eased, rate)
        assert max(waiting) <= 100 and max(waiting[-1_000:]) <= 40
        assert not eased.status()["at_ceiling"]
        unhelped = Load(10**9)
        assert queue(unhelped, rate)[-1] > 5_000 and unhelped.urgency == 0.0


def test_it_says_so_where_no_price_is_high_enough() -> None:
    lost = Load(20)
    last = queue(lost, 40.0)[-1]
    assert last > 50_000
    told = {"target": 20, "waiting": last, "urgency": 1.0, "at_ceiling": True}
    assert lost.status() == told


def test_it_falls_late_and_slowly_and_unknown_moves_nothing() -> None:
    load = Load(10)
    rises = [(20, 0.05), (11, 0.055), (10, 0.055)]
    for waiting, urgency in [*rises, (6, 0.055), (5, 0.045), (0, 0.035)]:
        load.take(waiting)
        assert load.urgency == pytest.approx(urgency)
    load.take(None)
    assert load.urgency == pytest.approx(0.035) and load.status()["waiting"] is None
    load.take(10**6)
    assert load.urgency == pytest.approx(0.235)


@pytest.mark.parametrize(
    ("told", "waiting"),
    [
        (b"# TYPE llamacpp:requests_deferred gauge\nllamacpp:requests_deferred 7\n", 7),
        (b'vllm:num_requests_waiting{engine="0"} 2.0\nvllm:num_requests_waiting{engine="1"} 3', 5),
        (b"sglang:num_queue_reqs 4", 4),
        (b"other 4", None),
        (b"vllm:num_requests_waiting NaN", None),
        (b'vllm:num_requests_waiting 1e308\nvllm:num_requests_waiting{engine="1"} 1e308', None),
        (b"vllm:num_requests_waiting", None),
        (b"<html>\xff", None),
        (b"", None),
    ],
)
def test_servers_tell_who_waits_by_their_own_names(told: bytes, waiting: int | None) -> None:
    assert waiting_in(told) == waiting


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(load, "_PAUSE", 0.02)
    with ExitStack() as stack:

        def started(kind: Kind, num_slots: int) -> Any:
            upstream = stack.enter_context(FakeUpstream(kind, num_slots=num_slots))
            head = saved_head(tmp_path / "head", sure_head(CLOSE))
            config = ServeConfig(
                head, upstream.url, control="apply", state=tmp_path / "state", load_target=1
            )
            return stack.enter_context(proxied(config))

        yield started


def told(proxy: Any) -> Any:
    return proxy.client.get("/v1/haltwise/control").raise_for_status().json()["load"]


@pytest.mark.parametrize("kind", ["vllm", "llama-server"])
def test_the_server_is_asked_who_waits(serving: Any, kind: Kind) -> None:
    proxy = serving(kind, 5)
    known = {"target": 1, "waiting": 0, "urgency": 0.0, "at_ceiling": False}
    wait_until(lambda: told(proxy) == known)  # a server that is slow for once tells nothing
    assert "haltwise_load_urgency 0.0" in proxy.client.get("/metrics").text


def test_a_server_that_does_not_tell_moves_nothing(serving: Any, plan: Plan) -> None:
    proxy = serving("vllm", 0)
    assert ask(proxy.client, plan).status == 200
    assert told(proxy)["waiting"] is None and told(proxy)["urgency"] == 0.0


def test_who_moves_prices_needs_certified_ones(tmp_path: Path) -> None:
    head = saved_head(tmp_path / "head")
    with pytest.raises(InputError, match="--load-target is 5, expected it with --control apply"):
        create_app(ServeConfig(head, load_target=5))
    with pytest.raises(InputError, match="--follow-doubts is on, expected it with --control apply"):
        create_app(ServeConfig(head, follow_doubts=True))
    with pytest.raises(InputError, match=r"--explore is 0.1, expected it with --control apply"):
        create_app(ServeConfig(head, explore=0.1))
    with pytest.raises(InputError, match="--load-target is 0, expected 1 or more"):
        create_app(ServeConfig(head, load_target=0, control="apply", state=tmp_path / "s"))


@pytest.mark.slow
def test_a_real_server_with_too_many_requests_is_eased(tmp_path: Path) -> None:
    """Of eight times as many requests as it has places for: prices rise to what is certified."""
    write_gguf(tmp_path / "embedded.gguf")
    asked = [
        [{"role": "user", "content": prompt_of(one).removesuffix("<think>").strip()}]
        for one in questions("sum", "test", 400)
    ]
    with llama_server(tmp_path / "embedded.gguf", 2) as server, ExitStack() as stack:
        settings: dict[str, Any] = {"control": "apply", "target": 0.7, "audit": 0.05, "price": 1e-3}
        config = ServeConfig(
            EMBEDDED.parent / "embedded-blind-head",
            server.url,
            state=tmp_path / "state",
            context=1024,
            load_target=2,
            **settings,
        )
        proxy = stack.enter_context(proxied(config))
        pool = stack.enter_context(ThreadPoolExecutor(16))

        def price(messages: Any) -> float:
            body = {"model": NAME, "messages": messages, "temperature": 0}
            found = proxy.client.post("/v1/chat/completions", json=body).raise_for_status()
            return float(found.json()["usage"]["haltwise"]["price"])

        def ceiling() -> float:
            status = proxy.client.get("/v1/haltwise/control").raise_for_status().json()
            return float(status["groups"]["everything"]["ceiling"])

        rest = iter(asked)
        while not ceiling():
            price(next(rest))
        wait_until(lambda: told(proxy)["waiting"] == 0)
        calm = [price(next(rest)) for _ in range(3)]
        busy = list(pool.map(price, [next(rest) for _ in range(250)]))
        assert max(calm) < max(busy) <= ceiling() and told(proxy)["urgency"] > 0.2
