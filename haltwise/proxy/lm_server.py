"""The LM's server: what kind it is, and how each kind ends a thought and goes on behind it."""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import anyio

from haltwise.proxy.completion_request import CompletionRequest, numbers_asked
from haltwise.proxy.dialect import (
    NO_SUCH_PATH,
    LlamaDialect,
    OllamaDialect,
    ServerDialect,
    SglangDialect,
    VllmDialect,
    listed_models,
    owner_of,
)
from haltwise.proxy.native import NATIVE_PATH, NativeLeg, native_body
from haltwise.proxy.sampling import numbers_in
from haltwise.proxy.upstream import GeneratedSoFar, SharedQuestion, Upstream, UpstreamLeg
from haltwise.proxy.wire import Json, RawHeaders, UpstreamError, json_object
from haltwise.session.signal_collector import NUM_TOP
from haltwise.session.thought import PointRules

# Answers to questions that hang on what clients send are kept for so many.
_MOST_KEPT = 1000
# Fields of a chat that its prompt hangs on, beside its messages.
_RENDERED = (
    *("model", "tools", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort"),
    *("add_generation_prompt", "continue_final_message"),
)
# What llama-server is asked for that hangs on all tokens of an answer, and not on the newest alone.
_OF_WHOLE = (
    *("mirostat", "adaptive_target", "t_max_predict_ms", "n_predict", "reasoning_format"),
    *("reasoning_budget_tokens", "thinking_budget_tokens", "reasoning_budget_message"),
)
# Marks, in a prompt that is only looked at, where the last message ends that the LM answers.
_BORDER = "~haltwise~"
# A text of which a server tells no id, or not of all its tokens.
_NO_ASCII = "\u00d7"
# How templates begin the turn of another speaker.
_TURN = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>|\[/?INST\]|</?s>|<(start|end)_of_turn>")
# Tokens of its context that SGLang may keep for itself.
_RESERVED = 16
# Seconds for which a server that did not render a chat in time is not asked to render another.
_SILENCE_LASTS = 10.0
# Seconds that a slot may take to become free whose client has left, and between two looks at it.
_LEAVING_TAKES = 2.0
_BETWEEN_LOOKS = 0.01
# Seconds that a server whose kind is known has to tell the names of its LMs.
_NAMES_TIMEOUT = 1.0


class LMServer(ServerDialect):
    """The LM's server, of a kind that nobody knows: completions can be continued as text.

    Args:
        upstream: The connections to it.
        rules: The think markers, and where thoughts have decision points.
        close_text: What closes a thought.
        samples_answers: Whether the answer behind a closed thought is sampled as its request says.
            Otherwise it is the likeliest one: such answers were recorded, and a price is chosen and
            certified by them.
    """

    one_at_a_time = False
    """Whether a second request waits for the first to end."""
    caches_by_slot = False
    """Whether a request beside another one has nothing of what that one has computed."""
    num_parallel: int | None = None
    """Requests that it runs at once; None if it does not tell."""
    sampling: Mapping[str, float] = MappingProxyType({})
    """How requests are sampled that name nothing, see `haltwise.proxy.sampling`; empty if it does
    not tell."""
    num_close_tokens = 0
    """Number of tokens of the close text; 0 if it is not known."""

    def __init__(
        self,
        upstream: Upstream,
        rules: PointRules,
        close_text: str,
        samples_answers: bool = False,
    ) -> None:
        """Asks nothing yet."""
        super().__init__(upstream)
        self.rules = rules
        self.samples_answers = samples_answers
        self.close_text = close_text
        has_marker = bool(rules.think_end) and rules.think_end in close_text
        before, after = close_text.split(rules.think_end, 1) if has_marker else ("", close_text)
        self.close_parts = (before, after.lstrip() if has_marker else after)
        """What of the close text stands inside of the thought, and what stands behind it."""
        self.names: list[str] = []
        """What it calls its models, as far as it was asked."""
        self._silent_until = 0.0
        # Only white space stands behind the marker.
        self.ends_with_marker = has_marker and not after.strip()

    async def learn(self, headers: RawHeaders) -> None:
        """Asks the server once for what has to be known of it; here that is nothing.

        Args:
            headers: A client's, whose key the questions are asked with.

        Raises:
            UpstreamError: If the server does not answer.
        """

    async def leave(self, leg: UpstreamLeg, headers: RawHeaders) -> None:
        """Ends a leg before its server has; what goes on from it is asked next.

        Args:
            leg: The leg.
            headers: A client's, whose key the server is asked with.
        """
        await leg.close()

    def why_not_halted(self, request: CompletionRequest) -> str | None:
        """Why a request cannot be halted on this server; None if it can."""
        return "unknown server" if request.chat else request.why_not_continued(self.close_text)

    def is_of(self, lm: str) -> bool:
        """Whether one of its models may be an LM, by the names of both.

        Args:
            lm: The LM's names, with commas between them; an empty one may be anything.
        """
        own, others = [_bare(name) for name in self.names], [_bare(n) for n in lm.split(",")]
        pairs = [(one, other) for one in own for other in others]
        return not pairs or any(one in other or other in one for one, other in pairs)

    def shows_numbers(self, request: CompletionRequest) -> bool:
        """Whether the server tells log probabilities of such a request's stream."""
        return True

    def needs_numbers(self, request: CompletionRequest) -> bool:
        """Whether it tells such a request's tokens apart by their log probabilities alone."""
        return True

    def num_top_shown(self, request: CompletionRequest) -> int | None:
        """How many of the likeliest tokens the client expects to see; None for no numbers."""
        return request.num_top

    def extra_fields(self, request: CompletionRequest) -> Json:
        """Fields that this kind of server needs in a request that is watched."""
        return {}

    @property
    def caps_itself(self) -> bool:
        """Whether the server closes a thought of `/v1/responses` at a cap, with the close text."""
        return False

    def capped_body(self, asked: Json, cap: int) -> Json:
        """A body of `/v1/responses` that tells such a server the cap; a smaller one is kept."""
        return asked

    async def end_thought(self, request: CompletionRequest, completion_id: str) -> bool:
        """Tells the server to end a running thought by itself; returns whether it will.

        Raises:
            UpstreamError: If the server does not answer.
        """
        return False

    async def in_turns(self, request: CompletionRequest) -> CompletionRequest | None:
        """The same request, as one whose thought comes in turns.

        Returns:
            None if it cannot, or if answers are better forced beside it on this kind of server.
        """
        return None

    async def open_turn(self, body: Json, headers: RawHeaders) -> UpstreamLeg:
        """Asks for a turn of a thought, as a completion.

        Args:
            body: The body of the completion; one without `logprobs` asks for the ids alone.
            headers: The client's.

        Raises:
            UpstreamError: If no answer comes.
        """
        return await self.upstream.stream("/v1/completions", body, headers)

    async def body_after(self, request: CompletionRequest, seen: GeneratedSoFar, tail: str) -> Json:
        """The body of the request that goes on from what was generated, and a tail behind it.

        Raises:
            UpstreamError: If the server did not show enough for it, or does not answer what it
                has to be asked for it.
        """
        if request.chat:
            raise UpstreamError("no token ids", "upstream did not tell the ids of a chat's tokens")
        return request.continued_body(prompt=request.prompt + seen.text + tail)

    async def answer_body(
        self, request: CompletionRequest, seen: GeneratedSoFar, tail: str
    ) -> Json:
        """The body of the request for the answer behind a closed thought.

        Raises:
            UpstreamError: As `body_after`.
        """
        body = await self.body_after(request, seen, tail)
        return body if self.samples_answers else body | {"temperature": 0}

    async def probe_body(self, request: CompletionRequest, seen: GeneratedSoFar) -> Json:
        """The body of the request that forces an answer: greedy, and as when it was recorded.

        Raises:
            UpstreamError: As `body_after`.
        """
        body = await self.body_after(request, seen, self.close_text)
        names = ("model", "prompt", "messages")
        kept: Json = {name: body[name] for name in names if name in body}
        return {
            **kept,
            "max_tokens": self.rules.max_answer_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **numbers_asked("messages" in kept, 1),
            **self.sampled(0.0, 0),
            **self.told_fields(None),
            **self.ended_by(self.rules.answer_end),
        }

    async def opened(self, request: CompletionRequest) -> bool | None:
        """Whether an answer begins inside of a thought.

        In a chat that hangs on the request's own messages: they may switch thoughts off, or have
        begun one.

        Returns:
            True inside of a thought, as in every answer of an LM that reasons in the open, False
            behind one that is closed already, None if there is none yet or the server does not
            tell.
        """
        if not request.chat:
            return opened_in_text(request.prompt, self.rules)
        if not self.rules.think_start:
            return True
        asks = request.fields_set(*_RENDERED)
        asks["messages"] = _with_border(request.body["messages"])
        asks.setdefault("add_generation_prompt", True)
        if anyio.current_time() < self._silent_until:
            return None
        try:
            rendered = await self.rendered(asks, request.headers)
        except UpstreamError as error:
            if error.kind == "timeout":
                self._silent_until = anyio.current_time() + _SILENCE_LASTS
            return None
        return _opened_in(rendered, self.rules)


class VllmServer(VllmDialect, LMServer):
    """vLLM: tells the ids of the prompt and of every token, and takes ids as a prompt."""

    def __init__(
        self,
        upstream: Upstream,
        rules: PointRules,
        close_text: str,
        samples_answers: bool = False,
    ) -> None:
        """Asks nothing yet; what is asked once is asked once, however many streams need it."""
        super().__init__(upstream, rules, close_text, samples_answers)
        self._close_ids: dict[bytes, SharedQuestion[list[int]]] = {}
        self._context = SharedQuestion(self._ask_context_length)

    def why_not_halted(self, request: CompletionRequest) -> str | None:
        """Chats can be halted as well as completions, since both can be continued."""
        return request.why_not_continued(self.close_text)

    def needs_numbers(self, request: CompletionRequest) -> bool:
        """It tells their ids."""
        return False

    def extra_fields(self, request: CompletionRequest) -> Json:
        """Asks for the ids of the tokens."""
        return {"return_token_ids": True}

    async def body_after(self, request: CompletionRequest, seen: GeneratedSoFar, tail: str) -> Json:
        """Goes on from ids if the server told all of them, which older ones do not, else text.

        Raises:
            UpstreamError: If the ids of a chat or of the tail, or the length of the context, are
                unknown.
        """
        if seen.prompt_ids is None or not seen.has_ids:
            return await super().body_after(request, seen, tail)
        ids = await self.text_ids(request, tail)
        return await self._from_ids(request, [*seen.prompt_ids, *seen.ids, *ids])

    async def _from_ids(self, request: CompletionRequest, ids: list[int]) -> Json:
        """The body that goes on from ids: what has no limit in a chat has 16 in completions."""
        body = request.continued_body(prompt=ids)
        if request.chat and request.max_tokens is None:
            context = await self._context.answer(request.headers)
            body["max_tokens"] = max(context - len(ids) - _RESERVED, 1)
        return body

    async def _ask_context_length(self, headers: RawHeaders) -> int:
        """How many tokens prompt and answer can have together."""
        found = await self.context(headers)
        if found is None:
            raise UpstreamError("context length", "upstream does not tell its context length")
        return found

    async def text_ids(self, request: CompletionRequest, text: str) -> list[int]:
        """The ids of a text's tokens; those of the close text are kept.

        Raises:
            UpstreamError: If the server does not tell.
        """
        asks = request.fields_set("model") | {"prompt": text, "add_special_tokens": False}
        if text != self.close_text:
            return await self.ids_of(asks, request.headers)
        key = _digest(asks)
        if key not in self._close_ids:
            if len(self._close_ids) >= _MOST_KEPT:
                self._close_ids.clear()
            self._close_ids[key] = SharedQuestion(partial(self.ids_of, asks))
        return await self._close_ids[key].answer(request.headers)


class SglangServer(SglangDialect, VllmServer):
    """SGLang: as vLLM, but its streams of chats have no ids."""

    def needs_numbers(self, request: CompletionRequest) -> bool:
        """Without ids it does."""
        return request.chat

    def extra_fields(self, request: CompletionRequest) -> Json:
        """Asks for ids in completions alone: a stream of a chat would be refused with it."""
        return {} if request.chat else super().extra_fields(request)

    async def body_after(self, request: CompletionRequest, seen: GeneratedSoFar, tail: str) -> Json:
        """Goes on, in a chat, from the ids of its messages and of the text so far.

        Raises:
            UpstreamError: If the server tells no ids, or not the length of the context.
        """
        if not request.chat:
            return await super().body_after(request, seen, tail)
        names = ("model", "messages", "chat_template_kwargs", "reasoning_effort")
        asks = request.fields_set(*names, "continue_final_message")
        seen.prompt_ids = await request.once("ids", lambda: self.ids_of(asks, request.headers))
        ids = await self.text_ids(request, seen.text + tail)
        return await self._from_ids(request, [*seen.prompt_ids, *ids])


class LlamaServer(LlamaDialect, LMServer):
    """llama.cpp's server: ends a chat's thought when told, and takes texts and ids mixed."""

    caches_by_slot = True
    _begins_with_space = False  # every text that its tokenizer reads
    _has_native = True  # as far as is known; a gateway may let other paths through alone

    async def learn(self, headers: RawHeaders) -> None:
        """Asks for its slots and its sampling, how long the close text is, how texts begin.

        Raises:
            UpstreamError: If the server does not answer.
        """
        props = await self.upstream.call("/props", None, headers)
        found = await self.upstream.call("/tokenize", {"content": self.close_text}, headers)
        self.num_parallel = _count(props.get("total_slots"))
        self.one_at_a_time = self.num_parallel == 1
        self.sampling = _own_sampling(props)
        self.num_close_tokens = len(found.get("tokens") or ())
        asks = {"content": _NO_ASCII, "with_pieces": True}
        first, *_ = (await self.upstream.call("/tokenize", asks, headers)).get("tokens") or [None]
        piece = first.get("piece") if isinstance(first, dict) else None
        self._begins_with_space = isinstance(piece, str) and piece.startswith(" ")

    async def leave(self, leg: UpstreamLeg, headers: RawHeaders) -> None:
        """Waits until the leg's slot is free, since no other has what it has computed.

        The server notices some tokens later that its client has left.
        """
        if self.one_at_a_time:  # whoever comes next waits for the slot
            await leg.close()
            return
        before = None
        with anyio.move_on_after(_LEAVING_TAKES):
            before = await self._num_busy(headers)
        await leg.close()
        with anyio.move_on_after(_LEAVING_TAKES):
            while before and (now := await self._num_busy(headers)) and now >= before:
                await anyio.sleep(_BETWEEN_LOOKS)

    async def _num_busy(self, headers: RawHeaders) -> int | None:
        """Slots in which a request runs; None if the server does not tell."""
        own = [pair for pair in headers if pair[0] == b"authorization"]
        try:
            told = await self.upstream.open("GET", b"/slots", own, b"")
            try:
                found = json_object(b'{"slots": %b}' % await told.body())
            finally:
                await told.close()
        except UpstreamError:
            return None
        slots = None if found is None else found["slots"]
        if not isinstance(slots, list) or not all(isinstance(slot, dict) for slot in slots):
            return None
        return sum(slot.get("is_processing") is True for slot in slots)

    def _controls(self, request: CompletionRequest) -> bool:
        """Whether the server is to end this request's thought by itself.

        It answers in the same stream then, with the request's own sampling.
        """
        own = request.body.get("reasoning_budget_message")
        can_end = request.chat and self.ends_with_marker and not own
        return can_end and (self.samples_answers or not self._is_better_continued(request))

    def _is_better_continued(self, request: CompletionRequest) -> bool:
        """Whether a chat would sample its answer, and a second request for the likeliest can do."""
        temperature = request.body.get("temperature")
        samples = self.sampling.get("temperature") if temperature is None else temperature
        last = (request.body.get("messages") or [{}])[-1]
        can_be = request.why_not_continued(self.close_text) is None and request.num_top is None
        return bool(samples) and can_be and last.get("role") != "assistant"

    def why_not_halted(self, request: CompletionRequest) -> str | None:
        """A thought that the server ends by itself can always be halted: it has no second leg.

        What the client has begun itself is a part of a whole answer, but not of a stream.
        """
        messages = request.body.get("messages") or [{}]
        if request.chat and not request.streams and messages[-1].get("role") == "assistant":
            return "prefill"
        if self._controls(request):
            return None
        return request.why_not_continued(self.close_text)

    def shows_numbers(self, request: CompletionRequest) -> bool:
        """It refuses to, where a chat has tools: only a cap can end such a thought."""
        return not (request.chat and request.body.get("tools"))

    def needs_numbers(self, request: CompletionRequest) -> bool:
        """Its native endpoint tells ids, and is asked for turns."""
        return not request.comes_in_turns

    def num_top_shown(self, request: CompletionRequest) -> int | None:
        """In a chat it shows some even if no number is named; in completions none if it is 0."""
        if request.chat:
            named = request.num_top is None or "top_logprobs" in request.body
            return request.num_top if named else NUM_TOP
        return request.num_top or None

    def extra_fields(self, request: CompletionRequest) -> Json:
        """Asks the server to listen for the end of the thought, and says what to end it with."""
        if not self._controls(request):
            return {}
        message = self.close_parts[0]
        return {"reasoning_control": True} | (
            {"reasoning_budget_message": message} if message else {}
        )

    @property
    def caps_itself(self) -> bool:
        """It writes the end marker itself, and before that what it is told to."""
        return self.ends_with_marker

    def capped_body(self, asked: Json, cap: int) -> Json:
        """Its own name for a cap; -1 is none."""
        own = asked.get("thinking_budget_tokens")
        is_smaller = isinstance(own, int) and 0 <= own < cap
        message = {"reasoning_budget_message": self.close_parts[0]} if self.close_parts[0] else {}
        return message | asked | {"thinking_budget_tokens": own if is_smaller else cap}

    async def end_thought(self, request: CompletionRequest, completion_id: str) -> bool:
        """Works in chats alone, and only if the close text ends with the marker.

        Raises:
            UpstreamError: If the server does not answer.
        """
        if not self._controls(request):
            return False
        asks = request.fields_set("model") | {"id": completion_id, "action": "reasoning_end"}
        found = await self.upstream.call("/v1/chat/completions/control", asks, request.headers)
        return found.get("success") is True

    async def in_turns(self, request: CompletionRequest) -> CompletionRequest | None:
        """A slot keeps its cache to itself: there, a request finds all that was said before.

        A chat is asked for as a completion of its prompt, whose tokens are all told.
        """
        body, messages = request.body, request.body.get("messages") or [{}]
        hangs_on_whole = request.has_stops or any(body.get(name) for name in _OF_WHOLE)
        why_not = request.why_not_continued(self.close_text)
        if why_not or hangs_on_whole or body.get("cache_prompt") is False:
            return None
        if request.chat:
            if request.num_top is not None or messages[-1].get("role") == "assistant":
                return None
            try:
                prompt = await self.rendered(request.body, request.headers)
            except UpstreamError:
                return None
            request = request.of_prompt(prompt)
        is_closed = opened_in_text(request.prompt, self.rules) is False
        return None if is_closed else replace(request, comes_in_turns=True)

    async def open_turn(self, body: Json, headers: RawHeaders) -> UpstreamLeg:
        """By the native endpoint; where there is none, ids come with log probabilities alone.

        Raises:
            UpstreamError: If no answer comes.
        """
        if self._has_native:
            leg = await self.upstream.stream(NATIVE_PATH, native_body(body), headers)
            if leg.response.status_code not in NO_SUCH_PATH:
                return NativeLeg(leg.response, str(body.get("model") or next(iter(self.names), "")))
            await leg.close()
            self._has_native = False
        return await super().open_turn(numbers_asked(False, 1) | body, headers)

    async def body_after(self, request: CompletionRequest, seen: GeneratedSoFar, tail: str) -> Json:
        """Goes on from the text of the prompt, the ids of the tokens and the text of the tail.

        Raises:
            UpstreamError: If the request has what a second one cannot have, or the server does
                not render the messages of a chat.
        """
        # It tells no ids of parts of a character, and of a chat's tokens that may begin a stop.
        is_told = seen.has_ids and not (request.chat and request.body.get("stop"))
        is_mixed = len(seen.texts) == len(seen.ids) and not self._begins_with_space
        said: list[int | str] = [seen.text]
        if is_told and seen.text.isascii():
            said = [*seen.ids]
        elif is_told and is_mixed:
            pairs = zip(seen.ids, seen.texts, strict=True)
            said = [i if text.isascii() else text for i, text in pairs]
        if not request.chat:
            return request.continued_body(prompt=_one_prompt([request.prompt, *said, tail]))
        why_not = request.why_not_continued(self.close_text)
        if why_not:
            raise UpstreamError(why_not, "upstream cannot continue such a request")
        prompt = await request.once("prompt", lambda: self._prompt_of_thought(request))
        return request.continued_body(prompt=_one_prompt([prompt, *said, tail]))

    async def _prompt_of_thought(self, request: CompletionRequest) -> str:
        """The text in which the thought of a chat begins."""
        prompt = await self.rendered(request.body, request.headers)
        if not await self.opened(request):
            # The LM's own marker has no chunk.
            prompt += self.rules.think_start + "\n"
        return prompt


class OllamaServer(OllamaDialect, LMServer):
    """Ollama: wraps every prompt in its template; goes on with a last message of the assistant."""

    one_at_a_time = True

    def why_not_halted(self, request: CompletionRequest) -> str | None:
        """Refuses a message that the client has begun: it looks like a thought that was begun."""
        messages = request.body.get("messages") or [{}]
        if messages[-1].get("role") == "assistant":
            return "prefill"
        return request.why_not_continued(self.close_text)

    async def body_after(self, request: CompletionRequest, seen: GeneratedSoFar, tail: str) -> Json:
        """Goes on from a message of the assistant, in completions too."""
        text, start = seen.text + tail, self.rules.think_start
        if request.chat:
            messages = request.body["messages"]
            text = text if start in text else f"{start}\n{text}"
        else:
            messages = [{"role": "user", "content": request.prompt}]
        said = {"role": "assistant", "content": text}
        return request.continued_body(messages=[*messages, said])


_SERVERS: list[type[LMServer]] = [VllmServer, SglangServer, OllamaServer, LlamaServer]


async def find_lm_server(unknown: LMServer, kind: str, headers: RawHeaders) -> LMServer:
    """The server, of the kind that it is or is said to be.

    Args:
        unknown: The server, as long as nobody knows its kind.
        kind: The kind that it is said to be; "auto" to ask it.
        headers: A client's, whose key the questions are asked with.

    Raises:
        UpstreamError: If it has to be asked and does not answer.
    """
    found = next((known for known in _SERVERS if known.kind == kind), None)
    models: list[Json] = []
    if found is not None:
        with anyio.move_on_after(_NAMES_TIMEOUT), suppress(UpstreamError):
            models = await listed_models(unknown.upstream, headers)
    else:
        models = await listed_models(unknown.upstream, headers)
        if not models:
            raise UpstreamError("status", "upstream names no model yet")
        owner = owner_of(models)
        found = next((known for known in _SERVERS if known.owner == owner), LMServer)
    server = found(unknown.upstream, unknown.rules, unknown.close_text, unknown.samples_answers)
    server.names = [str(m[name]) for m in models for name in ("id", "root") if m.get(name)]
    await server.learn(headers)
    return server


def _count(told: Any) -> int | None:
    return told if isinstance(told, int) and told > 0 else None


def _own_sampling(props: Json) -> dict[str, float]:
    """How llama-server samples where a request names nothing: by those samplers that it runs."""
    settings = props.get("default_generation_settings")
    params = settings.get("params") if isinstance(settings, dict) else None
    found = numbers_in(params)
    runs = params.get("samplers") if isinstance(params, dict) else None
    return found if not isinstance(runs, list) else {k: v for k, v in found.items() if k in runs}


def _bare(name: str) -> str:
    """The name of a model without its owner or folder, its ending, and how it is written."""
    last = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1]
    return re.sub(r"[\W_]+", "", last.lower().removesuffix(".gguf"))


def _with_border(messages: list[Json]) -> list[Json]:
    """Messages with a border behind the last one that the assistant has not begun itself."""
    num = len(messages) - (messages[-1:] != [] and messages[-1].get("role") == "assistant")
    if num == 0:
        return messages
    asked, content = messages[num - 1], messages[num - 1].get("content")
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": _BORDER}]
    else:
        content = f"{content or ''} {_BORDER}"
    return [*messages[: num - 1], asked | {"content": content}, *messages[num:]]


def _opened_in(rendered: str, rules: PointRules) -> bool | None:
    """As `LMServer.opened`, of a prompt with a border; what stands before that was not thought."""
    _, border, opening = rendered.rpartition(_BORDER)
    if not border:
        return opening.rfind(rules.think_start) > opening.rfind(rules.think_end) or None
    if rules.think_end in opening:
        return False
    return rules.think_start in opening or None


def opened_in_text(prompt: str, rules: PointRules) -> bool | None:
    """As `LMServer.opened`, of a prompt that is no chat.

    A marker that stands amid a line, or with another turn behind it, is only mentioned.
    """
    if not rules.think_start:
        return True
    before, marker, thought = prompt.rpartition(rules.think_start)
    if prompt.rstrip().endswith(rules.think_end):
        return False
    if not marker or rules.think_end in thought:
        return None
    has_line = not before or before[-1] in "\n>]" or thought.startswith("\n")
    return not thought.strip() or (has_line and not _TURN.search(thought)) or None


def _digest(asks: Json) -> bytes:
    """A short name of a question; clients choose how long the question is."""
    return hashlib.sha256(json.dumps(asks, sort_keys=True).encode()).digest()


def _one_prompt(parts: list[int | str]) -> str | list[int | str]:
    """The parts of a prompt as llama-server takes them: texts alone would be several prompts."""
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else parts
