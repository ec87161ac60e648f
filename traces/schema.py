"""The columns of a trace file: Apache Parquet, one row a trace.

Version 2 is version 1 with two things more: a trace may have no verdicts, since nobody knows the
right answer, and all answers may be digests, so that nobody can read them.
"""

from __future__ import annotations

import pyarrow as pa

from haltwise.policy.signals import MEASURED_FROM, SIGNAL_KINDS, SignalKind, signals_from

#: The major versions that are read, which are in a file's metadata under "haltwise.schema". A file
#: is written in the oldest one that can hold it.
VERSIONS = ("1", "2")

#: The signals that are measured beside a running LM. Each of them is a column in all shards of a
#: recording, or in none; `haltwise.Signals` says what they mean.
SIGNALS = signals_from(*MEASURED_FROM)

#: The columns with a name for each trace.
NAMES = ("trace_id", "question_id", "task", "segment", "model")

#: What the column "split" may hold; empty is unknown.
KNOWN_SPLITS = ("train", "dev", "test", "")

#: The columns that tell what is right. From version 2 on they are null where nobody knows: all of
#: them for a trace, or none.
VERDICTS = ("gold", "final_correct", "correct")

#: The columns of answers. What tells of the recorder says under "answers" whether they are "text",
#: as in version 1, or "digests" of answers in the spelling that equal ones share.
ANSWERS = ("gold", "final_answer", "answer")

#: The columns that a file may leave out. Readers ignore any further column.
OPTIONAL = (*SIGNALS, "question", "text")


def _column_type(kind: SignalKind) -> pa.DataType:
    """Returns the type of a signal's column: a list with one entry a decision point."""
    entry = pa.from_numpy_dtype(kind.dtype)
    return pa.list_(pa.list_(entry) if kind.is_vector else entry)


SCHEMA = pa.schema(
    [
        ("trace_id", pa.string()),  # unique
        ("question_id", pa.string()),  # the unit of every split and every bootstrap
        ("task", pa.string()),
        ("segment", pa.string()),  # a finer group; may be null
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
        # Optional, one entry a decision point, NaN if unknown:
        *((name, _column_type(SIGNAL_KINDS[name])) for name in SIGNALS),
        # Optional:
        ("question", pa.string()),
        ("text", pa.string()),
    ]
)

#: The columns that every file has.
REQUIRED = tuple(name for name in SCHEMA.names if name not in OPTIONAL)
#: The columns that have one entry a decision point.
POINTWISE = tuple(name for name in SCHEMA.names if pa.types.is_list(SCHEMA.field(name).type))
