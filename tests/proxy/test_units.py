"""The proxy's pure parts: events, chunks, requests, legs and settings."""

import asyncio
import copy
import json
import logging
import math
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import certifi
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltwise import HaltHead, Terms
from haltwise.proxy import aside, upstream
from haltwise.proxy.acceptance import Acceptance
from haltwise.proxy.app import _without
from haltwise.proxy.completion import CompletionSettings, WatchedCompletion
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.config import APIKeys, Customer, ServeConfig, UpstreamConfig
from haltwise.proxy.dialect import (
    LlamaDialect,
    OllamaDialect,
    ServedPrompt,
    ServerDialect,
    VllmDialect,
)
from haltwise.proxy.lm_server import LlamaServer, LMServer, find_lm_server, opened_in_text
from haltwise.proxy.metrics import JsonLines, Metrics
from haltwise.proxy.probing import ProbeRoom
from haltwise.proxy.second_leg import _MOST_HELD, AlreadyShown, HeldBackLeg, ThoughtCloser
from haltwise.proxy.upstream import GeneratedSoFar, SharedQuestion, Upstream, UpstreamLeg
from haltwise.proxy.wire import (
    DONE,
    EventReader,
    Json,
    ServedToken,
    StreamEvent,
    UpstreamError,
    WholeAnswer,
    chat_logprobs,
    choice_of,
    texts_of,
    tokens_of,
    trim_logprobs,
    uncut,
    whole_texts,
)
from haltwise.session.control import ConstantControl
from haltwise.session.request import ThoughtRequest
from haltwise.session.signal_collector import NUM_TOP
from haltwise.session.thought import PointRules
from tests.heads import sure_head

HEAD = sure_head(rule="every 8 tokens")
RULES = PointRules(HEAD.config.halting)
TERMS = Terms(1.0)
ASKED = ThoughtRequest(TERMS)


# Events


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.integers()), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(1, 40),
)
@pytest.mark.whole
def test_events_do_not_depend_on_how_their_bytes_are_cut(
    chunks: list[Json], end: str, size: int
) -> None:
    chunks = [{"x" + name: value for name, value in chunk.items()} for chunk in chunks]
    lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}{end}{end}" for chunk in chunks]
    data = "".join([f": ping{end}{end}", *lines, f"data: [DONE]{end}{end}"])
    raw = data.encode("utf-8", "surrogatepass")
    reader = EventReader()
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    # A lone \r at the end may be the first half of an end of line: one more byte settles it.
    events = [event for piece in [*pieces, b"\n"] for event in reader.feed(piece)]
    assert [event.chunk for event in events] == [None, *chunks, None]
    assert [event is DONE for event in events] == [False] * (len(chunks) + 1) + [True]


def test_an_event_has_the_fields_that_the_format_allows() -> None:
    text = b'id: 7\nevent: message\ndata:{"a":\ndata: 1}\nretry: 5\n\n'
    (event,) = EventReader().feed(text)
    assert (event.chunk, event.raw, event.encode()) == ({"a": 1}, text, text)
    event.chunk, event.raw = {"b": "é"}, b""
    assert event.encode() == b'data: {"b":"\\u00e9"}\n\n'


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"data: {", "malformed"),
        (b"data: []", "malformed"),
        (b"data: " + b"[" * 100_000, "malformed"),
        (b'data: {"error": {"message": "m", "code": 7}}', "said"),
        (b'data: {"error": "m"}', "said"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_an_event_that_is_none_is_an_error(text: bytes, kind: str) -> None:
    with pytest.raises(UpstreamError) as raised:
        list(EventReader().feed(text + b"\n\n"))
    assert raised.value.kind == kind
    assert set(raised.value.body["error"]) == {"message", "type", "param", "code"}
    assert kind == "malformed" or raised.value.body["error"]["message"] == "m"


def test_numbers_that_python_cannot_keep_are_no_reason_to_lose_an_answer() -> None:
    text = '{"a": %s, "b": [1e999, -1e999, NaN, 0.5], "c": 7}' % ("9" * 5000)
    (event,) = EventReader().feed(f"data: {text}\n\n".encode())
    event.raw = b""
    largest = sys.float_info.max
    found = json.loads(event.encode().removeprefix(b"data: "), parse_constant=pytest.fail)
    assert found == {"a": largest, "b": [largest, -largest, None, 0.5], "c": 7}


def test_a_whole_answer_is_read_as_the_stream_that_says_the_same() -> None:
    calls = [{"id": "c0", "function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": "18", "reasoning": "hm", "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    answer = {"id": "7", "object": "chat.completion", "choices": [choice], "usage": {"x": 1}}
    reader, whole = EventReader(), WholeAnswer()
    data = b"\n" + json.dumps(answer, indent=2).encode()
    assert [event for i in range(len(data)) for event in reader.feed(data[i : i + 1])] == []
    events = list(reader.end())
    assert events[-1] is DONE
    for event in events[:-1]:
        assert event.chunk and event.chunk["object"] == "chat.completion.chunk"
        whole.add(event.chunk)
    assert whole.answer(chat=True) == answer


def test_an_event_that_does_not_end_is_not_kept_for_ever() -> None:
    reader = EventReader()
    with pytest.raises(UpstreamError, match="does not end"):
        for _ in range(20):
            assert list(reader.feed(b"x" * 2**20)) == []


# Chunks


CHAT = {
    "content": [
        {
            "token": "a",
            "logprob": -0.1,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.1, "bytes": [97]},
                {"token": "é", "logprob": -3.0, "bytes": [195, 169]},
            ],
        }
    ]
}
LEGACY = {
    "tokens": ["a"],
    "token_logprobs": [-0.1],
    "top_logprobs": [{"a": -0.1, "é": -3.0}],
    "text_offset": [0],
}


def test_log_probabilities_are_read_in_both_forms() -> None:
    (chat,), (legacy,) = tokens_of({"logprobs": CHAT}), tokens_of({"logprobs": LEGACY})
    assert chat == legacy
    assert (chat.text, chat.logprob, chat.top) == ("a", -0.1, [-0.1, -3.0])
    assert chat_logprobs(LEGACY) == CHAT == chat_logprobs(CHAT)
    with_id = {"content": [{"token": "a", "logprob": 0, "id": 7}]}
    assert tokens_of({"logprobs": with_id})[0].id == 7


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "a", "logprob": None, "top_logprobs": [{"logprob": "x"}]}]},
        {"content": [{"token": "a", "top_logprobs": 3}]},
        {"tokens": ["a"], "token_logprobs": [], "top_logprobs": None},
        {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [["a"]]},
        {"tokens": ["a"], "token_logprobs": [10**400], "top_logprobs": [{"a": -(10**400)}]},
        {"tokens": ["a"], "token_logprobs": [5.0], "top_logprobs": [{"a": 1e300}]},
    ],
)
def test_malformed_log_probabilities_are_unknown(logprobs: Json) -> None:
    (token,) = tokens_of({"logprobs": logprobs})
    assert token.text == "a" and math.isnan(token.logprob)
    assert all(map(math.isnan, token.top))
    trim_logprobs(logprobs, 1)
    chat_logprobs(logprobs)


@pytest.mark.parametrize("logprobs", [None, 3, {}, {"content": 3}, {"tokens": "a"}])
def test_no_log_probabilities_are_no_tokens(logprobs: Any) -> None:
    assert tokens_of({"logprobs": logprobs}) == []
    trim_logprobs(logprobs, 1)


def test_a_client_sees_as_many_likely_tokens_as_it_asked_for() -> None:
    top = {"c": -3.0, "a": -0.1, "b": -2.0, "own": -9.0}
    legacy = {"tokens": ["own"], "top_logprobs": [dict(top)]}
    trim_logprobs(legacy, 2)
    assert legacy["top_logprobs"] == [{"a": -0.1, "b": -2.0, "own": -9.0}]
    unknown = {"tokens": ["own"], "top_logprobs": [{"c": math.nan, "d": None, "a": -0.1}]}
    trim_logprobs(unknown, 1)
    assert unknown["top_logprobs"] == [{"a": -0.1}]
    chat = {"content": [{"top_logprobs": [{"token": name} for name in "abc"]}]}
    for num in (2, 0):
        trim_logprobs(chat, num)
        assert [e["token"] for e in chat["content"][0]["top_logprobs"]] == list("ab")[:num]


@pytest.mark.parametrize("choices", [3, [3], [{"delta": 3}], {"a": 1}])
def test_malformed_choices_are_an_error(choices: Any) -> None:
    with pytest.raises(UpstreamError, match="malformed"):
        choice_of({"choices": choices})


def test_a_text_is_found_wherever_a_server_puts_it() -> None:
    assert texts_of({"text": "t"}) == texts_of({"delta": {"content": "t"}}) == ("", "t")
    for name in ("reasoning_content", "reasoning"):
        assert texts_of({"delta": {name: "r", "content": None}}) == ("r", "")
    assert texts_of({"delta": {}}) == texts_of({"text": None}) == ("", "")


def test_a_stream_of_a_chat_is_put_together() -> None:
    whole = WholeAnswer()
    parts: list[Json] = [
        {"role": "assistant", "content": ""},
        {"reasoning": "think", "role": None},
        {"reasoning": "ing"},
        {"content": "ans"},
        {"content": "wer"},
        {"tool_calls": [{"index": 1, "id": "c1", "function": {"name": "g", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "id": "c0", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]},
    ]
    for part in parts:
        whole.add({"id": "7", "object": "x", "choices": [{"index": 0, "delta": part}]})
    whole.add({"id": "7", "choices": [{"delta": {}, "finish_reason": "stop", "logprobs": CHAT}]})
    whole.add({"id": "7", "choices": [], "usage": {"prompt_tokens": 3}})
    assert whole.answer(chat=True) == {
        "id": "7",
        "object": "chat.completion",
        "usage": {"prompt_tokens": 3},
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": CHAT,
                "message": {
                    "role": "assistant",
                    "reasoning": "thinking",
                    "content": "answer",
                    "tool_calls": [
                        {"id": "c0", "function": {"name": "f", "arguments": ""}},
                        {"id": "c1", "function": {"name": "g", "arguments": "{}"}},
                    ],
                },
            }
        ],
    }


def test_a_stream_of_a_completion_is_put_together() -> None:
    whole = WholeAnswer()
    for text in ("one", " two", ""):
        finish = None if text else "length"
        logprobs = LEGACY if text else None
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
        whole.add({"object": "text_completion", "choices": [choice]})
    (choice,) = whole.answer(chat=False)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "length")
    assert choice["logprobs"]["token_logprobs"] == [-0.1, -0.1]


ODD_VALUES: list[Any] = [
    *(None, True, 10**400, math.nan, "text", [], [None], ["text"], {}, {"a": None}),
]
CHAT_CHUNKS: list[Json] = [
    {"id": "7", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {
        "prompt_token_ids": [1],
        "choices": [
            {"delta": {"reasoning": "a", "content": None}, "logprobs": CHAT, "token_ids": [2]}
        ],
    },
    {
        "choices": [
            {
                "delta": {
                    "content": "b",
                    "tool_calls": [
                        {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}
                    ],
                },
                "finish_reason": None,
                "stop_reason": None,
            }
        ]
    },
    {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}}]},
    {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "x": {"y": 1}}},
]
TEXT_CHUNKS: list[Json] = [
    {"choices": [{"text": "a", "logprobs": LEGACY, "finish_reason": None, "index": 0}]},
    {"choices": [{"text": "b", "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}},
]


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values inside of a JSON value."""
    keys = list(value if isinstance(value, dict) else range(len(value)) if is_list(value) else ())
    inner = [found for key in keys for found in places(value[key], (*place, key))]
    return [place, *inner] if place else inner


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def with_value(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    """A JSON value with another one in a place."""
    found = copy.deepcopy(value)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = odd
    return found


@pytest.mark.whole
@pytest.mark.parametrize("chat", [True, False])
def test_no_value_of_a_chunk_makes_the_proxy_itself_fail(chat: bool) -> None:
    chunks = CHAT_CHUNKS if chat else TEXT_CHUNKS
    body: Json = {"messages": []} if chat else {"prompt": "<think>"}
    body |= {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}

    async def play(chunks: list[Json]) -> None:
        bare: Json = {name: body[name] for name in ("messages", "prompt") if name in body}
        for asked in (body, bare):
            server = LMServer(cast(Any, Unreachable()), RULES, "</think>")
            settings = settings_of(Metrics())
            completion = WatchedCompletion(CompletionRequest(chat, asked), ASKED, server, settings)
            events = [StreamEvent(chunk=copy.deepcopy(chunk)) for chunk in chunks]
            with suppress(UpstreamError):
                json.dumps(await completion.whole(cast(Any, OwnLeg(events))))
            held = AlreadyShown("a", "</think>")
            for event in events:
                with suppress(UpstreamError):
                    held.leave_out_of(event.choice or {})

    async def play_all() -> None:
        for place in places(chunks):
            for odd in ODD_VALUES if len(place) > 1 else ():
                try:
                    await play(with_value(chunks, place, odd))
                except Exception as error:
                    failed[str((*place, str(odd)[:20]))] = repr(error)

    failed: dict[str, str] = {}
    asyncio.run(play_all())
    assert failed == {}


class Unreachable:
    """A server that answers nothing."""

    async def call(self, *_: Any) -> Json:
        raise UpstreamError("unreachable", "it is")

    async def stream(self, *_: Any) -> UpstreamLeg:
        raise UpstreamError("unreachable", "it is")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{"arguments": {"a": 1}}], {"arguments": {"a": 1}}),
        ([{"name": "f", "arguments": None}, {"arguments": "{}"}], {"name": "f", "arguments": "{}"}),
        ([{"arguments": "{"}, {"arguments": "}"}, {"arguments": None}], {"arguments": "{}"}),
        (["text", None, {"name": "f"}], {"name": "f"}),
    ],
    ids=str,
)
def test_a_tool_call_has_the_arguments_that_the_server_gave_it(
    parts: list[Any], expected: Json
) -> None:
    whole = WholeAnswer()
    for part in parts:
        whole.add({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": part}]}}]})
    (call,) = whole.answer(chat=True)["choices"][0]["message"]["tool_calls"]
    assert call == {"function": expected}


def test_tool_calls_without_a_number_are_told_apart_by_their_ids() -> None:
    whole = WholeAnswer()
    for calls in (
        [{"id": "a", "function": {"name": "f"}}, {"id": "b", "function": {"name": "g"}}],
        [{"function": {"arguments": "{}"}}],
    ):
        whole.add({"choices": [{"delta": {"tool_calls": calls}}]})
    first, second = whole.answer(chat=True)["choices"][0]["message"]["tool_calls"]
    assert (first["id"], second["id"]) == ("a", "b")
    assert second["function"] == {"name": "g", "arguments": "{}"}


# Requests


@pytest.mark.parametrize(
    ("chat", "body", "reason"),
    [
        (True, {"n": 1, "best_of": 1, "echo": False, "max_tokens": None}, None),
        (True, {"n": 2}, "n is not 1"),
        (True, {"n": "2"}, "malformed"),
        (True, {"top_logprobs": "many"}, "malformed"),
        (True, {"top_logprobs": -1}, "malformed"),
        (False, {"logprobs": -1}, "malformed"),
        (True, {"max_tokens": {}}, "malformed"),
        (True, {"stream_options": []}, "malformed"),
        (True, {"stop": [7]}, "malformed"),
        (True, {"messages": "hello"}, "malformed"),
        (True, {"model": "m" * 1001}, "malformed"),
        (True, {"messages": [3]}, "malformed"),
        (True, {"post_sampling_probs": True}, "post_sampling_probs"),
        (True, {"return_token_ids": True}, "return_token_ids"),
        (False, {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
        (False, {"best_of": 3}, "best_of"),
        (False, {"echo": True}, "echo"),
        (False, {"n_probs": 3}, "n_probs"),
        (False, {"suffix": "s"}, "suffix"),
        (False, {"prompt": ["one"]}, None),
        (False, {"prompt": ["one", "two"]}, "several prompts"),
        (False, {"prompt": [[1], [2]]}, "several prompts"),
        (False, {"prompt": [1, 2]}, "token prompt"),
        (False, {"prompt": []}, "malformed"),
        (False, {"prompt": None}, "malformed"),
    ],
    ids=str,
)
def test_what_cannot_be_halted_is_known_beforehand(
    chat: bool, body: Json, reason: str | None
) -> None:
    default: Json = {"messages": [{"role": "user", "content": "q"}]} if chat else {"prompt": "q"}
    assert CompletionRequest(chat, default | body).why_not_halted() == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"response_format": {"type": "text"}, "stop": "never", "tools": []}, None),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "structured output"),
        ({"guided_regex": "a"}, "structured output"),
        ({"stop": ["x", "</think>"]}, "stop"),
        ({"stop": "\n"}, "stop"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, "media"),
        ({"messages": [{"content": [{"type": "text", "text": "t"}]}]}, None),
        ({"include_reasoning": False}, "hidden reasoning"),
    ],
    ids=str,
)
def test_what_cannot_be_continued_is_known_beforehand(body: Json, reason: str | None) -> None:
    assert CompletionRequest(True, body).why_not_continued("\n</think>\n\n") == reason


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_second_leg_has_what_is_left_of_the_limits(limit: str) -> None:
    asked = CompletionRequest(
        True, {limit: 100, "min_tokens": 30, "tools": None, "messages": [], "top_k": 4}
    )
    asked.body["request_id"] = "r7"
    body = asked.less_tokens(asked.continued_body(prompt=[1, 2]), 40)
    assert body == {
        "prompt": [1, 2],
        "max_tokens": 60,
        "min_tokens": 0,
        "top_k": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert asked.less_tokens(body, 1_000)["max_tokens"] == 1
    unlimited = CompletionRequest(True, {limit: -1})
    assert unlimited.max_tokens is None and unlimited.less_tokens({limit: -1}, 40) == {limit: -1}


def test_what_is_asked_for_beside_is_what_the_client_did_not_ask_for() -> None:
    own: Json = {"messages": [], "stream_options": {"continuous_usage_stats": True}}
    asked = CompletionRequest(True, own)
    assert asked.watched_body({"extra": 1}) == {
        "messages": [],
        "logprobs": True,
        "top_logprobs": NUM_TOP,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True, "include_usage": True},
        "extra": 1,
    }
    assert (asked.num_top, asked.streams, asked.wants_usage) == (None, False, True)
    assert (
        CompletionRequest(True, {"logprobs": True, "top_logprobs": 40}).watched_body({})[
            "top_logprobs"
        ]
        == 40
    )
    assert CompletionRequest(False, {"logprobs": 0}).num_top == 0
    assert (
        CompletionRequest(False, {"prompt": "p", "logprobs": 2}).continued_body(prompt="q")[
            "logprobs"
        ]
        == 2
    )
    changed = CompletionRequest(True, {"logprobs": True}).continued_body(messages=[1])
    assert (changed["logprobs"], changed["top_logprobs"]) == (True, 0)


# Answers in parts


@given(st.text("ab é", max_size=12), st.text("ab é", min_size=1, max_size=12), st.integers(1, 9))
def test_an_answer_that_comes_anew_goes_on_where_it_broke_off(
    had: str, new: str, size: int
) -> None:
    skip, whole = AlreadyShown(had, "</think>"), had + new
    got = ""
    for i in range(0, len(whole), size):
        choice = {"text": whole[i : i + size]}
        if skip.leave_out_of(choice):
            got += choice["text"]
    assert got == new


@pytest.mark.parametrize("size", [1, 3, 100])
def test_of_another_answer_what_follows_its_thought_is_left(size: int) -> None:
    text = "this time I think so</think> 18"
    skip, got = AlreadyShown("that time", "</think>"), ""
    for i in range(0, len(text), size):
        choice: Json = {"text": text[i : i + size]}
        got += choice["text"] if skip.leave_out_of(choice) else ""
    assert got == "</think> 18"
    skip = AlreadyShown("that time", "</think>")
    parts: list[Json] = [{"reasoning": "this"}, {"reasoning": " time"}, {"content": " 18"}]
    assert [part for part in parts if skip.leave_out_of({"delta": part})] == [{"content": " 18"}]


@pytest.mark.parametrize(
    ("shown", "parts", "got"),
    [
        ("I think 18", [{"reasoning": "I think "}, {"content": "18"}], "18"),
        ("I think", [{"content": "I"}, {"content": " think"}], "I think"),
        ("I think", [{"content": ""}, {"tool_calls": [{"index": 0}]}], ""),
        ("I think", [{"reasoning": "I think"}, {"content": "18"}], "18"),
    ],
    ids=["looks-like-the-thought", "is-the-thought", "tool", "answer"],
)
def test_an_answer_is_told_from_a_thought_that_the_client_has(
    shown: str, parts: list[Json], got: str
) -> None:
    skip = AlreadyShown(shown, "</think>", has_field=True)
    left = [part for part in parts if skip.leave_out_of({"delta": part})]
    assert "".join(part.get("content") or "" for part in left) == got
    assert left[-1:] == parts[-1:] and all("tool_calls" in part or got for part in left)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_another_answer_without_a_thought_is_left_whole(size: int) -> None:
    skip, got, text = AlreadyShown("that time", "</think>"), "", "the answer is 18"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for piece, finish in [*((piece, None) for piece in pieces), ("", "stop")]:
        choice: Json = {"text": piece, "finish_reason": finish}
        got += choice["text"] if skip.leave_out_of(choice) else ""
    assert got == text


def test_what_was_seen_can_be_gone_on_from() -> None:
    seen = GeneratedSoFar()
    first = {"prompt_token_ids": [1, 2], "choices": [{"text": "a", "token_ids": [3]}]}
    seen.add(first)
    # The first half of a character has no text; the second one has both.
    for text, pieces in (("", ["\ufffd"]), ("é", ["\ufffd"]), ("bc", ["b", "c"])):
        content = [{"token": piece, "logprob": -1.0, "id": 4} for piece in pieces]
        seen.add({"choices": [{"text": text, "logprobs": {"content": content}}]})
    assert (seen.text, seen.prompt_ids, seen.ids) == ("aébc", [1, 2], [3, 4, 4, 4, 4])
    assert seen.has_ids and seen.num_tokens == 5
    seen.add({"choices": [{"text": "no id"}]})
    assert not seen.has_ids and seen.num_tokens == 6


@pytest.mark.parametrize(
    ("own", "text", "expected"),
    [
        (["</think>", "26"], " </think> 26", [" </think>", " 26"]),  # vLLM, several in a chunk
        (["b", "c", "17", "<eos>"], " b c 17", [" b", " c", " 17", "<eos>"]),
        (["a", "b"], "ab", ["a", "b"]),
        (["17", "<eos>"], " 17", [" 17", "<eos>"]),
        (["a", "c"], " a b c", ["", " a b c"]),
        (["a", "b"], "a b.", ["", "a b."]),
        (["\ufffd", "\ufffd"], "é", ["", "é"]),
        ([], "ab", ["ab"]),
    ],
)
def test_tokens_have_the_text_of_their_chunk(
    own: list[str], text: str, expected: list[str]
) -> None:
    found = whole_texts([ServedToken(word, -1.0, id=i) for i, word in enumerate(own)], text)
    assert [token.text for token in found] == expected
    assert [token.id for token in found] == ([*range(len(own))] or [None])


def test_a_token_that_a_stop_text_cuts_is_whole_among_the_likeliest() -> None:
    def entry(text: str, number: int, *likely: tuple[str, int]) -> Json:
        return {
            "token": text,
            "id": number,
            "top_logprobs": [{"token": t, "id": i} for t, i in likely],
        }

    content = [entry(" ", 1, (" }", 1)), entry("", 2, ("b", 3)), entry("é", 4, ("\ufffd", 4))]
    tokens = [ServedToken(one["token"], -1.0, id=one["id"]) for one in content]
    found = uncut({"logprobs": {"content": content}}, tokens)
    assert [(token.text, token.id) for token in found] == [(" }", 1), ("", 2), ("é", 4)]
    for odd in (None, {}, {"content": [None] * 3}, {"content": content[:1]}, {"content": "any"}):
        assert uncut({"logprobs": odd}, tokens) == tokens


def settings_of(metrics: Metrics, patience: float = 9.0) -> CompletionSettings:
    room = ProbeRoom(9, lambda: 0)
    control, acceptance = ConstantControl(), Acceptance("off")
    return CompletionSettings(HEAD, control, metrics, False, patience, room, 9.0, True, acceptance)


def watched(request: CompletionRequest, patience: float = 600.0) -> WatchedCompletion:
    """A completion without a server."""
    server = LMServer(cast(Any, None), RULES, "</think>")
    return WatchedCompletion(request, ASKED, server, settings_of(Metrics(), patience))


class OwnLeg:
    """Events without a server."""

    def __init__(self, events: list[StreamEvent], failure: Exception | None = None) -> None:
        self.events, self.failure, self.num_read = events, failure, 0

    async def __aiter__(self) -> AsyncIterator[StreamEvent]:
        for event in self.events:
            self.num_read += 1
            yield event
        if self.failure:
            raise self.failure

    async def close(self) -> None:
        pass


def test_a_leg_that_is_held_forgets_nothing_and_has_a_limit() -> None:
    num = 40
    events = [StreamEvent(b"x" * 2**20, {"choices": [{"text": str(i)}]}) for i in range(num)]

    async def play() -> None:
        leg: Any = OwnLeg(events, UpstreamError("cut", "cut"))
        held = HeldBackLeg(leg)
        while leg.num_read <= _MOST_HELD // 2**20:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert leg.num_read == _MOST_HELD // 2**20 + 1
        assert held.enough.done()
        got = []
        with pytest.raises(UpstreamError):
            async for event in held:
                got.append(event)
        assert got == events
        held = HeldBackLeg(OwnLeg(events[:2]))  # type: ignore[arg-type]
        await asyncio.sleep(0.0)
        await held.close()
        assert held.num_tokens() == 2

    asyncio.run(play())


def test_a_leg_that_is_held_tells_when_it_is_whole_and_keeps_nobody_waiting() -> None:
    last = StreamEvent(b"", {"choices": [{"text": "", "finish_reason": "stop"}]})
    called: list[bool] = []

    async def play() -> None:
        leg: Any = OwnLeg([last], RuntimeError("a mistake of ours"))
        held = HeldBackLeg(leg)
        held.enough.add_done_callback(lambda enough: called.append(enough.done()))
        with pytest.raises(UpstreamError):
            async for event in held:
                assert event is last
        held.enough.add_done_callback(lambda enough: called.append(enough.done()))
        await asyncio.sleep(0)

    asyncio.run(play())
    assert called == [True, True]


@pytest.mark.parametrize(
    ("chunks", "begins", "may_be_empty"),
    [
        ([{"delta": {"role": "assistant"}}, {"delta": {"content": "18"}}], True, True),
        ([{"text": "", "finish_reason": "stop"}], False, True),
        ([{"delta": {"reasoning": "hm"}}, {"delta": {"content": "18"}}], False, False),
        ([], False, False),
    ],
    ids=["answer", "empty", "thought", "nothing"],
)
def test_a_second_leg_has_to_answer(
    chunks: list[Json], begins: bool, may_be_empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def content() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield StreamEvent(chunk={"choices": [chunk]}).encode()

    async def ask(*_: Any) -> UpstreamLeg:
        kind = {"content-type": "text/event-stream"}
        return UpstreamLeg(httpx2.Response(200, headers=kind, content=content()))

    async def begun(may_be_empty: bool) -> list[Json]:
        completion = watched(CompletionRequest(True, {}))
        leg = await completion._closer.begun({}, may_be_empty)
        return [event.chunk["choices"][0] async for event in leg if event.chunk]

    monkeypatch.setattr(ThoughtCloser, "ask", ask)
    for empty, expected in ((False, begins), (True, may_be_empty)):
        if expected:
            assert asyncio.run(begun(empty)) == chunks
        else:
            with pytest.raises(UpstreamError, match="did not answer"):
                asyncio.run(begun(empty))


@pytest.mark.parametrize("ends", [True, False])
def test_an_answer_that_breaks_off_behind_its_end_is_whole(ends: bool) -> None:
    settings = settings_of(Metrics())
    server = LMServer(None, RULES, "</think>")  # type: ignore[arg-type]
    completion = WatchedCompletion(
        CompletionRequest(False, {"prompt": "q"}), ASKED, server, settings
    )
    choice = {"text": "18", "finish_reason": "stop" if ends else None}
    leg: Any = OwnLeg([StreamEvent(chunk={"choices": [choice]})], UpstreamError("cut", "cut"))

    async def play() -> Json:
        return await completion.whole(leg)

    if ends:
        assert asyncio.run(play())["choices"][0]["text"] == "18"
    else:
        with pytest.raises(UpstreamError):
            asyncio.run(play())


def test_numbers_of_tokens_without_a_text_are_kept() -> None:
    settings = settings_of(Metrics())
    server = LMServer(None, RULES, "</think>")  # type: ignore[arg-type]
    completion = WatchedCompletion(
        CompletionRequest(False, {"logprobs": 1, "prompt": ""}), ASKED, server, settings
    )
    # The first half of a character has no text.
    choices: list[Json] = [
        {"text": text, "logprobs": LEGACY, "finish_reason": finish}
        for text, finish in (("", None), ("é", None), ("", "stop"))
    ]
    leg: Any = OwnLeg([StreamEvent(chunk={"choices": [choice]}) for choice in choices])

    async def play() -> list[Any]:
        events = [event async for event in completion._events_of_leg(leg, GeneratedSoFar())]
        return [event.chunk["choices"][0]["logprobs"] for event in events if event.chunk]

    assert asyncio.run(play()) == [LEGACY] * 3


def test_a_thought_whose_tokens_are_named_by_their_ids_is_not_watched() -> None:
    metrics = Metrics()
    settings = settings_of(metrics)
    server = LMServer(None, RULES, "</think>")  # type: ignore[arg-type]
    completion = WatchedCompletion(
        CompletionRequest(False, {"prompt": "<think>"}), ASKED, server, settings
    )
    choice = {"text": "x", "logprobs": {"tokens": ["token_id:7"]}}
    events = [StreamEvent(chunk={"choices": [choice]}) for _ in range(20)]
    events.append(StreamEvent(chunk={"choices": [{"text": "", "finish_reason": "stop"}]}))
    leg: Any = OwnLeg(events)

    async def play() -> Json:
        return await completion.whole(leg)

    told = asyncio.run(play())["usage"]["haltwise"]
    assert (told["halted"], told["fallback"]) == (False, "token texts")


@pytest.mark.parametrize(
    ("text", "body", "said"),
    [
        ("hm", {}, [7]),
        ("h\u00e9", {}, None),
        ("hm", {"stop": "never"}, None),
    ],
    ids=["whole", "character", "stop"],
)
def test_llama_server_goes_on_from_text_where_its_ids_have_holes(
    text: str, body: Json, said: list[Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of texts alone would be as many prompts."""

    async def rendered(*_: Any) -> str:
        return "q<think>"

    monkeypatch.setattr(LlamaServer, "rendered", rendered)
    server = LlamaServer(None, RULES, "</think>\n\n")  # type: ignore[arg-type]
    # What the chunk shows may be longer than what its numbers tell of.
    logprobs = {"content": [{"token": text[-1], "id": 7, "logprob": -1.0}]}
    seen = GeneratedSoFar()
    seen.add({"choices": [{"delta": {"reasoning_content": text}, "logprobs": logprobs}]})
    asked = CompletionRequest(True, {"messages": []} | body)
    found = asyncio.run(server.body_after(asked, seen, "</think>\n\n"))
    parts, whole = ["q<think>", *(said or []), "</think>\n\n"], f"q<think>{text}</think>\n\n"
    assert found["prompt"] == (parts if said else whole)


@pytest.mark.parametrize(
    ("piece", "prompt"), [("\u00d7", ["q", 7, "\u00e9", 7, "t"]), (" \u00d7", "qh\u00e9mt")]
)
def test_llama_server_goes_on_from_ids_but_for_what_may_be_a_part_of_a_character(
    piece: str, prompt: Any
) -> None:
    """Not where its tokenizer begins each text with a space: then it goes on from one text."""

    class Upstream:
        async def call(self, path: str, asked: Json, _: Any) -> Json:
            return {"tokens": [{"id": 1, "piece": piece}]} if path == "/tokenize" else {}

    server = LlamaServer(cast(Any, Upstream()), RULES, "</think>\n\n")
    asyncio.run(server.learn([]))
    seen = GeneratedSoFar()
    for text in "h\u00e9m":
        logprobs = {"content": [{"token": text, "id": 7, "logprob": -1.0}]}
        seen.add({"choices": [{"text": text, "logprobs": logprobs}]})
    seen.add({"choices": [{"text": "", "logprobs": None}]})
    found = asyncio.run(server.body_after(CompletionRequest(False, {"prompt": "q"}), seen, "t"))
    assert found["prompt"] == prompt


def test_llama_server_goes_on_from_all_ids_of_a_text_that_is_told_in_one() -> None:
    """As an audit knows a thought: one text, and the ids of its tokens."""
    server = LlamaServer(cast(Any, None), RULES, "</think>\n\n")
    seen = GeneratedSoFar(["hm, so"], [7, 8, 9], None, 3)
    found = asyncio.run(server.body_after(CompletionRequest(False, {"prompt": "q"}), seen, "t"))
    assert found["prompt"] == ["q", 7, 8, 9, "t"]


@pytest.mark.parametrize("data", [None, [], [3], "x", {}], ids=str)
def test_a_server_without_a_model_is_asked_again_later(data: Any) -> None:
    class Upstream:
        async def call(self, *_: Any) -> Json:
            return {"data": data}

    upstream: Any = Upstream()
    server = LMServer(upstream, RULES, "</think>")
    with pytest.raises(UpstreamError, match="no model yet") as raised:
        asyncio.run(find_lm_server(server, "auto", []))
    assert raised.value.kind == "status"


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|user|>q<|assistant|><think>\n", True),
        ("7 + 8 = <think>", True),
        ("<think>\nLet me", True),
        ("q: <think>\nLet me", True),
        ("What is <think>?\n<|assistant|><think>", True),
        ("q", None),
        ("What is <think>?", None),
        ("What is <think>?\n<|assistant|>", None),
        ("What is\n<think>\n<\uff5cAssistant\uff5c>", None),
        ("[INST]<think>[/INST]", None),
        ("<think>a</think> 15", None),
        ("<think>\n\n</think>\n\n", False),
        ("What is <think>?\n<|assistant|><think></think>", False),
    ],
)
def test_a_marker_in_a_prompt_is_told_from_one_that_is_mentioned(
    prompt: str, opened: bool | None
) -> None:
    assert opened_in_text(prompt, RULES) is opened


@pytest.mark.parametrize(
    ("messages", "template", "opened"),
    [
        ([{"role": "user", "content": "q"}], "{}<think>\n", True),
        ([{"role": "user", "content": "q"}], "{}", None),
        ([{"role": "user", "content": "<think>"}], "{}", None),
        ([{"role": "user", "content": "</think>"}], "{}<think>", True),
        ([{"role": "user", "content": None}], "<think>a</think>{}<think></think>", False),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "{}<think>", True),
        ([{"role": "user"}, {"role": "assistant", "content": "<think>a"}], "{}<think>a", True),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "{}<think>a</think>x", False),
        ([{"role": "user"}, {"role": "assistant"}], "{}</think> says <think>", False),
        ([{"role": "assistant", "content": "x"}], "x<think>", True),
        ([], "", None),
    ],
    ids=str,
)
def test_what_a_template_makes_of_messages_tells_whether_a_thought_is_open(
    messages: list[Json], template: str, opened: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rendered(self: LMServer, asks: Json, headers: Any) -> str:
        assert asks["tools"] == [{"a": 1}] and asks["add_generation_prompt"] is True
        contents = (message.get("content") for message in asks["messages"][:1])
        texts = (text[-1]["text"] if isinstance(text, list) else text for text in contents)
        return template.replace("{}", "".join(map(str, texts)))

    monkeypatch.setattr(LMServer, "rendered", rendered)
    server = LMServer(None, RULES, "</think>")  # type: ignore[arg-type]
    asked = CompletionRequest(True, {"messages": messages, "tools": [{"a": 1}]})
    assert asyncio.run(server.opened(asked)) is opened
    assert asked.body == {"messages": messages, "tools": [{"a": 1}]}


@pytest.mark.parametrize("marker", ["\u25c1think\u25b7", "<think>"])
def test_markers_may_have_several_tokens_that_end_inside_of_characters(marker: str) -> None:
    halting = replace(HEAD.config.halting, think_start=marker, think_end="/" + marker)
    head = HaltHead(replace(HEAD.config, halting=halting), HEAD.weights)
    server = LMServer(None, PointRules(halting), "/" + marker)  # type: ignore[arg-type]
    asked = CompletionRequest(False, {"prompt": "q"})
    settings = replace(settings_of(Metrics()), head=head)
    completion = WatchedCompletion(asked, ASKED, server, settings)
    leg: Any = OwnLeg([])
    for text in ("\n", marker, "a", "b", "/" + marker, "18"):
        for i in range(len(text)):
            # The first of a character's two tokens has no text of its own.
            pieces = [("", "\ufffd"), (text[i], "\ufffd")]
            for shown, piece in pieces if ord(text[i]) > 127 else [(text[i], text[i])]:
                choice = {"text": shown, "logprobs": {"tokens": [piece]}, "finish_reason": None}
                leg.events.append(StreamEvent(chunk={"choices": [choice]}))
    leg.events.append(DONE)
    told = asyncio.run(completion.whole(leg))["usage"]["haltwise"]
    num_marker = len(marker) + sum(ord(letter) > 127 for letter in marker)
    assert (told["reason"], told["position"]) == ("closed by the LM", 2 * num_marker + 4)


@pytest.mark.parametrize(
    ("lm", "names", "is_of"),
    [
        ("Qwen/Qwen3-8B", ["Qwen/Qwen3-8B"], True),
        ("Qwen/Qwen3-8B", ["/models/qwen3-8b-Q4_K_M.gguf"], True),
        ("Qwen/Qwen3-8B", ["alias", "/models/Qwen3-8B/"], True),
        ("one, Qwen/Qwen3-8B", ["qwen3_8b"], True),
        ("Qwen/Qwen3-8B", ["deepseek-r1"], False),
        ("", ["deepseek-r1"], True),
        ("Qwen/Qwen3-8B", [], True),
    ],
)
def test_an_lm_is_known_by_its_name(lm: str, names: list[str], is_of: bool) -> None:
    server = LMServer(None, RULES, "</think>")  # type: ignore[arg-type]
    server.names = names
    assert server.is_of(lm) == is_of


# Questions, and work that takes its time


def headers_of(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", key.encode())]


def test_a_question_is_asked_once_for_all_who_wait_and_its_answer_kept() -> None:
    asked, told = [], asyncio.Event()

    async def ask(headers: Any) -> int:
        asked.append(headers)
        await told.wait()
        return 7

    async def play() -> list[Any]:
        question = SharedQuestion(ask)
        waiting = [asyncio.create_task(question.answer(headers_of("a"))) for _ in range(100)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # who asked first leaves
        told.set()
        found = await asyncio.gather(*waiting[1:])
        return [*found, await question.answer(headers_of("b"))]

    assert asyncio.run(play()) == [7] * 100 and asked == [headers_of("a")]


def test_a_server_that_is_silent_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_asked = 0

    async def ask(headers: Any) -> int:
        nonlocal num_asked
        num_asked += 1
        await asyncio.Event().wait()
        return 7

    async def play() -> None:
        question = SharedQuestion(ask)
        waiting = [question.answer(headers_of("a")) for _ in range(9)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(UpstreamError):
            await question.answer(headers_of("b"))
        assert {getattr(error, "kind", None) for error in found} == {"timeout"}

    monkeypatch.setattr(upstream, "_CALL_TIMEOUT", 0.01)
    asyncio.run(play())
    assert num_asked == 1


def test_a_key_that_is_refused_refuses_nobody_else() -> None:
    async def ask(headers: Any) -> int:
        if headers != headers_of("good"):
            raise UpstreamError("status", "upstream answered a call with 401")
        return 7

    async def play() -> int:
        question = SharedQuestion(ask)
        with pytest.raises(UpstreamError):
            await question.answer(headers_of("bad"))
        return await question.answer(headers_of("good"))

    assert asyncio.run(play()) == 7


def test_a_template_that_is_silent_is_waited_for_once() -> None:
    class Silent(LMServer):
        num_asked = 0

        async def rendered(self, asks: Json, headers: Any) -> str:
            self.num_asked += 1
            raise UpstreamError("timeout", "nothing")

    async def play() -> int:
        server = Silent(None, RULES, "</think>")  # type: ignore[arg-type]
        asked = CompletionRequest(True, {"messages": []})
        assert [await server.opened(asked) for _ in range(5)] == [None] * 5
        return server.num_asked

    assert asyncio.run(play()) == 1


@pytest.mark.whole
def test_large_bodies_are_read_and_written_while_streams_go_on() -> None:
    body = {"messages": [{"role": "user", "content": "é\ud800"}], "deep": [[]] * 300_000}
    data = json.dumps(body).encode()

    async def play() -> int:
        num_ticks = 0

        async def tick() -> None:
            nonlocal num_ticks
            while True:
                await asyncio.sleep(0.001)
                num_ticks += 1

        ticking = asyncio.create_task(tick())
        assert await aside.read_object(data) == body
        assert await aside.encoded(body) == data
        for wrong in (b"[" * 10**6, b'{"a": ' + b"[" * 10**6, b"{}" + b" " * 10**6 + b"x"):
            assert await aside.read_object(wrong) is None
        ticking.cancel()
        return num_ticks

    assert aside.is_large(body) and not aside.is_large({"a": ["x"] * 1000})
    assert asyncio.run(play()) > 3


@given(st.dictionaries(st.text(max_size=3), st.text() | st.floats() | st.lists(st.none())))
def test_large_bodies_are_read_as_small_ones_are(body: Json) -> None:
    padded = json.dumps(body | {"pad": "x" * 300_000}).encode()
    found = asyncio.run(aside.read_object(padded))
    assert str(found) == str(json.loads(padded))


# Settings


def test_every_line_of_the_log_is_a_json_object() -> None:
    lines = JsonLines()
    own = logging.makeLogRecord({"msg": '{"a": 1}', "name": "haltwise"})
    assert lines.format(own) == '{"a": 1}'
    try:
        raise ValueError("two\nlines")
    except ValueError:
        about = {"msg": "it %s\nhere", "args": ("failed",), "exc_info": sys.exc_info()}
    found = json.loads(lines.format(logging.makeLogRecord(about | {"name": "uvicorn.error"})))
    assert (found["message"], found["logger"]) == ("it failed\nhere", "uvicorn.error")
    assert found["traceback"].endswith("two\nlines")


def test_the_upstream_is_named_as_clients_name_it() -> None:
    for text in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert ServeConfig(Path("head"), upstream=text).connections.url == "http://h:1"
    deep = ServeConfig(Path("head"), upstream="https://h/lm/v1")
    assert deep.connections.url == "https://h/lm"


@pytest.mark.parametrize(
    ("host", "is_let_in"),
    [
        *(("localhost", True), ("LOCALHOST:8700", True), ("127.0.0.9:1", True), ("[::1]:1", True)),
        *(("::1", True), ("own.example", True), ("own.example:", True)),
        *(("", False), ("x", False), ("localhost.evil", False), ("evil:localhost", False)),
        *(("127.0.0.1.evil", False), ("own.example@evil", False), ("[", False), ("::1:1]", False)),
    ],
)
def test_browsers_come_in_by_known_names(host: str, is_let_in: bool) -> None:
    config = ServeConfig(Path("head"), allowed_hosts=("own.example",))
    assert config.lets_browsers_in_by(host) == is_let_in
    assert ServeConfig(Path("head"), host="0.0.0.0").lets_browsers_in_by(host)


def test_a_key_has_its_terms_and_is_kept_as_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({" sk-a\n": {"price": 2}, "sk-é": {"off": True}}))
    keys = APIKeys(path, Customer(Terms(1.0, max_tokens=9), 0.5))
    assert keys.customer_of("Bearer sk-a") == Customer(Terms(2.0, max_tokens=9))
    assert keys.customer_of("bearer  sk-a") == Customer(Terms(2.0, max_tokens=9))
    monkeypatch.setenv("UPSTREAM_KEY", "sk-inner\n")
    assert ServeConfig(Path("head"), upstream_key_env="UPSTREAM_KEY").connections.key == "sk-inner"
    # HTTP headers are bytes, shown as Latin-1.
    found = keys.customer_of("Bearer " + "sk-é".encode().decode("latin-1"))
    assert found == Customer(Terms(0.0, max_tokens=9))  # off lifts no cap
    for other in (None, "", "sk-a", "Basic sk-a", "Bearer", "Bearer sk-", "Bearer sk-aa"):
        assert keys.customer_of(other) is None
    assert "sk-" not in repr(vars(keys))


def test_headers_of_one_connection_go_no_further() -> None:
    headers = [(b"Connection", b"close, X-Own"), (b"x-own", b"1"), (b"TE", b"trailers")]
    headers += [(b"Host", b"h"), (b"Accept", b"a"), (b"accept", b"b")]
    assert _without(headers, {b"host"}) == [(b"accept", b"a"), (b"accept", b"b")]


@pytest.mark.parametrize(
    ("dialect", "is_all", "expected"),
    [
        (ServerDialect, True, {"prompt": "q<think> a b</think>"}),
        (VllmDialect, True, {"prompt": [1, 2, 5, 6, 9]}),
        (VllmDialect, False, {"prompt": "q<think> a b</think>"}),
        (LlamaDialect, True, {"prompt": [1, 2, 5, 6, 9]}),
        (LlamaDialect, False, {"prompt": [1, 2, " a b", 9]}),
    ],
)
def test_a_prompt_goes_on_from_ids_as_far_as_all_are_known(
    dialect: type[ServerDialect], is_all: bool, expected: Json
) -> None:
    upstream: Any = None
    said = [ServedToken(" a", id=5), ServedToken(" b", id=6)]
    prompt, tail = ServedPrompt("q<think>", [1, 2]), ServedPrompt("</think>", [9])
    assert dialect(upstream).continued(prompt, said, is_all, tail) == expected
    unknown = dialect(upstream).continued(ServedPrompt("q<think>"), said, is_all, tail)
    assert unknown == {"prompt": "q<think> a b</think>"}


def test_a_message_that_the_assistant_has_begun_goes_on() -> None:
    upstream: Any = None
    ollama, said = OllamaDialect(upstream), [ServedToken(" a"), ServedToken(" b")]
    asked: list[Json] = [{"role": "user", "content": "q"}]
    begun = [*asked, {"role": "assistant", "content": "<think>"}]
    for messages, before in ((asked, ""), (begun, "<think>")):
        found = ollama.continued(
            ServedPrompt("q", messages=messages), said, True, ServedPrompt("!")
        )
        expected = {"role": "assistant", "content": before + " a b!"}
        assert found == {"messages": [*asked, expected]}
    nothing = ServedPrompt("", [])
    assert ollama.continued(ServedPrompt("q"), [], True, nothing) == {"messages": asked}


def test_certificates_come_from_where_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, one = tmp_path / "ca.pem", Path(certifi.where()).read_text().split("-----END")[0]
    file.write_text(one[one.index("-----BEGIN") :] + "-----END CERTIFICATE-----\n")
    contexts: list[ssl.SSLContext] = []
    transport = httpx2.AsyncHTTPTransport

    def noted(verify: ssl.SSLContext, **settings: Any) -> httpx2.AsyncHTTPTransport:
        contexts.append(verify)
        return transport(verify=verify, **settings)

    monkeypatch.setattr(httpx2, "AsyncHTTPTransport", noted)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    Upstream(UpstreamConfig("https://lm.example", max_streams=1))
    (context,) = contexts
    assert len(context.get_ca_certs()) == 1
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED


def test_a_stream_that_breaks_off_amid_one_of_its_choices_is_not_whole() -> None:
    answer = watched(CompletionRequest(True, {"messages": []}))._answer
    for index, finish in ((0, None), (1, None), (0, "stop")):
        chunk: Json = {"choices": [{"index": index, "delta": {}, "finish_reason": finish}]}
        answer.shown(StreamEvent(chunk=chunk), chunk)
    with pytest.raises(UpstreamError, match="broke off"):
        answer.check_whole()
    answer.shown(StreamEvent(chunk=chunk), {"choices": [{"index": 1, "finish_reason": "stop"}]})
    answer.check_whole()


def test_an_event_of_many_lines_is_put_together_once() -> None:
    for line in (b"data: x\n", b"data: x\r\n", b"data: x\r"):
        reader = EventReader()
        assert all([*reader.feed(line)] == [] for _ in range(1000))
        assert len(reader._rest) == 1000


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ("7", 7, 7),
        (" 0 ", 0, 0),
        ("9" * 5000, 1e8, 1e9),
        ("", 0, 0),
        ("-3", 0, 0),
        ("soon", 0, 0),
        ("²", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2215 07:28:00 GMT", 1e8, 1e10),
        ("Wed, 21 Oct 2215 07:28:00", 1e8, 1e10),
        ("Wed, 99 Oct 2215", 0, 0),
    ],
)
def test_a_server_says_in_seconds_or_by_a_date_when_to_come_back(
    told: str, least: float, most: float
) -> None:
    headers = [(b"retry-after", told.encode())]
    assert least <= UpstreamLeg(httpx2.Response(429, headers=headers)).wait <= most
    assert UpstreamLeg(httpx2.Response(500, headers=headers)).wait == 0
