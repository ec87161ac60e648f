"""Looking at answers: at a decision point an answer is forced, beside the thought or in turn."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio

from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.dialect import ids_in, text_of
from haltwise.proxy.generation import ServedGeneration, read_generation, refusal
from haltwise.proxy.lm_server import LMServer
from haltwise.proxy.metrics import Metrics, log
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage, UpstreamLeg
from haltwise.proxy.wire import Json, RawHeaders, ServedToken, StreamEvent, UpstreamError
from haltwise.session.thought import Probe

# Keys of which it is known until when they are refused.
_MOST_KEYS = 1000


class ProbeRoom:
    """Room for the probes of all streams.

    Where a server tells how many requests it runs at once, a probe takes no place that a stream
    has or waits for. One that wants to be left alone for a while is, by those who ask with the key
    that it refused.

    Args:
        most: The most probes at a time.
        num_streams: Tells how many streams run.
    """

    def __init__(self, most: int, num_streams: Callable[[], int]) -> None:
        """Is empty."""
        self.num_running = 0
        """Probes that run."""
        self._most, self._num_streams = most, num_streams
        self._told: set[str] = set()  # what was warned of
        self._until: dict[bytes, float] = {}  # by key, on the clock of time.monotonic

    def leave_alone(self, headers: RawHeaders, seconds: float) -> None:
        """Has no room for a while for those who ask with the key in these headers."""
        if seconds > 0:
            if len(self._until) >= _MOST_KEYS:
                self._until.clear()
            until = time.monotonic() + seconds
            key = _key_in(headers)
            self._until[key] = max(until, self._until.get(key, 0.0))

    def tell_if_crowded(self, num_slots: int | None) -> None:
        """Warns of the first decision point that is passed since there are too few slots."""
        if not self.has_slots(num_slots):
            self._tell_once(
                "crowded",
                f"more streams than the {num_slots} that the LM's server runs at once: meanwhile "
                "no answers are looked at, and the head halts next to nothing. Expected as many "
                "slots as streams (llama-server --parallel)",
            )

    def tell_if_lost(self, turn: LegUsage) -> None:
        """Warns of the first turn that a server has computed anew for the most part.

        Args:
            turn: What a turn behind the first took.
        """
        computed, prompt = turn.computed_tokens, turn.prompt_tokens
        if computed is not None and prompt is not None and 2 * computed > prompt:
            self._tell_once(
                "lost",
                f"the LM's server has computed {computed} of {prompt} tokens anew for a turn of a "
                "thought, whose slot another request had taken. Expected a llama-server with "
                "--slot-prompt-similarity 0.8, and more slots than streams",
            )

    def _tell_once(self, what: str, told: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning(json.dumps({"warning": told}))

    def has_slots(self, num_slots: int | None) -> bool:
        """Whether there are no more streams than a server runs at once, as far as it tells."""
        return num_slots is None or self._num_streams() <= num_slots

    def is_free(self, num_slots: int | None, headers: RawHeaders, is_in_turn: bool = False) -> bool:
        """Whether there is room for one more.

        Args:
            num_slots: Requests that the server runs at once; None if it does not tell.
            headers: With the key that it asks with.
            is_in_turn: Whether its own stream does not run meanwhile: others may wait for that
                place if there are more of them than slots.
        """
        num = self.num_running
        if self._until and time.monotonic() < self._until.get(_key_in(headers), 0.0):
            return False
        num_places = self._num_streams() + (0 if is_in_turn else num + 1)
        return num < self._most and (num_slots is None or num_places <= num_slots)


@dataclass
class ProbeUsage:
    """What the probes of one completion took."""

    num: int = 0
    """Probes."""
    num_failed: int = 0
    """Those of them without an answer."""
    num_passed: int = 0
    """Decision points without one, since there was no room for it."""
    prompt_tokens: int = 0
    """Tokens of their prompts, as far as the server tells them; its cache has most of them."""
    cached_tokens: int = 0
    """Those of them that its cache had, as far as it tells."""
    completion_tokens: int = 0
    """Tokens that they generated."""

    def report(self) -> Json:
        """The numbers as a client is told them."""
        told = {"num": self.num, "failed": self.num_failed}
        told |= {"passed": self.num_passed} if self.num_passed else {}
        return told | {n: getattr(self, n) for n in ("prompt_tokens", "completion_tokens")}


@dataclass(frozen=True)
class SeenAnswer:
    """A forced answer that a head has seen."""

    probe: Probe
    """The answer."""
    is_whole: bool
    """Whether the LM has ended it, or the text that ends such answers, and not a limit."""
    num_before: int | None
    """Tokens of the completion's prompt; None if the server does not tell."""


class AnswerProber:
    """Forces the answers of one completion, one at a time.

    Whatever goes wrong with a probe, its answer is unknown, and nothing else happens.

    Args:
        request: What the client asked for.
        server: The LM's server.
        room: That of all probes.
        patience: Seconds that a probe may take.
        metrics: Where probes are counted.
        gives_seen: Whether an answer that was seen may be the client's.
    """

    def __init__(
        self,
        request: CompletionRequest,
        server: LMServer,
        room: ProbeRoom,
        patience: float,
        metrics: Metrics,
        gives_seen: bool,
    ) -> None:
        """Asks nothing yet."""
        self.usage = ProbeUsage()
        """What all probes took, the one that runs included."""
        self.running: asyncio.Task[SeenAnswer | None] | None = None
        """The probe whose answer has not been taken."""
        self.latest: SeenAnswer | None = None
        """The answer that was taken last; None if it was unknown."""
        self.seen: dict[int, SeenAnswer] = {}
        """By the tokens before each, all answers that were taken and known."""
        self.leg: UpstreamLeg | None = None
        """The leg that a probe takes turns with; None if it runs on beside."""
        self._at, self._gives_seen = 0, gives_seen
        self._request, self._server, self._room = request, server, room
        self._patience, self._metrics = patience, metrics
        self._continues = request.why_not_continued(server.close_text) is None
        # Two requests must not have one name.
        self._headers = [pair for pair in request.headers if pair[0] != b"x-request-id"]

    @property
    def keeps_slot(self) -> bool:
        """Whether a slot that its stream leaves waits for what it asks next: nobody else does."""
        return self._room.has_slots(self._server.num_parallel)

    @property
    def has_room(self) -> bool:
        """Whether a probe may start: none runs, and there is room for it."""
        if not self._continues or self.running is not None:
            return False
        num_slots, in_turn = self._server.num_parallel, self._request.comes_in_turns
        return self._room.is_free(num_slots, self._headers, in_turn)

    def note_turn(self, usage: Json) -> None:
        """Notes what a turn behind the first took, as far as the server tells it."""
        turn = LegUsage()
        turn.take(usage)
        self._room.tell_if_lost(turn)

    def pass_point(self) -> None:
        """Notes a decision point without a probe."""
        self.usage.num_passed += 1
        self._metrics.probes.labels("refused").inc()
        self._room.tell_if_crowded(self._server.num_parallel)

    def start(self, seen: GeneratedSoFar) -> None:
        """Starts a probe behind what was generated up to a decision point."""
        self._room.num_running += 1
        self.usage.num += 1
        self._at = seen.num_tokens
        self.running = asyncio.create_task(self._counted(seen))
        self.running.add_done_callback(self._leave)

    def _leave(self, _: asyncio.Task[SeenAnswer | None]) -> None:
        self._room.num_running -= 1

    def take(self) -> Probe | None:
        """Takes the answer of the probe that has ended; None if it is unknown."""
        assert self.running is not None
        self.latest, self.running = self.running.result(), None
        if self.latest is None:
            return None
        self.seen[self._at] = self.latest
        return self.latest.probe

    def to_give(self, seen: SeenAnswer | None, num_tokens: int) -> Probe | None:
        """The answer that was seen, where it is to be the client's and can be.

        What a client asks beside, about the answer, is for its LM to answer.

        Args:
            seen: The answer, if it is known.
            num_tokens: Tokens that the client has before it.
        """
        request = self._request
        if not self._gives_seen or seen is None:
            return None
        budget = request.max_tokens
        is_within = budget is None or num_tokens + len(seen.probe.tokens) <= budget
        is_plain = request.num_top is None and not request.has_stops
        is_answer = seen.is_whole and bool(seen.probe.text.strip())
        return seen.probe if is_answer and is_within and is_plain else None

    def drop(self) -> None:
        """Forgets the probe that was cancelled."""
        self.running = None

    def cancel(self) -> None:
        """Ends the probe that runs: nobody wants its answer any more."""
        if self.running is not None:
            self.running.cancel()

    async def close(self) -> None:
        """Ends the probe that runs, and waits until it has ended."""
        self.cancel()
        with anyio.CancelScope(shield=True), suppress(asyncio.CancelledError):
            if self.running is not None:
                await self.running

    async def _counted(self, seen: GeneratedSoFar) -> SeenAnswer | None:
        started, outcome = time.perf_counter(), "cancelled"
        try:
            answer = await self._patiently(seen)
            outcome = "failed" if answer is None else "answered"
        finally:
            self._metrics.probes.labels(outcome).inc()
        if answer is None:
            self.usage.num_failed += 1
        else:
            self._metrics.probe_seconds.observe(time.perf_counter() - started)
        return answer

    async def _patiently(self, seen: GeneratedSoFar) -> SeenAnswer | None:
        """The answer; None if it is unknown."""
        try:
            async with asyncio.timeout(self._patience):
                if self.leg is not None:
                    await self.leg.pause()
                return await self._answer(seen)
        except UpstreamError as error:
            self._room.leave_alone(self._headers, error.wait)
            return None
        except TimeoutError:
            return None
        except Exception:
            log.exception("a defect of the proxy")
            return None

    async def _answer(self, seen: GeneratedSoFar) -> SeenAnswer:
        """The answer.

        Raises:
            UpstreamError: If the server does not give it.
        """
        server, rules, usage = self._server, self._server.rules, self.usage
        body, before = await server.probe_body(self._request, seen), usage.completion_tokens
        first = LegUsage()
        said = await asked_to_go_on(server, body, self._headers, partial(self._events, first))
        while said.is_stopped and len(said.tokens) < body["max_tokens"]:
            # What ends answers was a part of this one, such as a brace that it had opened.
            events = partial(self._events, LegUsage())
            said = await asked_to_go_on(server, body, self._headers, events, said.tokens)
        num_prompt = first.prompt_tokens
        usage.prompt_tokens += num_prompt or 0
        usage.cached_tokens += first.cached_tokens or 0
        self._metrics.probe_tokens.inc(usage.completion_tokens - before)
        num_before = None
        if num_prompt is not None:
            num_before = max(num_prompt - seen.num_tokens - server.num_close_tokens, 0)
        forced = said.forced_answer
        is_whole = said.ended_by_lm or rules.is_complete(forced.tokens)
        return SeenAnswer(rules.read(forced), is_whole, num_before)

    async def _events(self, usage: LegUsage, leg: UpstreamLeg) -> AsyncIterator[StreamEvent]:
        """The events of a probe, whose tokens count as they come: it may be cancelled."""
        before = self.usage.completion_tokens
        async for event in counting(usage, leg):
            self.usage.completion_tokens = before + usage.completion_tokens
            yield event


def _key_in(headers: RawHeaders) -> bytes:
    """The key that a request is asked with; empty if it has none."""
    return next((value for name, value in headers if name == b"authorization"), b"")


async def counting(usage: LegUsage, leg: UpstreamLeg) -> AsyncIterator[StreamEvent]:
    """The events of a leg, whose tokens are counted as they come."""
    said = GeneratedSoFar()
    async for event in leg:
        if event.chunk is not None:
            said.add(event.chunk)
            usage.completion_tokens = max(usage.completion_tokens, said.num_tokens)
            usage.take(event.chunk.get("usage"))
            usage.take_timings(event.chunk.get("timings"))
        yield event


async def asked_to_go_on(
    server: LMServer,
    body: Json,
    headers: list[tuple[bytes, bytes]],
    events: Callable[[UpstreamLeg], AsyncIterator[StreamEvent]] = aiter,
    before: Sequence[ServedToken] = (),
) -> ServedGeneration:
    """What the LM says to a request of the proxy's own.

    Args:
        server: The LM's server.
        body: The body of the request.
        headers: Its headers.
        events: Gives the events of the answer; more than that may be done with them.
        before: What the LM has said to it already, if it is to go on from there.

    Returns:
        All that it has said, `before` included.

    Raises:
        UpstreamError: If the server refuses, breaks off or does not answer as it should.
    """
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    num_left, stop = body["max_tokens"] - len(before), "".join(body.get("stop", ()))
    if before:
        body = body | {"prompt": _behind(body["prompt"], before), "max_tokens": num_left}
    is_complete = server.rules.is_complete
    leg = await server.upstream.stream(path, body, headers)
    try:
        if not leg.is_readable:
            raise await refusal(path, leg)
        said = await read_generation(
            events(leg), num_left, lambda new: is_complete([t.text for t in (*before, *new)]), stop
        )
    finally:
        await leg.close()
    return replace(said, tokens=[*before, *said.tokens])


def _behind(prompt: str | list[Any], said: Sequence[ServedToken]) -> str | list[Any]:
    """A prompt, and behind it what was said to it."""
    if isinstance(prompt, str):
        return prompt + text_of(said)
    added: list[Any] = ids_in(said) or [text_of(said)]
    return [*prompt, *added]
