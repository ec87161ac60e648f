"""Heads that look at answers behind the proxy: what they ask the server, and what a client gets."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest

from haltwise import InputError
from haltwise.proxy import ServeConfig, create_server
from haltwise.proxy import probe_trial as trial_module
from haltwise.proxy.probe_trial import ProbeTrial
from haltwise.proxy.probing import ProbeRoom
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan, is_probe
from tests.proxy.proxies import PATIENCE, Pair, Pairs, Reply, ask, saved_head, wait_until

BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
KINDS = pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang", "ollama"])
NEVER = {"X-Haltwise-Price": "0.1"}


@pytest.fixture
def seen(pairs: Pairs) -> Pair:
    """Gives the answers that its head has seen."""
    return pairs(probing=True, answers="seen")


def thought_of(reply: Reply) -> str:
    return (reply.thought or reply.text.partition("</think>")[0]).rstrip("\n")


def answer_of(reply: Reply) -> str:
    return reply.text.rpartition("\n")[2]


@BOTH
@STREAMED
@KINDS
@pytest.mark.parametrize("answers", ["seen", "free"])
def test_a_thought_is_halted_by_what_was_seen_of_its_answers(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool, answers: str
) -> None:
    pair = pairs(kind, probing=True, answers=answers)
    reply = ask(pair.client, plan, chat, stream)
    # llama-server has sent some tokens more before it is told to end a thought by itself.
    thought, is_told = thought_of(reply), answers == "free" and (kind, chat) == LLAMA_CHAT
    assert thought.startswith(plan.thought(20)) and (is_told or thought == plan.thought(20))
    expected = plan.answer_text(thought.count("é"))
    assert (answer_of(reply).lstrip(), reply.finish) == (expected.lstrip(), "stop")
    told = reply.haltwise
    assert (told["halted"], told["reason"], told["position"]) == (True, "halted", 20)
    assert told["probes"]["num"] == 5 and told["probes"]["failed"] == 0
    assert told["probes"]["completion_tokens"] == 5 * (plan.answer + 1)  # the end is one
    assert len(told["legs"]) == (1 if answers == "seen" or (kind, chat) == LLAMA_CHAT else 2)


LLAMA_CHAT = ("llama-server", True)


@BOTH
@pytest.mark.parametrize("kind", ["vllm", "llama-server", "sglang"])
def test_a_probe_goes_on_from_the_thought_at_its_point(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool
) -> None:
    pair = pairs(kind, probing=True, answers="seen")
    ask(pair.client, plan, chat, temperature=0.7, seed=3, stop=None, user="u")
    probes = pair.upstream.of(plan, probes=True)
    for i, probe in enumerate(probes, start=1):
        parts = probe.body["prompt"]
        parts = [parts] if isinstance(parts, str) else parts
        text = "".join(p if isinstance(p, str) else pair.upstream.text([p]) for p in parts)
        assert text.endswith(f"<think>\n{plan.thought(4 * i)}{CLOSE}") and text.count(CLOSE) == 1
        assert (probe.body["temperature"], probe.body["seed"]) == (0, 0)
        assert "user" not in probe.body and probe.body["logprobs"] == 1


@BOTH
def test_probes_come_closer_while_the_answer_repeats(pairs: Pairs, plan: Plan, chat: bool) -> None:
    rule = "every 8 tokens, every 4 while the answer repeats"
    pair = pairs(probing=True, rule=rule)
    told = ask(pair.client, plan, chat, headers=NEVER).haltwise
    assert told["probes"]["num"] == 3  # no answer can be read: at 8, 16 and 24
    plan = replace(plan, name=f"{plan.name}b", mention=" Answer: 7\n")
    told = ask(pair.client, plan, chat, headers=NEVER).haltwise
    assert told["probes"]["num"] == 5  # at 8, 16, 20, 24 and 28


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
    expected = sum(leg["prompt_tokens"] + 4 * i + num_close for i in range(1, 6))
    assert probes["prompt_tokens"] == expected


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
                 probe_timeout=0.1)  # fmt: skip
    reply = ask(pair.client, plan, chat)
    assert thought_of(reply) == plan.thought() and "probes" not in reply.haltwise
    assert pair.proxy.metric("haltwise_probes_total", outcome="refused") >= 7


def test_there_is_room_for_so_many_probes_and_not_in_the_place_of_streams() -> None:
    streams = [0]
    room = ProbeRoom(2, lambda: streams[0])
    assert room.is_free(None) and room.is_free(1)
    streams[0] = 3
    assert room.is_free(4) and not room.is_free(3)
    room.num_running = 1
    assert room.is_free(None) and not room.is_free(4)
    room.num_running = 2
    assert not room.is_free(None)


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


def test_a_client_that_leaves_ends_its_probe(pairs: Pairs, plan: Plan) -> None:
    pair = pairs(probing=True)
    plan = replace(plan, probes="hangs")
    with pair.client.stream("POST", "/v1/completions", json=body_of(plan)):
        wait_until(lambda: bool(pair.upstream.of(plan, probes=True)))
    assert all(asked.gone.wait(PATIENCE) for asked in pair.upstream.of(plan, probes=True))
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)


def body_of(plan: Plan) -> dict[str, Any]:
    return {"model": "m", "stream": True, "prompt": plan.prompt(), "max_tokens": 99}


# At start


@pytest.mark.parametrize(
    ("trial", "problem"),
    [
        (ProbeTrial(300, 20, 5, 0.1, 4, True), ""),
        (ProbeTrial(300, None, 5, 0.1, None, True), ""),
        (ProbeTrial(None, None, 5, 0.1, None, True), ""),
        (ProbeTrial(300, 300, 5, 0.1, 4, True), "computed 300 of 300 tokens anew"),
        (ProbeTrial(300, 20, 200, 5.0, 1, False), "not there before the thought had ended"),
    ],
)
def test_a_trial_says_what_a_head_has_to_expect(trial: ProbeTrial, problem: str) -> None:
    assert problem in trial.problem() and bool(trial.problem()) == bool(problem)


def test_a_server_of_one_stream_is_refused_with_the_figures(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    head = saved_head(tmp_path, sure_head(probing="always"))
    with FakeUpstream("llama-server", num_slots=1) as fake:
        config = ServeConfig(head, fake.url, probe_timeout=0.2)
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
    assert any("were not tried at start" in record.getMessage() for record in caplog.records)


@KINDS
def test_a_trial_tells_of_a_probe_what_the_server_tells(
    kind: Kind, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[ProbeTrial] = []
    found = trial_module.try_probes

    async def noted(*asked: Any) -> ProbeTrial:
        trials.append(await found(*asked))
        return trials[-1]

    monkeypatch.setattr(trial_module, "try_probes", noted)
    with FakeUpstream(kind) as fake:
        create_server(ServeConfig(saved_head(tmp_path, sure_head(probing="always")), fake.url))
        assert len([one for one in fake.asked if is_probe(one.body or {})]) == 2
    (trial,) = trials
    assert trial.is_beside and trial.overrun_tokens < 200 and trial.seconds > 0
    assert trial.num_parallel == (1000 if kind == "llama-server" else None)
    assert trial.prompt_tokens is not None and trial.prompt_tokens > 100
