"""Heads that look at answers behind the proxy: what they ask the server, and what a client gets."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from haltwise import HaltHead, InputError
from haltwise.policy.halting import Probing
from haltwise.proxy import ServeConfig, app, create_server, lm_server, turns
from haltwise.proxy import probe_trial as trial_module
from haltwise.proxy.chat_form import ChatForm
from haltwise.proxy.lm_server import LlamaServer
from haltwise.proxy.probe_trial import ProbeTrial
from haltwise.proxy.probing import ProbeRoom
from haltwise.proxy.upstream import UpstreamLeg
from haltwise.proxy.wire import RawHeaders, StreamEvent, UpstreamError
from haltwise.session.thought import PointRules
from tests.heads import CLOSE, place_head, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan, is_probe
from tests.proxy.proxies import PATIENCE, Pair, Pairs, Reply, ask, proxied, saved_head, wait_until

BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
KINDS = pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang", "ollama"])
NEVER = {"X-Haltwise-Price": "0.1"}


@pytest.fixture(params=["vllm", "llama-server"], ids=["beside", "in turn"])
def seen(pairs: Pairs, request: pytest.FixtureRequest) -> Pair:
    """Gives the answers that its head has seen, beside the thought and in turn with it."""
    return pairs(request.param, probing=True, answers="seen")


@pytest.fixture
def in_turn(pairs: Pairs) -> Pair:
    """Its answers are forced in turn with the thought."""
    return pairs("llama-server", probing=True, answers="seen")


def thought_of(reply: Reply) -> str:
    return (reply.thought or reply.text.partition("</think>")[0]).rstrip("\n")


def answer_of(reply: Reply) -> str:
    return reply.text.rpartition("\n")[2]


@BOTH
@STREAMED
@KINDS
@pytest.mark.parametrize("answers", ["seen", "free"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "best"])
def test_a_thought_is_halted_by_what_was_seen_of_its_answers(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool, answers: str, beside: bool
) -> None:
    if not beside and kind != "llama-server":
        pytest.skip("beside is best there")
    pair = pairs(kind, probing=True, answers=answers, probe_beside=beside)
    reply = ask(pair.client, plan, chat, stream)
    # llama-server has sent some tokens more before it is told to end a thought by itself.
    controls = beside and (kind, chat) == ("llama-server", True)
    thought, is_told = thought_of(reply), answers == "free" and controls
    assert thought.startswith(plan.thought(20)) and (is_told or thought == plan.thought(20))
    expected = plan.answer_text(thought.count("é"))
    assert (answer_of(reply).lstrip(), reply.finish) == (expected.lstrip(), "stop")
    told = reply.haltwise
    assert (told["halted"], told["reason"], told["position"]) == (True, "halted", 20)
    assert told["probes"]["num"] == 5 and told["probes"]["failed"] == 0
    assert told["probes"]["completion_tokens"] == 5 * (plan.answer + 1)  # the end is one
    assert len(told["legs"]) == (1 if answers == "seen" or controls else 2)
    assert told.get("turns") == (None if beside else 5)


@BOTH
@pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang"])
def test_a_probe_goes_on_from_the_thought_at_its_point(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool
) -> None:
    pair = pairs(kind, probing=True, answers="seen")
    ask(pair.client, plan, chat, temperature=0.7, seed=3, stop=None, user="u")
    probes = pair.upstream.of(plan, probes=True)
    for i, probe in enumerate(probes, start=1):
        text = pair.upstream.text(probe.body["prompt"])
        assert text.endswith(f"<think>\n{plan.thought(4 * i)}{CLOSE}") and text.count(CLOSE) == 1
        assert (probe.body["temperature"], probe.body["seed"]) == (0, 0)
        assert "user" not in probe.body and probe.body["logprobs"] == 1


def ending(folder: Path, end: str) -> Path:
    """A saved head whose forced answers end with a text."""
    head = sure_head(CLOSE, "every 4 tokens", "always")
    config = replace(head.config, halting=replace(head.config.halting, answer_end=end))
    return saved_head(folder, HaltHead(config, head.weights))


@BOTH
def test_a_server_with_slots_ends_answers_itself_and_a_text_amid_one_ends_none(
    plan: Plan, chat: bool, tmp_path: Path
) -> None:
    """A slot whose client has left is not free at once; the next turn would run in another one."""
    braced = replace(plan, name=f"{plan.name}b", mention=" {5}", answer=2)
    ends = {"é": (plan, 5), "}": (braced, 5 * (1 + 2 + 1))}
    for end, (asked, num_tokens) in ends.items():
        head = ending(tmp_path / end, end)
        with FakeUpstream("llama-server", paced=4, probed=True) as upstream:
            config = ServeConfig(head, upstream.url, answers="seen", probe_timeout=PATIENCE)
            with proxied(config) as proxy:
                reply = ask(proxy.client, asked, chat)
            probes, others = upstream.of(asked, probes=True), upstream.of(asked)
        told = reply.haltwise["probes"]
        assert (told["num"], told["failed"], told["completion_tokens"]) == (5, 0, num_tokens)
        assert {probe.ended for probe in probes} == {"done"}
        assert {tuple(probe.body["stop"]) for probe in probes} == {(end,)}
        if end == "é":  # in the first token of an answer, which is whole
            assert answer_of(reply).strip() == f"{plan.name}.a0é"
        else:  # of a brace that the answer has opened itself
            rest = [one for one in others if one.body.get("stop") == ["}"]]
            assert len(rest) == 5 and answer_of(reply).startswith(" {5}")
            assert upstream.text(rest[0].body["prompt"]).endswith(f"{CLOSE} {{5}}")
            assert answer_of(reply).endswith(f"{asked.name}.seen20é")


@BOTH
@pytest.mark.parametrize("kind", ["vllm", "llama-server"], ids=["beside", "in turn"])
def test_probes_come_closer_while_the_answer_repeats(
    pairs: Pairs, plan: Plan, kind: Kind, chat: bool
) -> None:
    rule = "every 8 tokens, every 4 while the answer repeats"
    pair = pairs(kind, probing=True, rule=rule)
    told = ask(pair.client, plan, chat, headers=NEVER).haltwise
    # No answer can be read: at 8, 16 and 24. The thought ends in the fourth turn.
    assert (told["probes"]["num"], told.get("turns", 5)) == (3, 5)
    plan = replace(plan, name=f"{plan.name}b", mention=" Answer: 7\n")
    told = ask(pair.client, plan, chat, headers=NEVER).haltwise
    # At 8, 16, 20, 24 and 28.
    assert (told["probes"]["num"], told.get("turns", 7)) == (5, 7)


@BOTH
@STREAMED
def test_usage_counts_every_probe(seen: Pair, plan: Plan, chat: bool, stream: bool) -> None:
    usage = ask(seen.client, plan, chat, stream).usage
    probes, (leg,) = usage["haltwise"]["probes"], usage["haltwise"]["legs"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage[name] == leg[name] + probes[name]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert leg["completion_tokens"] == 20
    num_close = len(seen.upstream.ids(CLOSE))
    # In turn all is one text here, where the line break before the thought is no token of its own.
    num_merged = "turns" in usage["haltwise"]
    expected = sum(leg["prompt_tokens"] + 4 * i + num_close - num_merged for i in range(1, 6))
    assert probes["prompt_tokens"] == expected


@BOTH
def test_what_the_servers_cache_had_of_probes_is_told_and_billed(
    seen: Pair, plan: Plan, chat: bool
) -> None:
    reply = ask(seen.client, replace(plan, details=True), chat, headers=NEVER)
    num_legs, num_probes = len(reply.haltwise["legs"]), reply.haltwise["probes"]["num"]
    # One token of each prompt; that of all turns together is one.
    assert reply.usage["prompt_tokens_details"]["cached_tokens"] == num_legs + num_probes == 8


@BOTH
@pytest.mark.parametrize("trouble", ["500", "html", "dies", "ends", "malformed", "says"])
def test_probes_that_fail_halt_nothing(seen: Pair, plan: Plan, chat: bool, trouble: str) -> None:
    failed = seen.proxy.metric("haltwise_probes_total", outcome="failed")
    reply = ask(seen.client, replace(plan, probes=trouble), chat)
    assert thought_of(reply) == plan.thought() and reply.text.endswith(plan.answer_text())
    assert reply.done and reply.finish == "stop"
    told = reply.haltwise
    assert not told["halted"] and "fallback" not in told
    assert told["probes"]["num"] == told["probes"]["failed"] == 7
    assert seen.proxy.metric("haltwise_probes_total", outcome="failed") == failed + 7


@BOTH
def test_probes_that_are_late_halt_nothing(pairs: Pairs, plan: Plan, chat: bool) -> None:
    pair = pairs(probing=True, answers="seen", probe_timeout=0.05, probe_anyway=True)
    plan = replace(plan, probes="hangs")
    reply = ask(pair.client, plan, chat)
    assert thought_of(reply) == plan.thought() and reply.text.endswith(plan.answer_text())
    assert reply.haltwise["probes"]["failed"] == 7
    assert all(probe.gone.wait(PATIENCE) for probe in pair.upstream.of(plan, probes=True))


@BOTH
def test_a_point_is_passed_while_a_probe_is_on_its_way(
    pairs: Pairs, plan: Plan, chat: bool
) -> None:
    pair = pairs(probing=True, fake={"paced": 0})
    bad = pair.proxy.metric("haltwise_bad_signals_total")
    plan = replace(plan, probes="hangs", trouble="hangs", at=27, legs=(1,))
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask, pair.client, plan, chat)
        wait_until(lambda: bool(pair.upstream.of(plan, probes=True)))
        pair.upstream.free(pair.upstream.of(plan)[0])
        reply = asking.result(PATIENCE)
    assert thought_of(reply) == plan.thought() and reply.text.endswith(plan.answer_text())
    assert reply.haltwise["probes"]["num"] == 1
    assert pair.proxy.metric("haltwise_bad_signals_total") == bad + 6
    (probe,) = pair.upstream.of(plan, probes=True)
    assert probe.gone.wait(PATIENCE) and probe.ended == "closed"  # with its thought


@BOTH
def test_no_probe_takes_the_place_of_a_stream(pairs: Pairs, plan: Plan, chat: bool) -> None:
    pair = pairs("llama-server", probing=True, fake={"num_slots": 1}, probe_anyway=True,
                 probe_beside=True, probe_timeout=0.1)  # fmt: skip
    reply = ask(pair.client, plan, chat)
    assert thought_of(reply) == plan.thought()
    told = reply.haltwise["probes"]
    assert (told["num"], told["passed"]) == (0, 7)
    assert pair.proxy.metric("haltwise_probes_total", outcome="refused") >= 7


def test_there_is_room_for_so_many_probes_and_not_in_the_place_of_streams() -> None:
    streams = [0]
    room = ProbeRoom(2, lambda: streams[0])
    assert room.is_free(None, []) and room.is_free(1, [])
    streams[0] = 3
    assert room.is_free(4, []) and not room.is_free(3, [])
    room.num_running = 1
    assert room.is_free(None, []) and not room.is_free(4, [])
    # In turn it takes its own stream's place, unless another stream waits for that.
    assert room.is_free(3, [], is_in_turn=True) and not room.is_free(2, [], is_in_turn=True)
    room.num_running = 2
    assert not room.is_free(None, []) and not room.is_free(9, [], is_in_turn=True)


def test_a_server_that_wants_to_be_left_alone_is_by_whom_it_refused() -> None:
    room = ProbeRoom(2, lambda: 0)
    mine, other = [[(b"authorization", key)] for key in (b"Bearer a", b"Bearer b")]
    room.leave_alone(mine, 1000.0)
    room.leave_alone(mine, 0.0)
    assert not room.is_free(None, mine) and room.is_free(None, other) and room.is_free(None, [])
    room.leave_alone(other, 1e-9)
    assert room.is_free(None, other)
    for i in range(5000):
        room.leave_alone([(b"authorization", b"%d" % i)], 1000.0)
    assert len(room._until) <= 1000


@pytest.fixture
def patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is refused has to wait for longer than any machine takes for a test."""
    told: Any = vars(UpstreamLeg)["wait"]
    monkeypatch.setattr(UpstreamLeg, "wait", property(lambda leg: told.fget(leg) * PATIENCE))


@BOTH
@pytest.mark.parametrize("status", ["429", "503"])
def test_no_probe_is_asked_for_before_a_server_wants_it(
    pairs: Pairs, plan: Plan, chat: bool, status: str, patiently: None
) -> None:
    pair = pairs(probing=True, answers="seen")
    mine, other = ({"Authorization": f"Bearer {key}{plan.name}"} for key in "ab")
    told = ask(pair.client, replace(plan, probes=status), chat, headers=mine).haltwise
    assert told["probes"]["num"] == told["probes"]["failed"] == 1 and not told["halted"]
    for name, headers in (("x", mine), ("y", other)):
        told = ask(
            pair.client, replace(plan, name=plan.name + name), chat, headers=headers
        ).haltwise
        assert told["halted"] == (told["probes"]["num"] > 0) == (headers is other)


@BOTH
def test_a_client_that_is_refused_is_told_when_to_come_back_and_has_no_probes_until_then(
    pairs: Pairs, plan: Plan, chat: bool, patiently: None
) -> None:
    pair = pairs(probing=True, answers="seen")
    mine = {"Authorization": f"Bearer {plan.name}"}
    reply = ask(pair.client, replace(plan, trouble="429"), chat, headers=mine)
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    plan = replace(plan, name=plan.name + "x")
    assert ask(pair.client, plan, chat, headers=mine).haltwise["probes"]["num"] == 0


@BOTH
def test_a_cap_closes_at_once_whatever_a_probe_does(seen: Pair, plan: Plan, chat: bool) -> None:
    headers = {"X-Haltwise-Max-Tokens": "6"}
    pair = seen
    reply = ask(pair.client, replace(plan, probes="500"), chat, headers=headers)
    assert thought_of(reply) == plan.thought(6) and answer_of(reply) == plan.answer_text(6)
    assert reply.haltwise["reason"] == "capped"


@BOTH
def test_in_shadow_a_head_that_looks_at_answers_halts_nothing(
    pairs: Pairs, plan: Plan, chat: bool
) -> None:
    reply = ask(pairs(probing=True, shadow=True).client, plan, chat)
    assert thought_of(reply) == plan.thought() and reply.text.endswith(plan.answer_text())
    told = reply.haltwise
    assert (told["shadow"]["reason"], told["shadow"]["position"]) == ("halted", 20)
    assert told["probes"]["num"] == 5


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
        ({"stop": ["</think>"]}, "stop"),
    ],
    ids=str,
)
def test_what_cannot_go_on_behind_a_thought_is_not_probed(
    pairs: Pairs, plan: Plan, more: dict[str, Any], reason: str
) -> None:
    pair = pairs("llama-server", probing=True)  # whose control ends such thoughts
    reply = ask(pair.client, plan, **more)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == reason
    assert pair.upstream.of(plan, probes=True) == []


@pytest.mark.parametrize(
    ("plan_of", "more"),
    [
        ({}, {"stop": ["nothing of it"]}),
        ({}, {"logprobs": 2}),
        ({"answer": 40}, {}),
    ],
    ids=["stop", "logprobs", "longer than a probe"],
)
def test_an_answer_that_is_more_than_was_seen_is_the_lm_s(
    seen: Pair, plan: Plan, plan_of: dict[str, Any], more: dict[str, Any]
) -> None:
    plan = replace(plan, **plan_of)
    reply = ask(seen.client, plan, chat=False, **more)
    assert answer_of(reply) == plan.answer_text(20) and len(reply.haltwise["legs"]) == 2


@BOTH
def test_a_limit_of_the_client_holds_for_a_seen_answer(seen: Pair, plan: Plan, chat: bool) -> None:
    reply = ask(seen.client, plan, chat, max_tokens=22)
    assert answer_of(reply) == plan.answer_text(20)[: len(f" {plan.name}.a0é") * 2]
    assert reply.finish == "length"


def test_the_official_client_takes_a_seen_answer(seen: Pair, plan: Plan) -> None:
    client = openai.OpenAI(base_url=seen.proxy.url + "/v1", api_key="any", max_retries=0)
    messages: Any = plan.messages()
    done = client.chat.completions.create(model="m", messages=messages)
    assert done.choices[0].message.content == plan.answer_text(20)
    assert done.choices[0].finish_reason == "stop"


def test_a_client_that_leaves_ends_its_probe(seen: Pair, plan: Plan) -> None:
    pair = seen
    plan = replace(plan, probes="hangs")
    with pair.client.stream("POST", "/v1/completions", json=body_of(plan)):
        wait_until(lambda: bool(pair.upstream.of(plan, probes=True)))
    assert all(asked.gone.wait(PATIENCE) for asked in pair.upstream.of(plan, probes=True))
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)


def body_of(plan: Plan) -> dict[str, Any]:
    return {"model": "m", "stream": True, "prompt": plan.prompt(), "max_tokens": 99}


# In turn


@BOTH
@STREAMED
def test_a_thought_in_turns_that_nobody_halts_is_that_of_one_stream(
    in_turn: Pair, plan: Plan, chat: bool, stream: bool
) -> None:
    reply = ask(in_turn.client, plan, chat, stream, headers=NEVER)
    plain = ask(in_turn.direct, replace(plan, name=plan.name), chat, stream)
    assert (thought_of(reply), reply.text, reply.finish) == (
        thought_of(plain), plain.text.lstrip("\n") if chat else plain.text, "stop"
    )  # fmt: skip
    asked = in_turn.upstream.of(plan)[:-1]
    assert [one.body["max_tokens"] for one in asked[:7]] == [4] * 7
    for i, one in enumerate(asked[:8]):
        text = in_turn.upstream.text(one.body["prompt"])
        assert text.endswith(f"<think>\n{plan.thought(4 * i)}") and one.ended == "done"
    told = reply.haltwise
    assert told["turns"] == len(asked) == 9 and told["legs"] == [
        {name: plain.usage[name] for name in ("prompt_tokens", "completion_tokens")}
    ]
    ids = {event["id"] for event in reply.events}
    assert len(ids) == 1 and told["probes"]["num"] == 7


@BOTH
def test_a_turn_takes_up_the_limits_of_its_request(in_turn: Pair, plan: Plan, chat: bool) -> None:
    reply = ask(in_turn.client, plan, chat, headers=NEVER, max_tokens=10, seed=2**32 - 3)
    assert thought_of(reply) == plan.thought(10) and reply.finish == "length"
    asked = in_turn.upstream.of(plan)
    assert [one.body["max_tokens"] for one in asked] == [4, 4, 2]
    # Draws that hang on the place, and not those of the first turn again.
    assert [one.body["seed"] for one in asked] == [2**32 - 3, 2, 6]


@BOTH
@pytest.mark.parametrize("num", [1, 2])
def test_a_turn_that_fails_is_tried_once_more_and_nobody_looks_then(
    in_turn: Pair, plan: Plan, chat: bool, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "_BREATH", 0.0)
    ask_for, bodies = LlamaServer.open_turn, list[Any]()

    async def failing(server: LlamaServer, body: Any, headers: RawHeaders) -> UpstreamLeg:
        bodies.append(body)
        if 3 <= len(bodies) < 3 + num:
            raise UpstreamError("unreachable", "upstream cannot be reached")
        return await ask_for(server, body, headers)

    monkeypatch.setattr(LlamaServer, "open_turn", failing)
    reply = ask(in_turn.client, plan, chat)
    if num == 2:
        assert thought_of(reply) == plan.thought(8) and not reply.done and reply.error["message"]
        return
    assert thought_of(reply) == plan.thought() and reply.text.endswith(plan.answer_text())
    told = reply.haltwise
    assert not told["halted"] and told["fallback"] == "unreachable" and reply.done
    assert told["probes"]["num"] == 2 and "logprobs" not in bodies[-1]


def numberless(folder: Path, probing: Probing) -> Path:
    """A saved head that halts behind 20 tokens, and sees no log probability of the thought's."""
    groups = ("pace", "confidence") if probing == "always" else ("pace", "reflection")
    halting = sure_head(CLOSE, "every 4 tokens", probing).config.halting
    return saved_head(folder, place_head(20, groups, halting))


@BOTH
@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize(
    ("kind", "in_turn"),
    [("vllm", False), ("sglang", False), ("llama-server", True), ("llama-server", False)],
)
def test_log_probabilities_that_nobody_reads_are_not_asked_for(
    plan: Plan, kind: Kind, in_turn: bool, chat: bool, per_chunk: int, tmp_path: Path
) -> None:
    """Tokens are counted by their ids, which not every stream has by themselves."""
    plan = replace(plan, per_chunk=1 if in_turn else per_chunk)
    head = numberless(tmp_path, "always" if in_turn else "at_halt")
    with FakeUpstream(kind, probed=in_turn) as upstream:
        with proxied(ServeConfig(head, upstream.url, probe_timeout=PATIENCE)) as proxy:
            told = [
                ask(proxy.client, plan, chat, max_tokens=40, headers=headers)
                for headers in ({}, NEVER)
            ]
        asked = upstream.of(plan)
    assert thought_of(told[0]).startswith(plan.thought(20)) and told[0].haltwise["position"] == 20
    assert thought_of(told[1]) == plan.thought() and not told[1].haltwise["halted"]
    assert told[1].text.endswith(plan.answer_text()) and told[1].finish == "stop"
    are_asked = any("logprobs" in one.body for one in asked if not is_probe(one.body))
    has_ids = kind == "vllm" or in_turn or (kind, chat) == ("sglang", False)
    assert are_asked != has_ids


@BOTH
def test_where_a_gateway_lets_no_native_path_through_turns_are_completions(
    plan: Plan, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_server, "NATIVE_PATH", "/not/there")
    with FakeUpstream("llama-server", probed=True) as upstream:
        config = ServeConfig(numberless(tmp_path, "always"), upstream.url, probe_timeout=PATIENCE)
        with proxied(config) as proxy:
            reply = ask(proxy.client, plan, chat)
        turns = upstream.of(plan)
    assert thought_of(reply) == plan.thought(20) and reply.haltwise["turns"] == 5
    assert {(one.path, one.body["logprobs"]) for one in turns} == {("/v1/completions", 1)}


@BOTH
@pytest.mark.parametrize("choices", ["from 1", "two", "both", "late"])
def test_choices_that_nobody_asked_for_do_not_come_in_turns(
    in_turn: Pair, plan: Plan, chat: bool, choices: str
) -> None:
    plan = replace(plan, choices=choices)
    reply, direct = (
        ask(client, plan, chat, stream=False) for client in (in_turn.client, in_turn.direct)
    )
    texts = []
    for one in (reply, direct):
        parts = [choice.get("message") or choice for choice in one.events[0]["choices"]]
        names = ("reasoning_content", "content", "text")
        texts.append([[str(part.get(name, "")).strip("\n") for name in names] for part in parts])
    # The fake says all of a late choice where it does not stream.
    num = 1 if choices == "late" else 2
    assert texts[0][:num] == texts[1][:num] and len(texts[0]) == (1 if choices == "from 1" else 2)
    assert reply.haltwise["fallback"] == "several choices" and not reply.haltwise["halted"]


@BOTH
def test_a_turn_ends_at_a_point_that_hangs_on_a_text(pairs: Pairs, plan: Plan, chat: bool) -> None:
    pair = pairs("llama-server", probing=True, rule="after t9", answers="seen")
    reply = ask(pair.client, plan, chat)
    assert thought_of(reply) == plan.thought() and reply.haltwise["probes"]["num"] == 1
    first, probe, second = (
        one for one in pair.upstream.asked if plan.name in str(one.body) and "prompt" in one.body
    )
    assert first.ended == "closed" and is_probe(probe.body)
    assert pair.upstream.text(second.body["prompt"]).endswith(plan.thought(10))


@pytest.mark.parametrize(
    "more",
    [{"stop": ["nothing of it"]}, {"mirostat": 2}, {"cache_prompt": False}, {"n_predict": 99}],
    ids=str,
)
def test_what_hangs_on_all_of_an_answer_is_looked_at_beside(
    in_turn: Pair, plan: Plan, more: dict[str, Any]
) -> None:
    told = ask(in_turn.client, plan, chat=False, **more).haltwise
    assert told["halted"] and told["probes"]["num"] == 5 and "turns" not in told
    assert ask(in_turn.client, replace(plan, name=plan.name + "x")).haltwise["turns"] == 5


@pytest.mark.parametrize(
    ("opened", "pieces", "thought", "text"),
    [
        (True, ["\n a", " b\n", "\n</thi", "nk>\n", "\n c\n", "d"], " a b", " c\nd"),
        (True, ["a </th", "ing> b"], "a </thing> b", ""),
        (True, ["a\n\n", "b\n"], "a\n\nb\n", ""),
        (False, [" <th", "ink>\na", "</think>b"], "a", "b"),
        (False, ["\n<thing", "> a"], "", "\n<thing> a"),
        (False, ["a <think>b</think>"], "", "a <think>b</think>"),
        (False, ["<thi"], "", "<thi"),
    ],
)
def test_a_chat_has_its_thought_in_a_field_of_its_own(
    opened: bool, pieces: list[str], thought: str, text: str
) -> None:
    form = ChatForm(PointRules(sure_head().config.halting), opened, tells_usage=True)
    parts: list[Any] = []
    for i, piece in enumerate(pieces):
        finish = "stop" if i == len(pieces) - 1 else None
        chunk = {"choices": [{"index": 0, "text": piece, "finish_reason": finish}]}
        shown = form.shaped(StreamEvent(chunk=chunk))
        parts += [] if shown is None else [shown.choice["delta"]] if shown.choice else []
    for name, expected in (("reasoning_content", thought), ("content", text)):
        assert "".join(part.get(name) or "" for part in parts) == expected
    assert [part.get("role") for part in parts] == ["assistant", *[None] * (len(parts) - 1)]


# At start


@pytest.mark.parametrize(
    ("trial", "problem"),
    [
        (ProbeTrial(300, 20, 5, 0.1, 4, True), ""),
        (ProbeTrial(300, None, 5, 0.1, None, True), ""),
        (ProbeTrial(None, None, 5, 0.1, None, True), ""),
        (ProbeTrial(300, 300, 5, 0.1, 4, True), "computed 300 of 300 tokens anew"),
        # It was not there though four of them could have been, one after the other.
        (ProbeTrial(300, 20, 200, 5.0, 1, False, 4.0, 1.0), "not there before the thought had"),
        # What takes as long alone tells nothing of what runs beside.
        (ProbeTrial(300, 20, 200, 5.0, 1, False, 3.9, 1.0), ""),
        (ProbeTrial(300, 20, 200, 50.0, 4, True), ""),
    ],
)
def test_a_trial_says_what_a_head_has_to_expect(trial: ProbeTrial, problem: str) -> None:
    assert problem in trial.problem() and bool(trial.problem()) == bool(problem)


@pytest.mark.parametrize(
    ("trial", "doubt"),
    [
        (ProbeTrial(300, 20, 5, 5.0, 4, True), ""),
        (ProbeTrial(300, 20, 5, 5.02, 4, True), "later than --probe-timeout"),
        (ProbeTrial(300, 20, 200, 5.0, 1, False, 3.9, 1.0), "too short a thought to tell"),
    ],
)
def test_what_may_come_of_a_busy_machine_is_told_and_no_reason_to_refuse(
    trial: ProbeTrial, doubt: str
) -> None:
    assert (
        not trial.problem() and doubt in trial.doubt(5.0) and bool(trial.doubt(5.0)) == bool(doubt)
    )


@pytest.mark.parametrize(("status", "longest"), [(400, 256), (400, 0), (500, 256)])
def test_a_trial_asks_for_no_longer_thought_than_the_server_has_room_for(
    status: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure = ProbeTrial(300, 20, 200, 5.0, 1, False, 3.9, 1.0)

    async def tried(server: Any, headers: Any, length: int) -> ProbeTrial:
        if length > longest:
            raise UpstreamError("status", "too long", answered=status)
        return unsure

    monkeypatch.setattr(trial_module, "_tried", tried)
    server: Any = None
    found = trial_module.try_probes(server, [], False)
    if (status, longest) == (400, 256):
        assert asyncio.run(found) == unsure
    else:
        with pytest.raises(UpstreamError, match="too long"):
            asyncio.run(found)


@pytest.mark.parametrize("is_in_turn", [True, False])
@pytest.mark.parametrize(
    ("computed", "num"), [([20, 20], 2), ([300, 20], 2), ([300, 300, 300, 20], 4), ([300] * 9, 5)]
)
def test_a_cache_that_a_probe_misses_by_chance_is_looked_for_again(
    computed: list[int], num: int, is_in_turn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot of the probe before may not be free yet."""
    left = iter(computed)

    async def probed(*_: Any) -> ProbeTrial:
        return ProbeTrial(300, next(left), 5, 0.1, 4, True, is_in_turn=is_in_turn)

    name = "_probed_in_turn" if is_in_turn else "_probed"
    monkeypatch.setattr(trial_module, name, probed)
    head = saved_head(tmp_path, sure_head(probing="always"))
    is_refused = computed[num - 1] == 300
    with (
        FakeUpstream("llama-server") as fake,
        pytest.raises(InputError, match="300 of 300") if is_refused else nullcontext(),
    ):
        create_server(ServeConfig(head, fake.url, probe_beside=not is_in_turn))
    assert len(list(left)) == len(computed) - num


def test_a_sound_server_on_a_slow_machine_is_not_refused(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe takes longer than it may, and than the first thought that it is tried beside."""
    lengths: list[int] = []
    tried, read, forced = trial_module._tried, trial_module._read, trial_module._forced
    ended, took = asyncio.Event(), 0.0

    async def noted(server: Any, headers: Any, length: int) -> ProbeTrial:
        lengths.append(length)
        return await tried(server, headers, length)

    async def watched(*asked: Any) -> bool:
        if not (goes_on := await read(*asked)):
            ended.set()
        return goes_on

    async def slow(*asked: Any) -> None:
        nonlocal took
        started = time.perf_counter()
        await forced(*asked)
        if len(lengths) == 1:
            await ended.wait()
            await asyncio.sleep(took)
            took = took or time.perf_counter() - started

    monkeypatch.setattr(trial_module, "_tried", noted)
    monkeypatch.setattr(trial_module, "_read", watched)
    monkeypatch.setattr(trial_module, "_forced", slow)
    head = saved_head(tmp_path, sure_head(probing="always"))
    with FakeUpstream("vllm") as fake:
        create_server(ServeConfig(head, fake.url, probe_timeout=1e-4))
    assert lengths == [*trial_module._LENGTHS[:2]]
    assert any("later than --probe-timeout" in record.getMessage() for record in caplog.records)


def test_a_turn_that_was_computed_anew_is_told(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = saved_head(tmp_path, sure_head(probing="always"))
    with (
        FakeUpstream("llama-server", paced=4, probed=True) as fake,
        proxied(ServeConfig(head, fake.url, probe_timeout=PATIENCE)) as proxy,
    ):
        for details, num in ((False, 0), (True, 1), (True, 1)):  # with them, one token was cached
            asked = replace(plan, name=f"{plan.name}{details}", details=details)
            assert ask(proxy.client, asked, headers=NEVER).haltwise["turns"] > 2
            warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
            told = [one for one in warned if "computed" in one]
            assert len(told) == num and all("--slot-prompt-similarity 0.8" in one for one in told)


def test_points_that_are_passed_for_want_of_slots_are_told(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A head that cannot look halts nothing, which nobody is to take for its decision."""
    head = saved_head(tmp_path, sure_head(probing="always"))
    monkeypatch.setattr(ProbeRoom, "has_slots", lambda _, num: num != 2)
    monkeypatch.setattr(ProbeRoom, "is_free", lambda *_: False)
    with (
        FakeUpstream("llama-server", num_slots=2, probed=True) as fake,
        proxied(ServeConfig(head, fake.url)) as proxy,
    ):
        for name in ("a", "b"):
            told = ask(proxy.client, replace(plan, name=plan.name + name)).haltwise
            assert not told["halted"] and "fallback" not in told
            # Of 28 tokens one every 4.
            assert (told["probes"]["num"], told["probes"]["passed"]) == (0, 7)
    warnings = [
        r.getMessage() for r in caplog.records if "more streams than the 2" in r.getMessage()
    ]
    assert len(warnings) == 1


def test_a_server_of_one_stream_is_refused_with_the_figures(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    head = saved_head(tmp_path, sure_head(probing="always"))
    with FakeUpstream("llama-server", num_slots=1) as fake:
        create_server(ServeConfig(head, fake.url))  # in turn it is as good as any
        config = ServeConfig(head, fake.url, probe_beside=True, probe_timeout=0.2)
        with pytest.raises(InputError, match=r"took .* s and \d+ tokens .*, 1 slots: .* ended\. E"):
            create_server(config)
        create_server(replace(config, probe_anyway=True))
    assert any("1 slots" in record.getMessage() for record in caplog.records)


def test_a_server_that_is_not_there_yet_is_not_refused(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    create_server(
        ServeConfig(saved_head(tmp_path, sure_head(probing="always")), "http://127.0.0.1:1")
    )
    assert any(
        "http://127.0.0.1:1 does not answer at start" in record.getMessage()
        for record in caplog.records
    )


def test_a_server_that_comes_later_is_tried_then(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has told, and it is told of and not refused: clients are served by then."""
    caplog.set_level("INFO", "haltwise.proxy")
    monkeypatch.setattr(app, "_BETWEEN_TRIALS", 0.0)
    refused = trial_module.try_probes
    num_tried = 0

    async def once_refused(*asked: Any) -> ProbeTrial:
        nonlocal num_tried
        num_tried += 1
        if num_tried == 1:
            raise UpstreamError("unreachable", "not yet")
        return await refused(*asked)

    monkeypatch.setattr(trial_module, "try_probes", once_refused)
    head = saved_head(tmp_path, sure_head(probing="always"))
    with FakeUpstream("llama-server", num_slots=1) as fake:
        with monkeypatch.context() as patch:
            patch.setattr(app, "check_probes", unreachable)
            pair = proxied(ServeConfig(head, fake.url, price=0.1, probe_beside=True))
            proxy = pair.__enter__()

        def tried() -> bool:
            assert ask(proxy.client, Plan("later")).status == 200
            return any("1 slots: the answer was not" in r.getMessage() for r in caplog.records)

        wait_until(tried)
        num = num_tried
        assert ask(proxy.client, Plan("later")).status == 200 and num_tried == num == 2
        pair.__exit__(None, None, None)


async def unreachable(*_: Any) -> None:
    raise UpstreamError("unreachable", "it is down")


@KINDS
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "best"])
def test_a_trial_tells_of_a_probe_what_the_server_tells(
    kind: Kind, beside: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[ProbeTrial] = []
    found = trial_module.try_probes

    async def noted(*asked: Any) -> ProbeTrial:
        trials.append(await found(*asked))
        return trials[-1]

    monkeypatch.setattr(trial_module, "try_probes", noted)
    with FakeUpstream(kind) as fake:
        head = saved_head(tmp_path, sure_head(probing="always"))
        create_server(ServeConfig(head, fake.url, probe_beside=beside))
        # A turn of the trial's thought has as many tokens as a probe.
        num = len([one for one in fake.asked if is_probe(one.body or {})])
        assert num == (5 if trials[0].is_in_turn else 2)
    (trial,) = trials
    assert trial.is_in_turn == (kind == "llama-server" and not beside)
    assert trial.came_in_time and trial.overrun_tokens < 200 and trial.seconds > 0
    assert trial.num_parallel == (1000 if kind == "llama-server" else None)
    assert trial.prompt_tokens is not None and trial.prompt_tokens > 100
