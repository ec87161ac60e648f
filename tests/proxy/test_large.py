"""Requests that a cascade leaves to a large LM, and what becomes of them if that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from haltwise import HaltHead, InputError
from haltwise.policy.cascade import Cascade, CascadeConfig, observed_size
from haltwise.policy.question import QuestionReader
from haltwise.proxy import ServeConfig, create_app
from haltwise.proxy.large import Where
from tests.heads import sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan
from tests.proxy.proxies import (
    PATHS,
    PATIENCE,
    PLAIN,
    Proxy,
    Reply,
    ask,
    proxied,
    saved_head,
    unheard_port,
    wait_until,
)

BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
WHERE = pytest.mark.parametrize("where", ["start", "point", "end"])
# What a cascade's log-odds of escalating are made of, so that it escalates in one place alone; the
# first is their bias. At a cap it does so if they are less below 0 than those of halting.
PLACES: dict[str, dict[str, float]] = {
    "nowhere": {"": -1.0},
    "start": {"": -1.0, "at_start": 9.0},
    "point": {"": -0.6, "logprob": 3.0, "at_start": -9.0, "at_end": -9.0},
    "cap": {"": -0.2, "at_start": -9.0, "at_end": -9.0},
    "end": {"": -1.0, "at_end": 9.0},
}


def cascade(where: str, folder: Path, head: HaltHead | None = None) -> Path:
    """A cascade whose head is `sure_head`: at a price of 1 it closes a thought at 20 tokens.

    It escalates nowhere, at once, there, or at the end of the thought.
    """
    head, reader = head or sure_head(), QuestionReader()
    names = [*head.config.features, "at_start", "at_end", "cut", "price"]
    assert len(names) == observed_size(head.config.observing, reader)
    last = [0.0, *(PLACES[where].get(name, 0.0) for name in names)]
    weights = {"w0": np.zeros((1, len(names))), "b0": np.zeros(1), "w1": np.zeros((1, 1))}
    weights |= {"b1": np.zeros(1), "w2": np.array([last]), "b2": np.array([PLACES[where][""]])}
    config = CascadeConfig(reader, price_ratio=2.0, default_price=1.0)
    Cascade(head, config, {key: of.astype(np.float32) for key, of in weights.items()}).save(folder)
    return folder


@dataclass
class Two:
    """A proxy before a small and a large LM."""

    proxy: Proxy
    small: FakeUpstream
    large: FakeUpstream
    direct: httpx2.Client
    """Of the large LM."""


Serving = Callable[..., Two]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    found: dict[str, Two] = {}
    with ExitStack() as stack:

        def started(
            where: str,
            kind: Kind = "vllm",
            slots: int = 4,
            trouble: str = "",
            **settings: Any,
        ) -> Two:
            key = str((where, kind, slots, trouble, settings))
            if key not in found:
                folder = cascade(where, tmp_path_factory.mktemp("cascade"))
                small = stack.enter_context(FakeUpstream(kind, num_slots=slots))
                large = stack.enter_context(FakeUpstream(kind, trouble=trouble))
                wanted: dict[str, Any] = {"large": large.url, "read_timeout": PATIENCE} | settings
                config = ServeConfig(head=folder, upstream=small.url, **wanted)
                proxy = stack.enter_context(proxied(config))
                direct = httpx2.Client(base_url=large.url, timeout=PATIENCE, verify=PLAIN)
                stack.enter_context(direct)
                found[key] = Two(proxy, small, large, direct)
            return found[key]

        yield started


def shown(reply: Reply, chat: bool) -> tuple[str, str]:
    if chat:
        return reply.thought, reply.text
    thought, _, text = reply.text.rpartition("</think>")
    return thought, text


@BOTH
@STREAMED
@WHERE
@pytest.mark.parametrize(("kind", "slots"), [("vllm", 4), ("llama-server", 1), ("sglang", 1)])
def test_a_request_is_left_to_the_large_lm(
    serving: Serving, plan: Plan, kind: Kind, slots: int, where: Where, chat: bool, stream: bool
) -> None:
    two = serving(where, kind, slots)
    price = {"X-Haltwise-Price": "0.1"} if where == "end" else {}
    counted = two.proxy.metric("haltwise_thoughts_total", reason="escalated")
    reply = ask(two.proxy.client, plan, chat, stream, price)
    whole = ask(two.direct, plan, chat, stream)
    begun = {"start": 0, "point": 20, "end": 28}[where]
    thought, text = shown(reply, chat)
    assert text == shown(whole, chat)[1] and reply.finish == "stop"
    assert thought.replace("</think>", "").startswith(plan.thought(begun))
    assert thought.endswith(plan.thought())
    told = reply.haltwise
    assert (told["reason"], told["escalated"], told["halted"]) == ("escalated", where, False)
    assert "fallback" not in told and len(told["legs"]) == (1 if where == "start" else 2)
    assert told["legs"][-1]["completion_tokens"] == whole.usage["completion_tokens"]
    assert two.small.of(plan) == [] if where == "start" else len(two.small.of(plan)) == 1
    now = two.proxy.metric("haltwise_thoughts_total", reason="escalated")
    assert now == counted + 1


def test_a_stream_that_waits_for_the_large_lm_says_that_it_is_alive(
    serving: Serving, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haltwise.proxy.client._SILENCE", 0.01)
    two = serving("point", trouble="hangs")
    body = {"model": "fake", "stream": True, "messages": plan.messages()}
    with two.proxy.client.stream("POST", PATHS[True], json=body) as reply:
        pieces = reply.iter_raw()
        wait_until(lambda: two.large.of(plan) != [])
        assert any(b"\n\n:\n\n" in b"\n\n" + piece for piece in pieces)
        two.large.free(two.large.of(plan)[-1])
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


@BOTH
@STREAMED
def test_without_a_reason_the_small_lm_answers_as_by_its_head_alone(
    serving: Serving, plan: Plan, chat: bool, stream: bool
) -> None:
    two = serving("nowhere")
    reply = ask(two.proxy.client, plan, chat, stream)
    assert shown(reply, chat)[1].strip() == plan.answer_text(20).strip()
    assert reply.haltwise["halted"] and "escalated" not in reply.haltwise
    assert two.large.of(plan) == []


@pytest.mark.whole
@BOTH
@STREAMED
@WHERE
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("trouble", ["500", "html", "dies", "ends", "malformed", "says", "gone"])
def test_if_the_large_lm_fails_the_small_one_answers(
    serving: Serving,
    plan: Plan,
    where: Where,
    slots: int,
    trouble: str,
    chat: bool,
    stream: bool,
) -> None:
    """At any moment: before it says anything, amid its answer, or just before its end."""
    more: dict[str, Any] = {}
    if trouble == "gone":
        with unheard_port() as port:
            more = {"large": f"http://127.0.0.1:{port}"}
    kind: Kind = "vllm" if slots > 1 else "llama-server"
    two = serving(where, kind, slots, "" if trouble == "gone" else trouble, **more)
    price = {"X-Haltwise-Price": "0.1"} if where == "end" else {}
    reply = ask(two.proxy.client, plan, chat, stream, price)
    assert shown(reply, chat) == (plan.thought(), plan.answer_text()) and reply.finish == "stop"
    assert reply.haltwise["fallback"] == "large LM" and "escalated" not in reply.haltwise


def test_who_wants_no_halting_has_no_large_lm_either(serving: Serving, plan: Plan) -> None:
    for headers in ({"X-Haltwise-Price": "0"}, {"X-Haltwise-Off": "1"}):
        two = serving("start")
        reply = ask(two.proxy.client, plan, headers=headers)
        assert (reply.thought, reply.text) == (plan.thought(), plan.answer_text())
    assert two.large.of(plan) == []


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang"])
def test_a_thought_that_was_halted_is_not_escalated_at_its_end(
    serving: Serving, plan: Plan, kind: Kind
) -> None:
    """Servers that close it themselves show its end like any other one's."""
    two, waiting = serving("end", kind), replace(plan, trouble="hangs", at=20, legs=(1,))
    reply = ask(two.proxy.client, waiting, temperature=0)
    assert reply.haltwise["halted"] and reply.haltwise["position"] == 20
    assert "escalated" not in reply.haltwise and two.large.of(plan) == []
    assert len(reply.haltwise["legs"]) == (1 if kind == "llama-server" else 2)


@pytest.mark.whole
def test_a_request_that_names_no_price_is_served_the_cascades_own(
    tmp_path: Path, plan: Plan
) -> None:
    """Not that of the head, which halts nothing by itself."""
    patient = HaltHead(replace(sure_head().config, default_price=0.0), sure_head().weights)
    with FakeUpstream() as small, FakeUpstream() as large:
        folder = cascade("point", tmp_path, patient)
        with proxied(ServeConfig(head=folder, upstream=small.url, large=large.url)) as proxy:
            reply = ask(proxy.client, plan)
    assert (reply.haltwise["price"], reply.haltwise["escalated"]) == (1.0, "point")


@pytest.mark.whole
def test_a_cap_asks_the_cascade_too(serving: Serving, plan: Plan) -> None:
    """Before the first decision point it knows nothing, and the small LM answers."""
    capped = [{"X-Haltwise-Max-Tokens": num} for num in ("6", "2")]
    late, early = (ask(serving("cap").proxy.client, plan, True, True, one) for one in capped)
    assert late.haltwise["escalated"] == "point"
    assert late.thought == plan.thought(6) + plan.thought()
    assert (
        early.haltwise["reason"] == "capped" and early.text.strip() == plan.answer_text(2).strip()
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"large": "http://127.0.0.1:8080"}, "--large is .*, which is --upstream too"),
        ({"large": "nowhere"}, "--large: server is 'nowhere'"),
        ({"large": None, "large_model": "big"}, "--large-model is given, expected it with --large"),
        ({"tariffs": Path("t")}, "--tariffs is given, expected --large-model with the name"),
        ({"head": "plain"}, "no cascade.json in .*: expected a folder written by cascade.py"),
    ],
)
@pytest.mark.whole
def test_what_makes_no_sense_is_refused(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    upstream = "http://127.0.0.1:8080/v1"
    wanted: dict[str, Any] = {"head": "cascade", "large": "http://127.0.0.1:8081"} | settings
    folder = tmp_path / "head"
    if wanted["head"] == "plain":
        saved_head(folder)
    else:
        cascade("end", folder)
    with pytest.raises(InputError, match=expected):
        create_app(ServeConfig(upstream=upstream, **wanted | {"head": folder}))
