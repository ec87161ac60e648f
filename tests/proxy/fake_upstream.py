"""A server that streams as the real ones do, says what it is told, and misbehaves on request.

    with FakeUpstream("vllm") as upstream:
        openai.OpenAI(base_url=upstream.url + "/v1", api_key="any")

What to say is in the request itself: the plan stands as JSON in the last user message, or at the
start of the prompt. Every token names its plan, and an answer tells how long the thought was that
the LM has seen, so that any mix-up shows. The fake goes on from its prompt as an LM does: inside
of a thought with the thought, behind a closed one with the answer.

`python -m tests.proxy.fake_upstream` runs one alone; it prints its address.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, Self, get_args

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

Kind = Literal["vllm", "llama-server", "sglang", "ollama", "plain"]
"""plain: nothing tells what it is."""
Thoughts = Literal["field", "naive", "opened", "written"]
"""Where a chat's thoughts stand: in a field of their own, or in the content. Then <think> is in the
prompt already (opened), or the LM writes it (written). A naive server shows an answer in the field
if no thought was closed before it."""

NUM_OTHERS = 20
PROBE_TOKENS = 16
#: Tokens of prompt and answer together, where a server tells.
CONTEXT = 100_000
# llama-server's own, some of them in 32 bits.
_SAMPLING = {
    "temperature": 0.800000011920929,
    "top_k": 40,
    "top_p": 0.949999988079071,
    "min_p": 0.05000000074505806,
}
#: Texts of the tokens that a proxy has read and, if it looks at answers there, decided about: a
#: paced fake waits for it at each such place.
DECIDED: set[str] = set()
#: What leads an LM that reasons in the open to its answer.
CUE = "\n\nAnswer:"
_OPEN, _CLOSE = "<think>", "</think>"
_MENTION = "<think >"
_REASONING = {"vllm": "reasoning", "ollama": "reasoning"}
_EOS = "<eos>"


# llama-server's own endpoint, and its names for the fields of a completion.
_NATIVE = "/completion"
_OF_NATIVE = {
    "max_tokens": "n_predict",
    "logprobs": "n_probs",
    "return_token_ids": "return_tokens",
}
_VLLM_WAITING = "vllm:num_requests_waiting"


@dataclass(frozen=True)
class Plan:
    """What the fake says to a request, and what goes wrong."""

    name: str
    """In every token: of small letters and digits."""
    thinking: int = 28
    """Tokens of the thought, unless somebody ends it."""
    answer: int = 4
    """Tokens of the answer; the last one tells how many thinking tokens stand before it."""
    logprobs: tuple[tuple[int, float], ...] = ((0, -3.0), (8, -1.5), (16, -0.5))
    """Log probabilities of thinking tokens, each from some token on."""
    per_chunk: int = 1
    """Tokens in a chunk."""
    split: int = 0
    """Bytes in a packet; at 0 each chunk is one."""
    top: str = "sound"
    """What the log probabilities are: sound, none, few (5), nan, null, words. If more than 5 are
    asked for: a status, or what the stream begins with (says, malformed, list) or does (dies)."""
    form: str = ""
    """How the answer is sent: a content type, null (deltas without a text are null), unended (the
    last event has no blank line, and no mark follows), endless (no reason why it ends), bytes (that
    are no UTF-8), whole (no stream though one is asked for), or gzip."""
    trouble: str = ""
    """"500" and the like, mute (no answer at all), hangs, crowds (waits for others), dies, ends,
    endless, html, goes on (behind the mark of its end, and hangs), or a strange event before each
    other: malformed, says (an error), list, pings (comments)."""
    at: int = 0
    """Tokens before the trouble; in a thought, those that stand in the prompt count too."""
    legs: tuple[int, ...] = (1, 2, 3)
    """Where it happens: in the thought (1), in an answer after a closed one (2), or in an answer
    that has begun in the prompt (3). Never in a probe."""
    probes: str = ""
    """Trouble of probes alone."""
    anew: str = ""
    """What differs if the same is asked again: plain (it answers without a thought) or brief (it
    thinks five tokens)."""
    token_bytes: int = 0
    """Tokens are filled up to this length."""
    closes: str = ""
    """What it does behind a close text: repeats (the marker), thinks (three tokens more, unless it
    was closed twice) or both. A deaf one says that it will close a thought, and does not."""
    call: tuple[int, ...] = ()
    """In which of the thought's tokens a tool call begins, and in which it ends."""
    mention: str = ""
    """What the answer begins with."""
    told: str = ""
    """JSON that its usage is told as, in place of the true one."""
    details: bool = False
    """Tells details of its usage: all tokens of its answer are of a thought, one was cached."""
    choices: str = ""
    """Of an answer of which one choice is asked for: from 1 (its number), two (in turn), both (two
    in each chunk), or late (the second one begins amid the first)."""
    tool: bool = False
    """Calls a tool in place of an answer."""
    open: bool = False
    """Reasons in the open: without markers, up to the `CUE`."""

    by_seed: tuple[str, ...] = ()
    """By the request's seed, what the answer begins with; behind a ! it is the trouble."""

    @property
    def close(self) -> str:
        """What stands between the thought and the answer."""
        return CUE if self.open else _CLOSE

    def text(self) -> str:
        """For a message or the start of a prompt."""
        default = {f.name: f.default for f in fields(self)}
        return json.dumps({k: v for k, v in asdict(self).items() if v != default[k]})

    def prompt(self) -> str:
        """For completions: the thought has begun."""
        return f"{self.text()}\n" if self.open else f"{self.text()}\n{_OPEN}\n"

    def messages(self) -> list[Any]:
        """For chat."""
        return [{"role": "user", "content": self.text()}]

    @classmethod
    def read(cls, text: str) -> Plan:
        """The plan at the start of a text; one without an end where a proxy tries a probe."""
        if text.startswith("1 2 3"):
            return Plan("tried", thinking=10**6)
        found, _ = json.JSONDecoder().raw_decode(text)
        found["logprobs"] = tuple(map(tuple, found.get("logprobs", cls.logprobs)))
        places = {
            name: tuple(found.get(name, getattr(cls, name))) for name in ("legs", "call", "by_seed")
        }
        return cls(**found | places)

    def thought(self, num: int | None = None, start: int = 0) -> str:
        """Some of the thought, all of it by default."""
        num = self.thinking if num is None else num
        calls = dict(zip(self.call, ("<tool_call>", "</tool_call>"), strict=False))
        return "".join(self._token(f"t{i}") + calls.get(i, "") for i in range(start, num))

    def answer_text(self, seen: int | None = None, start: int = 0) -> str:
        """The answer after a thought of some length, the whole one by default."""
        seen = self.thinking if seen is None else seen
        names = [f"a{i}" for i in range(self.answer - 1)] + [f"seen{seen}"]
        return "".join(self._token(name) for name in names[start:])

    def logprob(self, i: int) -> float:
        """Of thinking token i, nats."""
        return [value for start, value in self.logprobs if start <= i][-1]

    def _token(self, what: str) -> str:
        text = f" {self.name}.{what}é"
        return text.ljust(self.token_bytes, "~")


@dataclass(frozen=True)
class Token:
    """A token of the fake LM."""

    text: str
    place: Literal["thought", "marker", "answer", "end"]
    logprob: float = -0.1
    cut: str = ""
    """What it was before a stop text was cut off."""

    @property
    def likely(self) -> str:
        """Its text among the likeliest ones of its place, which is whole."""
        return self.cut or self.text


def continuation(plan: Plan, prompt: str) -> Iterator[Token]:
    """What the LM says after a prompt; it may go on forever."""
    thought, is_closed, answer = prompt.partition(plan.close)
    seen = len(re.findall(rf" {plan.name}\.t\d+", thought))
    if not is_closed:
        if not (plan.open or _OPEN in thought):
            yield Token(_OPEN, "marker")
        while seen < plan.thinking or plan.trouble == "endless":
            yield Token(plan.thought(seen + 1, start=seen), "thought", plan.logprob(seen))
            seen += 1
        yield Token(plan.close, "marker")
    said = len(re.findall(rf" {plan.name}\.a\d+", answer))
    if plan.closes and is_closed and not said:
        yield from _unclosed(plan, seen, answer.count(_CLOSE))
    if plan.mention and not said and plan.mention not in answer:
        yield Token(plan.mention.replace(_MENTION, _OPEN), "answer")
    text = plan.answer_text(seen, start=said)
    for piece in re.findall(rf" {plan.name}\.[^ ]*", text):
        yield Token(piece, "answer")
    yield Token(_EOS, "end")


def _unclosed(plan: Plan, seen: int, num_more: int) -> Iterator[Token]:
    """What the LM says in place of an answer behind a thought that was closed for it."""
    if plan.closes in ("repeats", "both"):
        yield Token("\n", "answer")
        yield Token(_CLOSE[:3], "answer")
        yield Token(_CLOSE[3:] + "\n\n", "answer")
    if plan.closes in ("thinks", "both") and not num_more:
        yield Token(_OPEN, "answer")
        yield Token(plan.thought(seen + 3, start=seen), "answer")
        yield Token(_CLOSE, "answer")


def leg_of(prompt: str) -> int:
    """1 inside or before a thought, 2 behind a closed one, 3 with a part of the answer."""
    plan = Plan.read(prompt)
    _, marker, closed = prompt.partition(plan.close)
    return 1 + bool(marker) + (f" {plan.name}.a" in closed)


@cache
def top_logprobs(logprob: float) -> list[float]:
    """Of the likeliest 20 tokens beside one: 90 % of the rest, each a little less than the other.

    The one is not among the likeliest 20 if all of them are likelier.
    """
    rest = 0.9 * (1 - math.exp(logprob))
    weights = [1 - 0.01 * i for i in range(NUM_OTHERS)]
    return [math.log(rest * weight / sum(weights)) for weight in weights]


def is_probe(body: Any) -> bool:
    """Whether a request is one of the proxy's own, to look at an answer."""
    return bool(body.get("max_tokens") == PROBE_TOKENS and body.get("temperature") == 0)


@dataclass
class Asked:
    """A request that the fake had."""

    path: str
    headers: dict[str, str]
    body: Any
    ended: str = ""
    """done, died or closed (by the other side); empty if it still runs."""
    num_sent: int = 0
    """Bytes of the stream."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set once it has ended."""
    told: bool = False
    """Whether the thought is to end: the control call of llama-server."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is to hang no longer."""

    @property
    def key(self) -> str:
        """That was sent."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")


class _Stream(StreamingResponse):
    """Notes how it ended."""

    def __init__(self, asked: Asked, content: AsyncIterator[bytes], fake: _Fake, form: str) -> None:
        kind = form if "/" in form else "text/event-stream"
        super().__init__(content, headers={"content-type": kind})
        if form == "gzip":
            self.headers["content-encoding"] = "gzip"
        self.asked, self.fake = asked, fake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except _DiesError:
            self.asked.ended = "died"
            # uvicorn closes the connection of a response without an end.
        finally:
            self.asked.ended = self.asked.ended or "closed"
            self.fake.leave(self.asked)


class _DiesError(Exception):
    pass


class _Fake:
    """The server's state and its endpoints."""

    def __init__(
        self,
        kind: Kind,
        key: str = "",
        num_slots: int = 0,
        thoughts: Thoughts = "field",
        crowd: int = 0,
        paced: int = 0,
        probed: bool = False,
        trouble: str = "",
        samplers: Sequence[str] = ("temperature",),
    ) -> None:
        self._own_sampling = _SAMPLING | {"samplers": [*samplers]}
        self.probed, self.trouble, self.errs = probed, trouble, False
        self.kind, self.key, self.thoughts, self.paced = kind, key, thoughts, paced
        self.crowd, self.complete = crowd, asyncio.Event()
        self.asked: list[Asked] = []
        self.plans: list[Plan] = []
        self.num_slots = num_slots
        self.num_waiting = 0
        self._slots = asyncio.Semaphore(num_slots or 1_000_000)
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []
        self._running: dict[str, Asked] = {}
        self.app = Starlette(routes=[*self._routes()])

    def _routes(self) -> Iterator[Route]:
        yield Route("/v1/chat/completions", self.generate, methods=["POST"])
        yield Route("/v1/completions", self.generate, methods=["POST"])
        yield Route("/v1/responses", self.respond, methods=["POST"])
        yield Route("/v1/models", self.models)
        yield Route("/v1/echo", self.echo, methods=["GET", "POST"])
        yield Route("/asked", self.tell)
        yield Route("/health", lambda _: PlainTextResponse("OK"))
        if self.num_slots:
            yield Route("/metrics", self.tell_waiting)
        if self.kind in ("vllm", "llama-server", "sglang"):
            yield Route("/tokenize", self.tokenize, methods=["POST"])
            yield Route("/detokenize", self.detokenize, methods=["POST"])
        if self.kind == "llama-server":
            yield Route("/completion", self.generate, methods=["POST"])
            yield Route("/v1/chat/completions/control", self.control, methods=["POST"])
            yield Route("/apply-template", self.apply_template, methods=["POST"])
            props = {
                "total_slots": self.num_slots or 1_000,
                "chat_template": "not shown",
                "default_generation_settings": {"params": self._own_sampling},
            }
            yield Route("/props", lambda _: JSONResponse(props))

    def tell_waiting(self, _: Request) -> Response:
        """In the form of Prometheus, by the name that the kind of server gives it."""
        name = "llamacpp:requests_deferred" if self.kind == "llama-server" else _VLLM_WAITING
        return PlainTextResponse(f"# TYPE {name} gauge\n{name} {self.num_waiting}\n")

    # Tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text's words, each with the blank before it; markers are words."""
        pieces = re.findall(rf"{_OPEN}|{_CLOSE}|\s*[^\s<]+|\s+|<", text)
        return [self.token_id(piece) for piece in pieces]

    def token_id(self, piece: str) -> int:
        """Of one word."""
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        return "".join(self._pieces[i] for i in ids)

    def ids_of(self, prompt: str | list[int | str]) -> list[int]:
        """Of a prompt, which may be a list of ids and texts."""
        parts = [prompt] if isinstance(prompt, str) else prompt
        assert len(parts) < 2 or not all(isinstance(part, str) for part in parts), "many prompts"
        ids = [self.encode(part) if isinstance(part, str) else [part] for part in parts]
        return [id for some in ids for id in some]

    # Requests

    def _ask(self, request: Request, body: Any) -> Asked:
        asked = Asked(request.url.path, dict(request.headers), body)
        self.asked.append(asked)
        return asked

    def leave(self, asked: Asked) -> None:
        """Ends a request."""
        self._running = {id: other for id, other in self._running.items() if other is not asked}
        asked.gone.set()

    def rendered(self, body: Any) -> str:
        """What the template makes of messages, whatever stands in them."""
        others = [str(message.get("content")) for message in body["messages"][:-1]]
        return "".join(others) + self.prompt_of(body).replace(_MENTION, _OPEN)

    def prompt_of(self, body: Any, chat: bool = True) -> str:
        """What the LM reads, from its own plan on; markers of users mean nothing to it."""
        if not chat or "messages" not in body:
            prompt = body["prompt"]
            return prompt if isinstance(prompt, str) else self.decode(self.ids_of(prompt))
        messages = body["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        content = messages[last]["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        text = content.replace(_OPEN, _MENTION) + "\n<|assistant|>"
        if len(messages) == last + 1 and "/no_think" in content:
            return text + f"{_OPEN}\n\n{_CLOSE}\n\n"
        if len(messages) == last + 1:
            return text + ("" if self.thoughts == "written" else f"{_OPEN}\n")
        prefill = messages[-1]
        for name in ("reasoning_content", "reasoning"):
            if prefill.get(name):
                text += f"{_OPEN}\n{prefill[name]}\n{_CLOSE}\n\n"
        return text + str(prefill.get("content") or "")

    async def generate(self, request: Request) -> Response:
        """Both of chat and completions."""
        try:
            body = await request.json()
            if request.url.path == _NATIVE:
                body |= {own: body[name] for own, name in _OF_NATIVE.items() if name in body}
            chat = request.url.path.endswith("/chat/completions")
            prompt = self.prompt_of(body, chat)
            plan = Plan.read(prompt)
            counts = ("n", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs")
            numbers = {name: _count(body.get(name)) for name in counts}
            dict(body.get("stream_options") or {})
            (body.get("model") or "").encode()
        except (ValueError, TypeError, LookupError, AttributeError):
            return _refusal(self._ask(request, None), 400, "malformed request")
        asked = self._ask(request, body)
        if self.key and asked.key != self.key:
            return _refusal(asked, 401, "invalid api key")
        if self.probed and is_probe(body):
            plan = replace(plan, trouble=plan.probes, at=0, legs=(2,), closes="")
        if self.trouble:
            plan = replace(plan, trouble=self.trouble, at=30)
        if self.errs:
            plan = replace(plan, mention=" wrong")
        if plan.by_seed:
            said = plan.by_seed[body["seed"]]
            is_trouble = said.startswith("!")
            plan = replace(plan, **{"trouble" if is_trouble else "mention": said.lstrip("!")})
        if plan.trouble == "mute" and leg_of(prompt) in plan.legs:
            await asked.freed.wait()
        return await self._answer(asked, plan, prompt, numbers)

    async def _answer(
        self, asked: Asked, plan: Plan, prompt: str, numbers: dict[str, int]
    ) -> Response:
        is_anew = leg_of(prompt) == 1 and any(one.name == plan.name for one in self.plans)
        self.plans.append(plan)
        happens = leg_of(prompt) in plan.legs
        num_top = max(numbers["logprobs"], numbers["top_logprobs"])
        if self.kind == "llama-server" and asked.body.get("tools") and num_top:
            return _refusal(asked, 400, "no log probabilities with tools and a stream")
        if plan.top.isdigit() and num_top > 5:
            return _refusal(asked, int(plan.top), "at most 5 log probabilities")
        if plan.top in (*_STRANGE, "dies") and num_top > 5:
            plan, happens = replace(plan, trouble=plan.top, at=0), True
        if plan.trouble.isdigit() and happens:
            return _refusal(asked, int(plan.trouble), f"trouble with {plan.name}")
        if plan.trouble == "html" and happens:
            asked.gone.set()
            return Response(b"<html>not an API</html>", media_type="text/html")
        if is_anew:
            plan = replace(plan, thinking={"brief": 5, "plain": 0}.get(plan.anew, plan.thinking))
            prompt += plan.close if plan.anew == "plain" else ""
        writer = _Writer(self, asked, plan, prompt, happens)
        if asked.body.get("stream") and plan.form != "whole":
            return _Stream(asked, writer.packets(), self, plan.form)
        async for _ in writer.packets():
            pass
        asked.ended = "done"
        self.leave(asked)
        return JSONResponse(writer.whole())

    async def gather(self) -> None:
        """Waits until a whole crowd does."""
        self.crowd -= 1
        if self.crowd <= 0:
            self.complete.set()
        await self.complete.wait()

    def start(self, id: str, asked: Asked) -> None:
        """Makes a stream known to the control call."""
        self._running[id] = asked

    async def control(self, request: Request) -> Response:
        """Ends a thought, as llama-server does."""
        body = await request.json()
        self._ask(request, body).gone.set()
        asked = self._running.get(body["id"])
        if asked is None or not asked.body.get("reasoning_control"):
            return JSONResponse({"success": False, "message": "no such task"})
        asked.told = True
        asked.freed.set()
        return JSONResponse({"success": True, "message": "reasoning_end"})

    async def models(self, request: Request) -> Response:
        """One model."""
        self._ask(request, None).gone.set()
        owner = {"llama-server": "llamacpp", "ollama": "library"}.get(self.kind, self.kind)
        model: dict[str, Any] = {"id": "fake", "object": "model", "created": 1, "owned_by": owner}
        if self.kind in ("vllm", "sglang"):
            model["max_model_len"] = CONTEXT
        return JSONResponse({"object": "list", "data": [model]})

    async def echo(self, request: Request) -> Response:
        """What was sent, byte by byte, with an odd status and a header."""
        asked = self._ask(request, (await request.body()).decode())
        asked.gone.set()
        query = request.url.query.encode()
        return Response(
            request.method.encode() + b" " + query + b" " + str(asked.body).encode(),
            status_code=203,
            headers={"X-Fake": "yes"},
            media_type="application/x-echo",
        )

    async def respond(self, request: Request) -> Response:
        """As an echo; a question of no cap has to have none."""
        body = (await request.body()).decode()
        if "no cap" in body and "thinking_budget_tokens" in body:
            return _refusal(self._ask(request, body), 400, "no such field")
        return await self.echo(request)

    async def tokenize(self, request: Request) -> Response:
        """Of text or of messages."""
        body = await request.json()
        if "messages" in body:
            text = self.rendered(body)
        else:
            text = body.get("prompt", body.get("content"))
        ids = self.encode(text)
        return JSONResponse({"tokens": ids, "count": len(ids)})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids, under all the names that servers have for it."""
        text = self.decode((await request.json())["tokens"])
        return JSONResponse({"prompt": text, "text": text, "content": text})

    async def apply_template(self, request: Request) -> Response:
        """The prompt of messages."""
        return JSONResponse({"prompt": self.rendered(await request.json())})

    async def tell(self, request: Request) -> Response:
        """How the streams so far have ended, by path."""
        return JSONResponse([[asked.path, asked.ended] for asked in list(self.asked)])


def _count(value: Any) -> int:
    """A count that a request names, or 0; as real servers do, the fake refuses all else."""
    if not isinstance(value, int | None) or (value or 0) > 10**9:
        raise ValueError(value)
    return value or 0


def _refusal(asked: Asked, status: int, message: str) -> Response:
    asked.ended = "done"
    asked.gone.set()
    error = {"message": message, "type": "fake", "param": None, "code": status}
    return JSONResponse({"error": error}, status, {"Retry-After": "7"})


class _Writer:
    """Writes one stream."""

    def __init__(self, fake: _Fake, asked: Asked, plan: Plan, prompt: str, happens: bool) -> None:
        self.fake, self.asked, self.plan, self.happens = fake, asked, plan, happens
        self.body = asked.body
        self.native = asked.path == _NATIVE
        self.chat = asked.path.endswith("/chat/completions")
        self.prompt_ids = fake.ids_of(prompt if self.chat else self.body["prompt"])
        self.tokens = continuation(plan, prompt)
        self.thinks = leg_of(prompt) == 1
        self.num_before = len(re.findall(rf" {plan.name}\.t\d+", prompt)) if self.thinks else 0
        self.num_tokens = 0
        self.finish: str | None = None
        self.num_choices = int(self.body.get("n") or 1 + (plan.choices in ("two", "both", "late")))
        kind = "chatcmpl" if self.chat else "cmpl"
        self.id = f"{kind}-{plan.name}-{leg_of(prompt)}"
        limit = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        if limit is None and not self.chat and self._is("vllm", "sglang"):
            limit = 16  # theirs, but for chats
        self.limit = math.inf if limit is None else limit
        self.all: list[Token] = []
        stops = self.body.get("stop")
        stops = stops if isinstance(stops, list) else [stops]
        self.stops = [text for text in stops if isinstance(text, str) and text]
        self.packed = zlib.compressobj(wbits=31)

    async def packets(self) -> AsyncIterator[bytes]:
        """The stream's bytes."""
        size = self.plan.split
        self.fake.num_waiting += 1
        async with self.fake._slots:
            self.fake.num_waiting -= 1
            self.fake.start(self.id, self.asked)
            async for event in self.events():
                data = (event if event[:1] == ":" else f"data: {event}").encode() + b"\n\n"
                data = self.formed(data)
                for start in range(0, len(data), size or len(data)):
                    packet = data[start : start + size] if size else data
                    self.asked.num_sent += len(packet)
                    yield packet
                    await asyncio.sleep(0)
        self.asked.ended = "done"

    def formed(self, data: bytes) -> bytes:
        """An event's bytes in the plan's form."""
        match self.plan.form:
            case "unended" if self.finish:
                return data.rstrip()
            case "null":
                return data.replace(b'"delta": {}', b'"delta": null')
            case "bytes":
                return data.replace("é".encode(), "é".encode("latin-1"))
            case "gzip":
                return self.packed.compress(data) + self.packed.flush(zlib.Z_SYNC_FLUSH)
        return data

    async def events(self) -> AsyncIterator[str]:
        """The stream's events, each as text."""
        llama = self._is("llama-server")
        if self.chat:
            first = {"role": "assistant", "content": None if llama else ""}
            for group in self.groups():
                yield self._event([self._choice(i, first, None) for i in group], first=True)
        while self.finish is None:
            await self.keep_pace()
            if await self.troubled():
                yield _STRANGE[self.plan.trouble]
            chunk = self.take()
            for group in self.groups():
                choices = [self._of(i, chunk) for i in group]
                hidden = [self._choice(i, {}, None) for i in group]
                if choices != hidden or self.finish or not llama:
                    yield self._event(choices, first=not self.chat and not self.all)
            self.all += chunk
        if self.plan.form != "unended":
            async for event in self.last_events():
                yield event

    def groups(self) -> list[list[int]]:
        """Which choices stand in the next chunks."""
        if self.plan.choices == "late" and self.num_tokens < 3:
            return [[0]]
        numbers = [*range(self.num_choices)]
        return [numbers] if self.plan.choices == "both" else [[i] for i in numbers]

    async def last_events(self) -> AsyncIterator[str]:
        """Those behind the last token's."""
        llama = self._is("llama-server")
        if llama and not self.chat:
            # It tells how many tokens it took whether anybody asked or not.
            for group in self.groups():
                yield self._event([self._choice(i, "", None) for i in group], usage=self.usage())
        options = self.body.get("stream_options") or {}
        if options.get("include_usage") and not self.native:
            yield self._event([], usage=self.usage())
        if (self.plan.trouble != "ends" or not self.happens) and not self.native:
            yield "[DONE]"
        if self.plan.trouble == "goes on" and self.happens:
            yield self._event([self._of(0, [Token(" behind the end", "answer")])])
            await self.asked.freed.wait()

    async def keep_pace(self) -> None:
        """Waits for a proxy that looks at answers, so that it is never late."""
        num, is_watched = len(self.all), self._num_top() >= NUM_OTHERS
        is_tried = self.plan.name == "tried"
        if is_tried:
            await asyncio.sleep(0.001)  # probes are to be there before its end
        elif (
            self.plan.form != "whole"
            and self.fake.paced
            and is_watched
            and self.thinks
            and num % self.fake.paced == 0 < num
        ):
            while self.all[-1].text.rstrip("é") not in DECIDED:
                await asyncio.sleep(0.001)

    def _num_top(self) -> int:
        counts = [self.body.get("logprobs"), self.body.get("top_logprobs")]
        return max(int(count or 0) for count in counts)

    async def troubled(self) -> bool:
        """Whether the next event is none; may not come back."""
        num = self.num_before + self.num_tokens
        due = self.happens and num >= self.plan.at
        if not due or self.asked.freed.is_set():
            return False
        if self.plan.trouble == "dies":
            raise _DiesError
        if self.plan.trouble == "hangs":
            await self.asked.freed.wait()
        if self.plan.trouble == "crowds" and num == self.plan.at:
            await self.fake.gather()
        if self.plan.trouble == "ends":
            self.finish = ""
        return self.plan.trouble in _STRANGE

    def take(self) -> list[Token]:
        """The next tokens, fewer at the end or the limit."""
        chunk: list[Token] = []
        while len(chunk) < self.plan.per_chunk and self.finish is None:
            token = self.next()
            chunk.append(token)
            self.num_tokens += 1
            if token.place == "end":
                self.finish = "tool_calls" if self.plan.tool else "stop"
            elif any(text in token.text for text in self.stops):
                self.finish = "stop"
                chunk[-1] = replace(token, text="", cut=token.text)
            elif self.num_tokens >= self.limit:
                self.finish = "length"
        return chunk

    def next(self) -> Token:
        """The next token; the control call leads to another one."""
        if self.asked.told and self.thinks and self.plan.closes != "deaf":
            self.thinks = False
            seen = sum(token.place == "thought" for token in self.all)
            message = str(self.body.get("reasoning_budget_message") or "")
            prompt = f"{self.plan.text()}{_OPEN}{self.plan.thought(seen)}{message}{_CLOSE}"
            self.tokens = continuation(self.plan, prompt)
            return Token(message + _CLOSE, "marker")
        token = next(self.tokens)
        self.thinks &= token.text != self.plan.close
        return token

    # Forms

    def _is(self, *kinds: Kind) -> bool:
        return self.fake.kind in kinds

    def _event(
        self, choices: list[Any], usage: dict[str, Any] | None = None, first: bool = False
    ) -> str:
        event: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": 1_700_000_000,
            "model": self.body.get("model", "fake"),
            "choices": choices,
        }
        if first and self.body.get("return_token_ids"):
            where = event if self.chat else choices[0]
            where["prompt_token_ids"] = self.prompt_ids
        if usage is not None:
            event["usage"] = usage
        if self.native:
            event = self._native(choices[-1], usage)  # it has one
        # NaN is what a careless server writes.
        return json.dumps(event, ensure_ascii=False)

    def _native(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        """A chunk as llama-server's own endpoint has it."""
        ends = usage is not None and bool(self.finish)
        event = {"index": choice["index"], "content": choice["text"], "stop": ends}
        event |= {"tokens": choice.get("token_ids", []), "tokens_predicted": self.num_tokens}
        event["tokens_evaluated"] = len(self.prompt_ids)
        if choice["logprobs"] is not None:
            event["completion_probabilities"] = choice["logprobs"]["content"]
        if usage is not None:
            event["stop_type"] = "limit" if self.finish == "length" else "eos"
            for own, name in (("evaluated", "prompt_tokens"), ("predicted", "completion_tokens")):
                event[f"tokens_{own}"] = usage.get(name)
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict):
                event["timings"] = {"cache_n": details.get("cached_tokens")}
        return event

    def usage(self) -> dict[str, Any]:
        """Both counts and their sum, and the details."""
        if self.plan.told:
            lie: dict[str, Any] = json.loads(self.plan.told)
            return lie
        prompt, own = len(self.prompt_ids), self.num_tokens * self.num_choices
        details = {
            "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": None},
            "completion_tokens_details": {"reasoning_tokens": own},
        }
        return (details if self.plan.details else {}) | {
            "prompt_tokens": prompt,
            "completion_tokens": own,
            "total_tokens": prompt + own,
        }

    def _of(self, i: int, chunk: list[Token]) -> dict[str, Any]:
        logprobs = self._logprobs(chunk)
        if self.chat:
            delta = self._delta(chunk)
            # llama-server does not show a token without text.
            hidden = self._is("llama-server") and not delta
            return self._choice(i, delta, None if hidden else logprobs, chunk)
        shown = "".join(token.text for token in chunk if token.place != "end")
        return self._choice(i, shown, logprobs, chunk)

    def _choice(
        self, i: int, shown: Any, logprobs: Any, chunk: Sequence[Token] = ()
    ) -> dict[str, Any]:
        finish = None if self.plan.form == "endless" else self.finish or None
        if self._is("llama-server") and not self.chat and chunk:
            finish = None  # it has a chunk of its own
        name = "delta" if self.chat else "text"
        i += self.plan.choices == "from 1"
        choice = {"index": i, name: shown, "logprobs": logprobs, "finish_reason": finish}
        if logprobs is None and self._is("llama-server", "ollama") and self.chat:
            del choice["logprobs"]
        if self.body.get("return_token_ids") and chunk:
            choice["token_ids"] = [self.fake.token_id(token.text) for token in chunk]
        return choice

    def _delta(self, chunk: list[Token]) -> dict[str, Any]:
        if self.fake.thoughts == "naive" and all(token.text != _CLOSE for token in self.all):
            return {"reasoning": "".join(t.text for t in chunk if t.place == "answer")}
        if self.fake.thoughts in ("opened", "written"):
            text = "".join(token.text for token in chunk if token.place != "end")
            return {"content": text}
        # The marker and what a message puts before it.
        thought = "".join(token.text for token in chunk if token.place in ("thought", "marker"))
        thought = thought.replace(_CLOSE, "").replace(_OPEN, "")
        answer = "".join(token.text for token in chunk if token.place == "answer")
        delta: dict[str, Any] = {}
        if thought:
            delta[_REASONING.get(self.fake.kind, "reasoning_content")] = thought
        if answer and self.plan.tool:
            call = {"name": "call", "arguments": answer}
            delta["tool_calls"] = [{"index": 0, "id": "c0", "type": "function", "function": call}]
        elif answer:
            delta["content"] = answer
        return delta

    def _logprobs(self, chunk: list[Token]) -> Any:
        wanted = self.body.get("logprobs")
        if self.plan.top == "none" or wanted is None or wanted is False:
            return None
        num = self.body.get("top_logprobs", 0) if self.chat else int(wanted)
        num = min(num, 5 if self.plan.top == "few" else NUM_OTHERS)
        if not self.chat and not self._is("llama-server"):
            return self._legacy_logprobs(chunk, num)
        content = []
        for token in chunk:
            entry = self._entry(token.text, token.logprob)
            if self._is("llama-server"):
                entry["id"] = self.fake.token_id(token.likely)
            entry["top_logprobs"] = [self._entry(*pair) for pair in self._top(token, num)]
            content.append(entry)
        return {"content": content}

    def _legacy_logprobs(self, chunk: list[Token], num: int) -> dict[str, Any]:
        top = []
        for token in chunk:
            own = [(token.text, token.logprob)]
            top.append({text: self._shown(value) for text, value in own + self._top(token, num)})
        return {
            "tokens": [token.text for token in chunk],
            "token_logprobs": [self._shown(token.logprob) for token in chunk],
            "top_logprobs": top,
            "text_offset": [0] * len(chunk),
        }

    def _entry(self, text: str, logprob: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"token": text, "logprob": self._shown(logprob)}
        entry["bytes"] = list(text.encode())
        if self._is("llama-server"):
            entry["id"] = self.fake.token_id(text)
        return entry

    def _top(self, token: Token, num: int) -> list[tuple[str, float]]:
        others = [(f" o{j}", value) for j, value in enumerate(top_logprobs(token.logprob))]
        likeliest = [*others, (token.likely, token.logprob)]
        return sorted(likeliest, key=lambda pair: -pair[1])[:num]

    def _shown(self, logprob: float) -> Any:
        strange = {"nan": math.nan, "null": None, "words": "likely"}
        return strange.get(self.plan.top, logprob)

    def whole(self) -> dict[str, Any]:
        """The answer to a request without a stream."""
        choices = []
        for i in range(self.num_choices):
            choice = self._of(i, self.all)
            if self.chat:
                message = {"role": "assistant", "content": None} | choice.pop("delta")
                choice["message"] = message
            choices.append(choice | {"finish_reason": self.finish})
        event: dict[str, Any] = json.loads(self._event(choices, self.usage()))
        return event | {"object": "chat.completion" if self.chat else "text_completion"}


_STRANGE = {
    "malformed": "{ this is no JSON",
    "says": json.dumps({"error": {"message": "the engine has died", "type": "fake", "code": 500}}),
    "list": "[]",
    "pings": ": still here",
}


class FakeUpstream:
    """A fake in a thread of its own.

    Args:
        kind: The server that it looks like.
        key: Required of requests; empty for any.
        num_slots: Streams at once, others wait; 0 for no limit.
        thoughts: Where they stand in a chat.
        paced: Tokens between places where a thought waits for the proxy's decision; 0 for none.
        probed: Whether a proxy looks at answers here; recorders ask alike.
        trouble: What happens here to all that is asked, after 30 tokens, see `Plan`.
        samplers: Those that a llama-server runs.
    """

    def __init__(
        self,
        kind: Kind = "vllm",
        key: str = "",
        num_slots: int = 0,
        thoughts: Thoughts = "field",
        paced: int = 0,
        probed: bool = False,
        trouble: str = "",
        samplers: Sequence[str] = ("temperature",),
    ) -> None:
        self._fake = _Fake(
            kind,
            key,
            num_slots,
            thoughts,
            paced=paced,
            probed=probed,
            trouble=trouble,
            samplers=samplers,
        )
        self.kind = kind
        self._socket = listening_socket()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(server_config(self._fake.app))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for asked in self.asked:
            self.free(asked)
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        self._loop.close()

    @property
    def asked(self) -> list[Asked]:
        """Requests so far."""
        return list(self._fake.asked)

    def of(self, plan: Plan, probes: bool = False) -> list[Asked]:
        """Requests with a plan, in order: the probes, or all others."""
        name = f'"name": "{plan.name}"'
        return [
            asked
            for asked in self.asked
            if isinstance(asked.body, dict)
            and ("messages" in asked.body or "prompt" in asked.body)
            and (self._fake.probed and is_probe(asked.body)) == probes
            and name in self._fake.prompt_of(asked.body, "/chat/" in asked.path)
        ]

    def err(self) -> None:
        """Gives other answers from now on."""
        self._fake.errs = True

    def fail(self, trouble: str) -> None:
        """Lets something happen to all that is asked from now on, see `Plan`."""
        self._fake.trouble = trouble

    def free(self, asked: Asked) -> None:
        """Ends the hanging of a request."""
        self._loop.call_soon_threadsafe(asked.freed.set)

    def text(self, prompt: str | Sequence[int | str]) -> str:
        """Of a prompt, which may be a list of texts and of tokens that it has given out."""
        parts = [prompt] if isinstance(prompt, str) else prompt
        assert len(parts) < 2 or not all(isinstance(part, str) for part in parts), "many prompts"
        return "".join(p if isinstance(p, str) else self._fake.decode([p]) for p in parts)

    def ids(self, text: str) -> list[int]:
        """Of a text."""
        return self._fake.encode(text)


def server_config(app: Any) -> uvicorn.Config:
    """A server that says nothing."""
    return uvicorn.Config(app, log_config=None, log_level="critical", lifespan="off", backlog=4096)


def listening_socket() -> socket.socket:
    """A port that takes connections at once."""
    # With its protocol named, asyncio sends small pieces at once.
    found = socket.socket(proto=socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", 0))
    found.listen(4096)
    return found


def main() -> None:
    """Runs a fake until it is told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=get_args(Kind), default="vllm")
    parser.add_argument("--crowd", type=int, default=0)
    asked = parser.parse_args()
    listener = listening_socket()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    app = _Fake(asked.kind, crowd=asked.crowd).app
    uvicorn.Server(server_config(app)).run(sockets=[listener])


if __name__ == "__main__":
    main()
