"""Requests as spans for OpenTelemetry, with its names for generative AI where it has them.

Where spans are sent is said by OTEL_EXPORTER_OTLP_ENDPOINT and OpenTelemetry's other variables.
Spans hold what rows of the record hold: no content, no key.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from haltwise.control.record import RequestRow, Row
from haltwise.errors import InputError, from_clone

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

#: By a row's field, the name of a span's attribute.
ATTRIBUTES = MappingProxyType(
    {
        "operation": "gen_ai.operation.name",
        "lm": "gen_ai.request.model",
        "session": "gen_ai.conversation.id",
        "input_tokens": "gen_ai.usage.input_tokens",
        "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
        "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
        "output_tokens": "gen_ai.usage.output_tokens",
        "outcome": "gen_ai.response.finish_reasons",
        "id": "haltwise.request",
        "tenant": "haltwise.tenant",
        "user": "haltwise.user",
        "segment": "haltwise.segment",
        "task": "haltwise.task",
        "head": "haltwise.policy.head",
        "head_probability": "haltwise.policy.head.probability",
        "certificate": "haltwise.policy.certificate",
        "price_asked": "haltwise.price.asked",
        "price_ceiling": "haltwise.price.ceiling",
        "price_served": "haltwise.price.served",
        "audited": "haltwise.audit",
        "audit_probability": "haltwise.audit.probability",
        "audit_tokens": "haltwise.audit.tokens",
        "halted": "haltwise.halt",
        "reason": "haltwise.halt.reason",
        "position": "haltwise.halt.position",
    }
)
_NANO = 1_000_000_000


class Telemetry:
    """Sends spans in the background; what cannot be sent is dropped. To be closed.

    Args:
        exporter: Takes the spans; by default OTLP over HTTP.

    Raises:
        InputError: If OpenTelemetry is not installed.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Sends nothing yet."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            told = f"telemetry needs {error.name}: {from_clone('otel')}"
            raise InputError(told) from None
        named = Resource({"service.name": "haltwise"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("haltwise")

    def tell(self, row: Row) -> None:
        """Sends a request soon; other rows are no spans."""
        if not isinstance(row, RequestRow):
            return
        ended = int(row.at * _NANO)
        span = self._tracer.start_span(
            f"{row.operation or 'chat'} {row.lm or ''}".strip(),
            start_time=ended - int((row.seconds or 0.0) * _NANO),
            attributes=_attributes(row),
        )
        span.end(end_time=ended)

    def close(self) -> None:
        """Sends what waits."""
        self._provider.shutdown()


def _attributes(row: RequestRow) -> dict[str, Any]:
    found = {name: getattr(row, field) for field, name in ATTRIBUTES.items()}
    told = {name: value for name, value in found.items() if value is not None}
    outcome = ATTRIBUTES["outcome"]
    return told | ({outcome: [told[outcome]]} if outcome in told else {})
