"""What the proxy counts, and what it logs of each request."""

import json
import logging
import time
import uuid
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from haltwise.proxy.wire import Json, UpstreamError, json_object

#: Where the whole proxy logs.
log = logging.getLogger("haltwise.proxy")


class JsonLines(logging.Formatter):
    """Makes every record a line that is a JSON object, whoever has logged it."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line: the message itself if it is one already."""
        message = record.getMessage()
        if json_object(message) is not None and "\n" not in message:
            return message
        line = {"level": record.levelname.lower(), "logger": record.name, "message": message}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


_DECISIONS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
_WAITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The numbers of one proxy; no label of these holds anything that a client sent."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        seconds = partial(Histogram, registry=self.registry)
        self.requests = counter("haltwise_requests", "Requests", ["endpoint", "outcome"])
        text = "Completions, by how their thought ended"
        self.thoughts = counter("haltwise_thoughts", text, ["reason"])
        self.thinking_tokens = counter("haltwise_thinking_tokens", "Tokens of watched thoughts")
        text = "Thinking tokens that halting would have saved"
        self.shadow_saved_tokens = counter("haltwise_shadow_saved_tokens", text)
        text = "Decision points whose log probabilities were missing or malformed"
        self.bad_signals = counter("haltwise_bad_signals", text)
        text = "Thoughts that were to be halted and went on"
        self.fallbacks = counter("haltwise_fallbacks", text, ["reason"])
        text = "Terms of requests that did not hold, since nobody watches their endpoint"
        self.ignored_terms = counter("haltwise_ignored_terms", text, ["term"])
        text = "Watched requests of another temperature than the head's traces"
        self.other_temperatures = counter("haltwise_other_temperatures", text)
        text = "Requests of a segment without a price of its own, where others have one"
        self.unknown_segments = counter("haltwise_unknown_segments", text)
        text = "Probes, by whether they brought an answer; refused is one without room"
        self.probes = counter("haltwise_probes", text, ["outcome"])
        self.probe_tokens = counter("haltwise_probe_tokens", "Tokens that probes generated")
        text = "Tokens that were generated for audits alone"
        self.audit_tokens = counter("haltwise_audit_tokens", text)
        name, text = "haltwise_audit_traces_lost", "Audits' traces and labels that were not written"
        self.audit_traces_lost = Gauge(name, text, registry=self.registry)
        text = "Requests that a budget has refused"
        self.budget_refused = counter("haltwise_budget_refused", text, ["scope"])
        text = "Requests whose answer a budget has limited"
        self.budget_cut = counter("haltwise_budget_cut", text)
        text = "Requests that a budget has kept from the large LM"
        self.budget_unescalated = counter("haltwise_budget_unescalated", text)
        self.cost_dollars = counter("haltwise_cost_dollars", "What requests have cost")
        name, text = "haltwise_budget_over", "Requests that cost more than was held back for them"
        self.budget_over = Gauge(name, text, registry=self.registry)
        name, text = "haltwise_load_urgency", "How urgent it is that fewer requests wait, 0 to 1"
        self.load_urgency = Gauge(name, text, registry=self.registry)
        text = "Failures of the upstream"
        self.upstream_errors = counter("haltwise_upstream_errors", text, ["kind"])
        name = "haltwise_streams_in_flight"
        self.streams_in_flight = Gauge(name, "Requests that run", registry=self.registry)
        name, text = "haltwise_decision_seconds", "What a decision took"
        self.decision_seconds = seconds(name, text, buckets=_DECISIONS)
        name, text = "haltwise_probe_seconds", "What a probe took that brought an answer"
        self.probe_seconds = seconds(name, text, buckets=_WAITS)
        name, text = "haltwise_first_token_seconds", "From a request to the first of its answer"
        self.first_token_seconds = seconds(name, text, buckets=_WAITS)


class RequestRecord:
    """A line in the log and some numbers about one request; nothing that was said, and no key.

    Args:
        endpoint: The endpoint: "chat", "completions" or "other".
        metrics: Where the request is counted.
    """

    def __init__(self, endpoint: str, metrics: Metrics) -> None:
        """Starts the clock."""
        self.endpoint = endpoint
        self.id = uuid.uuid4().hex
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
            "request": self.id,
            "endpoint": self.endpoint,
            "outcome": self.outcome,
            "status": self.status,
            "first_seconds": self._first,
            "seconds": time.perf_counter() - self._started,
        }
        log.info(json.dumps(line | self.about))
