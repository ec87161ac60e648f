"""Columns of a trace file, version 1: Apache Parquet, one row a trace."""

from __future__ import annotations

import pyarrow as pa

#: Major version, in the file's metadata under "haltwise.schema".
VERSION = "1"

#: Signals of the LM's own distribution and text: in all shards of a recording, or in none.
SIGNALS = (
    "entropy",
    "max_entropy",
    "logprob",
    "min_logprob",
    "margin",
    "end_think_logprob",
    "num_reflections",
    "hidden",
)

#: Columns that a file may leave out. Readers ignore any further column.
OPTIONAL = (*SIGNALS, "question", "text")

SCHEMA = pa.schema(
    [
        ("trace_id", pa.string()),  # unique
        ("question_id", pa.string()),  # the unit of every split and every bootstrap
        ("task", pa.string()),
        ("segment", pa.string()),  # a finer group; the only column that may be null
        ("model", pa.string()),
        ("seed", pa.int32()),
        ("split", pa.string()),  # train, dev, test or empty
        ("gold", pa.string()),
        ("num_tokens", pa.int32()),  # generated when never halted, the answer included
        ("finished", pa.bool_()),
        ("final_answer", pa.string()),
        ("final_correct", pa.bool_()),
        # One entry a decision point:
        ("position", pa.list_(pa.int32())),  # thinking tokens so far
        ("probe_tokens", pa.list_(pa.int32())),  # generated to force the answer
        ("answer", pa.list_(pa.string())),  # empty if none could be read
        ("correct", pa.list_(pa.bool_())),
        ("confidence", pa.list_(pa.float32())),  # in [0, 1], NaN if unknown
        ("answer_logprobs", pa.list_(pa.list_(pa.float32()))),  # nats; empty if unknown
        # Optional, one entry a decision point, NaN if unknown; "since" the previous point:
        ("entropy", pa.list_(pa.float32())),  # mean since, nats
        ("max_entropy", pa.list_(pa.float32())),  # largest since, nats
        ("logprob", pa.list_(pa.float32())),  # mean of the generated tokens since, nats
        ("min_logprob", pa.list_(pa.float32())),  # smallest since, nats
        ("margin", pa.list_(pa.float32())),  # mean difference of the two largest probabilities
        ("end_think_logprob", pa.list_(pa.float32())),  # of the end-of-thinking token, nats
        ("num_reflections", pa.list_(pa.float32())),  # reflection words since
        ("hidden", pa.list_(pa.list_(pa.float16()))),  # last-layer state; one size in a recording
        # Optional:
        ("question", pa.string()),
        ("text", pa.string()),
    ]
)

REQUIRED = tuple(name for name in SCHEMA.names if name not in OPTIONAL)
POINTWISE = tuple(name for name in SCHEMA.names if pa.types.is_list(SCHEMA.field(name).type))
