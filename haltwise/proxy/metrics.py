"""What the proxy counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_DECISIONS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
_WAITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The numbers of one proxy; no label holds anything that a client sent."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "haltwise_requests", "Requests", ["endpoint", "outcome"], registry=registry
        )
        self.thoughts = Counter(
            "haltwise_thoughts", "Completions, by how their thought ended", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.thinking_tokens = Counter(
            "haltwise_thinking_tokens", "Tokens of watched thoughts", registry=registry
        )
        self.shadow_saved_tokens = Counter(
            "haltwise_shadow_saved_tokens",
            "Thinking tokens that halting would have saved",
            registry=registry,
        )
        self.bad_signals = Counter(
            "haltwise_bad_signals",
            "Decision points whose log probabilities were missing or malformed",
            registry=registry,
        )
        self.fallbacks = Counter(
            "haltwise_fallbacks",
            "Thoughts that were to be halted and went on",
            ["reason"],
            registry=registry,
        )
        self.upstream_errors = Counter(
            "haltwise_upstream_errors", "Failures of the upstream", ["kind"], registry=registry
        )
        self.streams_in_flight = Gauge(
            "haltwise_streams_in_flight", "Requests that run", registry=registry
        )
        self.decision_seconds = Histogram(
            "haltwise_decision_seconds",
            "What a decision took",
            buckets=_DECISIONS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "haltwise_first_token_seconds",
            "From a request to the first of its answer",
            buckets=_WAITS,
            registry=registry,
        )
