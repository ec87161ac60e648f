"""Recorded traces: the schema, the store, and the arrays that everything else reads."""

from traces.arrays import Traces
from traces.schema import SCHEMA
from traces.store import read_ids, read_traces, write_shard

__all__ = ["SCHEMA", "Traces", "read_ids", "read_traces", "write_shard"]
