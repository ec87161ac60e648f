"""What a client of the proxy gets, through real sockets, from fakes of all kinds of servers."""

import asyncio
import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from haltwise import HaltHead, HaltMonitor, Signals
from haltwise.proxy import ServeConfig
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import CONTEXT, FakeUpstream, Kind, Plan, Thoughts, top_logprobs
from tests.proxy.proxies import (
    PATIENCE,
    Pair,
    Pairs,
    Reply,
    ask,
    proxied,
    saved_head,
    wait_until,
)

KINDS: tuple[Kind, ...] = ("vllm", "sglang", "llama-server", "ollama")
BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
NEVER = {"X-Haltwise-Price": "0.1"}
# The fake waits where it is halted. Of what a server sends while it is being halted a client may
# see some, and the first leg's tokens would be counted by chance.
WAITS: dict[str, Any] = {"trouble": "hangs", "at": 20, "legs": (1,)}


def halted(plan: Plan, chat: bool, position: int = 20, close: str = CLOSE) -> tuple[str, str]:
    """Thought and text that a client gets if the thought is closed after so many tokens."""
    thought, answer = plan.thought(position), plan.answer_text(position)
    before, after = close.split("</think>")
    return (thought + before, after.lstrip() + answer) if chat else ("", thought + close + answer)


def unhalted(plan: Plan, chat: bool) -> tuple[str, str]:
    """What it gets otherwise."""
    if chat:
        return plan.thought(), plan.answer_text()
    return "", plan.thought() + "</think>" + plan.answer_text()


def shown(reply: Reply) -> tuple[str, str]:
    assert reply.status == 200 and (not reply.streamed or reply.done), reply.body[-500:]
    return reply.thought, reply.text


def bare(event: Any) -> Any:
    """An event without what the proxy may add, and without fields that are null."""
    if isinstance(event, dict):
        return {k: bare(v) for k, v in event.items() if v is not None and k != "haltwise"}
    return [bare(item) for item in event] if isinstance(event, list) else event


def numbers(chat: bool, num: int | None) -> dict[str, Any]:
    """Asks for the log probabilities of so many of the likeliest tokens."""
    if num is None:
        return {}
    return {"logprobs": True, "top_logprobs": num} if chat else {"logprobs": num}


# Relaying


@BOTH
@STREAMED
@ALL_KINDS
def test_off_is_byte_for_byte_what_the_server_says(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool
) -> None:
    pair = pairs(kind)
    direct = ask(pair.direct, plan, chat, stream, **numbers(chat, 3))
    for headers in ({"X-Haltwise-Off": "1"}, {"X-Haltwise-Price": "0"}):
        reply = ask(pair.client, plan, chat, stream, headers, **numbers(chat, 3))
        assert (reply.status, reply.body) == (direct.status, direct.body)
        assert reply.headers["content-type"] == direct.headers["content-type"]
        assert json.loads(reply.headers["x-haltwise"]) == {"halted": False, "reason": "off"}
    first, *others = pair.upstream.of(plan)
    assert len(others) == 2 and all(other.body == first.body for other in others)


@BOTH
@STREAMED
@pytest.mark.parametrize(
    ("kind", "num"), [*((kind, num) for kind in KINDS for num in (None, 3)), ("vllm", 0)]
)
def test_a_watched_thought_that_is_not_halted_is_what_the_server_says(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool, num: int | None
) -> None:
    pair = pairs(kind)
    direct = ask(pair.direct, plan, chat, stream, **numbers(chat, num))
    reply = ask(pair.client, plan, chat, stream, NEVER, **numbers(chat, num))
    assert shown(reply) == unhalted(plan, chat)
    found, expected = bare(reply.events), bare(direct.events)
    if kind == "llama-server" and not stream:
        # In its streams it leaves out the numbers of tokens without text.
        for choice in (found[0]["choices"][0], expected[0]["choices"][0]):
            choice.pop("logprobs", None)
    assert found == expected
    assert reply.haltwise["reason"] == "closed by the LM" and not reply.haltwise["halted"]


@BOTH
@STREAMED
@pytest.mark.parametrize("num", [None, 3])
@pytest.mark.parametrize("choices", ["from 1", "two", "both", "late"])
@pytest.mark.parametrize(
    ("kind", "probing"),
    [*((kind, False) for kind in KINDS), ("vllm", True), ("llama-server", True)],
)
@pytest.mark.whole
def test_choices_that_nobody_asked_for_are_passed_on_each_by_itself(
    pairs: Pairs, kind: Kind, probing: bool, plan: Plan, chat: bool, stream: bool, choices: str,
    num: int | None,
) -> None:  # fmt: skip
    pair = pairs(kind, probing=probing, probe_beside=True)
    plan = replace(plan, choices=choices)
    direct = ask(pair.direct, plan, chat, stream, **numbers(chat, num))
    reply = ask(pair.client, plan, chat, stream, **numbers(chat, num))
    found, expected = bare(reply.events), bare(direct.events)
    for event in [found[0], expected[0]] if choices == "late" and not stream else []:
        # The fake says all of its second choice where it does not stream.
        event["choices"][1:] = event["choices"][1:2]
        event["choices"][1].pop("logprobs", None)
        for name in ("message", "text"):
            event["choices"][1].pop(name, None)
    for choice in (c for event in [*found, *expected] for c in event["choices"]):
        if kind == "llama-server" and not stream:
            choice.pop("logprobs", None)
    assert found == expected and (not stream or reply.done)
    assert not reply.haltwise["halted"] and reply.haltwise["fallback"] == "several choices"
    assert len(pair.upstream.of(plan)) == 2


@BOTH
@pytest.mark.parametrize("trouble", ["dies", "ends"])
@pytest.mark.parametrize("choices", ["two", "both"])
def test_an_answer_of_several_choices_is_whole_if_each_is(
    vllm: Pair, plan: Plan, chat: bool, trouble: str, choices: str
) -> None:
    plan = replace(plan, choices=choices, trouble=trouble, at=10)
    reply = ask(vllm.client, plan, chat)
    assert not reply.done and reply.error["message"]
    assert ask(vllm.client, plan, chat, stream=False).status == 502


@BOTH
def test_a_stream_without_usage_has_none(vllm: Pair, plan: Plan, chat: bool) -> None:
    for price in ("0.1", "1"):
        headers = {"X-Haltwise-Price": price}
        reply = ask(vllm.client, plan, chat, headers=headers, stream_options=None)
        assert reply.done and not any(event.get("usage") for event in reply.events)
        assert all(event["choices"] for event in reply.events)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths_are_relayed_as_they_are(vllm: Pair, method: str) -> None:
    content = b"\x00 any bytes" if method == "POST" else b""
    direct = vllm.direct.request(method, "/v1/echo?a=b%20c", content=content)
    reply = vllm.client.request(method, "/v1/echo?a=b%20c", content=content)
    assert (reply.status_code, reply.content) == (203, direct.content)
    assert reply.headers["x-fake"] == "yes"
    assert reply.headers["content-type"] == direct.headers["content-type"]
    assert vllm.client.get("/v1/models").json() == vllm.direct.get("/v1/models").json()
    assert vllm.client.get("/v1/nowhere").status_code == 404
    elsewhere = vllm.client.get("/asked")
    told = "no such path, '/asked': expected one that begins with /v1"
    assert elsewhere.status_code == 404 and told in elsewhere.json()["error"]["message"]


@pytest.mark.parametrize(
    ("chat", "asked", "reason"),
    [
        (True, {"n": 2}, "n is not 1"),
        (False, {"n": 2}, "n is not 1"),
        (False, {"best_of": 2}, "best_of"),
        (False, {"echo": True}, "echo"),
        (False, {"suffix": "end"}, "suffix"),
        (True, {"tools": [{"type": "function", "function": {"name": "call"}}]}, "tools"),
        (True, {"response_format": {"type": "json_object"}}, "structured output"),
    ],
    ids=str,
)
@STREAMED
def test_what_cannot_be_halted_is_relayed_and_counted(
    vllm: Pair, plan: Plan, chat: bool, asked: dict[str, Any], reason: str, stream: bool
) -> None:
    plan = replace(plan, tool="tools" in asked)
    counted = vllm.proxy.metric("haltwise_thoughts_total", reason=reason)
    direct = ask(vllm.direct, plan, chat, stream, **asked)
    reply = ask(vllm.client, plan, chat, stream, **asked)
    assert (reply.status, reply.body) == (direct.status, direct.body)
    told_of = {"halted": False, "reason": reason, "ignored": ["price"]}
    assert json.loads(reply.headers["x-haltwise"]) == told_of
    assert vllm.proxy.metric("haltwise_thoughts_total", reason=reason) == counted + 1
    first, second = vllm.upstream.of(plan)
    assert second.body == first.body


@pytest.mark.parametrize(
    ("path", "headers", "ignored"),
    [
        ("/v1/responses", {}, ["price"]),
        ("/v1/responses", {"X-Haltwise-Off": "1"}, []),
        ("/v1/responses/", {"X-Haltwise-Max-Tokens": "9"}, ["price", "max_tokens"]),
        ("/v1/messages", {"X-Haltwise-Price": "0", "X-Haltwise-Min-Tokens": "4"}, ["min_tokens"]),
        ("/v1/echo", {"X-Haltwise-Price": "1"}, ["price"]),
        ("/v1/echo", {}, None),
    ],
)
def test_what_is_not_watched_is_told(
    vllm: Pair, path: str, headers: dict[str, str], ignored: list[str] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "haltwise.proxy")
    names = "haltwise_thoughts_total", "haltwise_ignored_terms_total"
    before = [vllm.proxy.metric(names[0], reason="endpoint"), vllm.proxy.metric(names[1])]
    reply = vllm.client.post(path, content=b"any", headers=headers)
    after = [vllm.proxy.metric(names[0], reason="endpoint"), vllm.proxy.metric(names[1])]
    line = json.loads(caplog.records[-1].getMessage())
    if ignored is None:
        assert "x-haltwise" not in reply.headers and "reason" not in line and after == before
        return
    told = json.loads(reply.headers["x-haltwise"])
    expected = {"halted": False, "reason": "endpoint"} | ({"ignored": ignored} if ignored else {})
    assert told == expected == {"halted": False} | {n: line[n] for n in told if n != "halted"}
    assert after == [before[0] + 1, before[1] + len(ignored)]


@pytest.mark.parametrize(("segment", "is_unknown"), [("hart", True), ("hard", False)])
def test_a_segment_without_a_price_is_told(
    segment: str, is_unknown: bool, plan: Plan, tmp_path: Path
) -> None:
    head = sure_head()
    config = replace(head.config, segment_prices={"hard": 1.0})
    saved = saved_head(tmp_path / "head", HaltHead(config, head.weights))
    with (
        FakeUpstream("vllm") as upstream,
        proxied(ServeConfig(head=saved, upstream=upstream.url)) as proxy,
    ):
        reply = ask(proxy.client, plan, headers={"X-Haltwise-Segment": segment})
        assert reply.haltwise.get("unknown_segment", False) is is_unknown
        assert proxy.metric("haltwise_unknown_segments_total") == is_unknown


@pytest.mark.parametrize(
    ("kind", "recorded", "asked", "is_other"),
    [
        ("vllm", 0.6, {"temperature": 0.6}, False),
        ("vllm", 0.6, {"temperature": 0}, True),
        ("vllm", 0.6, {"temperature": None}, False),  # it does not tell its own
        ("llama-server", 0.6, {}, True),  # whose own is 0.8
        ("llama-server", 0.8, {}, False),
        ("llama-server", 0.6, {"temperature": 0.6}, False),
        ("vllm", None, {"temperature": 1}, False),
    ],
)
def test_a_temperature_that_is_not_that_of_the_traces_is_told(
    kind: Kind, recorded: float | None, asked: dict[str, Any], is_other: bool, plan: Plan,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "haltwise.proxy")
    head = sure_head()
    told = {} if recorded is None else {"temperature": recorded}
    config = replace(head.config, recording=told)
    saved = saved_head(tmp_path / "head", HaltHead(config, head.weights))
    with (
        FakeUpstream(kind) as upstream,
        proxied(ServeConfig(head=saved, upstream=upstream.url)) as proxy,
    ):
        for _ in range(2):
            ask(proxy.client, plan, **asked)
        lines = [record.getMessage() for record in caplog.records]
        assert proxy.metric("haltwise_other_temperatures_total") == 2 * is_other
        assert sum("a request of temperature" in line for line in lines) == is_other
        assert ("temperature" in json.loads(lines[-1])) is is_other


def test_a_cap_that_cannot_hold_is_named(vllm: Pair, plan: Plan) -> None:
    reply = ask(vllm.client, plan, headers={"X-Haltwise-Max-Tokens": "9"}, n=2)
    told = json.loads(reply.headers["x-haltwise"])
    assert (told["reason"], told["ignored"]) == ("n is not 1", ["price", "max_tokens"])


@pytest.mark.parametrize("other", ["2", "5"])
def test_a_term_is_named_once(vllm: Pair, other: str) -> None:
    twice = [("X-Haltwise-Price", "2"), ("X-Haltwise-Price", other)]
    reply = vllm.client.post("/v1/chat/completions", json={"messages": []}, headers=twice)
    told = "X-Haltwise-Price is given twice, expected one"
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, told)


@pytest.mark.parametrize(
    ("runs", "asked", "told"),
    [
        (["top_k", "top_p", "min_p", "temperature"], {}, "top_k 40, top_p 0.95, min_p 0.05 beside"),
        (["temperature"], {}, None),
        (["temperature"], {"top_p": 0.5}, "top_p 0.5 beside"),
        (["top_k", "top_p", "min_p"], {"top_k": 0, "top_p": 1, "min_p": 0}, None),
        (["top_k"], {"temperature": 0}, None),
    ],
)
def test_samplers_that_the_traces_were_recorded_without_are_told(
    runs: list[str], asked: dict[str, Any], told: str | None, plan: Plan, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    head = sure_head()
    config = replace(head.config, recording={"temperature": 0.8})
    saved = saved_head(tmp_path / "head", HaltHead(config, head.weights))
    with (
        FakeUpstream("llama-server", samplers=["temperature", *runs]) as upstream,
        proxied(ServeConfig(head=saved, upstream=upstream.url)) as proxy,
    ):
        for _ in range(2):
            ask(proxy.client, plan, **asked)
    found = [
        line for line in map(logging.LogRecord.getMessage, caplog.records) if "sampled by" in line
    ]
    assert len(found) == (told is not None) and (told or "") in "".join(found)


def test_terms_of_what_is_not_watched_have_to_be_terms(vllm: Pair) -> None:
    reply = vllm.client.post("/v1/responses", content=b"any", headers={"X-Haltwise-Price": "-1"})
    assert reply.status_code == 400 and "price" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "cap", "budget"),
    [
        ({}, "7", 7),
        ({"thinking_budget_tokens": 5}, "7", 5),
        ({"thinking_budget_tokens": -1}, "7", 7),
        ({"thinking_budget_tokens": "x"}, "7", 7),
        ({"input": []}, None, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama-server", "vllm"])
def test_a_server_that_can_caps_what_is_not_watched(
    pairs: Pairs, kind: Kind, asked: dict[str, Any], cap: str | None, budget: int | None
) -> None:
    pair = pairs(kind, close="\n</think>")
    body = {"model": "m", "input": "x"} | asked
    headers = {"X-Haltwise-Price": "0"} | ({"X-Haltwise-Max-Tokens": cap} if cap else {})
    reply = pair.client.post("/v1/responses", json=body, headers=headers)
    holds = kind == "llama-server" and cap is not None
    ignored = {"ignored": ["max_tokens"]} if cap and not holds else {}
    told = json.loads(reply.headers["x-haltwise"])
    assert told == {"halted": False, "reason": "endpoint"} | ignored
    sent = json.loads(pair.upstream.asked[-1].body)
    more = {"thinking_budget_tokens": budget, "reasoning_budget_message": "\n"} if holds else {}
    assert sent == body | more


def test_a_cap_that_a_server_refuses_costs_no_answer(pairs: Pairs) -> None:
    pair, body = pairs("llama-server"), {"input": "no cap"}
    headers = {"X-Haltwise-Max-Tokens": "7", "X-Haltwise-Price": "0"}
    reply = pair.client.post("/v1/responses", json=body, headers=headers)
    assert reply.status_code == 203 and len(pair.upstream.asked) >= 2
    assert json.loads(pair.upstream.asked[-1].body) == body
    assert json.loads(reply.headers["x-haltwise"])["ignored"] == ["max_tokens"]


@pytest.mark.parametrize("body", [b"any", b"[]"])
def test_what_is_not_watched_and_cannot_be_read_is_passed_on(pairs: Pairs, body: bytes) -> None:
    pair = pairs("llama-server")
    headers = {"X-Haltwise-Max-Tokens": "7"}
    reply = pair.client.post("/v1/responses", content=body, headers=headers)
    assert reply.status_code == 203 and pair.upstream.asked[-1].body == body.decode()
    assert "max_tokens" in json.loads(reply.headers["x-haltwise"])["ignored"]


@STREAMED
def test_tools_before_a_server_that_shows_no_numbers_with_them(
    pairs: Pairs, plan: Plan, stream: bool
) -> None:
    pair, tools = pairs("llama-server"), [{"type": "function", "function": {"name": "call"}}]
    reply = ask(pair.client, plan, stream=stream, tools=tools)
    assert shown(reply) == unhalted(plan, chat=True)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == "tools"
    assert len(pair.upstream.of(plan)) == 1
    plan = replace(plan, name=plan.name + "x", tool=True, trouble="hangs", at=7, legs=(1,))
    capped = {"X-Haltwise-Max-Tokens": "7"}
    reply = ask(pair.client, plan, stream=stream, headers=capped, tools=tools)
    assert reply.thought == plan.thought(7) + "\n" and reply.finish == "tool_calls"
    assert reply.haltwise["reason"] == "capped" and len(pair.upstream.of(plan)) == 1


def test_prompts_of_ids_and_pictures_are_relayed(vllm: Pair, plan: Plan) -> None:
    ids = vllm.upstream.ids(plan.prompt())
    reply = ask(vllm.client, plan, chat=False, prompt=ids)
    assert shown(reply) == unhalted(plan, chat=False)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == "token prompt"
    picture = {"type": "image_url", "image_url": {"url": "data:,"}, "text": ""}
    parts = [{"type": "text", "text": plan.text()}, picture]
    reply = ask(vllm.client, plan, messages=[{"role": "user", "content": parts}])
    assert shown(reply) == unhalted(plan, chat=True)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == "media"


def test_a_server_that_nobody_knows_is_halted_in_completions_alone(
    pairs: Pairs, plan: Plan
) -> None:
    pair = pairs("plain")
    assert shown(ask(pair.client, plan, chat=False)) == halted(plan, chat=False)
    reply = ask(pair.client, plan)
    assert shown(reply) == unhalted(plan, chat=True)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == "unknown server"


def test_an_upstream_may_be_named_with_the_path_of_its_api(pairs: Pairs, plan: Plan) -> None:
    pair = pairs("vllm", upstream=pairs("vllm").upstream.url + "/v1/")
    assert shown(ask(pair.client, plan)) == halted(plan, chat=True)
    assert pair.client.get("/v1/models").status_code == 200


# Halting


@BOTH
@STREAMED
@pytest.mark.parametrize(("price", "position"), [("100", 4), ("10", 12), ("1", 20), ("0.1", None)])
def test_a_thought_is_halted_at_the_point_that_was_computed_by_hand(
    vllm: Pair, plan: Plan, chat: bool, stream: bool, price: str, position: int | None
) -> None:
    reply = ask(vllm.client, plan, chat, stream, {"X-Haltwise-Price": price})
    expected = unhalted(plan, chat) if position is None else halted(plan, chat, position)
    assert shown(reply) == expected
    assert (reply.finish, reply.streamed) == ("stop", stream)
    told = reply.haltwise
    assert (told["halted"], told["price"]) == (position is not None, float(price))
    assert told["reason"] == ("closed by the LM" if position is None else "halted")
    assert position in (None, told["position"])
    if not stream:
        assert json.loads(reply.headers["x-haltwise"]) == told


@BOTH
@ALL_KINDS
def test_every_kind_of_server_is_halted(pairs: Pairs, kind: Kind, plan: Plan, chat: bool) -> None:
    pair = pairs(kind)
    for stream in (True, False):
        plan = replace(plan, name=f"{plan.name}{stream}".lower(), **WAITS)
        reply = ask(pair.client, plan, chat, stream, temperature=0)
        assert shown(reply) == halted(plan, chat)
        assert reply.haltwise["halted"] and reply.haltwise["position"] == 20
        first, *others = pair.upstream.of(plan)
        assert first.gone.wait(PATIENCE)
        # llama-server is told to end a greedy chat's thought; others are left, and asked anew.
        by_itself = kind == "llama-server" and chat
        assert (first.ended, len(others)) == (("done", 0) if by_itself else ("closed", 1))


@BOTH
@ALL_KINDS
def test_events_of_both_legs_look_like_those_of_one(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool
) -> None:
    reply = ask(pairs(kind).client, plan, chat)
    events, choices = reply.events, [c for e in reply.events for c in e["choices"]]
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert events[0]["object"] == ("chat.completion.chunk" if chat else "text_completion")
    assert not chat or choices[0]["delta"]["role"] == "assistant"
    finishes = [choice["finish_reason"] for choice in choices]
    assert finishes[-1] == "stop" and set(finishes[:-1]) == {None}
    assert [bool(event.get("usage")) for event in events] == [False] * (len(events) - 1) + [True]
    assert not any({"token_ids", "prompt_token_ids"} & {*c, *e} for e in events for c in choices)
    assert not any(choice.get("logprobs") for choice in choices)


@BOTH
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_second_leg_has_exactly_the_prompt_the_thought_and_the_close_text(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool
) -> None:
    upstream = pairs(kind).upstream
    sampling: dict[str, Any] = {
        "temperature": 0.3,
        "top_p": 0.9,
        "seed": 5,
        "stop": ["never"],
        "max_tokens": 100,
    }
    ask(pairs(kind).client, plan, chat, user="somebody", **sampling)
    first, second = upstream.of(plan)
    prompt = plan.text() + "\n<|assistant|><think>\n" if chat else plan.prompt()
    sent = second.body["prompt"]
    text = sent if isinstance(sent, str) else upstream.text(sent)
    assert text == prompt + plan.thought(20) + CLOSE
    assert second.path == "/v1/completions"
    for name, value in sampling.items():
        assert first.body[name] == value
        assert second.body[name] == {"max_tokens": 80, "temperature": 0}.get(name, value)
    assert second.body["model"] == "fake" and second.body["user"] == "somebody"
    assert not {"messages", "tools"} & set(second.body)


@BOTH
@ALL_KINDS
@pytest.mark.parametrize("answers", ["seen", "free"])
def test_behind_a_halted_thought_the_likeliest_answer_follows_as_it_was_recorded(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, answers: str
) -> None:
    """An unhalted one is the request's own, and what nobody can continue the server ends itself."""
    pair, is_free = pairs(kind, answers=answers), answers == "free"
    ends_itself = kind == "llama-server" and chat
    cut = replace(plan, name=f"{plan.name}x", **WAITS)
    assert ask(pair.client, cut, chat, temperature=0.7).haltwise["halted"]
    first, *others = pair.upstream.of(cut)
    assert first.body["temperature"] == 0.7 and len(others) == 1 - (ends_itself and is_free)
    assert all(other.body["temperature"] == (0.7 if is_free else 0) for other in others)
    ask(pair.client, plan, chat, headers=NEVER, temperature=0.7)
    (only,) = pair.upstream.of(plan)
    assert only.body["temperature"] == 0.7


@pytest.mark.parametrize(
    "beside", [{"logprobs": True}, {"response_format": {"type": "json_object"}}, {"temperature": 0}]
)
def test_what_a_second_request_cannot_do_or_need_not_llama_server_ends_itself(
    pairs: Pairs, plan: Plan, beside: dict[str, Any]
) -> None:
    pair, plan = pairs("llama-server"), replace(plan, **WAITS)
    more: dict[str, Any] = {"temperature": 0.7} | beside
    assert ask(pair.client, plan, **more).haltwise["halted"]
    assert len(pair.upstream.of(plan)) == 1


def test_what_is_left_of_the_newer_limit_goes_to_the_second_leg(vllm: Pair, plan: Plan) -> None:
    ask(vllm.client, replace(plan, **WAITS), max_completion_tokens=50)
    first, second = vllm.upstream.of(replace(plan, **WAITS))
    assert first.body["max_completion_tokens"] == 50 and "max_tokens" not in first.body
    assert second.body["max_tokens"] == 30 and "max_completion_tokens" not in second.body


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_answer_of_a_chat_without_a_limit_may_fill_the_context(
    pairs: Pairs, kind: Kind, plan: Plan
) -> None:
    ask(pairs(kind).client, replace(plan, answer=40))
    _, second = pairs(kind).upstream.of(replace(plan, answer=40))
    num_prompt = len(second.body["prompt"])
    assert num_prompt <= CONTEXT - second.body["max_tokens"] <= num_prompt + 50


@BOTH
@pytest.mark.parametrize(
    ("kind", "close"),
    [
        *((kind, "\nEnough.\n</think>\n\nThe answer is") for kind in KINDS),
        ("llama-server", "\nEnough.\n</think>\n\n"),
    ],
)
def test_the_close_text_may_end_the_thought_and_begin_the_answer(
    pairs: Pairs, kind: Kind, close: str, plan: Plan, chat: bool
) -> None:
    plan = replace(plan, **WAITS)
    reply = ask(pairs(kind, close).client, plan, chat)
    assert shown(reply) == halted(plan, chat, close=close)


@pytest.mark.parametrize(
    ("kind", "thoughts"),
    [("vllm", "opened"), ("vllm", "written"), ("llama-server", "written")],
)
@STREAMED
def test_a_chat_s_thought_may_stand_in_its_content(
    pairs: Pairs, kind: Kind, plan: Plan, thoughts: Thoughts, stream: bool
) -> None:
    plan = replace(plan, **WAITS)
    pair = pairs(kind, fake={"thoughts": thoughts})
    reply = ask(pair.client, plan, stream=stream, temperature=0)
    # The LM's own marker is a token too.
    start, seen = ("<think>", 19) if thoughts == "written" else ("", 20)
    close = CLOSE.rstrip() if kind == "llama-server" else CLOSE  # which it writes by itself
    text = start + plan.thought(seen) + close + plan.answer_text(seen)
    assert shown(reply) == ("", text)
    assert reply.haltwise["position"] == 20


CAPPED = {"X-Haltwise-Max-Tokens": "3"}
CAPPED_AT_7 = {"X-Haltwise-Max-Tokens": "7", "X-Haltwise-Price": "0"}
CLOSED = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n"}


@pytest.mark.parametrize(
    ("kind", "thoughts"),
    [
        *(("vllm", thoughts) for thoughts in ("naive", "opened", "written")),
        ("sglang", "opened"),
        ("llama-server", "written"),
    ],
)
@pytest.mark.parametrize("asked", ["switch", "prefill"])
@pytest.mark.parametrize("mention", ["", "<think>", "a <think> is"])
def test_an_answer_behind_a_closed_thought_is_no_thought(
    pairs: Pairs, kind: Kind, plan: Plan, thoughts: Thoughts, asked: str, mention: str
) -> None:
    pair = pairs(kind, fake={"thoughts": thoughts})
    # Another one that thinks comes first: what is true of it is not believed of all.
    ask(pair.client, replace(plan, name=plan.name + "x"))
    plan = replace(plan, answer=9, mention=mention)
    content = plan.text() + (" /no_think" if asked == "switch" else "")
    messages = [{"role": "user", "content": content}]
    more: dict[str, Any] = {}
    if asked == "prefill":
        messages.append(CLOSED)
        more = {"continue_final_message": True, "add_generation_prompt": False}
    reply = ask(pair.client, plan, headers=CAPPED, messages=messages, **more)
    assert "".join(shown(reply)) == mention + plan.answer_text(0)
    assert not reply.haltwise["halted"] and len(pair.upstream.of(plan)) == 1


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("marker", ["<think>", "</think>"])
def test_a_marker_in_what_a_user_says_means_nothing(
    pairs: Pairs, plan: Plan, place: int, marker: str
) -> None:
    pair = pairs("vllm", fake={"thoughts": "opened"})
    said = ["", plan.text()]
    said[place] += f" what is {marker}?" if place == 0 or marker == "<think>" else ""
    messages = [{"role": "user", "content": text} for text in said]
    reply = ask(pair.client, plan, messages=messages)
    assert reply.text.startswith(plan.thought(20)) and reply.haltwise["position"] == 20
    messages[1]["content"] += " /no_think"
    reply = ask(pair.client, replace(plan, answer=9), headers=CAPPED, messages=messages)
    assert not reply.haltwise["halted"]


@pytest.mark.parametrize("mention", ["<think>", "a <think> is"])
def test_a_completion_that_mentions_a_marker_is_no_thought(
    vllm: Pair, plan: Plan, mention: str
) -> None:
    plan = replace(plan, answer=9, mention=mention)
    prompt = plan.text() + "\n<think>\n\n</think>\n\n"
    reply = ask(vllm.client, plan, chat=False, headers=CAPPED, prompt=prompt)
    assert reply.text == mention + plan.answer_text(0)
    assert reply.haltwise["reason"] == "no thought"


@BOTH
@STREAMED
@pytest.mark.parametrize("closes", ["repeats", "thinks", "both"])
@ALL_KINDS
def test_a_close_that_the_lm_does_not_heed_is_followed_through(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool, closes: str
) -> None:
    plan = replace(plan, closes=closes, **WAITS)
    reply = ask(pairs(kind).client, plan, chat, stream, temperature=0)
    assert shown(reply) == halted(plan, chat)
    assert reply.haltwise["halted"]
    by_itself = kind == "llama-server" and chat
    assert len(pairs(kind).upstream.of(plan)) == 3 - (closes == "repeats") - by_itself


@pytest.mark.whole
@STREAMED
@pytest.mark.parametrize("closes", ["", "repeats", "thinks", "both", "deaf"])
@pytest.mark.parametrize("thoughts", ["field", "written"])
@pytest.mark.parametrize("close", ["\n</think>\n\n", "\nEnough.\n</think>\n\n"])
@pytest.mark.parametrize("num_slots", [1, 9])
def test_a_close_that_the_server_writes_itself_is_followed_through(
    pairs: Pairs,
    plan: Plan,
    thoughts: Thoughts,
    closes: str,
    stream: bool,
    close: str,
    num_slots: int,
) -> None:
    pair = pairs("llama-server", close, {"thoughts": thoughts, "num_slots": num_slots})
    plan = replace(plan, closes=closes, **WAITS)
    if closes == "deaf":
        plan = replace(plan, thinking=1000)
    reply = ask(pair.client, plan, stream=stream, temperature=0)
    assert reply.haltwise["halted"] and reply.haltwise["position"] == 20
    assert reply.text.count("</think>") == (thoughts == "written") and reply.finish == "stop"
    assert reply.text.count("<think>") == (thoughts == "written")
    seen = reply.haltwise["length"] - (thoughts == "written") if closes == "deaf" else 20
    assert 20 <= seen < 300
    assert (reply.thought + reply.text).count("Enough.") == close.count("Enough.")
    seen -= thoughts == "written" and closes != "deaf"  # the LM's own marker is a token too
    assert reply.text.endswith(plan.answer_text(seen))
    assert plan.thought(seen) in reply.thought + reply.text
    assert plan.thought(seen + 1) not in reply.thought + reply.text
    assert len(pair.upstream.of(plan)) == (1 if closes in ("", "repeats") else 2)


@STREAMED
def test_a_second_thought_that_cannot_be_closed_is_the_lm_s(
    pairs: Pairs, plan: Plan, stream: bool
) -> None:
    plan = replace(plan, closes="both", **WAITS)
    form = {"type": "json_object"}
    reply = ask(pairs("llama-server").client, plan, stream=stream, response_format=form)
    assert reply.text.strip().startswith("</think>\n\n<think>")
    assert reply.text.endswith(plan.answer_text(20)) and reply.finish == "stop"
    assert reply.haltwise["fallback"] == "second thought" and not reply.haltwise["halted"]


@BOTH
@pytest.mark.parametrize("kind", ["vllm", "ollama"])
@pytest.mark.parametrize(
    ("call", "end", "position"),
    [
        ((3, 9), "", 10),
        ((6, 8), "", 9),
        ((7, 8), "", 7),
        ((3, 999), "</tool_call>", 263),
    ],
)
def test_a_cap_waits_for_the_end_of_a_call_and_not_for_ever(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, call: tuple[int, int], end: str, position: int
) -> None:
    plan = replace(plan, thinking=400, call=call)
    reply = ask(pairs(kind).client, plan, chat, headers=CAPPED_AT_7)
    assert reply.haltwise["reason"] == "capped" and reply.haltwise["position"] == position
    assert "fallback" not in reply.haltwise
    assert shown(reply) == halted(plan, chat, position, end + CLOSE)


@BOTH
def test_a_call_that_is_written_amid_a_thought_is_not_closed(
    vllm: Pair, plan: Plan, chat: bool
) -> None:
    plan = replace(plan, name="x<tool_call>")
    reply = ask(vllm.client, plan, chat)
    assert shown(reply) == unhalted(plan, chat) and reply.haltwise["fallback"] == "tool call"


def test_a_client_s_own_message_at_the_end_of_a_thought_is_kept(pairs: Pairs, plan: Plan) -> None:
    pair, plan = pairs("llama-server"), replace(plan, **WAITS)
    reply = ask(pair.client, plan, reasoning_budget_message="mine")
    assert shown(reply) == halted(plan, chat=True)
    first, second = pair.upstream.of(plan)
    assert first.body["reasoning_budget_message"] == "mine"
    assert "reasoning_control" not in first.body and second.path == "/v1/completions"


@pytest.mark.parametrize(("stream", "reason"), [(True, "halted"), (False, "prefill")])
def test_what_a_client_has_begun_stays_in_a_whole_answer(
    pairs: Pairs, plan: Plan, stream: bool, reason: str
) -> None:
    # llama-server's whole answers begin with it, its streams do not.
    messages = [*plan.messages(), {"role": "assistant", "reasoning_content": ""}]
    reply = ask(pairs("llama-server").client, plan, stream=stream, messages=messages)
    told = reply.haltwise if stream else json.loads(reply.headers["x-haltwise"])
    assert told["reason"] == reason


def test_a_message_may_have_parts(vllm: Pair, plan: Plan) -> None:
    parts = [{"type": "text", "text": plan.text()}, {"type": "text", "text": " please"}]
    reply = ask(vllm.client, plan, messages=[{"role": "user", "content": parts}])
    assert shown(reply) == halted(plan, chat=True)


@BOTH
@STREAMED
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_usage_is_that_of_both_legs(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool
) -> None:
    plan, pair = replace(plan, **WAITS), pairs(kind)
    reply = ask(pair.client, plan, chat, stream)
    prompt = plan.text() + "\n<|assistant|><think>\n" if chat else plan.prompt()
    num_prompt, num_close = len(pair.upstream.ids(prompt)), len(pair.upstream.ids(CLOSE))
    first = {"prompt_tokens": num_prompt, "completion_tokens": 20}
    # Four tokens and the one that ends the answer.
    second = {"prompt_tokens": num_prompt + 20 + num_close, "completion_tokens": 5}
    assert reply.haltwise["legs"] == [first, second]
    assert bare(reply.usage) == {
        "prompt_tokens": 2 * num_prompt + 20 + num_close,
        "completion_tokens": 25,
        "total_tokens": 2 * num_prompt + 45 + num_close,
    }


@BOTH
@STREAMED
def test_details_of_the_usage_of_both_legs_are_kept(
    vllm: Pair, plan: Plan, chat: bool, stream: bool
) -> None:
    plan = replace(plan, details=True, **WAITS)
    usage = ask(vllm.client, plan, chat, stream).usage
    # The first leg was left before it told anything; the second took five tokens.
    assert usage["prompt_tokens_details"]["cached_tokens"] == 1
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 20 + 5}


def test_a_thought_that_goes_on_behind_its_halt_has_two_lengths(pairs: Pairs, plan: Plan) -> None:
    told = ask(pairs("llama-server").client, replace(plan, **WAITS), temperature=0).haltwise
    # The token that closes it is the server's own.
    assert (told["position"], told["length"]) == (20, 21)
    assert "length" not in ask(pairs("vllm").client, plan).haltwise


@BOTH
@STREAMED
@pytest.mark.parametrize(("stop", "reason"), [(".t9", "token budget"), ("x", "closed by the LM")])
def test_a_client_s_own_end_is_not_the_lm_s(
    vllm: Pair, plan: Plan, chat: bool, stream: bool, stop: str, reason: str
) -> None:
    reply = ask(vllm.client, plan, chat, stream, NEVER, stop=[stop])
    assert (reply.finish, reply.haltwise["reason"]) == ("stop", reason)


@BOTH
@STREAMED
def test_log_probabilities_are_those_of_what_is_shown(
    vllm: Pair, plan: Plan, chat: bool, stream: bool
) -> None:
    reply = ask(vllm.client, plan, chat, stream, **numbers(chat, 3))
    tokens, tops = [], []
    for choice in (c for event in reply.events for c in event["choices"] if c.get("logprobs")):
        if chat:
            tokens += [entry["token"] for entry in choice["logprobs"]["content"]]
            tops += [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]]
        else:
            tokens += choice["logprobs"]["tokens"]
            tops += [len(top) for top in choice["logprobs"]["top_logprobs"]]
    assert "".join(tokens) == plan.thought(20) + plan.answer_text(20) + "<eos>"
    assert set(tops) <= {3, 4}


@BOTH
@ALL_KINDS
def test_max_tokens_holds_for_both_legs_together(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool
) -> None:
    plan, client = replace(plan, answer=50), pairs(kind).client
    reply = ask(client, plan, chat, max_tokens=40)
    answer = reply.text if chat else reply.text.partition("</think>")[2]
    assert reply.finish == "length"
    seen = reply.haltwise["position"] if kind != "llama-server" else 20
    assert plan.answer_text(seen).startswith(answer.lstrip("\n"))
    # What came while the thought was being halted counts too, and so does a marker.
    assert 0 < len(answer.split()) <= 20
    reply = ask(client, plan, chat, max_tokens=10)
    assert reply.finish == "length" and "</think>" not in reply.text
    assert reply.haltwise["reason"] == "token budget"


@BOTH
def test_several_tokens_a_chunk_are_not_cut(vllm: Pair, plan: Plan, chat: bool) -> None:
    plan = replace(plan, per_chunk=7)
    reply = ask(vllm.client, plan, chat)
    # The point at 20 lies in the third chunk, which ends at 21.
    assert reply.text.endswith(plan.answer_text(21))
    assert plan.thought(21) in (reply.thought + reply.text)
    assert reply.haltwise["position"] == 20


@BOTH
@pytest.mark.parametrize("split", [1, 7, 1_000])
def test_packets_may_end_anywhere(vllm: Pair, plan: Plan, chat: bool, split: int) -> None:
    plan = replace(plan, thinking=6, split=split)
    reply = ask(vllm.client, plan, chat, headers={"X-Haltwise-Price": "100"})
    assert shown(reply) == halted(plan, chat, 4)


@BOTH
@ALL_KINDS
def test_every_kind_of_server_shows_the_head_the_same_signals(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Signals] = []
    observe = HaltMonitor.observe

    def spy(monitor: HaltMonitor, signals: Signals, rows: Any) -> Any:
        seen.append(signals)
        return observe(monitor, signals, rows)

    monkeypatch.setattr(HaltMonitor, "observe", spy)
    # The first tokens are not among the likeliest 20 in their places.
    plan = replace(plan, thinking=9, logprobs=((0, -6.0), (3, -2.0)))
    ask(pairs(kind).client, plan, chat, headers=NEVER)
    assert [int(signals.position[0]) for signals in seen] == [4, 8]
    for signals, logprobs in zip(seen, [(-6.0, -6.0, -6.0, -2.0), (-2.0,) * 4], strict=True):
        entropies = [entropy_of(logprob) for logprob in logprobs]
        expected = {
            "entropy": sum(entropies) / 4,
            "max_entropy": max(entropies),
            "logprob": sum(logprobs) / 4,
            "min_logprob": min(logprobs),
            "margin": sum(map(margin_of, logprobs)) / 4,
            "num_reflections": 0.0,
        }
        found = {name: float(getattr(signals, name)[0]) for name in expected}
        assert found == pytest.approx(expected, abs=1e-5)


def likeliest(logprob: float) -> list[float]:
    """Probabilities of the likeliest 20 tokens in the place of one."""
    return sorted((math.exp(x) for x in [logprob, *top_logprobs(logprob)]), reverse=True)[:20]


def entropy_of(logprob: float) -> float:
    """Nats, with all tokens that are not told as one."""
    probs = likeliest(logprob)
    return -sum(p * math.log(p) for p in [*probs, 1 - sum(probs)])


def margin_of(logprob: float) -> float:
    first, second = likeliest(logprob)[:2]
    return first - second


# Terms


@pytest.mark.parametrize(
    ("headers", "position"),
    [
        ({"X-Haltwise-Price": "100", "X-Haltwise-Min-Tokens": "5"}, 8),
        ({"X-Haltwise-Price": "100", "X-Haltwise-Min-Tokens": "4"}, 4),
        ({"X-Haltwise-Max-Tokens": "7"}, 7),
        ({"X-Haltwise-Price": "0", "X-Haltwise-Max-Tokens": "7"}, 7),
        ({"X-Haltwise-Price": "100", "X-Haltwise-Max-Tokens": "7"}, 4),
    ],
    ids=str,
)
@BOTH
def test_a_thought_has_a_least_and_a_largest_length(
    vllm: Pair, plan: Plan, headers: dict[str, str], position: int, chat: bool
) -> None:
    reply = ask(vllm.client, plan, chat, headers=headers)
    assert reply.text.endswith(plan.answer_text(position))
    told = reply.haltwise
    assert (told["halted"], told["position"]) == (True, position)
    assert told["reason"] == ("halted" if position % 4 == 0 else "capped")


@pytest.mark.parametrize("top", ["none", "few", "nan", "null", "words"])
@BOTH
def test_the_cap_needs_no_log_probabilities_and_the_head_does(
    vllm: Pair, plan: Plan, top: str, chat: bool
) -> None:
    plan = replace(plan, top=top)
    counted = vllm.proxy.metric("haltwise_bad_signals_total")
    reply = ask(vllm.client, plan, chat, headers={"X-Haltwise-Price": "100"})
    assert shown(reply) == unhalted(plan, chat)
    assert not reply.haltwise["halted"]
    assert vllm.proxy.metric("haltwise_bad_signals_total") > counted
    reply = ask(vllm.client, plan, chat, headers={"X-Haltwise-Max-Tokens": "7"})
    assert reply.text.endswith(plan.answer_text(7)) and reply.haltwise["reason"] == "capped"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Haltwise-Price": "cheap"},
        {"X-Haltwise-Price": "-1"},
        {"X-Haltwise-Price": "nan"},
        {"X-Haltwise-Price": ""},
        {"X-Haltwise-Off": "perhaps"},
        {"X-Haltwise-Min-Tokens": "1.5"},
        {"X-Haltwise-Min-Tokens": "20", "X-Haltwise-Max-Tokens": "10"},
        {"X-Haltwise-Max-Tokens": "0"},
    ],
    ids=str,
)
def test_bad_terms_are_refused_and_go_no_further(
    vllm: Pair, plan: Plan, headers: dict[str, str]
) -> None:
    reply = ask(vllm.client, plan, headers=headers)
    assert reply.status == 400 and "expected" in reply.error["message"]
    # All that are given are about one term, or about one another.
    assert reply.error["message"].startswith(f"{[*headers][-1]}: ")
    assert "\n" not in reply.error["message"]
    assert vllm.upstream.of(plan) == []


def test_headers_of_the_proxy_are_not_passed_on_and_others_are(vllm: Pair, plan: Plan) -> None:
    headers = {"X-Haltwise-Price": "1", "X-Request-Id": "r7", "Authorization": "Bearer own"}
    ask(vllm.client, plan, headers=headers)
    asked = vllm.upstream.of(plan)
    for each in asked:
        assert not any(name.startswith("x-haltwise") for name in each.headers)
        assert each.key == "own"
    # Two requests must not have one name.
    assert [each.headers.get("x-request-id") for each in asked] == ["r7", None]


@BOTH
def test_a_stop_text_that_is_no_part_of_the_close_text_does_not_matter(
    vllm: Pair, plan: Plan, chat: bool
) -> None:
    for stop in ("never", ["never", "nowhere"], None):
        plan = replace(plan, name=plan.name + "x")
        assert shown(ask(vllm.client, plan, chat, stop=stop)) == halted(plan, chat)
    reply = ask(vllm.client, plan, chat, stop=["</think>"])
    assert json.loads(reply.headers["x-haltwise"])["reason"] == "stop"


# Keys


@pytest.fixture
def guarded(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    keys = tmp_path / "keys.json"
    entries = {"sk-one": {"price": 10}, "sk-two": {"max_tokens": 7}, "sk-three": {}}
    keys.write_text(json.dumps(entries))
    monkeypatch.setenv("UPSTREAM_KEY", "sk-inner")
    return pairs(
        "vllm",
        fake={"key": "sk-inner"},
        price=100.0,
        keys=keys,
        upstream_key_env="UPSTREAM_KEY",
    )


def test_the_price_is_the_header_s_or_the_key_s_or_the_default(guarded: Pair, plan: Plan) -> None:
    expected = {
        ("one", None): 12,
        ("one", "1"): 20,
        ("two", None): 4,
        ("two", "0.1"): 7,
        ("three", None): 4,
        ("three", "10"): 12,
    }
    for (key, price), position in expected.items():
        plan = replace(plan, name=plan.name + "x")
        headers = {"Authorization": f"Bearer sk-{key}"}
        if price is not None:
            headers["X-Haltwise-Price"] = price
        reply = ask(guarded.client, plan, headers=headers)
        assert reply.haltwise["position"] == position, (key, price)
        assert {asked.key for asked in guarded.upstream.of(plan)} == {"sk-inner"}


def test_an_unknown_key_is_refused_everywhere_and_no_key_is_told(
    guarded: Pair,
    plan: Plan,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG, logger="haltwise")
    seen = []
    for value in (None, "Bearer sk-guessed", "sk-one", "Bearer", "Basic sk-one"):
        headers: dict[str, str] = {} if value is None else {"Authorization": value}
        for chat in (True, False):
            reply = ask(guarded.client, plan, chat, headers=headers)
            seen.append(reply.body.decode())
            assert reply.status == 401 and reply.error["message"]
        assert guarded.client.get("/v1/models", headers=headers).status_code == 401
        assert guarded.upstream.of(plan) == []
    listed = {"Authorization": "Bearer sk-one"}
    assert ask(guarded.client, plan, headers=listed).status == 200
    broken = replace(plan, name=plan.name + "x", trouble="dies", at=3)
    seen.append(ask(guarded.client, broken, headers=listed).body.decode())
    for path in ("/metrics", "/health"):
        told = guarded.client.get(path)
        assert told.status_code == 200
        seen.append(told.text)
    wait_until(lambda: caplog.text.count('"outcome"') == 17)
    seen += [caplog.text, *capfd.readouterr()]
    assert not any("sk-" in text for text in seen)


def test_a_browser_asks_without_a_key_what_it_may_ask_for(guarded: Pair) -> None:
    asks = {"Origin": "https://chat", "Access-Control-Request-Method": "POST"}
    for path in ("/v1/chat/completions", "/v1/models"):
        found = guarded.client.options(path, headers=asks)
        assert found.status_code == guarded.direct.options(path, headers=asks).status_code
        assert guarded.client.options(path).status_code == 401
        assert guarded.client.get(path, headers=asks).status_code == 401


def test_a_key_that_the_server_refuses_is_refused_as_the_server_does(
    pairs: Pairs, plan: Plan
) -> None:
    pair = pairs("vllm", fake={"key": "right"})
    reply = ask(pair.client, plan, headers={"Authorization": "Bearer wrong"})
    assert (reply.status, reply.error["message"]) == (401, "invalid api key")
    reply = ask(pair.client, plan, headers={"Authorization": "Bearer right"})
    assert shown(reply) == halted(plan, chat=True)


def test_logs_have_a_line_a_request_and_never_what_was_said(
    vllm: Pair, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="haltwise")
    ask(vllm.client, plan)
    wait_until(lambda: '"outcome"' in caplog.text)
    told = [r.getMessage() for r in caplog.records if r.name.startswith("haltwise")]
    (line,) = [line for line in told if line != '{"upstream": "vllm"}']
    told = json.loads(line)
    assert told["reason"] == "halted" and told["position"] == 20
    assert plan.name not in line.replace(f"chatcmpl-{plan.name}", "")


# Shadow


@BOTH
@STREAMED
def test_in_shadow_nothing_changes_and_the_saving_is_told(
    pairs: Pairs, plan: Plan, chat: bool, stream: bool
) -> None:
    pair = pairs("vllm", shadow=True)
    saved = pair.proxy.metric("haltwise_shadow_saved_tokens_total")
    reply = ask(pair.client, plan, chat, stream)
    assert bare(reply.events) == bare(ask(pair.direct, plan, chat, stream).events)
    told = reply.haltwise
    assert not told["halted"] and len(told["legs"]) == 1
    assert told["shadow"]["reason"] == "halted" and told["shadow"]["position"] == 20
    # Of 28 thinking tokens; the marker that closes the thought may count as one.
    assert told["shadow"]["saved_tokens"] in (8, 9)
    saved += told["shadow"]["saved_tokens"]
    assert pair.proxy.metric("haltwise_shadow_saved_tokens_total") == saved
    assert len(pair.upstream.of(plan)) == 2
    assert "return_token_ids" not in pair.upstream.of(plan)[0].body
    assert "shadow" not in ask(pair.client, plan, chat, stream, NEVER).haltwise
    assert pair.proxy.metric("haltwise_shadow_saved_tokens_total") == saved


# Official clients


def test_the_official_client_streams_a_halted_chat(vllm: Pair, plan: Plan) -> None:
    client = openai.OpenAI(base_url=vllm.proxy.url + "/v1", api_key="any", max_retries=0)
    stream = client.chat.completions.create(
        model="fake",
        messages=plan.messages(),
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Haltwise-Price": "10"},
    )
    chunks = list(stream)
    parts: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thought = "".join(getattr(part, "reasoning", None) or "" for part in parts)
    assert thought.strip() == plan.thought(12).strip()
    assert "".join(part.content or "" for part in parts) == plan.answer_text(12)
    usage: Any = chunks[-1].usage
    assert usage.haltwise["position"] == 12
    legs = usage.haltwise["legs"]
    assert usage.completion_tokens == sum(leg["completion_tokens"] for leg in legs)


def test_the_official_client_takes_a_whole_completion(vllm: Pair, plan: Plan) -> None:
    client = openai.OpenAI(base_url=vllm.proxy.url + "/v1", api_key="any", max_retries=0)
    done = client.completions.create(model="fake", prompt=plan.prompt(), max_tokens=100)
    assert done.choices[0].text == halted(plan, chat=False)[1]
    assert done.choices[0].finish_reason == "stop"
    usage: Any = done.usage
    assert usage.haltwise["halted"]
    assert client.models.list().data[0].id == "fake"


@pytest.mark.whole
def test_the_official_client_may_ask_many_things_at_once(vllm: Pair, plan: Plan) -> None:
    plans = [replace(plan, name=f"{plan.name}x{n}") for n in range(20)]

    async def everything() -> list[Any]:
        url = vllm.proxy.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(
                *(create(model="fake", messages=each.messages()) for each in plans)
            )

    for found, each in zip(asyncio.run(everything()), plans, strict=True):
        message = found.choices[0].message
        assert (message.reasoning, message.content) == halted(each, chat=True)


# Metrics and layers


def test_metrics_count_what_has_happened(pairs: Pairs, plan: Plan) -> None:
    pair = pairs("vllm", max_streams=99)  # its own
    for n in range(3):
        ask(pair.client, replace(plan, name=f"{plan.name}x{n}"))
    ask(pair.client, Plan("short", thinking=10), chat=False)
    ask(pair.client, Plan("off"), headers={"X-Haltwise-Off": "true"})
    ask(pair.client, Plan("refused", trouble="500"))
    pair.client.get("/v1/anything/at/all")
    metric = pair.proxy.metric
    assert metric("haltwise_thoughts_total", reason="halted") == 3
    assert metric("haltwise_thoughts_total", reason="closed by the LM") == 1
    assert metric("haltwise_thoughts_total", reason="off") == 1
    assert metric("haltwise_requests_total") == 7
    assert metric("haltwise_requests_total", endpoint="other") == 1
    assert metric("haltwise_upstream_errors_total") == 1
    assert metric("haltwise_streams_in_flight") == 0
    assert 70 <= metric("haltwise_thinking_tokens_total") <= 75
    assert metric("haltwise_decision_seconds_count") == 3 * 5 + 2
    assert metric("haltwise_first_token_seconds_count") >= 4
    assert metric("haltwise_fallbacks_total") == 0
    assert "anything" not in pair.client.get("/metrics").text


@ALL_KINDS
def test_health_tells_how_the_server_is(pairs: Pairs, kind: Kind, plan: Plan) -> None:
    pair = pairs(kind)
    ask(pair.client, plan)
    told = pair.client.get("/health")
    assert told.status_code == 200
    num = len(pair.upstream.asked)
    for _ in range(20):
        pair.client.get("/health")
    assert len(pair.upstream.asked) == num  # what it was told a moment ago is believed
    expected = {"status": "ok", "upstream": "ok", "streams_in_flight": 0, "kind": kind}
    assert told.json() == expected


@pytest.mark.whole
def test_the_proxy_loads_no_framework() -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'gymnasium', 'pyarrow', 'openai'}"
    code = f"import sys, haltwise.proxy; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
