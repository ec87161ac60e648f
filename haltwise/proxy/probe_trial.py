"""Whether forced answers run well on a server: tried once, before anybody is served."""

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

from haltwise import InputError
from haltwise.proxy.completion_request import CompletionRequest, numbers_asked
from haltwise.proxy.generation import refusal
from haltwise.proxy.lm_server import LMServer
from haltwise.proxy.metrics import log
from haltwise.proxy.probing import asked_to_go_on, counting
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage, UpstreamLeg
from haltwise.proxy.wire import Json, RawHeaders, UpstreamError
from haltwise.session.signal_collector import NUM_TOP

# What any LM goes on from; it is long enough to see whether the server's cache has it.
_PROMPT = " ".join(map(str, range(1, 101)))
# Tokens of the thought before each probe.
_STEP = 16
# Tokens of the thought in all: where it ends too soon to tell, a longer one is tried.
_LENGTHS = (256, 1024, 4096)
# How a server answers a request that its context has no room for.
_TOO_LONG = 400
# The first probe finds no cache, and a later one may miss it by chance: the slot of the one before
# is not free yet, or another client's request has it. A server that keeps one is not that unlucky.
_MOST_PROBES = 5
# A thought is long enough if so many probes alone, one after the other, could have run beside it.
_ENOUGH = 4.0
# Probes alone; the shortest one is what the server can do, whatever else the machine does.
_NUM_ALONE = 3
# Seconds that all of it may take.
_TIMEOUT = 60.0


@dataclass(frozen=True)
class ProbeTrial:
    """What a probe took, one step after another one: beside a stream, or in turn with it."""

    prompt_tokens: int | None
    """Tokens of its prompt, and of that of the turn behind it; None if the server does not tell."""
    computed_tokens: int | None
    """Those of them that the server's cache did not have; None if it does not tell."""
    overrun_tokens: int
    """Tokens of the stream until the answer was there, or the stream had ended."""
    seconds: float
    """Time until the answer was there."""
    num_parallel: int | None
    """Requests that the server runs at once; None if it does not tell."""
    came_in_time: bool
    """Whether the answer came before the thought had ended."""
    stream_seconds: float = 0.0
    """Time for which the stream went on beside it."""
    alone_seconds: float | None = None
    """Time that such an answer takes without a stream; None if that was of no interest."""
    is_in_turn: bool = False
    """Whether it came in turn with the thought, and not beside."""

    @property
    def is_sure(self) -> bool:
        """Whether the stream was long enough to tell: by the server's own pace, on this machine."""
        alone = self.alone_seconds
        return self.came_in_time or (alone is not None and self.stream_seconds >= _ENOUGH * alone)

    def problem(self) -> str:
        """What a head has to expect of such a server; no text if that is nothing bad."""
        if not self.is_sure:
            return ""
        if not self.came_in_time:
            return "the answer was not there before the thought had ended"
        computed, prompt = self.computed_tokens, self.prompt_tokens
        if computed is not None and prompt is not None and 2 * computed > prompt:
            return f"the server computed {computed} of {prompt} tokens anew"
        return ""

    def doubt(self, patience: float) -> str:
        """What may be bad, or may come of a busy machine; no text if there is nothing like it."""
        if not self.is_sure:
            return "too short a thought to tell whether answers come beside one"
        return "later than --probe-timeout" if self.seconds > patience else ""


async def check_probes(
    server: LMServer, patience: float, anyway: bool, headers: RawHeaders, takes_turns: bool
) -> None:
    """Tries a probe, and says what it took.

    Args:
        server: The LM's server.
        patience: Seconds that a probe may take once clients are served.
        anyway: Whether to go on even where probes are not served well.
        headers: With the key that it is asked with.
        takes_turns: Whether probes come in turn with thoughts, where a server does that well.

    Raises:
        InputError: If they are not.
        UpstreamError: If the server does not answer.
    """
    try:
        async with asyncio.timeout(_TIMEOUT):
            trial = await try_probes(server, headers, takes_turns)
    except TimeoutError:
        raise UpstreamError("timeout", f"no probe within {_TIMEOUT:.0f} seconds") from None
    log.info(json.dumps({"probe": asdict(trial)}))
    problem = trial.problem()
    if not (told := problem or trial.doubt(patience)):
        return
    slots = "" if trial.num_parallel is None else f", {trial.num_parallel} slots"
    way = "in turn with" if trial.is_in_turn else "beside"
    told = (
        f"a forced answer {way} a thought took {trial.seconds:.2f} s and {trial.overrun_tokens} "
        f"tokens of the thought{slots}: {told}"
    )
    if problem and not anyway:
        slots = "" if trial.is_in_turn else "two slots or more (llama-server --parallel 4) and "
        raise InputError(
            f"{told}. Expected {slots}a cache that has what was said before, a head trained with "
            "--probing at_halt, or --probe-anyway"
        )
    log.warning(json.dumps({"warning": told}))


async def try_probes(server: LMServer, headers: RawHeaders, takes_turns: bool) -> ProbeTrial:
    """Runs a stream, and probes beside it or in turn; a longer one where the first tells nothing.

    Args:
        server: The LM's server.
        headers: With the key that it is asked with.
        takes_turns: As of `check_probes`.

    Raises:
        UpstreamError: If the server does not answer.
    """
    if takes_turns and (request := await server.in_turns(_asked(server, headers, _STEP))):
        return await _tried_in_turn(server, request)
    trial = await _tried(server, headers, _LENGTHS[0])
    for length in _LENGTHS[1:]:
        if trial.is_sure:
            break
        try:
            trial = await _tried(server, headers, length)
        except UpstreamError as error:
            if error.answered != _TOO_LONG:
                raise
            break
    return trial


async def _tried(server: LMServer, headers: RawHeaders, length: int) -> ProbeTrial:
    """As `try_probes`, with a stream of so many tokens."""
    request = _asked(server, headers, length)
    body = request.watched_body(server.extra_fields(request))
    leg = await server.upstream.stream("/v1/completions", body, headers)
    try:
        if not leg.is_readable:
            raise await refusal("/v1/completions", leg)
        generated = GeneratedSoFar()
        for nth in range(_MOST_PROBES):
            await _read(leg, generated, _STEP)
            trial = await _probed(server, request, leg, generated)
            if not trial.came_in_time or (nth > 0 and not trial.problem()):
                break
    finally:
        await leg.close()
    if trial.came_in_time:
        return trial
    alone = [await _alone(server, request, generated) for _ in range(_NUM_ALONE)]
    return replace(trial, alone_seconds=min(alone))


def _asked(server: LMServer, headers: RawHeaders, num: int) -> CompletionRequest:
    """A request for a thought of so many tokens."""
    asked = {"prompt": _PROMPT, "max_tokens": num, "temperature": 0, "ignore_eos": True}
    asked |= {"model": server.names[0]} if server.names else {}
    return CompletionRequest(False, asked, headers)


async def _tried_in_turn(server: LMServer, request: CompletionRequest) -> ProbeTrial:
    """Runs turns of a thought, each with a probe behind it."""
    seen, body = GeneratedSoFar(), request.watched_body({})
    await _read_turn(server, request, body, seen)
    for nth in range(_MOST_PROBES):
        trial = await _probed_in_turn(server, request, seen)
        if nth > 0 and not trial.problem():
            break
    return trial


async def _probed_in_turn(
    server: LMServer, request: CompletionRequest, seen: GeneratedSoFar
) -> ProbeTrial:
    """Forces an answer behind what was generated, and reads the turn that follows."""
    started, usage = time.perf_counter(), LegUsage()
    await _forced(server, request, seen, usage)
    seconds = time.perf_counter() - started
    body = await server.body_after(request, seen, "")
    turn = await _read_turn(server, request, body, seen)
    return ProbeTrial(
        _sum_known(usage.prompt_tokens, turn.prompt_tokens),
        _sum_known(usage.computed_tokens, turn.computed_tokens),
        0,
        seconds,
        server.num_parallel,
        came_in_time=True,
        is_in_turn=True,
    )


async def _read_turn(
    server: LMServer, request: CompletionRequest, body: Json, seen: GeneratedSoFar
) -> LegUsage:
    """Reads a turn of a thought, which adds to what was generated; returns what it took."""
    numbers = numbers_asked(False, NUM_TOP)
    leg = await server.open_turn(body | numbers, request.headers)
    usage = LegUsage()
    try:
        if not leg.is_readable:
            raise await refusal("a turn of a thought", leg)
        async for event in counting(usage, leg):
            seen.add(event.chunk or {})
    finally:
        await leg.close()
    return usage


def _sum_known(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


async def _read(leg: UpstreamLeg, generated: GeneratedSoFar, num: int) -> bool:
    """Reads some tokens more; returns whether there were so many."""
    wanted = generated.num_tokens + num
    async for event in leg:
        generated.add(event.chunk or {})
        if generated.num_tokens >= wanted:
            return True
    return False


async def _probed(
    server: LMServer, request: CompletionRequest, leg: UpstreamLeg, generated: GeneratedSoFar
) -> ProbeTrial:
    """Forces an answer behind what was generated, and reads on until it is there."""
    seen = replace(generated, texts=list(generated.texts), ids=list(generated.ids))
    started, usage, came_in_time = time.perf_counter(), LegUsage(), True
    probe = asyncio.create_task(_forced(server, request, seen, usage))
    try:
        while came_in_time and await leg.comes_before(probe):
            came_in_time = await _read(leg, generated, 1)
        stream_seconds = time.perf_counter() - started
        await probe
    finally:
        probe.cancel()
    return ProbeTrial(
        usage.prompt_tokens,
        usage.computed_tokens,
        generated.num_tokens - seen.num_tokens,
        time.perf_counter() - started,
        server.num_parallel,
        came_in_time,
        stream_seconds,
    )


async def _alone(server: LMServer, request: CompletionRequest, seen: GeneratedSoFar) -> float:
    """Seconds that a forced answer takes without a stream beside it."""
    started = time.perf_counter()
    await _forced(server, request, seen, LegUsage())
    return time.perf_counter() - started


async def _forced(
    server: LMServer, request: CompletionRequest, seen: GeneratedSoFar, usage: LegUsage
) -> None:
    """Forces an answer, whose tokens are counted."""
    body = await server.probe_body(request, seen)
    await asked_to_go_on(server, body, request.headers, partial(counting, usage))
