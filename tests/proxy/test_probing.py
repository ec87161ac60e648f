"""Heads that look at answers behind the proxy: what they ask the server, and what a client gets."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest

from haltwise import InputError
from haltwise.proxy import ServeConfig, app, create_server
from haltwise.proxy import probe_trial as trial_module
from haltwise.proxy.probe_trial import ProbeTrial
from haltwise.proxy.probing import ProbeRoom
from haltwise.proxy.upstream import UpstreamLeg
from haltwise.proxy.wire import UpstreamError
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan, is_probe
from tests.proxy.proxies import PATIENCE, Pair, Pairs, Reply, ask, proxied, saved_head, wait_until

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
    assert room.is_free(None, []) and room.is_free(1, [])
    streams[0] = 3
    assert room.is_free(4, []) and not room.is_free(3, [])
    room.num_running = 1
    assert room.is_free(None, []) and not room.is_free(4, [])
    room.num_running = 2
    assert not room.is_free(None, [])


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
        assert told["halted"] == ("probes" in told) == (headers is other)


@BOTH
def test_a_client_that_is_refused_is_told_when_to_come_back_and_has_no_probes_until_then(
    pairs: Pairs, plan: Plan, chat: bool, patiently: None
) -> None:
    pair = pairs(probing=True, answers="seen")
    mine = {"Authorization": f"Bearer {plan.name}"}
    reply = ask(pair.client, replace(plan, trouble="429"), chat, headers=mine)
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    plan = replace(plan, name=plan.name + "x")
    assert "probes" not in ask(pair.client, plan, chat, headers=mine).haltwise


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
            pair = proxied(ServeConfig(head, fake.url, price=0.1))
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
