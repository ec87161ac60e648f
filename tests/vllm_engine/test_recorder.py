"""Recording the embedded LM with the real vLLM; see the Makefile for what it needs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.recordings import assert_same
from tests.vllm_engine.recorder import recorded
from traces import read_traces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.parametrize(
    "asked", [("--answer-end= ",), ("--task=let", "--close-text=. so </think>")]
)
def test_a_greedy_recording_equals_that_of_transformers(
    tmp_path: Path, asked: tuple[str, ...]
) -> None:
    asked = ("--num=12", "--temperature=0", *asked)
    rows = recorded(tmp_path / "vllm", "--engine=vllm", "--batch-size=5", *asked)
    expected = recorded(tmp_path / "hf", *asked)
    assert rows.keys() == expected.keys() and len(rows) == 12
    for name, row in rows.items():
        del expected[name]["end_think_logprob"]
        assert_same(row, expected[name], tolerance=1e-3)
    assert read_traces(tmp_path / "vllm").recorder["engine"] == "vllm"


def test_a_question_and_its_seed_decide_its_tokens(tmp_path: Path) -> None:
    asked = ("--num=6", "--engine=vllm", "--temperature=0.8")
    rows = recorded(tmp_path / "whole", "--num-seeds=2", *asked)
    recorded(tmp_path / "parts", "--batch-size=4", *asked)
    parts = recorded(tmp_path / "parts", "--num-seeds=2", "--batch-size=7", *asked)
    assert {name: row["text"] for name, row in rows.items()} == {
        name: row["text"] for name, row in parts.items()
    }
    assert len({row["text"] for row in rows.values()}) == 12
