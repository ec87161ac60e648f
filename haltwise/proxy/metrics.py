"""What the proxy counts."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_DECISIONS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
_WAITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The numbers of one proxy; no label holds anything that a client sent."""

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
        text = "Failures of the upstream"
        self.upstream_errors = counter("haltwise_upstream_errors", text, ["kind"])
        name = "haltwise_streams_in_flight"
        self.streams_in_flight = Gauge(name, "Requests that run", registry=self.registry)
        name, text = "haltwise_decision_seconds", "What a decision took"
        self.decision_seconds = seconds(name, text, buckets=_DECISIONS)
        name, text = "haltwise_first_token_seconds", "From a request to the first of its answer"
        self.first_token_seconds = seconds(name, text, buckets=_WAITS)
