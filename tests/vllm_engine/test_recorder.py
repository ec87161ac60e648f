"""Recording the embedded LM with the real vLLM; see the Makefile for what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from recording.trace_row import TraceRow
from tests.recordings import assert_same, rows_of
from traces import read_traces

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[2]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def collect(out: Path, *arguments: str) -> dict[str, TraceRow]:
    done = subprocess.run(
        [sys.executable, "collect.py", f"--out={out}", "--split=test", *arguments],
        cwd=ROOT,
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return rows_of(out)


@pytest.mark.parametrize(
    "asked", [("--answer-end= ",), ("--task=let", "--close-text=. so </think>")]
)
def test_a_greedy_recording_equals_that_of_transformers(
    tmp_path: Path, asked: tuple[str, ...]
) -> None:
    asked = ("--num=12", "--temperature=0", *asked)
    rows = collect(tmp_path / "vllm", "--engine=vllm", "--batch-size=5", *asked)
    expected = collect(tmp_path / "hf", *asked)
    assert rows.keys() == expected.keys() and len(rows) == 12
    for name, row in rows.items():
        del expected[name]["end_think_logprob"]
        assert_same(row, expected[name], tolerance=1e-3)
    assert read_traces(tmp_path / "vllm").recorder["engine"] == "vllm"


def test_a_question_and_its_seed_decide_its_tokens(tmp_path: Path) -> None:
    asked = ("--num=6", "--engine=vllm", "--temperature=0.8")
    rows = collect(tmp_path / "whole", "--num-seeds=2", *asked)
    collect(tmp_path / "parts", "--batch-size=4", *asked)
    parts = collect(tmp_path / "parts", "--num-seeds=2", "--batch-size=7", *asked)
    assert {name: row["text"] for name, row in rows.items()} == {
        name: row["text"] for name, row in parts.items()
    }
    assert len({row["text"] for row in rows.values()}) == 12
