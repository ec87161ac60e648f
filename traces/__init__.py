"""Recorded traces: the schema, the store, and the arrays that everything else reads."""

from traces.arrays import Traces
from traces.json_lines import import_json_lines
from traces.pairs import Pairs, pair_up, read_pairs
from traces.schema import SCHEMA, SIGNALS
from traces.store import read_ids, write_shard
from traces.stream import (
    MAX_TRACES,
    Chunks,
    TraceFiles,
    Words,
    check_recorded,
    chunks_of,
    read_traces,
)

__all__ = [
    "MAX_TRACES",
    "SCHEMA",
    "SIGNALS",
    "Chunks",
    "Pairs",
    "TraceFiles",
    "Traces",
    "Words",
    "check_recorded",
    "chunks_of",
    "import_json_lines",
    "pair_up",
    "read_ids",
    "read_pairs",
    "read_traces",
    "write_shard",
]
