from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from haltwise import InputError
from haltwise.policy.question import Question
from traces import Traces, pair_up, read_pairs, write_shard

MakeTraces = Callable[..., Traces]
MakeRow = Callable[..., dict[str, Any]]


def test_the_answers_of_a_question_are_paired_by_seed(make_traces: MakeTraces) -> None:
    small = make_traces(
        [
            {"question_id": "b", "seed": 5, "trace_id": "b5"},
            {"question_id": "a", "seed": 1, "trace_id": "a1"},
            {"question_id": "a", "seed": 0, "trace_id": "a0"},
            {"question_id": "a", "seed": 2, "trace_id": "a2"},
            {"question_id": "alone"},
        ]
    )
    large = make_traces(
        [
            {"question_id": "a", "seed": 8, "trace_id": "A8", "model": "big"},
            {"question_id": "b", "seed": 0, "trace_id": "B0", "model": "big"},
            {"question_id": "a", "seed": 7, "trace_id": "A7", "model": "big"},
        ]
    )
    pairs = pair_up(small, large, {"a1": "How?"})
    both = zip(pairs.small.trace_id.tolist(), pairs.large.trace_id.tolist(), strict=True)
    assert list(both) == [("a0", "A7"), ("a1", "A8"), ("a2", "A7"), ("b5", "B0")]
    assert pairs.questions[1] == Question("How?", "toy", "easy")
    assert len(pairs.select(pairs.small.question_id == "b")) == 1


def test_traces_that_are_no_pairs_are_refused(make_traces: MakeTraces) -> None:
    small = make_traces([{}])
    with pytest.raises(InputError, match="lm is on both sides, expected traces of two LMs"):
        pair_up(small, small)
    large = make_traces([{"question_id": "other", "model": "big"}])
    with pytest.raises(InputError, match="no question in common: found 1 of the small LM and 1"):
        pair_up(small, large)


def test_pairs_are_read_by_the_names_of_their_lms(make_row: MakeRow, tmp_path: Path) -> None:
    path = tmp_path / "both.parquet"
    rows = [
        make_row(trace_id=f"{lm}{n}", question_id=f"q{n}", model=lm, question="the same")
        for lm in ("lm", "big")
        for n in (0, 1)
    ]
    write_shard(path, rows, {})
    pairs = read_pairs(path, path, "lm", "big")
    assert pairs.large.trace_id.tolist() == ["big0", "big1"]
    assert set(pairs.small.question_id.tolist()) == {"q0"}  # one text is one question
    assert {question.text for question in pairs.questions} == {"the same"}
    with pytest.raises(InputError, match="no trace of 'huge', found those of big, lm"):
        read_pairs(path, path, "lm", "huge")
    with pytest.raises(InputError, match="big, lm is on both sides"):
        read_pairs(path, path)
