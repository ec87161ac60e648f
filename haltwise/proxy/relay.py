"""The life of one watched completion: its thought, how that ends, and the answer."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass

import anyio

from haltwise.policy.head import HaltHead
from haltwise.proxy.asked import Asked
from haltwise.proxy.legs import Held, Leg, Seen, Skip, Used
from haltwise.proxy.metrics import Metrics
from haltwise.proxy.upstream import CannotContinue, Headers, Server
from haltwise.proxy.wire import (
    DONE,
    REASONING_FIELDS,
    Event,
    Json,
    Token,
    UpstreamError,
    Whole,
    chat_logprobs,
    choice_of,
    texts_of,
    tokens_of,
    trim_logprobs,
)
from haltwise.session.stream import Watcher
from haltwise.session.terms import Terms

log = logging.getLogger("haltwise.proxy")

# Seconds that a second leg has at least, even if the first one's own answer is whole by then.
_SOON = 2.0
# What chunks of one answer have in common.
_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
# How vLLM begins the texts of tokens that it was told to name by their ids.
_ID_TEXT = "token_id:"
# What a choice has on every server.
_OF_CHOICE = ("index", "delta", "text", "logprobs", "finish_reason")


@dataclass(frozen=True)
class Setting:
    """What all completions have in common."""

    head: HaltHead
    """The policy."""
    metrics: Metrics
    """Where they are counted."""
    shadow: bool
    """Whether they only tell what they would have done."""
    patience: float
    """Seconds to wait for a second leg."""


class Completion:
    """One completion that is watched, from the first token to the last.

    Args:
        asked: What the client wants.
        terms: On which its thought is watched.
        headers: What the upstream gets of the client's.
        server: The LM's.
        setting: As for all others.
    """

    def __init__(
        self,
        asked: Asked,
        terms: Terms,
        headers: Headers,
        server: Server,
        setting: Setting,
    ) -> None:
        """Starts before the first token."""
        self.asked = asked
        self.used = [Used()]
        """Tokens of each leg."""
        self.halted = False
        """Whether the proxy closed the thought."""
        self._headers, self._server = headers, server
        self._terms, self._setting = terms, setting
        prompt = "" if asked.chat else asked.prompt
        self._watcher = Watcher(setting.head, server.rules, terms, prompt)
        self._seen = Seen()
        self._legs: list[Leg] = []
        self._held: Held | None = None
        self._envelope: Json = {}
        self._num_top = server.num_top(asked)
        self._thinks, self._decides, self._knows_opening = True, True, not asked.chat
        self._field = ""  # in which the server puts the thought, if in one of its own
        self._shown_texts: list[str] = []
        self._finish: str | None = None
        self._fallback = ""  # why the LM was left to think on, if it was

    # What the client gets

    async def open(self) -> Leg:
        """Asks the upstream for a stream that can be watched.

        Raises:
            UpstreamError: If it does not answer.
        """
        extra = {} if self._setting.shadow else self._server.extra(self.asked)
        return await self._ask(self.asked.watched(extra))

    async def events(self, first: Leg) -> AsyncGenerator[Event, None]:
        """What the client gets of the stream, and of what takes its place.

        Raises:
            UpstreamError: If the answer is not whole.
        """
        try:
            async with aclosing(self._all_of(first)) as events:
                async for event in events:
                    yield event
        except UpstreamError:
            if self._finish is None:
                raise
        if self._finish is None:
            raise UpstreamError("cut", "upstream broke off its answer")
        yield DONE

    async def _all_of(self, first: Leg) -> AsyncGenerator[Event, None]:
        """As `events`, but for the end, even if an answer breaks off behind its own."""
        source: AsyncIterator[Event] | Held = first
        halts = True
        while halts:
            halts = False
            async for event in source:
                shown, halts = await self._take(event)
                if shown is not None:
                    yield shown
                if halts:
                    break
            if halts and not await self._ends_by_itself():
                second, source = await self._closed(first)
                if second is not None:
                    async for event in self._answer(second):
                        yield event
                    break

    async def whole(self, first: Leg) -> Json:
        """The same as one answer.

        Raises:
            UpstreamError: If it is not whole.
        """
        whole = Whole()
        async for event in self.events(first):
            if event.chunk is not None:
                whole.add(event.chunk)
        answer = whole.answer(self.asked.chat)
        return answer | {"usage": self._usage(answer.get("usage") or {})}

    async def close(self) -> None:
        """Ends whatever still runs."""
        if self._held is not None:
            await self._held.close()
        for leg in self._legs:
            await leg.close()

    # What is told about it

    @property
    def _completion_id(self) -> str:
        """The upstream's name of the answer."""
        return str(self._envelope.get("id", ""))

    @property
    def _position(self) -> int:
        """Thinking tokens, up to where the thought was halted if it was."""
        at = self._watcher.halted_at
        return at if self.halted and at is not None else self._watcher.progress.position

    @property
    def _reason(self) -> str:
        """Why the thought ended."""
        if self.halted:
            return "capped" if self._watcher.capped else "halted"
        if self._finish is None:
            return "cut off"
        if not self._watcher.progress.begun:
            return "no thought"
        cut = self._thinks and self._finish == "length"
        return "token budget" if cut else "closed by the LM"

    def report(self) -> Json:
        """What the client and the log are told."""
        legs = [asdict(used) for used in self.used]
        report: Json = {"halted": self.halted, "reason": self._reason, "position": self._position}
        report |= {"price": self._terms.price, "legs": legs}
        if self._fallback:
            report["fallback"] = self._fallback
        at = self._watcher.halted_at
        if self._setting.shadow and at is not None:
            shadow = {"reason": "capped" if self._watcher.capped else "halted", "position": at}
            report["shadow"] = shadow | {"saved_tokens": self._position - at}
        return report

    def count(self) -> None:
        """Adds it to the metrics, once it has ended."""
        report, metrics = self.report(), self._setting.metrics
        metrics.thoughts.labels(report["reason"]).inc()
        metrics.thinking_tokens.inc(self._watcher.progress.position)
        metrics.bad_signals.inc(self._watcher.num_bad_signals)
        metrics.shadow_saved_tokens.inc(report.get("shadow", {}).get("saved_tokens", 0))

    def _usage(self, told: Json) -> Json:
        """The usage of all legs, from what the server told of the only one if there is one."""
        prompt = sum(used.prompt_tokens or 0 for used in self.used)
        completion = sum(used.completion_tokens for used in self.used)
        usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion}
        usage |= {"total_tokens": prompt + completion}
        return usage | (told if len(self.used) == 1 else {}) | {"haltwise": self.report()}

    # The thought

    async def _take(self, event: Event) -> tuple[Event | None, bool]:
        """Takes in an event of the first leg; what to show of it, and whether to halt."""
        if event.chunk is None:
            return None if event.is_done else event, False
        choice, halts = choice_of(event.chunk), False
        if choice is not None:
            self._envelope = self._envelope or _envelope_of(event.chunk)
            if self._thinks:
                halts = await self._watch(event.chunk, choice)
            elif any(texts_of(choice)):
                self.used[-1].completion_tokens += 1  # unless the server tells it better
            self._finish = choice.get("finish_reason") or self._finish
        return self._shown(event, choice), halts and self._finish is None

    async def _watch(self, chunk: Json, choice: Json) -> bool:
        """Watches a chunk of the thought; whether to halt."""
        tokens, (thought, text) = tokens_of(choice), texts_of(choice)
        progress = self._watcher.progress
        self._seen.add(chunk, tokens)
        self.used[0].completion_tokens = self._seen.num_tokens
        self._note_prompt()
        if choice.get("delta", {}).get("tool_calls") or (text and self._field):
            self._thinks = False  # the server tells the answer apart
            return False
        self._shown_texts.append(thought + text)
        if thought and not self._field:
            self._field = next(name for name in REASONING_FIELDS if choice["delta"].get(name))
            progress.begun = self._knows_opening = True
        elif not self._knows_opening and (tokens or text):
            self._knows_opening = True
            opening = text + "".join(token.text for token in tokens)
            progress.begun = self._server.rules.think_start in opening or (
                await self._server.opens_thought(self.asked, self._headers)
            )
        if any(token.text.startswith(_ID_TEXT) for token in tokens):
            self._thinks = False  # its markers cannot be seen
            self._fall_back("token texts")
            return False
        if not tokens and thought + text:
            tokens = [Token(thought + text)]
        halts = self._feed(tokens)
        self._thinks &= not self._watcher.is_over
        budget = self.asked.max_tokens
        in_budget = budget is None or self._seen.num_tokens < budget
        return halts and self._decides and in_budget and not self._setting.shadow

    def _note_prompt(self) -> None:
        if self._seen.prompt_ids is not None:
            self.used[0].prompt_tokens = len(self._seen.prompt_ids)

    def _feed(self, tokens: list[Token]) -> bool:
        """Feeds the watcher; whether to halt at one of the tokens."""
        halts, watcher = False, self._watcher
        try:
            for token in tokens:
                num_points, started = watcher.progress.num_points, time.perf_counter()
                halts |= watcher.add(token.text, token.logprob, token.top)
                if watcher.progress.num_points > num_points:
                    self._setting.metrics.decision_seconds.observe(time.perf_counter() - started)
        except Exception:
            log.exception("a decision failed: the LM thinks on")
            self._thinks = False
            self._fall_back("policy")
        return halts

    def _shown(self, event: Event, choice: Json | None) -> Event | None:
        """An event without what the client did not ask for."""
        chunk: Json = event.chunk or {}
        if self._strip(chunk, choice):
            event.raw = b""
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.used[-1].take(usage)
            if choice is None and not self.asked.wants_usage:
                return None
            if self._finish is not None:
                chunk["usage"], event.raw = self._usage(usage), b""
        return event

    def _strip(self, chunk: Json, choice: Json | None) -> bool:
        """Takes out what the client did not ask for; whether there was anything."""
        parts = [chunk] if choice is None else [chunk, choice]
        dropped = ["prompt_token_ids", "token_ids"]
        if self._num_top is None:
            dropped.append("logprobs")
        found = [part.pop(name) for part in parts for name in dropped if name in part]
        if choice is not None and self._num_top is not None:
            trim_logprobs(choice.get("logprobs"), self._num_top)
            return True
        return bool(found)

    # How it is ended

    def _fall_back(self, reason: str) -> None:
        """Lets the LM think on."""
        self._decides, self._fallback = False, reason
        self._setting.metrics.fallbacks.labels(reason).inc()

    async def _ends_by_itself(self) -> bool:
        """Whether the server ends the running thought when told."""
        try:
            self.halted = await self._server.end_thought(
                self.asked, self._completion_id, self._headers
            )
        except UpstreamError:
            self.halted = False
        self._decides = False
        return self.halted

    async def _closed(self, first: Leg) -> tuple[Leg | None, AsyncIterator[Event] | Held]:
        """Closes the thought by a second leg; without one, gives what goes on instead."""
        if not self._server.one_at_a_time:
            self._held = Held(first)
        try:
            body = await self._body_after(self._server.close_text)
        except (UpstreamError, CannotContinue) as error:
            self._fall_back(error.kind)
            return None, self._held or first
        if self._held is None:
            await first.close()
        may_be_empty = bool(self._server.close_parts[1])
        try:
            second = await self._begun(body, may_be_empty, self._held)
        except UpstreamError as error:
            self._fall_back(error.kind)
            return None, self._held or self._again()
        self.halted = True
        if self._held is not None:
            await self._held.close()
            self.used[0].completion_tokens += self._held.num_tokens()
            await first.close()
        return second, second

    async def _body_after(self, tail: str) -> Json:
        """The body of a request that goes on from the thought and a tail behind it."""
        body = await self._server.continuation(self.asked, self._seen, tail, self._headers)
        self._note_prompt()
        return self.asked.less(body, sum(used.completion_tokens for used in self.used))

    async def _begun(self, body: Json, may_be_empty: bool, held: Held | None = None) -> Leg:
        """A leg that has begun to answer, or has nothing to add if it may.

        Args:
            body: Of its request.
            may_be_empty: Whether it may have nothing to add.
            held: Goes on instead, if this one begins neither soon nor before it has enough.

        Raises:
            UpstreamError: If it does not, or thinks on.
        """
        soon = anyio.current_time() + _SOON
        with anyio.move_on_after(self._setting.patience) as scope:

            def hurry() -> None:
                scope.deadline = min(scope.deadline, soon)

            if held is not None:
                held.when_enough(hurry)
            leg = await self._ask(body)
            choice = await leg.first_choice() if leg.is_stream else None
            thought, text = ("", "") if choice is None else texts_of(choice)
            if choice is not None and not thought and (text or may_be_empty):
                return leg
            await leg.close()
            raise UpstreamError("no answer", "upstream did not answer where it was to")
        if held is not None and held.is_enough:
            raise UpstreamError("late", "upstream went on by itself for too long")
        raise UpstreamError("timeout", "upstream did not answer in time", 504)

    async def _ask(self, body: Json) -> Leg:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        headers = self._headers
        if self._legs:  # two requests must not have one name
            headers = [pair for pair in headers if pair[0] != b"x-request-id"]
        leg = await self._server.upstream.stream(path, body, headers)
        self._legs.append(leg)
        return leg

    async def _again(self) -> AsyncIterator[Event]:
        """The answer anew, without what the client has of it."""
        self.used.append(Used())
        self._thinks = False
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        leg = await self._ask(self.asked.body | streaming)
        if not leg.is_stream:
            raise UpstreamError("status", f"upstream answered with {leg.response.status_code}")
        skip = Skip("".join(self._shown_texts), self._server.rules.think_end)
        async for event in leg:
            choice = choice_of(event.chunk) if event.chunk else None
            if event.chunk and (choice is None or skip.rest(choice)):
                yield Event(chunk=event.chunk | self._envelope)

    # The answer

    async def _answer(self, leg: Leg) -> AsyncIterator[Event]:
        """What the client gets of the second leg, and of a third one if that breaks off."""
        before, after = self._server.close_parts
        if self._field and before:
            yield self._made({}, {self._field: before})
        if text := after if self._field else self._server.close_text:
            yield self._made({}, self._part(text))
        said = Seen()
        try:
            async for event in self._answer_of(leg, said):
                yield event
        except UpstreamError as error:
            if self._finish is None:
                await leg.close()
                leg = await self._resumed(said.text, error)
                async for event in self._answer_of(leg, Seen()):
                    yield event
        if self.used[0].prompt_tokens is None and self.used[1].prompt_tokens is not None:
            num_sent = self._seen.num_tokens + self._server.num_close_tokens
            self.used[0].prompt_tokens = self.used[1].prompt_tokens - num_sent
        if self.asked.wants_usage:
            yield Event(chunk=self._envelope | {"choices": [], "usage": self._usage({})})

    async def _resumed(self, said: str, error: UpstreamError) -> Leg:
        """A leg that goes on where another one broke off.

        Raises:
            UpstreamError: What broke it off, if there is none.
        """
        try:
            body = await self._body_after(self._server.close_text + said)
            return await self._begun(body, may_be_empty=True)
        except (UpstreamError, CannotContinue):
            raise error from None

    async def _answer_of(self, leg: Leg, said: Seen) -> AsyncIterator[Event]:
        """The answer of a leg, in the form that the client expects.

        Raises:
            UpstreamError: If it breaks off.
        """
        used = Used()
        self.used.append(used)
        async for event in leg:
            choice = choice_of(event.chunk) if event.chunk else None
            if event.chunk is None:
                if not event.is_done:
                    yield event
                continue
            said.add(event.chunk)
            used.completion_tokens = said.num_tokens
            if choice is not None:
                self._finish = choice.get("finish_reason") or self._finish
                self._strip(event.chunk, choice)
                text = "".join(texts_of(choice))
                if text or choice.get("logprobs") or choice.get("finish_reason"):
                    yield self._made(choice, self._part(text))
            used.take(event.chunk.get("usage"))
        if self._finish is None:
            raise UpstreamError("cut", "upstream broke off its answer")

    def _part(self, text: str) -> Json:
        return {"content": text} if self.asked.chat else {"text": text}

    def _made(self, choice: Json, part: Json) -> Event:
        """A chunk as those of the first leg, with what a choice of another one tells beside."""
        own: Json = {"index": 0}
        own |= {"delta": part} if self.asked.chat else part
        if self._num_top is not None:
            logprobs = choice.get("logprobs")
            own["logprobs"] = chat_logprobs(logprobs) if self.asked.chat else logprobs
        own["finish_reason"] = choice.get("finish_reason")
        own |= {name: value for name, value in choice.items() if name not in _OF_CHOICE}
        return Event(chunk=self._envelope | {"choices": [own]})


def _envelope_of(chunk: Json) -> Json:
    return {name: chunk[name] for name in _ENVELOPE if name in chunk}
