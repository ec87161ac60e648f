"""Whether forced answers run beside a thought on a server: tried once, before anybody is served."""

import asyncio
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

from haltwise import InputError
from haltwise.proxy.completion_request import CompletionRequest
from haltwise.proxy.lm_server import LMServer
from haltwise.proxy.metrics import log
from haltwise.proxy.probing import asked_to_go_on, counting
from haltwise.proxy.upstream import GeneratedSoFar, LegUsage, UpstreamLeg
from haltwise.proxy.wire import UpstreamError

# What any LM goes on from; it is long enough to see whether the server's cache has it.
_PROMPT = " ".join(map(str, range(1, 101)))
# Tokens of the thought before each probe, and in all.
_STEP, _MOST = 16, 256
# The first probe finds no cache.
_NUM_PROBES = 2
# Seconds that all of it may take.
_TIMEOUT = 60.0


@dataclass(frozen=True)
class ProbeTrial:
    """What a probe took that ran beside a stream, one step after another one."""

    prompt_tokens: int | None
    """Tokens of its prompt; None if the server does not tell."""
    computed_tokens: int | None
    """Those of them that the server's cache did not have; None if it does not tell."""
    overrun_tokens: int
    """Tokens of the stream until the answer was there."""
    seconds: float
    """Time until then."""
    num_parallel: int | None
    """Requests that the server runs at once; None if it does not tell."""
    is_beside: bool
    """Whether the answer came before the stream had ended, and in time."""

    def problem(self) -> str:
        """What a head has to expect of such a server; no text if that is nothing bad."""
        if not self.is_beside:
            return "the answer was not there before the thought had ended"
        computed, prompt = self.computed_tokens, self.prompt_tokens
        if computed is not None and prompt is not None and 2 * computed > prompt:
            return f"the server computed {computed} of {prompt} tokens anew"
        return ""


async def check_probes(server: LMServer, patience: float, anyway: bool) -> None:
    """Tries a probe beside a stream, and says what it took.

    Args:
        server: The LM's server.
        patience: Seconds that a probe may take.
        anyway: Whether to go on even where probes are not served well.

    Raises:
        InputError: If they are not.
        UpstreamError: If the server does not answer.
    """
    try:
        async with asyncio.timeout(_TIMEOUT):
            trial = await try_probes(server, patience)
    except TimeoutError:
        raise UpstreamError("timeout", f"no probe within {_TIMEOUT:.0f} seconds") from None
    log.info(json.dumps({"probe": asdict(trial)}))
    if not (problem := trial.problem()):
        return
    slots = "" if trial.num_parallel is None else f", {trial.num_parallel} slots"
    told = (
        f"a forced answer beside a thought took {trial.seconds:.2f} s and {trial.overrun_tokens} "
        f"tokens of the thought{slots}: {problem}"
    )
    if not anyway:
        raise InputError(
            f"{told}. Expected two slots or more and a prefix cache (llama-server --parallel 4), a "
            "head trained with --probing at_halt, or --probe-anyway"
        )
    log.warning(json.dumps({"warning": told}))


async def try_probes(server: LMServer, patience: float) -> ProbeTrial:
    """Runs a stream, and probes beside it.

    Args:
        server: The LM's server.
        patience: Seconds that a probe may take.

    Raises:
        UpstreamError: If the server does not answer.
    """
    asked = {"prompt": _PROMPT, "max_tokens": _MOST, "temperature": 0, "ignore_eos": True}
    request = CompletionRequest(False, asked | ({"model": server.names[0]} if server.names else {}))
    body = request.watched_body(server.extra_fields(request))
    leg = await server.upstream.stream("/v1/completions", body, [])
    try:
        if not leg.is_readable:
            raise UpstreamError("status", f"upstream answered with {leg.response.status_code}")
        generated = GeneratedSoFar()
        for _ in range(_NUM_PROBES):
            await _read(leg, generated, _STEP)
            trial = await _probed(server, request, leg, generated, patience)
            if not trial.is_beside:
                break
        return trial
    finally:
        await leg.close()


async def _read(leg: UpstreamLeg, generated: GeneratedSoFar, num: int) -> bool:
    """Reads some tokens more; returns whether there were so many."""
    wanted = generated.num_tokens + num
    async for event in leg:
        generated.add(event.chunk or {})
        if generated.num_tokens >= wanted:
            return True
    return False


async def _probed(
    server: LMServer,
    request: CompletionRequest,
    leg: UpstreamLeg,
    generated: GeneratedSoFar,
    patience: float,
) -> ProbeTrial:
    """Forces an answer behind what was generated, and reads on until it is there."""
    seen = replace(generated, texts=list(generated.texts), ids=list(generated.ids))
    started, usage, is_beside = time.perf_counter(), LegUsage(), True

    async def ask() -> None:
        body = await server.probe_body(request, seen)
        await asked_to_go_on(server, body, [], partial(counting, usage))

    probe = asyncio.create_task(ask())
    try:
        async with asyncio.timeout(patience):
            while is_beside and await leg.comes_before(probe):
                is_beside = await _read(leg, generated, 1)
            await probe
    except TimeoutError:
        is_beside = False
    finally:
        probe.cancel()
    return ProbeTrial(
        usage.prompt_tokens,
        usage.computed_tokens,
        generated.num_tokens - seen.num_tokens,
        time.perf_counter() - started,
        server.num_parallel,
        is_beside,
    )
