"""Requests are spans with OpenTelemetry's names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from haltwise import InputError
from haltwise.control.record import AnswerRow, Record, RequestRow
from haltwise.control.store import SQLiteStore
from haltwise.control.telemetry import ATTRIBUTES, Telemetry

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

ROW = RequestRow(
    "a",
    100.5,
    operation="chat",
    lm="m",
    session="s",
    audited=True,
    audit_probability=0.05,
    halted=True,
    reason="halted",
    position=64,
    input_tokens=10,
    reasoning_tokens=64,
    output_tokens=70,
    outcome="stop",
    seconds=2.5,
)


def test_a_request_is_a_span_and_an_answer_is_none(tmp_path: Path) -> None:
    found = InMemorySpanExporter()
    telemetry = Telemetry(found)
    record = Record(SQLiteStore(tmp_path / "record"), tell=telemetry.tell)
    record.put(ROW)
    record.put(AnswerRow("a", 64, None, None, "d", True, 6, "source"))
    record.close()
    telemetry.close()
    (span,) = found.get_finished_spans()
    assert span.name == "chat m" and span.resource.attributes["service.name"] == "haltwise"
    assert (span.start_time, span.end_time) == (98_000_000_000, 100_500_000_000)
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.conversation.id": "s",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.reasoning.output_tokens": 64,
        "gen_ai.usage.output_tokens": 70,
        "gen_ai.response.finish_reasons": ("stop",),
        "haltwise.request": "a",
        "haltwise.audit": True,
        "haltwise.audit.probability": 0.05,
        "haltwise.audit.tokens": 0,
        "haltwise.halt": True,
        "haltwise.halt.reason": "halted",
        "haltwise.halt.position": 64,
    }


def test_names_are_opentelemetrys_where_it_has_them() -> None:
    known = {v for name, v in vars(gen_ai_attributes).items() if name.startswith("GEN_AI")}
    own = {name for name in ATTRIBUTES.values() if name not in known}
    assert all(name.startswith("haltwise.") for name in own) and len(own) < len(ATTRIBUTES)


def test_whatever_telemetry_does_rows_are_kept(tmp_path: Path) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("broken")

    record = Record(SQLiteStore(tmp_path / "record"), tell=broken)
    assert record.put(ROW)
    record.close()
    assert record.num_dropped == 0


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match=r"-e '\.\[otel\]' -c constraints.txt in the clone"):
        Telemetry()
