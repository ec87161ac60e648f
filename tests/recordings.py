"""What tests of the recorder share: a small LM in a folder, and traces to compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lms.questions import Question
from recording.collect import CollectConfig
from recording.config import TaskFormat
from recording.trace_row import TraceRow
from tests.tiny_lm import tiny_lm, tiny_tokenizer
from traces import SIGNALS


def save_tiny_lm(folder: Path, seed: int = 1, temperature: float = 0.8) -> Path:
    """Writes an LM with random weights that samples by default."""
    model = tiny_lm(seed=seed)
    model.generation_config.update(do_sample=True, temperature=temperature)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def small_config(lm: Path, out: Path, **changes: Any) -> CollectConfig:
    """Records a few short thoughts."""
    settings: dict[str, Any] = {
        "num": 7,
        "split": ("train", "dev"),
        "every": 4,
        "max_tokens": 32,
        "max_answer_tokens": 3,
        "batch_size": 4,
        "shard_size": 5,
    }
    return CollectConfig(lm=str(lm), out=out, **settings | changes)


def rows_of(folder: Path | None) -> dict[str, TraceRow]:
    """All traces in a folder, by id."""
    assert folder
    rows = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len({row["trace_id"] for row in rows}) == len(rows)
    return {row["trace_id"]: row for row in rows}


def assert_same(row: TraceRow, other: TraceRow, tolerance: float = 1e-5) -> None:
    """Compares two traces: numbers that come from logits nearly, the others exactly."""
    floats = {"confidence", "answer_logprobs", *SIGNALS}
    assert row.keys() == other.keys()
    for name in row.keys() - floats:
        assert row[name] == other[name], name
    for name in row.keys() & floats:
        atol = 1e-3 if name == "hidden" else tolerance
        for values, expected in zip(row[name], other[name], strict=True):
            np.testing.assert_allclose(values, expected, atol=atol, err_msg=name)


class Deadly(Question):
    """A question that ends whatever process it is sent to."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


class DeadlyTaskFormat(TaskFormat):
    """What ends every worker before it has loaded its LM."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)
