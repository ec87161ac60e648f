"""Recorded traces: the schema, the store, and the arrays that everything else reads."""

from traces.arrays import Traces
from traces.json_lines import import_json_lines
from traces.schema import SCHEMA, SIGNALS
from traces.store import read_ids, read_traces, write_shard

__all__ = [
    "SCHEMA",
    "SIGNALS",
    "Traces",
    "import_json_lines",
    "read_ids",
    "read_traces",
    "write_shard",
]
