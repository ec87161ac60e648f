"""Recording on many workers, here or on a cluster: Ray starts them and notices when one is lost.

Each worker holds an LM of its own and answers one job, a number of questions, at a time. Its traces
depend on the questions alone, and so a job that is lost is done again by any other worker.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from tqdm import tqdm

from haltwise import InputError
from haltwise.errors import reason_of
from recording.config import EngineConfig, TaskFormat
from recording.engine import RecordingEngine, open_engine
from recording.trace_row import SeededQuestion, TraceRow

_CLONE = Path(__file__).parents[1]
# The parts of the clone that workers need: 9 MB, of which 8 are the embedded LM.
_NEEDED = ("haltwise", "lms", "traces", "recording", "pyproject.toml", "checkpoints/embedded")
_LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)
# A job that so many workers have died of is not given to another one.
_MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class LoadedWorker:
    """What a worker tells of itself once its LM is loaded."""

    recorder: dict[str, Any]
    """The metadata that its engine keeps beside traces."""
    description: str
    """The description of the LM, for a person."""
    pid: int
    """The process id of the worker."""
    host: str
    """The address of its machine."""


class RecordingWorker:
    """An engine in a process of its own.

    Args:
        config: Which LM its engine runs, and how it is asked.
        task_format: How the task's answers are asked for and read.
    """

    def __init__(self, config: EngineConfig, task_format: TaskFormat) -> None:
        """Loads nothing yet: Ray tells of an error in here only as the worker's death."""
        self._config, self._task_format = config, task_format
        self._engine: RecordingEngine | None = None

    def load(self) -> LoadedWorker:
        """Loads the LM, and tells of the worker.

        Raises:
            InputError: If the engine is not installed, or the LM cannot be used.
        """
        self._engine = engine = open_engine(self._config, self._task_format)
        host = ray.util.get_node_ip_address()
        return LoadedWorker(engine.recorder, engine.description, os.getpid(), host)

    def record(self, job: list[SeededQuestion]) -> list[TraceRow]:
        """Answers the questions of a job and returns their traces.

        Raises:
            InputError: If a question cannot be asked, or the LM's logits are not numbers.
        """
        assert self._engine is not None
        return list(self._engine.record(job))

    def self_test(self, work: Sequence[SeededQuestion], max_tokens: int | None) -> str:
        """Tries a few questions, and returns a report for a person.

        Raises:
            InputError: If halting this LM cannot work.
        """
        assert self._engine is not None
        return self._engine.self_test(work, max_tokens)


@dataclass(eq=False)
class _HiredWorker:
    """A worker as the process that hands out jobs sees it."""

    actor: Any
    """Ray's handle of the worker."""
    loaded: LoadedWorker | None = None
    """What the worker has told; None while it loads its LM."""


@dataclass(eq=False)
class _WorkerJob:
    """The questions that one worker answers in one go."""

    work: list[SeededQuestion]
    """The questions with their sampling seeds."""
    num_attempts: int = 0
    """The number of workers that have died of it."""


class RayEngine:
    """The `recording.engine.RecordingEngine` that spreads its work over many workers by Ray.

    A worker that is lost, its process or its machine, is replaced as soon as Ray has room, and its
    questions are asked again. No worker has more than one job, and so at most one job of each
    waits in memory here.

    Args:
        config: Which LM each worker runs, and how it is asked.
        task_format: How the task's answers are asked for and read.
        address: "local" starts Ray on this machine; "auto" or HOST:PORT joins a cluster.
        num_workers: The number of workers; None for one a GPU (or one for every
            `tensor_parallel` of them), or one a CPU.
        job_size: The number of questions in a job.

    Raises:
        InputError: If there is no such cluster or no room for the workers, the engine is not
            installed, or the LM cannot be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        task_format: TaskFormat,
        address: str,
        num_workers: int | None,
        job_size: int,
    ) -> None:
        """Starts the workers, and waits until the first one has loaded the LM."""
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _join(address)
        self._config, self._task_format, self._job_size = config, task_format, job_size
        self._first: LoadedWorker | None = None
        self._busy: dict[Any, tuple[_HiredWorker, _WorkerJob | None]] = {}
        self._idle: list[_HiredWorker] = []
        self._again: deque[_WorkerJob] = deque()
        self._num_dead_loading = 0
        try:
            for _ in range(_num_workers(config, num_workers)):
                self._hire()
            while self._first is None:
                self._wait()
        except BaseException:
            self.close()
            raise
        self.recorder: dict[str, Any] = self._first.recorder
        self.description: str = self._first.description

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that have loaded their LM, on whatever machine."""
        workers = [*self._idle, *(worker for worker, _ in self._busy.values())]
        return [worker.loaded.pid for worker in workers if worker.loaded]

    def record(self, work: Iterable[SeededQuestion]) -> Iterator[TraceRow]:
        """Answers questions, and yields their traces job by job, as the jobs are done.

        A question that is too long for the LM is left out, with a message.

        Raises:
            InputError: If a question cannot be asked, the LM's logits are not numbers, or too many
                workers die.
        """
        waiting, num_running = iter(work), 0
        while True:
            while self._idle and (job := self._next_job(waiting)):
                worker = self._idle.pop()
                self._busy[worker.actor.record.remote(job.work)] = worker, job
                num_running += 1
            if self._idle and not num_running:
                return
            job_done, rows = self._wait()
            num_running -= job_done
            yield from rows

    def self_test(self, work: Sequence[SeededQuestion], max_tokens: int | None) -> str:
        """Tries a few questions on one worker, and returns a report for a person.

        Raises:
            InputError: If halting this LM cannot work, or the worker dies.
        """
        while not self._idle:
            self._wait()
        try:
            told: str = self._get(self._idle[-1].actor.self_test.remote(work, max_tokens))
        except _LOST as error:
            reason = reason_of(error)
            raise InputError(f"a worker died of the self-test: {reason}") from None
        return told

    def close(self) -> None:
        """Ends the workers, and Ray if it was started or joined for them."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            ray.kill(worker.actor)
        self._idle, self._busy = [], {}
        if self._owns_ray:
            ray.shutdown()

    def _next_job(self, waiting: Iterator[SeededQuestion]) -> _WorkerJob | None:
        if self._again:
            return self._again.popleft()
        work = list(islice(waiting, self._job_size))
        return _WorkerJob(work) if work else None

    def _hire(self) -> None:
        """Starts a worker; it gets its first job once it has loaded the LM."""
        on_gpu = torch.device(self._config.device).type != "cpu"
        num_gpus = self._config.tensor_parallel if on_gpu else 0
        actor = ray.remote(RecordingWorker).options(num_cpus=1, num_gpus=num_gpus)
        worker = _HiredWorker(actor.remote(self._config, self._task_format))
        self._busy[worker.actor.load.remote()] = worker, None

    def _wait(self) -> tuple[bool, list[TraceRow]]:
        """Waits until a worker has loaded its LM, has done its job, or is lost.

        Returns:
            Whether a job has left its worker, done or lost, and the traces that it gave.

        Raises:
            InputError: If the worker told of one, or too many workers have died.
        """
        (ref,), _ = ray.wait(list(self._busy), num_returns=1)
        worker, job = self._busy.pop(ref)
        try:
            result = self._get(ref)
        except _LOST as error:
            self._lose(worker, job, error)
            return job is not None, []
        except BaseException:  # the worker lives: it can be asked again, and `close` ends it
            self._idle.append(worker)
            raise
        self._idle.append(worker)
        if job is None:
            self._welcome(worker, result)
            return False, []
        return True, result

    def _get(self, ref: Any) -> Any:
        """Returns what a worker has returned.

        Raises:
            InputError: If the worker has raised one.
        """
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise

    def _welcome(self, worker: _HiredWorker, loaded: LoadedWorker) -> None:
        """Takes in a worker that has loaded its LM.

        Raises:
            InputError: If it would record otherwise than the first worker.
        """
        worker.loaded, self._num_dead_loading = loaded, 0
        self._first = self._first or loaded
        expected = self._first.recorder
        differ = sorted(k for k in expected if loaded.recorder[k] != expected[k])
        if differ:
            raise InputError(
                f"workers on {self._first.host} and {loaded.host} differ in {', '.join(differ)}: "
                "expected the same LM and code on every machine"
            )

    def _lose(self, worker: _HiredWorker, job: _WorkerJob | None, error: Exception) -> None:
        """Replaces a worker that is lost, and puts its job back.

        Raises:
            InputError: If so many workers have died of the job, or as they loaded the LM, that
                another one would die too.
        """
        reason = reason_of(error)
        name = (
            f"worker {worker.loaded.pid} on {worker.loaded.host}"
            if worker.loaded
            else "a new worker"
        )
        tqdm.write(f"lost {name}: {reason}")
        ray.kill(worker.actor)  # it may only be out of reach
        if job is None:
            self._num_dead_loading += 1
            if self._num_dead_loading == _MOST_ATTEMPTS:
                raise InputError(f"{_MOST_ATTEMPTS} workers died as they loaded the LM: {reason}")
        else:
            job.num_attempts += 1
            if job.num_attempts == _MOST_ATTEMPTS:
                first, last = (job.work[i][0].question_id for i in (0, -1))
                raise InputError(
                    f"{_MOST_ATTEMPTS} workers died of the {len(job.work)} questions from "
                    f"{first!r} to {last!r}: {reason}"
                )
            self._again.append(job)
        self._hire()


def _join(address: str) -> None:
    """Starts Ray or joins a cluster, whose machines get what they need of this clone.

    Raises:
        InputError: If there is no such cluster, or it cannot be joined.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with TemporaryDirectory() as folder:
        if address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options["include_dashboard"] = False
        else:
            _check_address(address)
            _copy_needed(Path(folder))
            options["runtime_env"] = {"working_dir": folder}
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = reason_of(error)
            raise InputError(f"cannot use Ray at {address!r}: {reason}") from None


def _check_address(address: str) -> None:
    """Refuses an address where nobody answers: Ray would wait minutes for it.

    Raises:
        InputError: If no connection can be made.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use Ray at {address!r}: {error}") from None


def _copy_needed(folder: Path) -> None:
    for name in _NEEDED:
        source, target = _CLONE / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def _num_workers(config: EngineConfig, asked: int | None) -> int:
    """Returns how many workers there are to be.

    Args:
        config: What each worker runs, and on what.
        asked: The number that a person has asked for; None for as many as there is room for.

    Raises:
        InputError: If the cluster has no room for so many.
    """
    on_gpu = torch.device(config.device).type != "cpu"
    kind, each = ("GPU", config.tensor_parallel) if on_gpu else ("CPU", 1)
    found = int(ray.cluster_resources().get(kind, 0))
    most = found // each
    if most < (asked or 1):
        raise InputError(
            f"the cluster has {found} {kind}s, expected {(asked or 1) * each} or more for "
            f"{asked or 1} workers"
        )
    return asked or most
