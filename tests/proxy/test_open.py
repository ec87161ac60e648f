"""LMs that reason in the open behind the proxy: all they say is a thought, until it is halted.

A client gets what the LM would have said if it had come to its answer by itself: the thought so
far, the close text and the answer, in one field.
"""

import json
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.heads import CLOSE
from tests.proxy.fake_upstream import CUE, Kind, Plan
from tests.proxy.proxies import PATIENCE, Pair, Pairs, Reply, ask

BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
KINDS = pytest.mark.parametrize("kind", ["vllm", "sglang", "llama-server", "ollama"])
PROBING = pytest.mark.parametrize("probing", [False, True], ids=["at halt", "always"])
# What stands behind the thought is sure: a higher bar than for thoughts that end is needed.
NEVER = {"X-Haltwise-Price": "0.01"}
WAITS: dict[str, Any] = {"trouble": "hangs", "at": 20, "legs": (1,)}


@pytest.fixture
def plan(plan: Plan) -> Plan:
    return replace(plan, open=True)


def pair_of(pairs: Pairs, kind: Kind = "vllm", probing: bool = False, **settings: Any) -> Pair:
    answers = {"answers": "seen"} if probing else {}
    return pairs(kind, CUE, {"thoughts": "written"}, probing, **answers | settings)


def said(plan: Plan, position: int | None = None) -> str:
    """What a client gets if the thought is closed after so many tokens; by default it is not."""
    return plan.thought(position) + CUE + plan.answer_text(position)


def text_of(reply: Reply) -> str:
    assert reply.status == 200 and (not reply.streamed or reply.done), reply.body[-500:]
    assert not reply.thought
    return reply.text


@pytest.mark.whole
@BOTH
@STREAMED
@KINDS
@PROBING
@pytest.mark.parametrize(("price", "position"), [("10", 12), ("1", 20), ("0.01", None)])
def test_an_answer_is_its_thought_the_close_text_and_what_the_lm_says_then(
    pairs: Pairs,
    kind: Kind,
    plan: Plan,
    chat: bool,
    stream: bool,
    probing: bool,
    price: str,
    position: int | None,
) -> None:
    pair = pair_of(pairs, kind, probing)
    if not probing and position is not None:
        plan = replace(plan, **WAITS | {"at": position})
    reply = ask(pair.client, plan, chat, stream, {"X-Haltwise-Price": price})
    assert (text_of(reply), reply.finish) == (said(plan, position), "stop")
    told = reply.haltwise
    assert told["halted"] == (position is not None) and "fallback" not in told
    if position is None:
        # The cue, four tokens of the answer and the LM's end stand behind 28 of the thought.
        assert told["reason"] == "closed by the LM" and 33 <= told["position"] <= 34
    else:
        assert (told["reason"], told["position"]) == ("halted", position)
        assert len(told["legs"]) == (1 if probing else 2)


@BOTH
@STREAMED
@PROBING
def test_a_thought_that_is_not_halted_is_what_the_server_says(
    pairs: Pairs, plan: Plan, chat: bool, stream: bool, probing: bool
) -> None:
    pair = pair_of(pairs, probing=probing, shadow=True)
    direct, reply = ask(pair.direct, plan, chat, stream), ask(pair.client, plan, chat, stream)
    assert text_of(reply) == text_of(direct) == said(plan) and reply.finish == direct.finish
    shadow = reply.haltwise["shadow"]
    assert (shadow["reason"], shadow["position"]) == ("halted", 20)


@BOTH
@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama-server"])
@PROBING
def test_what_goes_on_has_the_prompt_the_thought_and_the_close_text(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, probing: bool
) -> None:
    pair, plan = pair_of(pairs, kind, probing), plan if probing else replace(plan, **WAITS)
    ask(pair.client, plan, chat, max_tokens=100)
    first = pair.upstream.of(plan)[0]
    last = pair.upstream.of(plan, probes=probing)[-1]
    assert last.path == "/v1/completions" and "reasoning_control" not in first.body
    parts = last.body["prompt"]
    parts = [parts] if isinstance(parts, str) else parts
    text = "".join(p if isinstance(p, str) else pair.upstream.text([p]) for p in parts)
    prompt = plan.text() + "\n<|assistant|>" if chat else plan.prompt()
    assert text == prompt + plan.thought(20) + CUE
    assert last.body["max_tokens"] == (16 if probing else 80)


@BOTH
@STREAMED
def test_usage_is_that_of_both_legs(pairs: Pairs, plan: Plan, chat: bool, stream: bool) -> None:
    plan, pair = replace(plan, **WAITS), pair_of(pairs)
    usage = ask(pair.client, plan, chat, stream).usage
    prompt = plan.text() + "\n<|assistant|>" if chat else plan.prompt()
    num_prompt, num_close = len(pair.upstream.ids(prompt)), len(pair.upstream.ids(CUE))
    assert usage["prompt_tokens"] == 2 * num_prompt + 20 + num_close
    assert usage["completion_tokens"] == 20 + 5


@BOTH
@PROBING
def test_a_cap_holds_to_the_token(pairs: Pairs, plan: Plan, chat: bool, probing: bool) -> None:
    headers = {"X-Haltwise-Max-Tokens": "7", "X-Haltwise-Price": "0"}
    reply = ask(pair_of(pairs, probing=probing).client, plan, chat, headers=headers)
    assert reply.haltwise["reason"] == "capped" and text_of(reply) == said(plan, 7)


@BOTH
@STREAMED
@pytest.mark.parametrize("trouble", ["500", "dies", "says"])
def test_if_the_second_leg_fails_the_first_one_goes_on(
    pairs: Pairs, plan: Plan, chat: bool, stream: bool, trouble: str
) -> None:
    plan = replace(plan, trouble=trouble, legs=(2,))
    reply = ask(pair_of(pairs).client, plan, chat, stream)
    assert text_of(reply) == said(plan)
    assert not reply.haltwise["halted"] and reply.haltwise["fallback"]


@STREAMED
def test_a_server_of_one_stream_is_asked_anew(pairs: Pairs, plan: Plan, stream: bool) -> None:
    pair = pairs("ollama", CUE, {"thoughts": "written", "num_slots": 1})
    failing = replace(plan, name=plan.name + "x", trouble="500", legs=(2,))
    assert text_of(ask(pair.client, failing, stream=stream)) == said(failing)
    # It says something else this time: all of that stands behind what the client has.
    other = replace(plan, name=plan.name + "y", trouble="500", legs=(2,), anew="brief")
    text = text_of(ask(pair.client, other, stream=stream))
    assert text.startswith(other.thought(20)) and text.endswith(CUE + other.answer_text(5))


@BOTH
def test_no_answer_is_looked_at_where_the_lm_has_ended(
    pairs: Pairs, plan: Plan, chat: bool
) -> None:
    plan = replace(plan, thinking=26)  # with the cue, the answer and the end these are 32 tokens
    told = ask(pair_of(pairs, probing=True).client, plan, chat, headers=NEVER).haltwise
    assert told["position"] == 32 and told["probes"]["num"] == 7


@STREAMED
def test_a_thought_that_a_server_tells_apart_is_left_alone(
    pairs: Pairs, plan: Plan, stream: bool
) -> None:
    pair, plan = pairs("vllm", CUE), replace(plan, open=False)
    reply = ask(pair.client, plan, stream=stream)
    assert (reply.thought, reply.text) == (plan.thought(), plan.answer_text())
    assert reply.haltwise["fallback"] == "thought apart" and not reply.haltwise["halted"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
        ({"stop": ["Answer"]}, "stop"),
    ],
    ids=str,
)
def test_what_cannot_go_on_is_passed_on(
    pairs: Pairs, plan: Plan, more: dict[str, Any], reason: str
) -> None:
    pair = pair_of(pairs, "llama-server")  # whose control ends no thought without a marker
    headers = {"X-Haltwise-Max-Tokens": "7"}
    reply = ask(pair.client, plan, headers=headers, **more)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == reason
    assert len(pair.upstream.of(plan)) == 1


def test_the_official_client_takes_a_halted_answer(pairs: Pairs, plan: Plan) -> None:
    url = pair_of(pairs, "llama-server", probing=True).proxy.url
    client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=PATIENCE)
    messages: Any = plan.messages()
    done = client.chat.completions.create(model="m", messages=messages)
    assert done.choices[0].message.content == said(plan, 20)
    assert done.choices[0].finish_reason == "stop"


def test_a_marker_is_text_like_any_other(pairs: Pairs, plan: Plan) -> None:
    plan = replace(plan, mention=CLOSE)
    reply = ask(pair_of(pairs).client, plan, headers=NEVER)
    assert text_of(reply) == plan.thought() + CUE + CLOSE + plan.answer_text()
