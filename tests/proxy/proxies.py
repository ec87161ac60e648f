"""The proxy in a thread, a head whose decisions are known beforehand, and a plain client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from haltwise import HaltHead
from haltwise.proxy import ServeConfig, create_server
from tests.heads import CLOSE, sure_head
from tests.proxy.fake_upstream import FakeUpstream, Kind, Plan, listening_socket

#: Seconds to wait for what comes for sure, however busy the machine is.
PATIENCE = 600.0
#: Why a proxy leaves a thought alone that it was to halt, if a busy machine makes it late.
LATE = ("timeout", "late", "unknown server")
#: Of connections without TLS, for which no certificate need be read.
PLAIN = httpx2.create_ssl_context(verify=False)
PATHS = {True: "/v1/chat/completions", False: "/v1/completions"}


@dataclass
class Proxy:
    """A running proxy."""

    url: str
    process: subprocess.Popen[bytes] | None = None
    client: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE, verify=PLAIN)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all samples of a name that have these labels."""
        text = self.client.get("/metrics").raise_for_status().text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )

    def cpu_seconds(self) -> float:
        """What its process has computed so far."""
        assert self.process is not None
        return cpu_seconds_of(self.process.pid)


def cpu_seconds_of(pid: int) -> float:
    """What a process has computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proxied(config: ServeConfig) -> AbstractContextManager[Proxy]:
    """Runs a proxy in a thread, on any free port."""
    return listening(create_server(config))


@contextmanager
def listening(running: uvicorn.Server) -> Iterator[Proxy]:
    """Runs a proxy's server in a thread, on any free port."""
    listener = listening_socket()
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    proxy = Proxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield proxy
    finally:
        proxy.client.close()
        running.should_exit = True
        thread.join(PATIENCE)
        listener.close()


def saved_head(folder: Path, head: HaltHead | None = None) -> Path:
    """A folder with a head, by default `sure_head`."""
    (head or sure_head()).save(folder)
    return folder


@dataclass
class Pair:
    """A fake, the proxy before it, and a client of the fake alone."""

    upstream: FakeUpstream
    proxy: Proxy
    direct: httpx2.Client

    @property
    def client(self) -> httpx2.Client:
        """Of the proxy."""
        return self.proxy.client


class Pairs:
    """Pairs that tests share, each started when it is first asked for.

    Args:
        folder: For heads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stacks: list[ExitStack] = []
        self._pairs: dict[str, Pair] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor() as pool:  # a server takes a moment to end
            list(pool.map(ExitStack.close, self._stacks))

    def __call__(
        self,
        kind: Kind = "vllm",
        close: str = CLOSE,
        fake: dict[str, Any] | None = None,
        probing: bool = False,
        rule: str = "every 4 tokens",
        **settings: Any,
    ) -> Pair:
        """The pair of a kind of server, what its head is like, and settings of fake and proxy.

        If the head looks at answers, the thought waits for it, and the LM answers freely, unless
        the settings say otherwise: then a thought ends as with a head that does not.
        """
        key = str((kind, close, fake, probing, rule, settings))
        if key not in self._pairs:
            policy = sure_head(close, rule, "always" if probing else "at_halt")
            head = saved_head(self._folder / str(len(self._pairs)), policy)
            if probing:
                fake = {"paced": 4, "probed": True} | (fake or {})
                settings = {"answers": "free", "probe_timeout": PATIENCE} | settings
            stack = ExitStack()
            self._stacks.append(stack)
            upstream = stack.enter_context(FakeUpstream(kind, **fake or {}))
            wanted: dict[str, Any] = {"head": head, "upstream": upstream.url} | settings
            config = ServeConfig(**wanted)
            proxy = stack.enter_context(proxied(config))
            direct = stack.enter_context(
                httpx2.Client(base_url=upstream.url, timeout=PATIENCE, verify=PLAIN)
            )
            self._pairs[key] = Pair(upstream, proxy, direct)
        return self._pairs[key]


@dataclass
class Reply:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes
    streamed: bool

    @property
    def payloads(self) -> list[str]:
        """Of a stream's events."""
        events = self.body.decode().split("\n\n")
        assert events.pop() == "" and all(event.startswith(("data: ", ":")) for event in events)
        return [event.removeprefix("data: ") for event in events if not event.startswith(":")]

    @property
    def events(self) -> list[Any]:
        """A stream's events that are JSON, or the one body."""
        if not self.streamed:
            return [json.loads(self.body)]
        return [json.loads(payload) for payload in self.payloads if payload != "[DONE]"]

    @property
    def done(self) -> bool:
        """Whether a stream ended as it should."""
        return self.payloads[-1:] == ["[DONE]"]

    def _shown(self, *names: str) -> str:
        choices = [choice for event in self.events for choice in event.get("choices", [])]
        parts = [c.get("delta") or c.get("message") or c for c in choices]
        return "".join(part.get(name) or "" for part in parts for name in names)

    @property
    def thought(self) -> str:
        """Reasoning fields of a chat."""
        return self._shown("reasoning", "reasoning_content")

    @property
    def text(self) -> str:
        """Content of a chat, text of a completion."""
        return self._shown("content", "text")

    @property
    def finish(self) -> str | None:
        """The last one."""
        reasons = [c["finish_reason"] for e in self.events for c in e.get("choices", [])]
        return next((reason for reason in reversed(reasons) if reason), None)

    @property
    def usage(self) -> Any:
        """The last one that was told; None if there is none."""
        return next((e["usage"] for e in reversed(self.events) if e.get("usage")), None)

    @property
    def haltwise(self) -> Any:
        """What the proxy tells in the usage."""
        return self.usage["haltwise"]

    @property
    def is_late(self) -> bool:
        """Whether the thought was left alone because the proxy or its server was too slow."""
        told = self.usage.get("haltwise") or json.loads(self.headers["x-haltwise"])
        return told.get("fallback", told["reason"]) in LATE

    @property
    def error(self) -> Any:
        """The error in the last event or the body."""
        error = self.events[-1]["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def ask(
    client: httpx2.Client,
    plan: Plan,
    chat: bool = True,
    stream: bool = True,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> Reply:
    """Asks a server what a plan says; usage is wanted."""
    body: dict[str, Any] = {"model": "fake", "stream": stream}
    # The limit that completions have of themselves is small.
    body |= {"messages": plan.messages()} if chat else {"prompt": plan.prompt(), "max_tokens": 999}
    if stream:
        body["stream_options"] = {"include_usage": True}
    found = client.post(PATHS[chat], json=body | more, headers=headers)
    streamed = found.headers["content-type"].lower().startswith("text/event-stream")
    return Reply(found.status_code, dict(found.headers), found.content, streamed)


def connected(proxy: Proxy) -> socket.socket:
    """A bare connection to a proxy."""
    host, port = proxy.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def request_bytes(plan: Plan, chat: bool, stream: bool, headers: dict[str, str]) -> bytes:
    """A request for what a plan says, without a limit."""
    body: dict[str, Any] = {"model": "m", "stream": stream, "max_tokens": 10**9}
    body |= {"messages": plan.messages()} if chat else {"prompt": plan.prompt()}
    data = json.dumps(body).encode()
    lines = [f"POST {PATHS[chat]} HTTP/1.1", "Host: proxy", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(data)}", "", ""]
    return "\r\n".join(lines).encode() + data


def wait_until(true: Callable[[], bool]) -> None:
    """Waits for what is sure to come true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# In processes of their own

ROOT = Path(__file__).parents[2]
SERVE = (sys.executable, "-m", "haltwise", "serve")


@contextmanager
def spawned_fake(*flags: str) -> Iterator[str]:
    """The address of a fake in a process of its own."""
    command = [sys.executable, "-m", "tests.proxy.fake_upstream", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def spawned_proxy(*flags: str, log: Path | None = None) -> Iterator[Proxy]:
    """`haltwise serve` in a process of its own, at a port that it finds and tells.

    Args:
        flags: More of them.
        log: The file that gets what it writes to stderr.
    """
    with TemporaryDirectory() as folder:
        log = log or Path(folder) / "log"
        command = [*SERVE, "--port", "0", *flags]
        with (
            log.open("w") as stderr,
            subprocess.Popen(command, cwd=ROOT, stderr=stderr) as process,
        ):

            def port() -> int | None:
                found = re.search(r'"listening".*"port": (\d+)}\n', log.read_text())
                return int(found[1]) if found else None

            try:
                wait_until(lambda: port() is not None or process.poll() is not None)
                assert process.poll() is None, log.read_text()
                yield Proxy(f"http://127.0.0.1:{port()}", process)
            finally:
                process.kill()


@contextmanager
def unheard_port() -> Iterator[int]:
    """A port that nobody listens at, and nobody can for as long as the block runs."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        yield int(found.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody takes connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Fetched:
    """A reply, and when it came."""

    reply: Reply
    started: float
    first: float
    """When the first token came; like the others in seconds of the same clock."""
    ended: float


async def fetch(url: str, path: str, body: Any, headers: dict[str, str]) -> Fetched:
    """Asks with as little work as can be; `first` is of the first data behind the role."""
    parts, data = urlsplit(url), json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += ["Connection: close", f"Content-Length: {len(data)}", "", ""]
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    writer.write("\r\n".join(lines).encode() + data)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    pieces, first = [], 0.0
    while piece := await reader.read(1 << 16):
        pieces.append(piece)
        if not first and b".t0" in piece:
            first = time.perf_counter()
    ended = time.perf_counter()
    writer.close()
    status, *fields = head.split("\r\n")[:-2]
    found = dict(line.split(": ", 1) for line in fields)
    content = b"".join(pieces)
    if found.get("transfer-encoding") == "chunked":
        content = _unchunked(content)
    streamed = found["content-type"].startswith("text/event-stream")
    return Fetched(Reply(int(status.split()[1]), found, content, streamed), started, first, ended)


def _unchunked(data: bytes) -> bytes:
    pieces, start = [], 0
    while size := int(data[start : (end := data.index(b"\r\n", start))], 16):
        pieces.append(data[end + 2 : end + 2 + size])
        start = end + 2 + size + 2
    return b"".join(pieces)
