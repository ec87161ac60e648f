"""Servers and clients that break HTTP itself: what the other side gets.

The upstream is a bare socket here: each question names what bytes it answers with.
"""

import asyncio
import gzip
import json
import logging
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from haltwise.proxy import ServeConfig, upstream
from haltwise.proxy.config import UpstreamConfig
from haltwise.proxy.wire import UpstreamError
from tests.heads import CLOSE
from tests.proxy.fake_upstream import Plan, listening_socket
from tests.proxy.proxies import (
    PATHS,
    PATIENCE,
    Pair,
    Pairs,
    Proxy,
    ask,
    connected,
    proxied,
    request_bytes,
    saved_head,
    wait_until,
)

SAID = "hello you"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CLOSES = b"Connection: close\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    chunk = {"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n".encode()


WHOLE = event("hello ") + event("you", "stop") + b"data: [DONE]\n\n"


#: A thought of three tokens, and an answer.
THOUGHT = OK + CLOSES + b"\r\n" + b"".join(map(event, ("a", "b", "c", "</think>")))
THOUGHT += event("mine", "stop") + b"data: [DONE]\n\n"


def chunked(data: bytes, size: int = 9) -> bytes:
    pieces = (data[i : i + size] for i in range(0, len(data), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def bomb(num_levels: int) -> bytes:
    """400 MB of zeros, packed so many times."""
    packing = zlib.compressobj(9, wbits=31)
    data = b"".join(packing.compress(bytes(2**20)) for _ in range(400)) + packing.flush()
    for _ in range(num_levels - 1):
        data = gzip.compress(data)
    return data


# What a server sends, and what the client of a watched stream gets: what was said, an error, or a
# status as it came.
SERVERS: dict[str, tuple[bytes, str | int]] = {
    "plain": (OK + CLOSES + b"\r\n" + WHOLE, SAID),
    "redirect": (b"HTTP/1.1 302 F\r\nLocation: http://evil/\r\nContent-Length: 0\r\n\r\n", 302),
    "redirect with a body": (b"HTTP/1.1 307 T\r\nLocation: /x\r\nContent-Length: 2\r\n\r\nhi", 307),
    "bomb": (OK + CLOSES + b"Content-Encoding: gzip\r\n\r\n" + bomb(1), "error"),
    "bomb in a bomb": (OK + CLOSES + b"Content-Encoding: gzip, gzip\r\n\r\n" + bomb(2), "error"),
    "not packed": (OK + CLOSES + b"Content-Encoding: gzip\r\n\r\n" + WHOLE, "error"),
    "informational": (
        b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 103 E\r\nLink: x\r\n\r\n" + OK + CLOSES + b"\r\n" + WHOLE,
        SAID,
    ),
    "switching": (b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nx", "error"),
    "trailers": (
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(WHOLE) + b"0\r\nX-Haltwise: x\r\n\r\n",
        SAID,
    ),
    "bad chunk": (
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(event("a")) + b"zz\r\n",
        "error",
    ),
    "endless chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffff\r\n" + WHOLE, SAID),
    "too long": (OK + b"Content-Length: 100000\r\n\r\n" + WHOLE, SAID),
    "cut": (OK + b"Content-Length: 100000\r\n\r\n" + event("hello "), "error"),
    "too short": (OK + b"Content-Length: 10\r\n\r\n" + WHOLE, "error"),
    "two lengths": (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n" + WHOLE, "error"),
    "length and chunks": (
        OK
        + b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunked(WHOLE)
        + b"0\r\n\r\n",
        SAID,
    ),
    "less than nothing": (OK + b"Content-Length: -1\r\n\r\n" + WHOLE, "error"),
    "control in a header": (OK + CLOSES + b"X-A: b\x00c\r\n\r\n" + WHOLE, "error"),
    "folded and Latin headers": (
        OK + CLOSES + b"X-A: b\r\n  c\r\nX-B: \xff\r\nX-C:\r\n\r\n" + WHOLE,
        SAID,
    ),
    "huge header": (OK + CLOSES + b"X-A: " + b"y" * 300_000 + b"\r\n\r\n" + WHOLE, "error"),
    "many headers": (
        OK + CLOSES + b"".join(b"X-%d: y\r\n" % i for i in range(3000)) + b"\r\n" + WHOLE,
        SAID,
    ),
    "nothing": (b"HTTP/1.1 204 N\r\n\r\n", 204),
    "not modified": (b"HTTP/1.1 304 N\r\n\r\n", 304),
    "status 999": (b"HTTP/1.1 999 X\r\nContent-Length: 2\r\n\r\nhi", "error"),
    "status 600": (b"HTTP/1.1 600 X\r\nContent-Length: 2\r\n\r\nhi", "error"),
    "status 099": (b"HTTP/1.1 099 X\r\nContent-Length: 2\r\n\r\nhi", "error"),
    "another protocol": (b"\x15\x03\x01\x00\x02\x02\x28", "error"),
    "closed": (b"", "error"),
    "no UTF-8": (OK + CLOSES + b"\r\n" + WHOLE.replace(b"hello", b"h\xff"), "h\ufffd you"),
    "other fields": (OK + CLOSES + b"\r\nevent: x\nid: 1\nretry: 5\n" + WHOLE, SAID),
    "other line ends": (OK + CLOSES + b"\r\n" + WHOLE.replace(b"\n", b"\r"), SAID),
    "no lines": (OK + CLOSES + b"\r\n" + b"x" * 17 * 2**20, "error"),
    "lines without an end": (OK + CLOSES + b"\r\n" + (b"data: x\n" * 2**21) + b"x", "error"),
}


class RawUpstream:
    """Answers each question with the bytes that it names, on a connection of its own."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length or 0))
            if b"/v1/models" in head:
                models = json.dumps({"data": [{"id": "m", "owned_by": "vllm"}]}).encode()
                data = OK + CLOSES + b"\r\n" + models
            elif b"/chat/completions" in head:
                data = SERVERS[json.loads(body)["messages"][0]["content"]][0]
            elif b"/v1/completions" not in head:
                data = b"HTTP/1.1 404 N\r\nContent-Length: 0\r\n\r\n"
            else:
                name, _, rest = json.loads(body)["prompt"].partition("\n")
                data = SERVERS[name][0] if "</think>" in rest else THOUGHT
            for i in range(0, len(data), 2**14):
                writer.write(data[i : i + 2**14])
                await writer.drain()
        writer.close()


@contextmanager
def running(answer: Any) -> Iterator[str]:
    """The address of a bare server."""
    listener, loop = listening_socket(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    made = asyncio.start_server(answer, sock=listener, limit=2**20)
    asyncio.run_coroutine_threadsafe(made, loop).result(PATIENCE)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    head = saved_head(tmp_path_factory.mktemp("head"))
    with running(RawUpstream()) as url, proxied(ServeConfig(head=head, upstream=url)) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def no_defects(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.records if record.exc_info]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def got(proxy: Proxy, name: str, stream: bool, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body, which may be cut."""
    body = {"model": "m", "messages": [{"role": "user", "content": name}], "stream": stream}
    found, told = httpx2.Client(timeout=PATIENCE), b""
    headers = headers | {"Accept-Encoding": "identity"}
    with found.stream("POST", proxy.url + PATHS[True], json=body, headers=headers) as reply:
        with suppress(httpx2.RemoteProtocolError):
            for data in reply.iter_raw():
                told += data
        return reply.status_code, told


@pytest.mark.whole
@pytest.mark.parametrize("name", SERVERS)
def test_whatever_a_server_sends_its_client_gets_an_answer_or_an_error(
    hostile: Proxy, name: str
) -> None:
    expected = SERVERS[name][1]
    status, told = got(hostile, name, True, {})
    whole_status, whole = got(hostile, name, False, {})
    if isinstance(expected, int):
        assert status == whole_status == expected and told == whole
    elif expected == "error":
        assert status in (200, 502) and b'"upstream_error"' in told and b"[DONE]" not in told
        assert whole_status == 502 and json.loads(whole)["error"]["message"]
    else:
        lines = told.decode(errors="replace").split("\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
        assert (status, said) == (200, expected) and told.endswith(b"data: [DONE]\n\n")
        assert json.loads(whole)["choices"][0]["message"]["content"] == expected
    assert hostile.metric("haltwise_streams_in_flight") == 0


@pytest.mark.parametrize("name", SERVERS)
def test_whatever_a_server_sends_is_passed_on_or_an_error(hostile: Proxy, name: str) -> None:
    status, told = got(hostile, name, True, {"X-Haltwise-Off": "1"})
    assert 200 <= status < 600
    if status == 502:
        assert json.loads(told)["error"]["message"]
    elif SERVERS[name][1] == SAID:
        assert told.startswith(WHOLE[:20]) or name in ("other fields", "other line ends")
    assert hostile.metric("haltwise_streams_in_flight") == 0


@pytest.mark.parametrize("name", SERVERS)
def test_whatever_a_second_leg_sends_the_client_gets_an_answer(hostile: Proxy, name: str) -> None:
    """The first leg goes on, unless the second has begun to answer: then that breaks off."""
    headers = {"X-Haltwise-Price": "0", "X-Haltwise-Max-Tokens": "2"}
    body = {"model": "m", "prompt": f"{name}\n<think>\n", "stream": True}
    told = hostile.client.post(PATHS[False], json=body, headers=headers).content
    expected = SERVERS[name][1]
    if name in ("cut", "bad chunk"):
        assert b'"upstream_error"' in told and b"[DONE]" not in told
        return
    lines = told.decode(errors="replace").split("\n")
    choices = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
    said = "".join(
        choice.get("text", "") + choice.get("delta", {}).get("content", "")
        for (choice,) in filter(None, choices)
    )
    is_said = isinstance(expected, str) and expected != "error"
    assert said == (f"ab{CLOSE}{expected}" if is_said else "abc</think>mine")
    assert told.endswith(b"data: [DONE]\n\n")


def test_questions_of_the_proxy_s_own_have_answers_that_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(OK + b"\r\n{")
            while True:
                writer.write(b" " * 2**16)
                await writer.drain()

    async def asked(url: str) -> None:
        await upstream.Upstream(UpstreamConfig(url)).call("/v1/models", None, [])

    monkeypatch.setattr(upstream, "_LONGEST_BODY", 2**20)
    with running(endless) as url, pytest.raises(UpstreamError, match="not end"):
        asyncio.run(asked(url))


# Clients

BODY = json.dumps({"model": "m", "messages": Plan("hostile").messages()}).encode()
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
TE = b"Transfer-Encoding: chunked\r\n"


def request(
    headers: bytes = b"", data: bytes = BODY, length: bytes | None = None,
    start: bytes = b"POST /v1/chat/completions HTTP/1.1",
) -> bytes:  # fmt: skip
    """A request with any length, so that its connection ends behind it."""
    length = b"Content-Length: %d\r\n" % len(data) if length is None else length
    own = b"Host: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return start + b"\r\n" + own + headers + length + b"\r\n" + data


def with_field(field: bytes) -> bytes:
    return BODY[:-1] + b", " + field + b"}"


# What a client sends, and the status that it gets.
CLIENTS: dict[str, tuple[bytes, int]] = {
    "plain": (request(), 200),
    "huge header": (request(b"X-A: " + b"y" * 10**6 + b"\r\n"), 400),
    "bad chunk": (request(length=TE, data=b"zz\r\nhello\r\n0\r\n\r\n"), 400),
    "less than nothing": (request(length=TE, data=b"-5\r\nhello\r\n0\r\n\r\n"), 400),
    "long extension": (request(length=TE, data=b"5;" + b"a" * 200_000), 400),
    "extension and trailer": (
        request(length=TE, data=CHUNKS.replace(b"\r\n", b";a=b\r\n", 1)[:-2] + b"X-T: y\r\n\r\n"),
        200,
    ),
    "packed": (request(length=b"Transfer-Encoding: gzip, chunked\r\n", data=b"0\r\n\r\n"), 400),
    "length and chunks": (request(length=b"Content-Length: 5\r\n" + TE, data=CHUNKS), 200),
    "negative length": (request(length=b"Content-Length: -1\r\n"), 400),
    "two lengths": (request(length=b"Content-Length: 5\r\nContent-Length: 6\r\n"), 400),
    "signed length": (request(length=b"Content-Length: +%d\r\n" % len(BODY)), 400),
    "huge length": (request(length=b"Content-Length: 99999999999999999999\r\n"), 413),
    "odd digits": (request(length="Content-Length: ²\r\n".encode("latin-1")), 400),
    "no length": (request(length=b""), 400),
    "websocket": (request(b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n"), 200),
    "expectation": (request(b"Expect: 200-ok\r\n"), 200),
    "absolute": (request(start=b"POST http://evil.example/v1/chat/completions HTTP/1.1"), 404),
    "asterisk": (request(start=b"OPTIONS * HTTP/1.1"), 404),
    "old": (request(start=b"POST /v1/chat/completions HTTP/1.0"), 200),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "two hosts": (request(b"Host: y\r\n"), 400),
    "bare line ends": (request().replace(b"\r\n", b"\n"), 200),
    "control in a header": (request(b"X-A: \x00\r\n"), 400),
    "blank in a name": (request(b"X A: b\r\n"), 400),
    "Latin headers": (request("Authorization: Bearer ü\r\nX-B: \xff\r\n".encode("latin-1")), 200),
    "Latin terms": (request("X-Haltwise-Price: ½\r\n".encode("latin-1")), 400),
    "no terms": (request(b"X-Haltwise-: 3\r\n"), 400),
    "endless terms": (request(b"X-Haltwise-Max-Tokens: " + b"9" * 5000 + b"\r\n"), 400),
    "keys twice": (request(data=with_field(b'"n": 2, "n": 1, "stream": true, "stream": 0')), 200),
    "byte order": (request(data=b"\xef\xbb\xbf" + BODY), 200),
    "UTF-16": (request(data=BODY.decode().encode("utf-16")), 200),
    "garbage behind": (request(data=BODY + b"garbage"), 400),
    "half a character": (request(data=with_field(rb'"user": "\ud800"')), 200),
    "no number": (request(data=with_field(b'"temperature": NaN')), 200),
    "unheard method": (request(start=b"BREW /v1/chat/completions HTTP/1.1"), 405),
    "control in a path": (request(start=b"POST /v1/\x01 HTTP/1.1"), 400),
    "no ASCII in a path": (request(start="POST /v1/é HTTP/1.1".encode()), 400),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_whatever_a_client_sends_it_gets_a_status(vllm: Pair, name: str) -> None:
    data, status = CLIENTS[name]
    with connected(vllm.proxy) as client:
        with suppress(OSError):  # it need not be read to its end
            client.sendall(data)
        told = b""
        with suppress(ConnectionResetError):
            while new := client.recv(2**16):
                told += new
    assert told.split(b" ")[1] == str(status).encode()
    assert status != 200 or b".seen20" in told
    assert vllm.proxy.metric("haltwise_requests_total", outcome="defect") == 0
    wait_until(lambda: vllm.proxy.metric("haltwise_streams_in_flight") == 0)


def test_requests_that_come_at_once_are_answered_in_turn(vllm: Pair) -> None:
    plans = [Plan(f"piped{i}") for i in range(20)]
    data = b"".join(request_bytes(plan, True, False, {}) for plan in plans)
    with connected(vllm.proxy) as client:
        client.sendall(data)
        told = b""
        while told.count(b".seen") < len(plans):
            told += (new := client.recv(2**16))
            assert new
    places = [told.find(f" {plan.name}.seen20".encode()) for plan in plans]
    assert places == sorted(places) and min(places) > 0


@pytest.mark.whole
def test_requests_of_one_name_are_not_mixed_up(vllm: Pair) -> None:
    plans = [Plan(f"named{i}") for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        replies = pool.map(
            lambda plan: ask(vllm.client, plan, headers={"X-Request-Id": "one"}), plans
        )
        texts = [reply.text for reply in replies if not reply.is_late]
    assert set(texts) <= {plan.answer_text(20) for plan in plans} and len(texts) > 0
    names = [
        asked.headers.get("x-request-id") for plan in plans for asked in vllm.upstream.of(plan)
    ]
    assert names.count("one") == len(plans)


@pytest.mark.parametrize(
    ("probing", "at"), [(False, "second leg"), (True, "second leg"), (True, "probe")]
)
def test_a_client_that_leaves_while_something_starts_ends_it(
    pairs: Pairs, plan: Plan, probing: bool, at: str
) -> None:
    pair, is_probe = pairs(probing=probing), at == "probe"
    silent = replace(plan, probes="mute") if is_probe else replace(plan, trouble="mute", legs=(2,))
    with connected(pair.proxy) as client:
        client.sendall(request_bytes(silent, True, True, {}))
        wait_until(lambda: len(pair.upstream.of(plan, probes=is_probe)) == 2 - is_probe)
    wait_until(lambda: pair.proxy.metric("haltwise_streams_in_flight") == 0)
    assert pair.proxy.metric("haltwise_requests_total", outcome="defect") == 0
    assert ask(pair.client, replace(plan, name=plan.name + "x")).status == 200
    for asked in pair.upstream.of(plan, probes=is_probe):
        pair.upstream.free(asked)


def test_clients_that_reset_at_any_moment_leave_nothing_behind(vllm: Pair) -> None:
    def leave(i: int) -> None:
        with connected(vllm.proxy) as client:
            client.sendall(request_bytes(Plan(f"reset{i}"), i % 2 == 0, i % 3 == 0, {}))
            if i % 4:
                wait_until(lambda: bool(vllm.upstream.of(Plan(f"reset{i}"))))
            linger = b"\1\0\0\0\0\0\0\0"  # on, for no time: a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(leave, range(60)))
    wait_until(lambda: vllm.proxy.metric("haltwise_streams_in_flight") == 0)
    assert vllm.proxy.metric("haltwise_requests_total", outcome="defect") == 0


def test_idle_clients_do_not_push_out_one_that_has_asked(pairs: Pairs) -> None:
    pair = pairs("vllm", max_streams=4)  # 72 connections
    with connected(pair.proxy) as known:
        known.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in known.recv(10_000)
        for _ in range(3):
            clients = [connected(pair.proxy) for _ in range(100)]
            known.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            told = b""
            while b"streams_in_flight" not in told.rpartition(b" 200 ")[2]:
                told += (new := known.recv(10_000))
                assert new
            for client in clients:
                client.close()
