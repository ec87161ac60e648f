import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from haltwise import HaltHead, Halting, HeadConfig, Observing, feature_names
from traces import Traces, read_traces, write_shard

pytest_plugins = ["tests.stores"]

# How long an example takes says nothing about whether it holds.
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples everywhere: what fails is what was changed. `make test-all` seeks new ones.
settings.register_profile("same", settings.get_profile("new"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True, scope="session")
def one_core() -> Iterator[None]:
    """Folds are fitted in the process of the tests: each other one would load torch anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        yield


Row = dict[str, Any]
MakeTraces = Callable[..., Traces]


def trace_row(**changes: Any) -> Row:
    """The worked example of the token accounting, with some columns changed."""
    row: Row = {
        "trace_id": "q0-0",
        "question_id": "q0",
        "task": "toy",
        "segment": "easy",
        "model": "lm",
        "seed": 0,
        "split": "test",
        "gold": "7",
        "num_tokens": 600,
        "finished": True,
        "final_answer": "7",
        "final_correct": True,
        "position": [100, 250, 400],
        "probe_tokens": [10, 12, 11],
        "answer": ["3", "7", "7"],
        "correct": [False, True, True],
        "confidence": [0.5, 0.75, 0.96875],
        "answer_logprobs": [[-1.0, -2.0], [], [-0.5]],
    }
    return row | changes


@pytest.fixture
def make_row() -> Callable[..., Row]:
    return trace_row


@pytest.fixture
def make_traces(tmp_path: Path) -> MakeTraces:
    """Traces from a list of changes to the worked example, written and read back."""

    def make(changes: Sequence[Row], recorder: Row | None = None) -> Traces:
        rows = [
            trace_row(**{"trace_id": f"t{n}", "question_id": f"q{n}"} | change)
            for n, change in enumerate(changes)
        ]
        write_shard(tmp_path / "made.parquet", rows, recorder or {})
        return read_traces(tmp_path / "made.parquet")

    return make


@pytest.fixture
def worked_example(make_traces: MakeTraces) -> Traces:
    """One trace: position 100, 250, 400; probe_tokens 10, 12, 11; correct no, yes, yes; 600."""
    return make_traces([{}])


def random_rows() -> list[Row]:
    """60 traces of 20 questions, 0 to 7 points each; later points are more often right and sure.

    The other signals are noise.
    """
    rng = np.random.default_rng(7)
    noise = np.random.default_rng(8)
    steps = ("entropy", "max_entropy", "logprob", "min_logprob", "margin")
    names = (*steps, "end_think_logprob", "num_reflections")
    states = np.random.default_rng(9)
    rows = []
    for n in range(60):
        length = int(rng.integers(0, 8))
        position = np.cumsum(rng.integers(20, 90, length))
        skill = rng.random()
        correct = rng.random(length) < skill * np.linspace(0.4, 1.2, length)
        confidence = np.clip(rng.normal(0.45 + 0.4 * correct, 0.15), 0, 1)
        rows.append(
            trace_row(
                trace_id=f"t{n}",
                question_id=f"q{n % 20}",
                split=("train", "dev", "test")[n % 20 % 3],
                num_tokens=int(position[-1] if length else 10) + int(rng.integers(20, 200)),
                final_correct=bool(rng.random() < skill),
                position=position.tolist(),
                probe_tokens=rng.integers(1, 6, length).tolist(),
                answer=["7" if c else str(rng.integers(3)) for c in correct],
                correct=correct.tolist(),
                confidence=confidence.tolist(),
                hidden=states.normal(0, np.linspace(3, 1, 20), (length, 20)).tolist(),
                answer_logprobs=noise.normal(-1, 0.1, (length, 2)).tolist(),
                **{
                    name: (noise.random(length) * (-1 if "logprob" in name else 1)).tolist()
                    for name in names
                },
            )
        )
    return rows


@pytest.fixture(scope="session")
def random_traces_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "made.parquet"
    write_shard(path, random_rows(), {})
    return path


@pytest.fixture
def random_traces(random_traces_path: Path) -> Traces:
    return read_traces(random_traces_path)


@pytest.fixture
def run_head() -> HaltHead:
    """A head that halts at a run of 1, 2 or 4 equal answers at a price of 10, 1 or 0.1.

    Its log-odds are tanh(tanh(log1p(run) - log1p(1.5) + log10(price) / 2)).
    """
    names = feature_names(["agreement"])
    mean = np.where(np.array(names) == "log_run", np.log1p(1.5), 0.0)
    observing = Observing(("agreement",), tuple(mean), (1.0,) * len(names), (0.1, 10.0))
    w0 = np.zeros((1, observing.size), dtype=np.float32)
    w0[0, names.index("log_run")] = 1.0
    w0[0, -1] = 0.5
    one, zero = np.ones((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
    weights = {"w0": w0, "b0": zero, "w1": one, "b1": zero, "w2": one, "b2": zero}
    halting = Halting("always", "every 50 tokens", "</think>", "source")
    return HaltHead(HeadConfig(observing, halting, default_price=1.0), weights)


@pytest.fixture
def bench() -> Callable[[str], Path]:
    """Path of a shared recording; skips the test where it is not there."""

    def path(name: str) -> Path:
        found = Path(__file__).parents[2] / "shared" / "bench" / name
        if not found.exists():
            pytest.skip(f"no shared recording {name}")
        return found

    return path
