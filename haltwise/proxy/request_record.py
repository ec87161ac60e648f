"""What is logged and counted of each request."""

from __future__ import annotations

import json
import logging
import time
import uuid

from haltwise.proxy.metrics import Metrics
from haltwise.proxy.wire import Json, UpstreamError

log = logging.getLogger("haltwise.proxy")


class RequestRecord:
    """A line in the log and some numbers about one request; nothing that was said, and no key.

    Args:
        endpoint: The endpoint: "chat", "completions" or "other".
        metrics: Where the request is counted.
    """

    def __init__(self, endpoint: str, metrics: Metrics) -> None:
        """Starts the clock."""
        self.endpoint = endpoint
        self.outcome = "ok"
        self.status: int | None = None
        """The HTTP status that the client got; None if it got none."""
        self.about: Json = {}
        """The model, the terms, and how the thought ended."""
        self._metrics = metrics
        self._started = time.perf_counter()
        self._first: float | None = None

    def note_first(self) -> None:
        """Notes that the first of an answer goes to the client, if it is the first."""
        if self._first is None:
            self._first = time.perf_counter() - self._started
            self._metrics.first_token_seconds.observe(self._first)

    def note_error(self, error: UpstreamError) -> None:
        """Notes that the upstream failed."""
        self.outcome = "upstream error"
        self._metrics.upstream_errors.labels(error.kind).inc()

    def close(self) -> None:
        """Counts the request and writes its line."""
        self._metrics.requests.labels(self.endpoint, self.outcome).inc()
        line = {
            "request": uuid.uuid4().hex,
            "endpoint": self.endpoint,
            "outcome": self.outcome,
            "status": self.status,
            "first_seconds": self._first,
            "seconds": time.perf_counter() - self._started,
        }
        log.info(json.dumps(line | self.about))
