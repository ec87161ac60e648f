"""Runs the recorder where not all is installed that the scripts need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from recording.trace_row import TraceRow
from tests.recordings import rows_of

ROOT = Path(__file__).parents[2]
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# What collect.py does, less its look at what is installed.
_COLLECT = """
from command import run
from recording.collect import CollectConfig, collect
if __name__ == "__main__": run(collect, CollectConfig)
"""


def recorded(out: Path, *arguments: str) -> dict[str, TraceRow]:
    """The traces of test questions that collect.py records into a folder."""
    done = subprocess.run(
        [sys.executable, "-c", _COLLECT, f"--out={out}", "--split=test", *arguments],
        cwd=ROOT,
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return rows_of(out)
