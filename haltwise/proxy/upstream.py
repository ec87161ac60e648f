"""The server of the LM: how it is reached, what kind it is, and how its thoughts are ended."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import anyio
import httpx2

from haltwise.proxy.asked import Asked
from haltwise.proxy.config import ServeConfig
from haltwise.proxy.legs import Leg, Seen, told
from haltwise.proxy.wire import Json, UpstreamError
from haltwise.session.thought import PointRules, Thought
from haltwise.session.token_statistics import NUM_TOP

_STREAMS_A_POOL = 16
# Seconds that an answer to such a question may take: a client waits for it.
_CALL_TIMEOUT = 5.0
# Answers to questions that hang on what clients send are kept for so many.
_MOST_KEPT = 1000
# Tokens of its context that SGLang may keep for itself.
_RESERVED = 16

Headers = list[tuple[bytes, bytes]]


class Upstream:
    """The connections to the LM's server."""

    def __init__(self, config: ServeConfig) -> None:
        """Opens none yet."""
        self._url = httpx2.URL(config.upstream_url)
        key = config.upstream_key
        self._key = None if key is None else f"Bearer {key}".encode()
        # No connection is used twice: one that the server closes just then would lose an answer.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._timeout = httpx2.Timeout(config.read_timeout, connect=config.connect_timeout)
        # A pool looks at each of its connections at every request: many small ones look less.
        context = httpx2.create_ssl_context(trust_env=True)  # whom the system trusts
        pools = [
            httpx2.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)
            for _ in range(-(-config.max_streams // _STREAMS_A_POOL))
        ]
        self._pools = pools
        self._next_pool = itertools.cycle(pools)

    async def close(self) -> None:
        """Closes all connections."""
        for pool in self._pools:
            await pool.aclose()

    async def open(self, method: str, target: bytes, headers: Headers, content: bytes) -> Leg:
        """Sends a request.

        Args:
            method: Of HTTP.
            target: Path and query.
            headers: Of the client; its authorization gives way to the upstream's own key.
            content: The body.

        Raises:
            UpstreamError: If there is no answer.
        """
        url = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + target)
        request = httpx2.Request(method, url, headers=self._signed(headers), content=content)
        request.extensions["timeout"] = self._timeout.as_dict()
        with told():
            return Leg(await next(self._next_pool).handle_async_request(request))

    async def stream(self, path: str, body: Json, headers: Headers) -> Leg:
        """Posts JSON and expects events."""
        headers = [pair for pair in headers if pair[0] not in (b"accept-encoding", b"content-type")]
        headers += [(b"accept-encoding", b"identity"), (b"content-type", b"application/json")]
        return await self.open("POST", path.encode(), headers, json.dumps(body).encode())

    async def call(self, path: str, body: Json | None, headers: Headers) -> Json:
        """Posts JSON, or gets, and expects JSON at once.

        Raises:
            UpstreamError: If there is none, or not soon.
        """
        own = [pair for pair in headers if pair[0] == b"authorization"]
        with anyio.move_on_after(_CALL_TIMEOUT):
            if body is None:
                leg = await self.open("GET", path.encode(), own, b"")
            else:
                leg = await self.stream(path, body, own)
            try:
                return _json(leg.response.status_code, await leg.body())
            finally:
                await leg.close()
        raise UpstreamError("timeout", "upstream did not answer a call in time", 504)

    def _signed(self, headers: Headers) -> Headers:
        if self._key is None:
            return headers
        others = [pair for pair in headers if pair[0] != b"authorization"]
        return [*others, (b"authorization", self._key)]


def _json(status: int, content: bytes) -> Json:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if status != 200 or not isinstance(found, dict):
        raise UpstreamError("status", f"upstream answered a call with {status}")
    return found


def _models(told: Json) -> list[Json]:
    """The models of a server's list of them."""
    models = told.get("data")
    return [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []


def _digest(asks: Json) -> bytes:
    """A short name of a question; clients choose how long it is."""
    return hashlib.sha256(json.dumps(asks, sort_keys=True).encode()).digest()


class CannotContinue(Exception):
    """A thought cannot be closed and continued; `kind` says why."""

    def __init__(self, kind: str) -> None:
        """Takes the reason in a word or two."""
        super().__init__(kind)
        self.kind = kind


class Server:
    """The LM's server, of a kind that nobody knows: completions can be continued as text."""

    kind = "unknown"
    one_at_a_time = False
    """Whether a second request waits for the first to end."""
    num_close_tokens = 0
    """Tokens of the close text, if they are known."""

    def __init__(self, upstream: Upstream, rules: PointRules, close_text: str) -> None:
        """Takes the connections, the think markers and what closes a thought."""
        self.upstream = upstream
        self.rules = rules
        self.close_text = close_text
        before, marker, after = close_text.partition(rules.think_end)
        #: What of the close text stands in the thought, and behind it.
        self.close_parts = (before, after.lstrip()) if marker else ("", close_text)
        # Only white space stands behind the marker.
        self.ends_with_marker = bool(marker) and not after.strip()
        self._opens: dict[bytes, bool] = {}

    def why_not(self, asked: Asked) -> str | None:
        """Why a request cannot be halted here; None if it can."""
        return "unknown server" if asked.chat else asked.why_not_continued(self.close_text)

    def num_top(self, asked: Asked) -> int | None:
        """The likeliest tokens that the client expects to see; None if no numbers at all."""
        return asked.num_top

    def extra(self, asked: Asked) -> Json:
        """Fields that are added to a request that is watched."""
        return {}

    async def end_thought(self, asked: Asked, completion_id: str, headers: Headers) -> bool:
        """Tells the server to end a running thought by itself; whether it will.

        Raises:
            UpstreamError: If the call fails.
        """
        return False

    async def continuation(self, asked: Asked, seen: Seen, tail: str, headers: Headers) -> Json:
        """The body of the request that goes on from what was seen, and a tail.

        Raises:
            CannotContinue: If the server did not show enough for it.
            UpstreamError: If the server does not tell what it has to.
        """
        if asked.chat:
            raise CannotContinue("no token ids")
        return asked.continued(prompt=asked.prompt + seen.text + tail)

    async def opens_thought(self, asked: Asked, headers: Headers) -> bool:
        """Whether the server's template of a chat ends inside of a thought."""
        asks = asked.named("model", "chat_template_kwargs", "reasoning_effort", "chat_template")
        key = _digest(asks)
        if key not in self._opens:
            asks |= {"messages": [{"role": "user", "content": "?"}], "add_generation_prompt": True}
            try:
                rendered = await self.rendered(asks, headers)
            except UpstreamError:
                return False
            if len(self._opens) >= _MOST_KEPT:
                self._opens.clear()
            self._opens[key] = Thought(self.rules, rendered).begun
        return self._opens[key]

    async def rendered(self, asks: Json, headers: Headers) -> str:
        """The text that messages become.

        Raises:
            UpstreamError: If the server does not tell.
        """
        raise UpstreamError("status", "this kind of server does not tell")


class Vllm(Server):
    """vLLM: tells the ids of the prompt and of every token, and takes ids."""

    kind = "vllm"

    def __init__(self, upstream: Upstream, rules: PointRules, close_text: str) -> None:
        """As of any server."""
        super().__init__(upstream, rules, close_text)
        # What is asked once, however many streams need it at a time.
        self._asking = anyio.Lock()
        self._close_ids: dict[bytes, list[int]] = {}
        self._context: int | None = None

    def why_not(self, asked: Asked) -> str | None:
        """Chats can be continued too."""
        return asked.why_not_continued(self.close_text)

    def extra(self, asked: Asked) -> Json:
        """Asks for ids."""
        return {"return_token_ids": True}

    async def continuation(self, asked: Asked, seen: Seen, tail: str, headers: Headers) -> Json:
        """Goes on from ids, which older servers do not tell."""
        if seen.prompt_ids is None or not seen.has_ids:
            return await super().continuation(asked, seen, tail, headers)
        ids = await self.text_ids(asked, tail, headers)
        return await self._from_ids(asked, [*seen.prompt_ids, *seen.ids, *ids], headers)

    async def _from_ids(self, asked: Asked, ids: list[int], headers: Headers) -> Json:
        """The body that goes on from ids: what has no limit in a chat has 16 in completions."""
        body = asked.continued(prompt=ids)
        if asked.chat and asked.max_tokens is None:
            context = await self._context_length(headers)
            body["max_tokens"] = max(context - len(ids) - _RESERVED, 1)
        return body

    async def _context_length(self, headers: Headers) -> int:
        """Tokens that prompt and answer can have together."""
        async with self._asking:
            if self._context is None:
                models = _models(await self.upstream.call("/v1/models", None, headers))
                lengths = [model.get("max_model_len") for model in models]
                self._context = next((n for n in lengths if isinstance(n, int)), None)
            if self._context is None:
                raise CannotContinue("context length")
            return self._context

    async def text_ids(self, asked: Asked, text: str, headers: Headers) -> list[int]:
        """Ids of a text.

        Raises:
            UpstreamError: If the server does not tell.
        """
        asks = asked.named("model") | {"prompt": text, "add_special_tokens": False}
        if text != self.close_text:
            return await self.ids_of(asks, headers)
        async with self._asking:
            key = _digest(asks)
            if key not in self._close_ids:
                if len(self._close_ids) >= _MOST_KEPT:
                    self._close_ids.clear()
                self._close_ids[key] = await self.ids_of(asks, headers)
            return self._close_ids[key]

    async def ids_of(self, asks: Json, headers: Headers) -> list[int]:
        """Ids of what is asked for.

        Raises:
            UpstreamError: If the server does not tell.
        """
        found = (await self.upstream.call("/tokenize", asks, headers)).get("tokens")
        if not isinstance(found, list) or not all(isinstance(i, int) for i in found):
            raise UpstreamError("malformed", "upstream's /tokenize gave no ids")
        return found

    async def rendered(self, asks: Json, headers: Headers) -> str:
        """By way of ids."""
        model = {"model": asks["model"]} if "model" in asks else {}
        ids = await self.ids_of(asks, headers)
        told = await self.upstream.call("/detokenize", model | {"tokens": ids}, headers)
        return str(told.get("prompt") or told.get("text") or "")


class Sglang(Vllm):
    """SGLang: as vLLM, but streams of chats have no ids."""

    kind = "sglang"

    def extra(self, asked: Asked) -> Json:
        """In a stream of a chat it refuses to tell ids."""
        return {} if asked.chat else super().extra(asked)

    async def continuation(self, asked: Asked, seen: Seen, tail: str, headers: Headers) -> Json:
        """A chat goes on from the ids of its messages and of the text so far."""
        if not asked.chat:
            return await super().continuation(asked, seen, tail, headers)
        names = ("model", "messages", "chat_template_kwargs", "reasoning_effort")
        asks = asked.named(*names, "continue_final_message")
        seen.prompt_ids = await self.ids_of(asks, headers)
        ids = await self.text_ids(asked, seen.text + tail, headers)
        return await self._from_ids(asked, [*seen.prompt_ids, *ids], headers)


class LlamaServer(Server):
    """llama.cpp's server: ends a chat's thought when told, and takes texts and ids mixed."""

    kind = "llama-server"

    def __init__(self, *args: Any, one_at_a_time: bool, num_close_tokens: int) -> None:
        """Takes whether it has a single slot, and the tokens of the close text."""
        super().__init__(*args)
        self.one_at_a_time, self.num_close_tokens = one_at_a_time, num_close_tokens

    def _controls(self, asked: Asked) -> bool:
        own = asked.body.get("reasoning_budget_message")
        return asked.chat and self.ends_with_marker and not own

    def why_not(self, asked: Asked) -> str | None:
        """What it ends by itself needs no second leg."""
        return None if self._controls(asked) else asked.why_not_continued(self.close_text)

    def num_top(self, asked: Asked) -> int | None:
        """In a chat some even if no number is named; in completions none if it is 0."""
        if asked.chat:
            named = asked.num_top is None or "top_logprobs" in asked.body
            return asked.num_top if named else NUM_TOP
        return asked.num_top or None

    def extra(self, asked: Asked) -> Json:
        """Asks it to listen, and tells what to end a thought with."""
        if not self._controls(asked):
            return {}
        message = self.close_parts[0]
        return {"reasoning_control": True} | (
            {"reasoning_budget_message": message} if message else {}
        )

    async def end_thought(self, asked: Asked, completion_id: str, headers: Headers) -> bool:
        """Only in chats, and only with the marker last."""
        if not self._controls(asked):
            return False
        asks = asked.named("model") | {"id": completion_id, "action": "reasoning_end"}
        told = await self.upstream.call("/v1/chat/completions/control", asks, headers)
        return told.get("success") is True

    async def continuation(self, asked: Asked, seen: Seen, tail: str, headers: Headers) -> Json:
        """Goes on from the text of the prompt, the ids of the tokens and the text of the tail."""
        # It tells no ids of parts of a character, and of a chat's tokens that may begin a stop.
        is_complete = seen.has_ids and seen.text.isascii()
        is_complete &= not (asked.chat and asked.body.get("stop"))
        said = seen.ids if is_complete else [seen.text]
        if not asked.chat:
            return asked.continued(prompt=[asked.prompt, *said, tail])
        why_not = asked.why_not_continued(self.close_text)
        if why_not:
            raise CannotContinue(why_not)
        prompt = await self.rendered(asked.body, headers)
        if not Thought(self.rules, prompt).begun:
            # The LM's own marker has no chunk.
            prompt += self.rules.think_start + "\n"
        return asked.continued(prompt=[prompt, *said, tail])

    async def opens_thought(self, asked: Asked, headers: Headers) -> bool:
        """It tells thoughts apart, or shows their marker."""
        return False

    async def rendered(self, asks: Json, headers: Headers) -> str:
        """By its template."""
        return str((await self.upstream.call("/apply-template", asks, headers)).get("prompt") or "")


class Ollama(Server):
    """Ollama: wraps every prompt in its template; goes on with a last message of the assistant."""

    kind = "ollama"
    one_at_a_time = True

    def why_not(self, asked: Asked) -> str | None:
        """A message that the client has begun is not distinguished from a thought."""
        messages = asked.body.get("messages") or [{}]
        if messages[-1].get("role") == "assistant":
            return "prefill"
        return asked.why_not_continued(self.close_text)

    async def continuation(self, asked: Asked, seen: Seen, tail: str, headers: Headers) -> Json:
        """Goes on from a message of the assistant, in completions too."""
        text, start = seen.text + tail, self.rules.think_start
        if asked.chat:
            messages = asked.body["messages"]
            text = text if start in text else f"{start}\n{text}"
        else:
            messages = [{"role": "user", "content": asked.prompt}]
        said = {"role": "assistant", "content": text}
        return asked.continued(messages=[*messages, said])


# What their lists of models name as the owner.
_OWNERS: dict[str, type[Server]] = {
    "vllm": Vllm,
    "sglang": Sglang,
    "library": Ollama,
    "llamacpp": LlamaServer,
}


async def find_server(
    upstream: Upstream, kind: str, rules: PointRules, close_text: str, headers: Headers
) -> Server:
    """The server, of the kind that it is or is said to be.

    Raises:
        UpstreamError: If it has to be asked and does not answer.
    """
    found = next((known for known in _OWNERS.values() if known.kind == kind), None)
    if found is None:
        models = _models(await upstream.call("/v1/models", None, headers))
        if not models:
            raise UpstreamError("status", "upstream names no model yet")
        found = _OWNERS.get(str(models[0].get("owned_by")), Server)
    if found is LlamaServer:
        props = await upstream.call("/props", None, headers)
        ids = await upstream.call("/tokenize", {"content": close_text}, headers)
        return LlamaServer(
            upstream,
            rules,
            close_text,
            one_at_a_time=props.get("total_slots") == 1,
            num_close_tokens=len(ids.get("tokens") or ()),
        )
    return found(upstream, rules, close_text)
