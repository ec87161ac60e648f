"""What the first line of traces says, and their columns contradict."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from haltwise import MEAN_LOGPROB
from traces import TraceFiles, write_shard
from traces.claims import broken_claims

MakeRow = Callable[..., dict[str, Any]]
RECORDER = {
    "decision_rule": "every 8 tokens",
    "confidence_rule": MEAN_LOGPROB,
    "answer_rule": "strict",
}
SOUND: dict[str, Any] = {
    "position": [8, 16, 32],
    "confidence": [0.52, math.nan, 0.5],
    "answer_logprobs": [[-0.7, -0.6], [-1.0], []],
    **{"gold": "7", "final_answer": "7", "final_correct": True, "num_tokens": 40},
}


@pytest.mark.parametrize(
    ("columns", "recorder", "told"),
    [
        ({}, {}, ""),
        ({"position": [8, 12, 16]}, {}, "decision rule 'every 8 tokens' .*: it has a point at 12"),
        ({"position": [8, 12, 16]}, {"decision_rule": "by hand"}, ""),
        ({"confidence": [0.7, 0.2, 0.5]}, {}, r"confidence is 0\.7, and 0\.522 by its answer_logp"),
        ({"confidence": [0.7, 0.2, 0.5]}, {"confidence_rule": "by hand"}, ""),
        ({"final_correct": False}, {}, "answer rule 'strict' .*correct is False, of '7' for '7'"),
        ({"final_answer": "8"}, {}, "the first 'x': final_correct is True, of '8' for '7'"),
        ({"final_answer": "", "final_correct": False}, {}, ""),
        ({"gold": None, "correct": None, "final_correct": None}, {}, ""),
    ],
)
def test_a_claim_that_traces_contradict_is_told(
    tmp_path: Path, make_row: MakeRow, columns: dict[str, Any], recorder: dict[str, Any], told: str
) -> None:
    rows = [make_row(**SOUND), make_row(**(SOUND | columns), trace_id="x")]
    write_shard(tmp_path / "0.parquet", rows, RECORDER | recorder)
    found = broken_claims(TraceFiles.open(tmp_path), lambda rule: operator.eq)
    assert len(found) == bool(told)
    if told:
        assert found[0].startswith("1 of 2 traces contradict the ")
        assert re.search(told, found[0])
