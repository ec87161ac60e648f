"""The proxy gives the answer that most of several thoughts of a request lead to."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from haltwise.proxy import ServeConfig, create_app
from haltwise.proxy.billing import Size
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan
from tests.proxy.proxies import (
    PATHS,
    PATIENCE,
    Pair,
    Pairs,
    Proxy,
    Reply,
    ask,
    proxied,
    saved_head,
    wait_until,
)

BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
KINDS = pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang", "ollama"])
THREE = {"X-Haltwise-Thoughts": "3"}


def voting(pairs: Pairs, kind: Kind = "vllm", **more: Any) -> Pair:
    return pairs(kind, most_thoughts=3, **more)


def vote(pair: Pair, plan: Plan, *by_seed: str, chat: bool = True, **more: Any) -> Reply:
    """Asks for three thoughts, whose answers begin with these, or are these troubles."""
    return ask(pair.client, replace(plan, by_seed=by_seed), chat, headers=THREE, seed=0, **more)


def seeds(pair: Pair, plan: Plan) -> list[int]:
    """Those of the thoughts that were begun; a second leg has that of its thought."""
    return sorted({asked.body["seed"] for asked in pair.upstream.of(plan)})


def number(reply: Reply) -> str:
    """What an answer begins with, behind its thought."""
    return reply.text.rpartition("</think>")[2].split()[0]


def votes(reply: Reply) -> list[int]:
    return [thought["votes"] for thought in reply.haltwise["thoughts"]]


@KINDS
@BOTH
@STREAMED
def test_where_two_agree_there_is_no_third(
    pairs: Pairs, plan: Plan, kind: Kind, chat: bool, stream: bool
) -> None:
    pair = voting(pairs, kind, fake={"num_slots": 1 if kind == "ollama" else 4})
    reply = vote(pair, plan, " 7", " 7.0", chat=chat, stream=stream)
    assert (reply.status, number(reply), reply.finish) == (200, "7", "stop")
    assert seeds(pair, plan) == [0, 1] and votes(reply) == [2, 2]
    told = reply.haltwise
    assert (told["most_thoughts"], told["given"], told["halted"]) == (3, 0, True)
    assert "failed" not in told
    assert [thought["position"] for thought in told["thoughts"]] == [20, 20]


@pytest.mark.parametrize("probing", [False, True], ids=["blind", "looks"])
@STREAMED
@pytest.mark.parametrize(
    ("by_seed", "given", "expected"),
    [
        ((" 7", " 8", " 9"), 0, [1, 1, 1]),
        ((" 7", " 8", " 8"), 1, [1, 2, 2]),
        ((" well", " 8", " 7"), 1, [0, 1, 1]),
        ((" well", " so", " then"), 0, [0, 0, 0]),
    ],
)
def test_the_earliest_thought_with_the_answer_of_most_is_given_whole(
    pairs: Pairs,
    plan: Plan,
    by_seed: tuple[str, ...],
    given: int,
    expected: list[int],
    stream: bool,
    probing: bool,
) -> None:
    pair = voting(pairs, probing=probing)
    reply = vote(pair, plan, *by_seed, stream=stream)
    if not probing:  # whose looks the fake waits for in one thought alone
        alone = ask(pair.client, replace(plan, by_seed=by_seed), stream=stream, seed=given)
        assert (reply.thought, reply.text) == (alone.thought, alone.text)
    assert number(reply) == by_seed[given].strip() and reply.text.count("seen") == 1
    assert reply.haltwise["given"] == given and votes(reply) == expected
    assert reply.done if stream else reply.headers["x-haltwise"] == json.dumps(reply.haltwise)


def test_a_stream_begins_at_once_and_says_nothing_before_the_vote(pairs: Pairs, plan: Plan) -> None:
    """The first thought hangs until the client has its status."""
    pair, waits = voting(pairs), replace(plan, trouble="hangs", at=10, legs=(1,), mention=" 7")
    body = {"model": "fake", "stream": True, "messages": waits.messages()}
    with pair.client.stream("POST", PATHS[True], json=body, headers=THREE) as reply:
        assert reply.status_code == 200
        pieces = reply.iter_raw()
        wait_until(lambda: thoughts(pair, plan) == 1)
        pair.upstream.free(pair.upstream.of(plan)[-1])
        wait_until(lambda: thoughts(pair, plan) == 2)
        pair.upstream.free(pair.upstream.of(plan)[-1])
        said = b"".join(pieces)
    assert said.endswith(b"data: [DONE]\n\n") and said.count(b"seen20") == 1


def test_a_silent_vote_says_that_it_is_alive(
    pairs: Pairs, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haltwise.proxy.client._SILENCE", 0.01)
    pair, waits = voting(pairs), replace(plan, trouble="hangs", at=10, legs=(1,), mention=" 7")
    body = {"model": "fake", "stream": True, "messages": waits.messages()}
    with pair.client.stream("POST", PATHS[True], json=body, headers=THREE) as reply:
        pieces = reply.iter_raw()
        assert next(pieces).startswith(b":\n\n")
        pair.upstream.free(pair.upstream.of(plan)[-1])
        wait_until(lambda: thoughts(pair, plan) == 2)
        pair.upstream.free(pair.upstream.of(plan)[-1])
        events = b"".join(pieces).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(event == b":" or event.startswith(b"data: ") for event in events[:-1])


def test_who_waits_for_no_vote_hears_the_lm_alone(
    pairs: Pairs, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haltwise.proxy.client._SILENCE", 0.01)
    pair, waits = voting(pairs), replace(plan, trouble="hangs", at=10, legs=(1,))
    body = {"model": "fake", "stream": True, "messages": waits.messages()}
    with pair.client.stream("POST", PATHS[True], json=body) as reply:
        time.sleep(0.1)
        pair.upstream.free(pair.upstream.of(plan)[-1])
        events = b"".join(reply.iter_raw()).split(b"\n\n")
    assert all(event.startswith(b"data: ") for event in events[:-1])


def test_whoever_leaves_amid_a_vote_leaves_no_thought_behind(pairs: Pairs, plan: Plan) -> None:
    pair, hangs = voting(pairs), replace(plan, by_seed=(" 7", "!hangs"), at=10, legs=(1,))
    body = {"model": "fake", "stream": True, "messages": hangs.messages(), "seed": 0}
    with pair.client.stream("POST", PATHS[True], json=body, headers=THREE):
        wait_until(lambda: thoughts(pair, plan) == 2)
    assert pair.upstream.of(plan)[-1].gone.wait(PATIENCE)
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)


def thoughts(pair: Pair, plan: Plan) -> int:
    """Those that were begun by now."""
    return sum("messages" in asked.body for asked in pair.upstream.of(plan))


@STREAMED
def test_usage_counts_all_thoughts(pairs: Pairs, plan: Plan, stream: bool) -> None:
    pair, by_seed = voting(pairs), (" 7", " 8", " 8 9 8")
    reply = vote(pair, replace(plan, details=True), *by_seed, stream=stream)
    told = replace(plan, by_seed=by_seed, details=True)
    alone = [ask(pair.client, told, stream=stream, seed=i).usage for i in range(3)]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert reply.usage[name] == sum(usage[name] for usage in alone) > 0
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in alone]
    assert reply.usage["prompt_tokens_details"]["cached_tokens"] == sum(cached) > 0


@STREAMED
@pytest.mark.parametrize(
    ("trouble", "expected"), [("!500", "status"), ("!dies", "cut"), ("!html", "malformed")]
)
def test_if_a_later_thought_fails_those_before_it_decide(
    pairs: Pairs, plan: Plan, trouble: str, expected: str, stream: bool
) -> None:
    pair = voting(pairs)
    counted = pair.proxy.metric("haltwise_upstream_errors_total", kind=expected)
    reply = vote(pair, replace(plan, legs=(1,)), " 7", trouble, " 8", stream=stream)
    assert (reply.status, number(reply)) == (200, "7") and seeds(pair, plan) == [0, 1]
    assert reply.haltwise["failed"] == expected and votes(reply)[0] == 1
    now = pair.proxy.metric("haltwise_upstream_errors_total", kind=expected)
    assert now == counted + 1


@STREAMED
@pytest.mark.parametrize("trouble", ["500", "429", "dies", "html"])
def test_the_first_thought_fails_as_if_it_were_alone(
    pairs: Pairs, plan: Plan, trouble: str, stream: bool
) -> None:
    pair, fails = voting(pairs), replace(plan, legs=(1,))
    reply = vote(pair, fails, f"!{trouble}", " 7", stream=stream)
    alone = ask(pair.client, replace(fails, by_seed=(f"!{trouble}",)), stream=stream, seed=0)
    assert reply.status == alone.status and reply.error == alone.error
    assert seeds(pair, plan) == [0]


def test_without_a_seed_none_is_named_and_at_a_price_of_0_nothing_is_halted(
    pairs: Pairs, plan: Plan
) -> None:
    pair, free = voting(pairs), THREE | {"X-Haltwise-Off": "1"}
    reply = ask(pair.client, replace(plan, mention=" 7"), headers=free)
    assert votes(reply) == [2, 2] and reply.thought == plan.thought()
    assert ["seed" in asked.body for asked in pair.upstream.of(plan)] == [False, False]


@pytest.mark.parametrize("headers", [{}, {"X-Haltwise-Thoughts": "1"}])
def test_who_does_not_ask_has_one_thought(
    pairs: Pairs, plan: Plan, headers: dict[str, str]
) -> None:
    reply = ask(voting(pairs).client, plan, headers=headers)
    plain = ask(pairs("vllm").client, plan)
    assert (reply.thought, reply.text, reply.usage) == (plain.thought, plain.text, plain.usage)


@pytest.mark.parametrize(
    ("told", "more", "expected"),
    [
        ("4", {}, "X-Haltwise-Thoughts is '4', expected a whole number from 1 to 3"),
        ("0", {}, "expected a whole number from 1 to 3"),
        ("two", {}, "X-Haltwise-Thoughts is 'two', expected"),
        ("9" * 5000, {}, "expected a whole number from 1 to 3"),
        ("3", {"temperature": 0}, "with this: a temperature of 0, where all thoughts are the same"),
        ("3", {"n": 2}, "X-Haltwise-Thoughts is 3, expected 1 for a request with this: n is not 1"),
        ("3", {"tools": [{"type": "function"}]}, "with this: tools"),
        ("3", {"response_format": {"type": "json_object"}}, "with this: structured output"),
        ("3", {"logprobs": "many"}, "with this: malformed"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(
    pairs: Pairs, plan: Plan, told: str, more: Any, expected: str
) -> None:
    pair = voting(pairs)
    reply = ask(pair.client, plan, headers={"X-Haltwise-Thoughts": told}, **more)
    assert reply.status == 400 and expected in reply.error["message"]
    assert "\n" not in reply.error["message"] and pair.upstream.of(plan) == []


def test_what_nobody_watches_or_offers_is_refused(pairs: Pairs, plan: Plan) -> None:
    body = {"model": "fake", "input": "hello"}
    found = voting(pairs).client.post("/v1/responses", json=body, headers=THREE)
    assert found.status_code == 400 and "expected it at /v1/chat/completions" in found.text
    unoffered = ask(pairs("vllm").client, plan, headers=THREE)
    assert unoffered.status == 400 and "a proxy with --most-thoughts" in unoffered.error["message"]
    unknown = ask(voting(pairs, "plain").client, plan, headers=THREE)
    assert unknown.status == 400 and "X-Haltwise-Thoughts is 3" in unknown.error["message"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"most_thoughts": 0}, "--most-thoughts is 0, expected 1 to 32"),
        ({"large": "http://127.0.0.1:1"}, "expected 1 beside --large"),
        ({"control": "observe", "state": Path("s")}, "expected 1 beside --control observe"),
    ],
)
def test_what_knows_of_one_thought_is_refused_beside_several(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    wanted: dict[str, Any] = {"most_thoughts": 3} | settings
    with pytest.raises(InputError, match=expected):
        create_app(ServeConfig(head=saved_head(tmp_path / "head"), **wanted))


def test_as_much_is_held_back_for_each_thought() -> None:
    one = Size(num_input=10, num_output=100, num_goes_on=2, num_looked=5).spent()
    three = replace(Size(10, 100, num_goes_on=2, num_looked=5), num_thoughts=3).spent()
    assert one.input_tokens and one.output_tokens
    assert three.input_tokens == 3 * one.input_tokens
    assert three.output_tokens == 3 * one.output_tokens


@pytest.mark.parametrize("trouble", ["", "!500", "!dies"])
def test_a_budget_holds_back_for_all_and_pays_for_those_that_ran(
    tmp_path: Path, plan: Plan, trouble: str
) -> None:
    """There is room for one thought of 2,000 tokens and its second leg, and for shorter ones."""
    budgets = tmp_path / "budgets"
    budgets.write_text(json.dumps({"everything": {"tokens": 10_000}}))
    told = replace(plan, by_seed=(" 7", trouble or " 7"), legs=(1,))
    settings: Any = {"state": tmp_path / "state", "budgets": budgets, "most_thoughts": 3}
    with FakeUpstream("vllm") as upstream:
        config = ServeConfig(saved_head(tmp_path / "head"), upstream.url, **settings)
        with proxied(config) as proxy:
            replies = [
                ask(proxy.client, told, headers=headers, seed=0, max_tokens=2000)
                for headers in ({}, THREE)
            ]
            wait_until(lambda: account(proxy)["held_tokens"] == 0)
            limits = [one.body["max_tokens"] for one in upstream.of(told) if "messages" in one.body]
            assert limits[0] == 2000 and 256 <= limits[1] == limits[-1] < 1200
            spent = account(proxy)["spent_tokens"]
    assert [reply.status for reply in replies] == [200, 200]
    assert len(replies[1].haltwise["thoughts"]) == (1 if trouble == "!500" else 2)
    counted = sum(reply.usage["total_tokens"] for reply in replies)
    # Of a thought that breaks off nobody tells the prompt, which counts as long as it can be.
    assert counted <= spent <= counted + (1000 if trouble == "!dies" else 0)


def account(proxy: Proxy) -> Any:
    (found,) = proxy.client.get("/v1/haltwise/control").json()["budgets"]["accounts"]
    return found
