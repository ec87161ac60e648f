"""What a client of the proxy gets when something goes wrong: a clean error, or the whole answer."""

import asyncio
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import openai
import pytest

from haltwise import HaltMonitor
from haltwise.proxy import app, second_leg, upstream
from haltwise.proxy import server as proxy_server
from haltwise.proxy.client import RequestingClient
from haltwise.proxy.completion import CompletionSettings
from haltwise.proxy.lm_server import VllmServer
from haltwise.proxy.probing import ProbeRoom
from haltwise.proxy.upstream import UpstreamLeg
from tests.heads import CLOSE
from tests.proxy.fake_upstream import Asked, Kind, Plan
from tests.proxy.proxies import (
    PATHS,
    PATIENCE,
    Pair,
    Pairs,
    Reply,
    ask,
    connected,
    request_bytes,
    unheard_port,
    wait_until,
)

BOTH = pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
STREAMED = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
NEVER = {"X-Haltwise-Price": "0.1"}
OFF = {"X-Haltwise-Off": "1"}


@pytest.fixture(
    params=[("vllm", False), ("vllm", True), ("llama-server", True)],
    ids=["blind", "probing", "in turn"],
)
def watching(pairs: Pairs, request: pytest.FixtureRequest) -> Pair:
    """One head that sees the thought alone, one that looks at answers beside it, and in turn."""
    kind, probing = request.param
    return pairs(kind, probing=probing)


@pytest.fixture
def hasty(pairs: Pairs) -> Pair:
    """Gives an upstream up soon, which may be before a busy machine has said anything."""
    return pairs("vllm", read_timeout=0.3)


@pytest.fixture
def impatient(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Waits for first legs as long as it takes, and gives second ones up soon."""

    def settings(*others: Any) -> CompletionSettings:
        return replace(CompletionSettings(*others), patience=0.3)

    monkeypatch.setattr(app, "CompletionSettings", settings)
    return pairs("vllm", read_timeout=2 * PATIENCE)  # its own


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Headers of clients that are given up soon; all others have the time that they need."""

    class Hurried(RequestingClient):
        def __init__(self, *settings: Any) -> None:
            super().__init__(*settings)
            if self.headers.get("x-hurried"):
                self._patience = 0.5

    monkeypatch.setattr(app, "RequestingClient", Hurried)
    return {"X-Hurried": "yes"}


def is_unhalted(reply: Reply, plan: Plan, chat: bool) -> bool:
    thought, text = reply.thought, reply.text
    if not chat:
        thought, _, text = text.partition("</think>")
    return (thought, text, reply.finish) == (plan.thought(), plan.answer_text(), "stop")


def before_the_error(reply: Reply) -> str:
    """What a stream that ended in an error had shown, without markers."""
    assert reply.status == 200 and not reply.done and reply.error["message"]
    text = ""
    for choice in (c for event in reply.events[:-1] for c in event.get("choices", [])):
        part = choice.get("delta", choice)
        names = ("reasoning", "reasoning_content", "content", "text")
        text += "".join(part.get(name) or "" for name in names)
    return text.replace("</think>", "")


def behind_thought(pair: Pair, plan: Plan) -> list[Asked]:
    """The requests that go on behind a closed thought."""
    asked = pair.upstream.of(plan)
    return [one for one in asked if CLOSE in pair.upstream.text(one.body.get("prompt", ""))]


# The server does not answer, or not with a stream


@BOTH
@STREAMED
def test_a_server_that_is_not_there_is_a_502(
    pairs: Pairs, plan: Plan, chat: bool, stream: bool
) -> None:
    with unheard_port() as port:
        proxy = pairs("vllm", upstream=f"http://127.0.0.1:{port}").proxy
        reply = ask(proxy.client, plan, chat, stream)
        assert reply.status == 502 and reply.error["message"]
        assert ask(proxy.client, plan, chat, stream, OFF).status == 502
        assert proxy.client.get("/v1/models").status_code == 502
        assert proxy.client.get("/health").status_code == 503
        assert proxy.metric("haltwise_upstream_errors_total") >= 3


@BOTH
@STREAMED
@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_errors_of_the_server_are_passed_on(
    watching: Pair, plan: Plan, chat: bool, stream: bool, status: int
) -> None:
    plan = replace(plan, trouble=str(status))
    mine = {"Authorization": f"Bearer {plan.name}"}  # others are not refused for it
    expected = ask(watching.direct, plan, chat, stream)
    reply = ask(watching.client, plan, chat, stream, mine)
    assert (reply.status, reply.body) == (status, expected.body)
    assert reply.headers["content-type"] == expected.headers["content-type"]
    assert reply.headers["retry-after"] == "7"
    # What was refused may have been what the proxy asked for beside: then it is asked without.
    assert len(watching.upstream.of(plan)) == 2 + (status in (400, 500))


@BOTH
@STREAMED
@pytest.mark.parametrize("status", ["400", "404", "413", "422", "500", "501"])
def test_a_server_that_gives_few_log_probabilities_is_asked_again_without(
    watching: Pair, plan: Plan, chat: bool, stream: bool, status: str
) -> None:
    plan = replace(plan, top=status)
    reply = ask(watching.client, plan, chat, stream)
    assert is_unhalted(reply, plan, chat)
    assert json.loads(reply.headers["x-haltwise"])["reason"] == "refused"
    *tried, plain = watching.upstream.of(plan)
    # Where a path is not there, the other one for turns is tried as well.
    assert len(tried) == 1 or [one.path for one in tried] == ["/completion", "/v1/completions"]
    assert "logprobs" not in plain.body


@BOTH
@STREAMED
@pytest.mark.parametrize("top", ["500", "501", "404", "413", "says", "dies", "malformed"])
@pytest.mark.parametrize("kind", ["sglang", "llama-server", "ollama", "plain"])
def test_whatever_log_probabilities_break_is_asked_for_again_without(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool, top: str
) -> None:
    reply = ask(pairs(kind).client, replace(plan, top=top), chat, stream)
    assert is_unhalted(reply, plan, chat) and (not stream or reply.done)


@BOTH
@STREAMED
@pytest.mark.parametrize("top", ["says", "malformed", "list", "dies"])
def test_a_stream_that_fails_before_it_says_anything_is_asked_for_again_without(
    watching: Pair, plan: Plan, chat: bool, stream: bool, top: str
) -> None:
    plan = replace(plan, top=top)
    reply = ask(watching.client, plan, chat, stream)
    assert is_unhalted(reply, plan, chat) and (not stream or reply.done)
    assert reply.haltwise["fallback"] == "refused"
    assert len(watching.upstream.of(plan)) == 2


FORMS = (
    *("null", "unended", "endless", "bytes", "whole", "gzip", "text/plain", "application/json"),
    *("Text/Event-Stream; Charset=UTF-8", "application/octet-stream", "application/x-ndjson"),
)


@pytest.mark.whole
@BOTH
@STREAMED
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("headers", [NEVER, {}], ids=["unhalted", "halted"])
def test_an_answer_in_an_odd_form_is_an_answer(
    watching: Pair, plan: Plan, chat: bool, stream: bool, form: str, headers: dict[str, str]
) -> None:
    is_in_turn = watching.upstream.kind == "llama-server"
    if is_in_turn and form in ("unended", "endless"):
        pytest.skip("the last event of its native endpoint tells that it is that")
    plan = replace(plan, form=form)
    found = ask(watching.client, plan, chat, stream, headers)
    body = found.body.decode(errors="replace").replace("\ufffd", "é").replace("\\ufffd", "\\u00e9")
    reply = replace(found, body=body.encode())
    assert reply.status == 200 and reply.streamed == stream and (not stream or reply.done)
    # Whoever answers without a stream cannot be halted, unless each turn is an answer.
    is_halted = headers is not NEVER and (form != "whole" or is_in_turn)
    assert reply.text.endswith(plan.answer_text(20 if is_halted else 28))
    assert plan.thought(20) in reply.thought + reply.text
    assert reply.finish == (None if form == "endless" else "stop")


@BOTH
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *itertools.product(("llama-server", "sglang", "ollama"), ("null", "whole", "text/plain")),
        *itertools.product(("sglang", "ollama"), ("unended", "endless")),
    ],
)
def test_every_kind_of_server_may_answer_in_an_odd_form(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, form: str
) -> None:
    plan = replace(plan, form=form, trouble="hangs" * (form != "whole"), at=20, legs=(1,))
    reply = ask(pairs(kind).client, plan, chat)
    assert reply.done and reply.text.endswith(plan.answer_text(28 if form == "whole" else 20))


@BOTH
def test_something_else_than_an_api_is_an_error(watching: Pair, plan: Plan, chat: bool) -> None:
    plan = replace(plan, trouble="html")
    for stream in (True, False):
        reply = ask(watching.client, plan, chat, stream)
        assert reply.status == 502 and reply.error["message"]


@BOTH
@STREAMED
@pytest.mark.parametrize("trouble", ["mute", "hangs"])
def test_a_silent_server_is_given_up(
    hasty: Pair, plan: Plan, trouble: str, chat: bool, stream: bool
) -> None:
    plan = replace(plan, trouble=trouble, at=5)
    reply = ask(hasty.client, plan, chat, stream)
    if stream and trouble == "hangs" and reply.status == 200:
        assert plan.thought(5).startswith(before_the_error(reply))
    else:
        assert reply.status == 504 and reply.error["message"]
    if trouble == "hangs":
        assert all(asked.gone.wait(PATIENCE) for asked in hasty.upstream.of(plan))
    assert hasty.proxy.metric("haltwise_streams_in_flight") == 0


# The first leg goes wrong


@pytest.mark.whole
@BOTH
@pytest.mark.parametrize("trouble", ["dies", "ends", "malformed", "list", "says"])
@pytest.mark.parametrize("at", [0, 10, 30])
def test_a_broken_stream_ends_in_a_clean_error(
    watching: Pair, plan: Plan, chat: bool, trouble: str, at: int
) -> None:
    plan = replace(plan, trouble=trouble, at=at, legs=(1,))
    reply = ask(watching.client, plan, chat, headers=NEVER)
    # The 29th token closes the thought, the 30th is an answer's.
    assert before_the_error(reply) == (plan.thought() + plan.answer_text())[: len(
        plan.thought(min(at, 28)) + (" " + plan.name + ".a0é") * (at == 30)
    )]  # fmt: skip
    if trouble == "says":
        assert reply.error["message"] == "the engine has died"
    assert watching.upstream.of(plan)[0].gone.wait(PATIENCE)


@BOTH
@pytest.mark.parametrize("trouble", ["dies", "says"])
def test_a_stream_that_breaks_before_it_is_halted_is_an_error_too(
    watching: Pair, plan: Plan, chat: bool, trouble: str
) -> None:
    plan = replace(plan, trouble=trouble, at=10, legs=(1,))
    assert before_the_error(ask(watching.client, plan, chat)) == plan.thought(10)
    # Where it would have broken later nobody is there any more.
    plan = replace(plan, name=plan.name + "x", at=25)
    assert ask(watching.client, plan, chat).text.endswith(plan.answer_text(20))


@BOTH
def test_a_stream_that_is_only_passed_on_ends_in_a_clean_error(
    vllm: Pair, plan: Plan, chat: bool
) -> None:
    plan = replace(plan, trouble="dies", at=10)
    assert before_the_error(ask(vllm.client, plan, chat, headers=OFF)) == plan.thought(10)


@BOTH
@pytest.mark.parametrize("trouble", ["dies", "ends", "malformed", "says"])
def test_without_a_stream_a_broken_one_is_an_error_of_the_server(
    watching: Pair, plan: Plan, chat: bool, trouble: str
) -> None:
    reply = ask(watching.client, replace(plan, trouble=trouble, at=9), chat, stream=False)
    # An error that the server tells of has a status of its own.
    assert reply.status == (500 if trouble == "says" else 502) and reply.error["message"]
    assert plan.name not in reply.body.decode()


def test_the_official_client_sees_a_broken_stream_as_an_error(watching: Pair, plan: Plan) -> None:
    client = openai.OpenAI(base_url=watching.proxy.url + "/v1", api_key="any", max_retries=0)
    plan = replace(plan, trouble="dies", at=10)
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="m", messages=plan.messages(), stream=True))
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(model="m", prompt=plan.prompt())
    assert raised.value.status_code == 502


@BOTH
@STREAMED
@pytest.mark.parametrize("headers", [NEVER, {}], ids=["whole", "halted"])
def test_what_comes_behind_the_end_of_a_stream_is_not_waited_for(
    watching: Pair, plan: Plan, chat: bool, stream: bool, headers: dict[str, str]
) -> None:
    plan = replace(plan, trouble="goes on")
    reply = ask(watching.client, plan, chat, stream, headers)
    assert reply.text.endswith(plan.answer_text(20 if headers is not NEVER else 28))
    assert not stream or reply.done


@pytest.mark.parametrize("kind", ["vllm", "ollama"])
@pytest.mark.parametrize("headers", [NEVER, {}, OFF], ids=["whole", "halted", "off"])
def test_what_a_completion_has_of_a_chat_does_not_make_it_one(
    pairs: Pairs, kind: Kind, plan: Plan, headers: dict[str, str]
) -> None:
    pair = pairs(kind)
    stray = [{"role": "user", "content": Plan("stray").text()}]
    reply = ask(pair.client, plan, chat=False, headers=headers, messages=stray)
    assert "stray" not in reply.text and reply.text.startswith(plan.thought(20))
    assert pair.upstream.of(plan)[0].path == PATHS[False]


HEADS = pytest.mark.parametrize("probing", [False, True], ids=["blind", "probing"])
CAPPED = {"X-Haltwise-Max-Tokens": "3"}


@HEADS
@BOTH
@STREAMED
@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama-server"])
@pytest.mark.parametrize("mention", ["", "<think>"])
def test_an_answer_behind_a_thought_that_the_client_has_closed_is_left_alone(
    pairs: Pairs, kind: Kind, plan: Plan, probing: bool, chat: bool, stream: bool, mention: str
) -> None:
    pair = pairs(kind, probing=probing, fake={"thoughts": "opened"})
    closed, plan = "<think>\nhm\n</think>\n\n", replace(plan, answer=9, mention=mention)
    begun = {"role": "assistant", "content": closed}
    asked = {"messages": [*plan.messages(), begun]} if chat else {"prompt": plan.text() + closed}
    reply = ask(pair.client, plan, chat, stream, CAPPED, **asked)
    assert reply.text == mention + plan.answer_text(0) and reply.finish == "stop"
    assert len(pair.upstream.of(plan)) == 1 and not pair.upstream.of(plan, probes=True)


@pytest.mark.whole
@HEADS
@BOTH
@STREAMED
@pytest.mark.parametrize("closes", ["repeats", "thinks", "both"])
@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama-server", "ollama"])
def test_a_close_that_is_not_heeded_is_followed_through_whoever_halts(
    pairs: Pairs, kind: Kind, plan: Plan, probing: bool, chat: bool, stream: bool, closes: str
) -> None:
    reply = ask(
        pairs(kind, probing=probing).client,
        replace(plan, closes=closes, trouble="hangs", at=20, legs=(1,)),
        chat,
        stream,
    )
    assert reply.text.endswith(plan.answer_text(20)) and reply.haltwise["halted"]
    assert reply.text.count("</think>") == (not chat) and reply.text.count(".a0é") == 1
    assert plan.thought(21) not in reply.thought + reply.text


@BOTH
@STREAMED
def test_an_end_that_the_client_has_named_is_its_own(
    watching: Pair, plan: Plan, chat: bool, stream: bool
) -> None:
    direct = ask(watching.direct, plan, chat, stream, stop=[".t9"])
    reply = ask(watching.client, plan, chat, stream, NEVER, stop=[".t9"])
    assert (reply.thought, reply.text) == (direct.thought, direct.text)
    assert (reply.finish, reply.haltwise["reason"]) == ("stop", "token budget")


@BOTH
def test_comments_keep_a_stream_alive_and_change_nothing(
    watching: Pair, plan: Plan, chat: bool
) -> None:
    plan = replace(plan, trouble="pings")
    reply = ask(watching.client, plan, chat)
    assert reply.done and reply.text.endswith(plan.answer_text(20))
    assert is_unhalted(ask(watching.client, plan, chat, headers=NEVER), plan, chat)


@BOTH
def test_huge_tokens_pass(vllm: Pair, plan: Plan, chat: bool) -> None:
    plan = replace(plan, thinking=2, answer=1, token_bytes=400_000)
    assert is_unhalted(ask(vllm.client, plan, chat), plan, chat)


@BOTH
def test_a_policy_that_fails_lets_the_lm_think_on(
    watching: Pair, plan: Plan, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bool:
        raise RuntimeError("a mistake of ours")

    counted = watching.proxy.metric("haltwise_fallbacks_total")
    monkeypatch.setattr(HaltMonitor, "observe", fail)
    assert is_unhalted(ask(watching.client, plan, chat), plan, chat)
    assert watching.proxy.metric("haltwise_fallbacks_total") == counted + 1


# The second leg goes wrong


@pytest.mark.whole
@BOTH
@STREAMED
@pytest.mark.parametrize("trouble", ["500", "html", "dies", "ends", "malformed", "says"])
def test_if_the_second_leg_fails_the_first_one_goes_on(
    watching: Pair, plan: Plan, chat: bool, stream: bool, trouble: str
) -> None:
    counted = watching.proxy.metric("haltwise_fallbacks_total")
    plan = replace(plan, trouble=trouble, legs=(2, 3))
    reply = ask(watching.client, plan, chat, stream)
    assert is_unhalted(reply, plan, chat)
    assert not reply.haltwise["halted"] and reply.haltwise["fallback"]
    assert watching.proxy.metric("haltwise_fallbacks_total") == counted + 1
    first = watching.upstream.of(plan)[0]
    assert first.gone.wait(PATIENCE) and first.ended == "done"


@BOTH
@pytest.mark.parametrize("trouble", ["hangs", "mute"])
def test_if_the_second_leg_is_silent_the_first_one_goes_on(
    impatient: Pair, plan: Plan, chat: bool, trouble: str
) -> None:
    counted = impatient.proxy.metric("haltwise_fallbacks_total")
    plan = replace(plan, trouble=trouble, legs=(2, 3))
    assert is_unhalted(ask(impatient.client, plan, chat), plan, chat)
    assert impatient.proxy.metric("haltwise_fallbacks_total") == counted + 1


@BOTH
@STREAMED
def test_a_second_leg_that_waits_for_the_first_to_end_is_too_late(
    pairs: Pairs, plan: Plan, chat: bool, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_leg, "_SOON", 0.0)
    pair = pairs("vllm", fake={"num_slots": 1}, read_timeout=PATIENCE)
    plan = replace(plan, trouble="hangs", legs=(2,))
    counted = pair.proxy.metric("haltwise_fallbacks_total", reason="late")
    reply = ask(pair.client, plan, chat, stream)
    assert is_unhalted(reply, plan, chat) and reply.haltwise["fallback"] == "late"
    assert pair.proxy.metric("haltwise_fallbacks_total", reason="late") == counted + 1


@BOTH
def test_what_a_server_does_not_tell_in_time_is_not_waited_for(
    pairs: Pairs, plan: Plan, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs("vllm")
    ask(pair.client, replace(plan, name=plan.name + "x"))  # it is known by now

    async def hang(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(upstream, "_CALL_TIMEOUT", 0.1)
    monkeypatch.setattr(VllmServer, "text_ids", lambda self, *_: self.upstream.call("/x", {}, []))
    monkeypatch.setattr(UpstreamLeg, "body", hang)
    counted = pair.proxy.metric("haltwise_fallbacks_total", reason="timeout")
    assert is_unhalted(ask(pair.client, plan, chat), plan, chat)
    assert pair.proxy.metric("haltwise_fallbacks_total", reason="timeout") == counted + 1


# llama-server is told to end the thought of a chat: there is no second leg.
ONE_STREAM = pytest.mark.parametrize(
    ("kind", "chat"), [("llama-server", False), ("ollama", True), ("ollama", False)]
)


@pytest.mark.whole
@HEADS
@ONE_STREAM
@STREAMED
@pytest.mark.parametrize("trouble", ["500", "dies", "malformed", "says", "html"])
def test_a_server_of_one_stream_is_asked_again_if_the_second_leg_fails(
    pairs: Pairs, kind: Kind, plan: Plan, probing: bool, chat: bool, stream: bool, trouble: str
) -> None:
    # There is no place for a probe: only a cap halts.
    capped = {"X-Haltwise-Price": "0", "X-Haltwise-Max-Tokens": "20"} if probing else {}
    pair = pairs(kind, probing=probing, fake={"num_slots": 1}, probe_anyway=probing)
    counted = pair.proxy.metric("haltwise_fallbacks_total")
    plan = replace(plan, trouble=trouble, legs=(2, 3))
    reply = ask(pair.client, plan, chat, stream, capped)
    assert is_unhalted(reply, plan, chat)
    assert pair.proxy.metric("haltwise_fallbacks_total") == counted + 1


@ONE_STREAM
@STREAMED
@pytest.mark.parametrize("anew", ["plain", "brief"])
def test_a_server_of_one_stream_that_answers_otherwise_when_asked_again_is_heard(
    pairs: Pairs, kind: Kind, plan: Plan, chat: bool, stream: bool, anew: str
) -> None:
    plan = replace(plan, trouble="500", legs=(2, 3), anew=anew)
    reply = ask(pairs(kind, fake={"num_slots": 1}).client, plan, chat, stream)
    assert plan.thought(20) in reply.thought + reply.text
    assert reply.text.endswith(plan.answer_text(0 if anew == "plain" else 5))
    assert reply.text.count(".a0é") == 1 and reply.finish == "stop"


@STREAMED
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("crowded", [True, False])
def test_a_server_with_slots_of_its_own_is_left_before_unless_it_is_crowded_or_checked(
    pairs: Pairs, plan: Plan, stream: bool, checked: bool, crowded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the first leg has computed is its slot's alone, so that the second has to run there."""
    monkeypatch.setattr(ProbeRoom, "has_slots", lambda _, num: num == 4 and not crowded)
    checks: dict[str, Any] = {"check_answers": "readable"} if checked else {}
    pair = pairs("llama-server", fake={"num_slots": 4}, **checks)
    is_kept = crowded or checked
    failing = replace(plan, trouble="500", legs=(2, 3))
    assert is_unhalted(ask(pair.client, failing, False, stream), failing, False)
    # The first goes on, or the request is asked anew.
    assert len(pair.upstream.of(failing)) == (2 if is_kept else 3)
    whole = replace(plan, name=f"{plan.name}w", mention=" Answer: 7\n")
    reply = ask(pair.client, whole, False, stream)
    assert reply.haltwise["halted"] and reply.text.endswith(whole.answer_text(20))


@ONE_STREAM
def test_a_server_of_one_stream_is_halted(pairs: Pairs, kind: Kind, plan: Plan, chat: bool) -> None:
    pair = pairs(kind, fake={"num_slots": 1})
    plan = replace(plan, trouble="hangs", at=20, legs=(1,))
    reply = ask(pair.client, plan, chat)
    assert reply.text.endswith(plan.answer_text(20)) and reply.haltwise["halted"]
    legs = pair.upstream.of(plan)
    assert all(leg.gone.wait(PATIENCE) for leg in legs)
    assert [leg.ended for leg in legs] == ["closed", "done"]


@pytest.mark.whole
@BOTH
@STREAMED
@pytest.mark.parametrize("trouble", ["dies", "ends", "malformed", "says"])
def test_an_answer_that_breaks_off_is_continued_once(
    watching: Pair, plan: Plan, chat: bool, stream: bool, trouble: str
) -> None:
    plan = replace(plan, answer=6, trouble=trouble, at=3, legs=(2,))
    reply = ask(watching.client, plan, chat, stream)
    assert reply.text.endswith(plan.answer_text(20)) and reply.text.count(".a0é") == 1
    assert reply.finish == "stop" and reply.haltwise["halted"]
    text = watching.upstream.text(behind_thought(watching, plan)[1].body["prompt"])
    said = text.rpartition(CLOSE)[2]
    assert said.endswith(".a2é") and plan.answer_text(20).startswith(said)
    assert reply.haltwise["legs"][1]["completion_tokens"] == 3


@BOTH
@STREAMED
def test_an_answer_that_breaks_off_again_is_an_error(
    watching: Pair, plan: Plan, chat: bool, stream: bool
) -> None:
    plan = replace(plan, answer=9, trouble="dies", at=3, legs=(2, 3))
    reply = ask(watching.client, plan, chat, stream)
    assert len(behind_thought(watching, plan)) == 2
    if stream:
        answer = before_the_error(reply).partition(".t19é")[2].lstrip("\n")
        assert answer.endswith(".a5é") and plan.answer_text(20).startswith(answer)
    else:
        assert reply.status == 502 and reply.error["message"]


# The client goes wrong


@BOTH
@pytest.mark.parametrize(
    ("leg", "stream", "headers"),
    [(1, True, NEVER), (1, False, NEVER), (2, True, {}), (2, False, {}), (1, True, OFF)],
    ids=["first", "first-whole", "second", "second-whole", "off"],
)
def test_a_client_that_leaves_ends_what_was_asked_for_it(
    watching: Pair, plan: Plan, chat: bool, leg: int, stream: bool, headers: dict[str, str]
) -> None:
    plan = replace(plan, trouble="hangs", at=3 if leg == 1 else 1, legs=(leg,))
    with connected(watching.proxy) as client:
        client.sendall(request_bytes(plan, chat, stream, headers))
        asked = behind_thought if leg == 2 else lambda pair, plan: pair.upstream.of(plan)
        wait_until(lambda: any(one.num_sent > 0 for one in asked(watching, plan)))
        if stream:
            assert b"200" in client.recv(100)
    *others, last = watching.upstream.of(plan)
    assert last.gone.wait(PATIENCE) and last.ended == "closed"
    assert all(other.gone.wait(PATIENCE) for other in others)
    wait_until(lambda: watching.proxy.metric("haltwise_streams_in_flight") == 0)


@pytest.mark.whole
@pytest.mark.parametrize("headers", [NEVER, OFF], ids=["watched", "off"])
def test_a_client_that_does_not_read_is_dropped_and_nobody_else(
    vllm: Pair, plan: Plan, headers: dict[str, str], hurried: dict[str, str]
) -> None:
    pair = vllm
    other, plan = plan, replace(plan, name="endless", trouble="endless", token_bytes=10_000)
    plan = replace(plan, name="endless" + "x" * (headers is OFF))
    with connected(pair.proxy) as client:
        client.sendall(request_bytes(plan, True, True, headers | hurried))
        wait_until(lambda: bool(pair.upstream.of(plan)))
        (stuck,) = pair.upstream.of(plan)
        assert ask(pair.client, other).text == other.answer_text(20)
        assert stuck.gone.wait(PATIENCE) and stuck.ended == "closed"
        # What the sockets' own buffers hold on the way: nine tenths of what the server sends are
        # numbers, which the client does not get.
        assert stuck.num_sent < 200_000_000
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)
    assert ask(pair.client, replace(other, name="later")).status == 200


def test_a_client_that_does_not_finish_its_request_is_dropped(
    vllm: Pair, plan: Plan, hurried: dict[str, str]
) -> None:
    pair = vllm
    with connected(pair.proxy) as client:
        client.sendall(request_bytes(plan, True, True, hurried)[:-5])
        assert b" 408 " in client.recv(100)
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)
    assert pair.upstream.of(plan) == []


def test_a_client_that_sends_its_request_piece_by_piece_has_one_deadline(
    vllm: Pair, plan: Plan, hurried: dict[str, str]
) -> None:
    pair = vllm
    with connected(pair.proxy) as client:
        data = request_bytes(plan, True, True, hurried)
        client.sendall(data[:-99])
        client.settimeout(0.1)
        found = b""
        for byte in data[-99:]:
            with suppress(TimeoutError):
                found += client.recv(100)
            if found:
                break
            client.sendall(bytes([byte]))
        assert b" 408 " in found
    assert pair.upstream.of(plan) == []


def test_a_client_that_asks_for_nothing_is_let_go(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs("vllm")
    monkeypatch.setattr(proxy_server, "_SILENCE", 0.05)
    with connected(pair.proxy) as client:
        assert client.recv(1) == b""


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("half", [b"GET", b"GET /health HTTP/1.1\r\n", HEALTH[:-2]])
def test_a_client_that_asks_for_half_of_something_is_let_go(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    with connected(pairs("vllm").proxy) as client:
        client.sendall(HEALTH)
        told = b""
        while b"streams_in_flight" not in told:
            told += client.recv(10_000)
        # From the end of the next answer on, which has not been asked for yet.
        monkeypatch.setattr(proxy_server, "_SILENCE", 0.05)
        client.sendall(HEALTH + half)
        told = b""
        while new := client.recv(10_000):
            told += new
        assert b" 200 " in told


def test_a_client_that_asks_while_it_is_let_go_is_heard(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come and was not read yet counts as asked."""
    connections: list[proxy_server._Protocol] = []
    look = proxy_server._Protocol._look

    def noted(connection: proxy_server._Protocol) -> None:
        connections.append(connection)
        look(connection)

    monkeypatch.setattr(proxy_server._Protocol, "_look", noted)
    with connected(pairs("vllm").proxy) as client:
        client.sendall(HEALTH)
        told = b""
        while b"streams_in_flight" not in told:
            told += client.recv(10_000)
        connection = connections[-1]

        def let_go() -> None:
            client.sendall(HEALTH)
            wait_until(lambda: connection._is_heard)
            connection._let_go()

        connection.loop.call_soon_threadsafe(let_go)
        told = b""
        while b"streams_in_flight" not in told:
            told += (new := client.recv(10_000))
            assert new


def test_clients_that_ask_for_nothing_make_room_for_others(
    pairs: Pairs, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_server, "_OTHER_CONNECTIONS", 1)
    pair = pairs("vllm", max_streams=3)  # 7 connections
    held = replace(plan, trouble="hangs", at=5, legs=(1,))
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        reply = pool.submit(ask, pair.client, held, headers=NEVER)
        wait_until(lambda: bool(pair.upstream.of(held)))
        clients = [stack.enter_context(connected(pair.proxy)) for _ in range(20)]
        with connected(pair.proxy) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in client.recv(10_000)
        pair.upstream.free(pair.upstream.of(held)[0])
        assert reply.result(PATIENCE).done
        num_gone = 0
        for client in clients:
            client.settimeout(0.2)
            with suppress(TimeoutError):
                num_gone += client.recv(1) == b""
        assert num_gone >= 20 - 7


def test_a_lack_of_files_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    loop, complaints = asyncio.new_event_loop(), proxy_server.Complaints()
    for _ in range(1000):
        complaints(loop, {"message": "accept", "exception": OSError(24, "Too many open files")})
    complaints(loop, {"message": "another", "exception": ValueError("x")})
    loop.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "Too many open files" in told[0] and "another" in told[1]


def test_a_slow_client_gets_everything(vllm: Pair, plan: Plan) -> None:
    plan = replace(plan, thinking=20, token_bytes=200_000)
    body = {"model": "m", "stream": True, "prompt": plan.prompt(), "max_tokens": 99}
    with vllm.client.stream("POST", PATHS[False], json=body, headers=NEVER) as reply:
        data = b"".join(reply.iter_raw(chunk_size=1 << 16))
    assert is_unhalted(Reply(200, {}, data, True), plan, chat=False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"messages": 3, "prompt": null}',
        b'{"messages": [3], "prompt": 3}',
        b'{"messages": [{"role": "user"}], "prompt": {}}',
        b'{"messages": [], "prompt": []}',
    ],
    ids=lambda content: repr(content[:40]),
)
@BOTH
def test_a_malformed_request_is_refused(vllm: Pair, content: bytes, chat: bool) -> None:
    headers = {"content-type": "application/json"}
    reply = vllm.client.post(PATHS[chat], content=content, headers=headers)
    assert reply.status_code == 400 and reply.json()["error"]["message"]
    assert vllm.proxy.metric("haltwise_streams_in_flight") == 0


@pytest.mark.parametrize(
    "asked",
    [{"n": "two"}, {"max_tokens": "many"}, {"max_tokens": [1]}, {"logprobs": "x"},
     {"logprobs": True, "top_logprobs": "x"}],
    ids=str,
)  # fmt: skip
@BOTH
def test_a_field_of_the_wrong_type_is_refused_by_the_server(
    vllm: Pair, plan: Plan, asked: dict[str, Any], chat: bool
) -> None:
    for stream in (True, False):
        reply = ask(vllm.client, plan, chat, stream, **asked)
        assert (reply.status, reply.error["message"]) == (400, "malformed request")


@pytest.mark.parametrize("asked", [{"stop": 5}, {"stop": [None, 3]}, {"seed": {}}], ids=str)
@BOTH
def test_an_odd_field_that_the_server_takes_is_no_trouble(
    watching: Pair, plan: Plan, asked: dict[str, Any], chat: bool
) -> None:
    assert ask(watching.client, plan, chat, stream=False, **asked).status == 200


def test_a_path_cannot_lead_out_of_the_api(vllm: Pair) -> None:
    num = len(vllm.upstream.asked)
    paths = (
        r"/v1/..\asked",
        "/v1/x%5c..%5c..%5casked",
        "/v1/%255c..%255c../asked",
        "/v1/../asked",
        "/v1/%2e%2e/asked",
        "/v1/x/..%2f..%2fasked",
        "//asked",
        "/v1/a#b",
    )
    for path in (*paths, "/v1/" + "x" * 2**16):
        with connected(vllm.proxy) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: proxy\r\n\r\n".encode())
            assert b" 404 " in client.recv(100)
    assert len(vllm.upstream.asked) == num


EVIL = "https://evil.example"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": EVIL, "Content-Type": "text/plain"}, 415),
        ({"Origin": EVIL, "Content-Type": "text/plain", "Host": "other.example"}, 415),
        ({"Origin": EVIL, "Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": EVIL, "Content-Type": "multipart/form-data; boundary=application/json"}, 415),
        ({"Origin": EVIL, "Content-Type": ""}, 415),
        ({"Origin": "null", "Content-Type": "text/plain"}, 415),
        ({"Origin": EVIL, "Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ({"Origin": EVIL, "Content-Type": "text/plain", "Authorization": "Bearer x"}, 200),
        ({"Content-Type": "text/plain"}, 200),
        ({"Content-Type": "application/json", "Host": "evil.example"}, 200),
        ({"Content-Type": "application/json", "Host": "evil.example:80", "Origin": EVIL}, 421),
        ({"Content-Type": "application/json", "Host": "evil.example", "Referer": EVIL}, 421),
        ({"Content-Type": "application/json", "Host": "x", "User-Agent": "Mozilla/5.0"}, 421),
        ({"Content-Type": "application/json", "Host": "localhost:1", "Origin": EVIL}, 200),
    ],
    ids=str,
)
def test_no_page_asks_by_the_way_of_a_browser_that_does_not_ask_first(
    vllm: Pair, plan: Plan, headers: dict[str, str], status: int
) -> None:
    body = json.dumps({"model": "m", "messages": plan.messages()}).encode()
    for path in (PATHS[True], "/v1/echo"):
        found = vllm.client.post(path, content=body, headers=headers).status_code
        assert found == (203 if path == "/v1/echo" and status == 200 else status)
    assert bool(vllm.upstream.of(plan)) == (status == 200)


def test_pages_may_ask_by_the_names_that_are_allowed(pairs: Pairs) -> None:
    client = pairs("vllm", allowed_hosts=("Models.example",)).client
    for host, status in {
        "models.example:8700": 200,
        "127.0.0.1": 200,
        "other.example": 421,
    }.items():
        headers = {"Host": host, "Origin": EVIL}
        assert client.get("/v1/models", headers=headers).status_code == status


def test_the_proxy_is_no_tunnel(vllm: Pair) -> None:
    for target in ("/v1/models", "example.com:443"):
        with connected(vllm.proxy) as client:
            client.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.recv(12) in (b"HTTP/1.1 405", b"HTTP/1.1 404")
    assert vllm.proxy.metric("haltwise_requests_total", outcome="defect") == 0


def test_a_request_has_a_largest_size(pairs: Pairs, plan: Plan) -> None:
    pair = pairs("vllm", max_body_bytes=5 * 2**20)
    padding = "x" * 4 * 2**20
    body: dict[str, Any] = {"model": "m", "messages": plan.messages()}
    body["messages"].insert(0, {"role": "system", "content": padding})
    reply = pair.client.post(PATHS[True], json=body)
    assert reply.json()["choices"][0]["message"]["content"] == plan.answer_text(20)
    sent = pair.upstream.of(plan)[0].body
    assert sent["messages"] == body["messages"]
    num = len(pair.upstream.asked)
    body["messages"][0]["content"] = padding * 2
    data = json.dumps(body).encode()
    pieces = (data[i : i + 2**16] for i in range(0, len(data), 2**16))
    for content in (data, pieces):  # with a length, and in chunks without one
        reply = pair.client.post(PATHS[True], content=content)
        assert reply.status_code == 413 and reply.json()["error"]["message"]
    assert len(pair.upstream.asked) == num
    assert ask(pair.client, replace(plan, name="later")).status == 200


def test_there_are_no_more_streams_than_allowed(pairs: Pairs, plan: Plan) -> None:
    pair = pairs("vllm", max_streams=2)
    held = [replace(plan, name=f"{plan.name}x{n}", trouble="hangs", at=5) for n in range(2)]
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(ask, pair.client, each, headers=NEVER) for each in held]
        wait_until(lambda: all(pair.upstream.of(each) for each in held))
        assert pair.proxy.metric("haltwise_streams_in_flight") == 2
        refused = ask(pair.client, plan)
        assert refused.status == 503 and refused.error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert pair.upstream.of(plan) == []
        assert pair.client.get("/health").status_code == 200
        for asked in (asked for each in held for asked in pair.upstream.of(each)):
            pair.upstream.free(asked)
        assert all(reply.result(PATIENCE).done for reply in replies)
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)
    assert ask(pair.client, plan).status == 200
