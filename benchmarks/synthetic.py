"""Made-up traces with the proportions of recorded ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from recording.trace_row import TraceRow
from traces import SIGNALS, Traces, read_traces, write_shard

#: The names of the signals that are recorded by default.
RECORDED = tuple(name for name in SIGNALS if name != "hidden")

_MAX_POINTS = 30
_RIGHT, _WRONG = "42", "7"


def synthetic_rows(num: int, seed: int = 0, mean_points: int | None = None) -> Iterator[TraceRow]:
    """Yields traces one by one, so that any number of them takes no memory.

    A trace has 13 points on average, at most 30, and now and then none. From some point on the
    forced answers are right, and mostly surer than before. The other signals are noise.

    Args:
        num: The number of traces; six belong to a question.
        seed: The seed of everything random.
        mean_points: Another mean number of points; a trace then has at most four times as many.
    """
    prob, most = (
        (0.06, _MAX_POINTS) if mean_points is None else (1 / (mean_points + 1), 4 * mean_points)
    )
    rng = np.random.default_rng(seed)
    for n in range(num):
        length = min(int(rng.geometric(prob)) - 1, most)
        position = rng.geometric(1 / 220, length).cumsum()
        correct = np.arange(length) >= rng.geometric(0.15) - 1
        finally_correct = bool(rng.random() < 0.9)
        confidence = np.where(correct, rng.beta(8, 1, length), rng.beta(2, 2, length))
        yield {
            "trace_id": f"synthetic/{n}",
            "question_id": f"question-{n // 6}",
            "task": "synthetic",
            "segment": None,
            "model": "synthetic",
            "seed": n % 6,
            "split": "train",
            "gold": _RIGHT,
            "num_tokens": int(position.max(initial=0) + rng.geometric(1 / 2400)),
            "finished": True,
            "final_answer": _RIGHT if finally_correct else _WRONG,
            "final_correct": finally_correct,
            "position": position.tolist(),
            "probe_tokens": rng.integers(4, 17, length).tolist(),
            "answer": [_RIGHT if c else str(rng.integers(5)) for c in correct],
            "correct": correct.tolist(),
            "confidence": confidence.tolist(),
            "answer_logprobs": np.log(confidence)[:, None].repeat(3, axis=1).tolist(),
            **{
                name: (rng.random(length) * (-1 if "logprob" in name else 1)).tolist()
                for name in RECORDED
            },
        }


def synthetic_traces(num: int) -> Traces:
    """Returns so many traces of `synthetic_rows`, written to a file and read back."""
    with TemporaryDirectory() as folder:
        write_shard(Path(folder) / "synthetic.parquet", list(synthetic_rows(num)), {})
        return read_traces(folder)


def final_answers(traces: Traces) -> NDArray[np.object_]:
    """Returns the answers (N,) that synthetic traces end with."""
    return np.where(traces.final_correct, _RIGHT, _WRONG).astype(object)
