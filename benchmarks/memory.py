"""The peak memory of recording, and of reading and training, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from agents.fit import learn
from agents.ppo import PPOConfig, make_ppo
from benchmarks.environment import benchmark_observing, replay_env
from benchmarks.synthetic import RECORDED, synthetic_rows
from benchmarks.timing import BenchResult
from haltwise.engine.decoder import Decoder
from lms.language_model import LanguageModel
from lms.tasks import each_question
from recording.collect import CollectConfig
from recording.hf_engine import record
from recording.shards import write_shards
from traces import read_traces

_ROOT = Path(__file__).parent.parent
# Linux counts the memory of a process that starts another one as the other's. So a small process
# stands in between, and asks for the peak of what it has started.
_ASK_PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
# The bytes of the unit in which the system tells of a peak.
_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class MemoryConfig:
    """The peak memory by the number of traces."""

    num_traces: tuple[int, ...] = (1_000, 10_000, 100_000)
    """The numbers of synthetic traces to write as the recorder does, and to read and train on."""
    num_questions: tuple[int, ...] = (300, 900)
    """The numbers of questions to record with the embedded LM. Its KV cache is as long as the
    longest thought so far, whatever their number: it grows now and then, up to the token
    budget."""


@dataclass(frozen=True)
class TrainingMemoryConfig:
    """The peak memory of train.py with all processes that it starts; on Linux only."""

    num_traces: tuple[int, ...] = (10_000, 100_000)
    """The numbers of synthetic traces to train on."""
    mean_points: int = 30
    """The mean number of decision points of a trace; with more of them training takes more
    memory."""
    total_timesteps: int = 70_000
    """The number of decisions that PPO learns from. More take longer, but no more memory."""


def measure_training(config: TrainingMemoryConfig) -> list[BenchResult]:
    """Measures training's peaks in MB (a million bytes); none where the system does not tell."""
    if not Path("/proc/self/smaps_rollup").exists():
        return []
    peaks = {}
    with TemporaryDirectory() as temporary:
        for num in config.num_traces:
            folder = Path(temporary) / f"synthetic-{num}"
            rows = synthetic_rows(num, mean_points=config.mean_points)
            for _ in write_shards(folder, rows, {}, CollectConfig.shard_size):
                pass
            run_dir = Path(temporary) / f"run-{num}"
            arguments = ["--traces", folder, "--run-dir", run_dir]
            arguments += ["--fit.ppo.total-timesteps", config.total_timesteps]
            peaks[num] = tree_peak([sys.executable, "train.py", *map(str, arguments)])
    return _lines("train.py, all processes", peaks)


def tree_peak(command: Sequence[str]) -> float:
    """Runs a command and returns the peak memory of it and of all processes it starts, in MB.

    Pages that several of them share count once (Linux's proportional set size). Memory is looked at
    five times a second: a peak between two looks is not seen.

    Raises:
        CalledProcessError: If the command fails.
    """
    process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL)
    largest = 0
    while process.poll() is None:
        largest = max(largest, _tree_memory(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return largest / 1e6


def _tree_memory(pid: int) -> int:
    """Returns the bytes of a process and its descendants in memory; 0 once it has ended."""
    proc = Path(f"/proc/{pid}")
    try:
        lines = (proc / "smaps_rollup").read_text().splitlines()
        started = [
            int(child) for at in proc.glob("task/*/children") for child in at.read_text().split()
        ]
    except OSError:
        return 0
    own = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return own * 1024 + sum(map(_tree_memory, started))


def measure(config: MemoryConfig) -> list[BenchResult]:
    """Measures peaks in MB (a million bytes), and what a thousand more traces take.

    There is no slope for recording: a few MB of noise between a few hundred questions would make
    one up.
    """
    written, trained_on, recorded = {}, {}, {}
    with TemporaryDirectory() as temporary:
        loaded = peak("load", 0, Path(temporary))
        for num in config.num_traces:
            folder = Path(temporary) / f"synthetic-{num}"
            written[num] = peak("write", num, folder)
            trained_on[num] = peak("read", num, folder)
        for num in config.num_questions:
            recorded[num] = peak("record", num, Path(temporary) / f"embedded-{num}")
    return [
        BenchResult("memory", "libraries loaded, nothing done", "MB", (loaded,)),
        *_lines("record the embedded LM", recorded),
        *_lines("write synthetic traces", written),
        *_slope("write synthetic traces", written),
        *_lines("read synthetic traces and train", trained_on),
        *_slope("read synthetic traces and train", trained_on),
    ]


def peak(job: str, num: int, folder: Path) -> float:
    """Runs a job in a new process and returns its peak resident memory in MB.

    Args:
        job: The name of the job: load, write, record or read.
        num: The number of its traces or questions.
        folder: The folder of its traces.
    """
    arguments = ["-m", "benchmarks.memory", job, str(num), str(folder)]
    command = [sys.executable, "-c", _ASK_PEAK, *arguments]
    done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) * _UNIT / 1e6


def _lines(name: str, peaks: dict[int, float]) -> list[BenchResult]:
    return [
        BenchResult("memory", f"{name}: {num:,}", "MB", (found,)) for num, found in peaks.items()
    ]


def _slope(name: str, peaks: dict[int, float]) -> list[BenchResult]:
    """Returns what a thousand more traces take; nothing if only one number was measured."""
    (few, low), (many, high) = min(peaks.items()), max(peaks.items())
    if few == many:
        return []
    slope = 1000 * (high - low) / (many - few)
    return [BenchResult("memory", f"{name}: each 1,000 more", "MB", (slope,))]


def load(num: int, folder: Path) -> None:
    """Does nothing: what every job imports is in memory already."""


def write(num: int, folder: Path) -> None:
    """Writes synthetic traces as the recorder does."""
    for _ in write_shards(folder, synthetic_rows(num), {}, CollectConfig.shard_size):
        pass


def record_embedded(num: int, folder: Path) -> None:
    """Records the embedded LM as the recorder does by default."""
    config = CollectConfig(out=folder)
    lm = LanguageModel.load(config.lm)
    halting = config.halting(lm.chat, config.open())
    decoder = Decoder(
        lm.model,
        lm.tokenizer,
        halting,
        config.batch_size,
        config.budget(lm.context),
        lm.temperature,
        signals=RECORDED,
    )
    work = ((question, 0) for question in each_question("all", "train", num))
    for _ in write_shards(folder, record(lm, decoder, work), {}, config.shard_size):
        pass


def read(num: int, folder: Path) -> None:
    """Reads traces, sets up training, and makes one rollout and update of PPO."""
    traces = read_traces(folder)
    assert len(traces) == num
    observing, settings = benchmark_observing(traces), PPOConfig()
    env = replay_env(traces, observing, settings.num_envs)
    ppo = make_ppo(env, observing, settings, mean_points=traces.num_points / num, seed=0)
    learn(ppo, settings.n_steps * settings.num_envs, "benchmark", None, progress_bar=False)


if __name__ == "__main__":
    jobs = {"load": load, "write": write, "record": record_embedded, "read": read}
    jobs[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
