"""Load is a budget too: while too many requests wait at the server, thoughts are halted sooner."""

import asyncio
import json
import math

from prometheus_client.parser import text_string_to_metric_families

from haltwise.proxy.metrics import log
from haltwise.proxy.upstream import Upstream
from haltwise.proxy.wire import Json, UpstreamError

# What servers call the requests that wait for a place.
_WAITING = ("llamacpp:requests_deferred", "vllm:num_requests_waiting", "sglang:num_queue_reqs")
# Seconds between two looks, and for an answer.
_PAUSE = 1.0
# How far a queue of twice the target moves the urgency in a look, and the most in any.
_RISE, _MOST_RISE = 0.05, 0.2
# How far it falls in a look; only below this share of the target, so that it does not swing.
_FALL, _CALM = 0.01, 0.5


class Load:
    """How urgent it is, because of those who wait, that requests end sooner.

    Args:
        target: Requests that may wait.
    """

    def __init__(self, target: int) -> None:
        """Nobody waits."""
        self._target = target
        self.urgency = 0.0
        """In [0, 1], as in `haltwise.control.pacing`."""
        self.waiting: int | None = None
        """The requests that waited at the last look; None if the server does not tell."""

    def take(self, waiting: int | None) -> None:
        """Takes in how many requests wait; None is unknown, and moves nothing."""
        self.waiting = waiting
        if waiting is None:
            return
        if waiting > self._target:
            rise = _RISE * (waiting - self._target) / self._target
            self.urgency = min(self.urgency + min(rise, _MOST_RISE), 1.0)
        elif waiting <= _CALM * self._target:
            self.urgency = max(self.urgency - _FALL, 0.0)

    def status(self) -> Json:
        """Returns, as a JSON object, how it stands; `at_ceiling` if no price can help any more."""
        at_ceiling = self.urgency == 1.0 and (self.waiting or 0) > self._target
        told = {"target": self._target, "waiting": self.waiting, "urgency": self.urgency}
        return told | {"at_ceiling": at_ceiling}

    async def watch(self, upstream: Upstream) -> None:
        """Looks again and again how many requests wait at the server, until it is cancelled."""
        was_told = True
        while True:
            self.take(await _waiting_at(upstream))
            if was_told and self.waiting is None:
                told = "the server does not tell how many requests wait: /metrics has none of "
                told += ", ".join(_WAITING) + " (llama-server needs --metrics)"
                log.warning(json.dumps({"warning": told}))
            was_told = self.waiting is not None
            await asyncio.sleep(_PAUSE)


async def _waiting_at(upstream: Upstream) -> int | None:
    """Returns how many requests wait at the server; None if it does not tell."""
    try:
        async with asyncio.timeout(_PAUSE):
            leg = await upstream.open("GET", b"/metrics", [], b"")
            try:
                text = await leg.body()
            finally:
                await leg.close()
    except (UpstreamError, TimeoutError):
        return None
    return waiting_in(text) if leg.response.is_success else None


def waiting_in(metrics: bytes) -> int | None:
    """Returns how many requests wait, by what a server tells Prometheus; None if it does not."""
    try:
        families = list(text_string_to_metric_families(metrics.decode("utf-8", "replace")))
    except ValueError:
        return None
    found = [s.value for one in families for s in one.samples if s.name in _WAITING]
    return round(sum(found)) if found and math.isfinite(sum(found)) else None
