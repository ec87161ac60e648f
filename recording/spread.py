"""Recording on many workers, here or on a cluster: Ray starts them and notices when one is lost.

Each worker holds an LM of its own and answers a job, so many questions, at a time. What it gives
depends on the questions alone, so a job that is lost is done again by any other worker.
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
from recording.config import Answering, EngineConfig
from recording.engine import Engine, open_engine
from recording.recording import Row, Work

_CLONE = Path(__file__).parents[1]
# What workers need of the clone: 9 MB, of which 8 are the embedded LM.
_NEEDED = ("haltwise", "lms", "traces", "recording", "pyproject.toml", "checkpoints/embedded")
_LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)
# A job that so many workers have died of is not given to another one.
_MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Loaded:
    """What a worker tells once its LM is loaded."""

    recorder: dict[str, Any]
    description: str
    pid: int
    host: str


class Worker:
    """An engine in a process of its own.

    Args:
        config: What it runs.
        answering: How the task is answered.
    """

    def __init__(self, config: EngineConfig, answering: Answering) -> None:
        """Loads nothing yet: an error in here would only be told as a death."""
        self._config, self._answering = config, answering
        self._engine: Engine | None = None

    def load(self) -> Loaded:
        """Loads the LM."""
        self._engine = engine = open_engine(self._config, self._answering)
        host = ray.util.get_node_ip_address()
        return Loaded(engine.recorder, engine.description, os.getpid(), host)

    def record(self, job: list[Work]) -> list[Row]:
        """Answers questions."""
        assert self._engine is not None
        return list(self._engine.record(job))

    def self_test(self, work: Sequence[Work], max_tokens: int | None) -> str:
        """See `Engine`."""
        assert self._engine is not None
        return self._engine.self_test(work, max_tokens)


@dataclass(eq=False)
class _Hand:
    """A worker as the driver sees it."""

    actor: Any
    loaded: Loaded | None = None


@dataclass(eq=False)
class _Job:
    """Questions that one worker answers in one go."""

    work: list[Work]
    num_attempts: int = 0


class Spread:
    """Many workers as one engine; see `recording.engine.Engine`.

    A worker that is lost, its process or its machine, is replaced as soon as Ray has room, and its
    questions are asked again. No worker has more than one job, so what waits in memory here is
    one job of each at most.

    Args:
        config: What each worker runs.
        answering: How the task is answered.
        address: "local" starts Ray on this machine; "auto" or HOST:PORT joins a cluster.
        num_workers: None for one a GPU (or one for every `tensor_parallel`), or one a CPU.
        job_size: Questions in a job.

    Raises:
        InputError: If there is no such cluster or no room for the workers, or as `open_engine`.
    """

    def __init__(
        self,
        config: EngineConfig,
        answering: Answering,
        address: str,
        num_workers: int | None,
        job_size: int,
    ) -> None:
        """Starts the workers, and waits until the first one has loaded the LM."""
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _join(address)
        self._config, self._answering, self._job_size = config, answering, job_size
        self._first: Loaded | None = None
        self._busy: dict[Any, tuple[_Hand, _Job | None]] = {}
        self._idle: list[_Hand] = []
        self._again: deque[_Job] = deque()
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
        """Process ids of the workers that have loaded, on whatever machine."""
        hands = [*self._idle, *(hand for hand, _ in self._busy.values())]
        return [hand.loaded.pid for hand in hands if hand.loaded]

    def record(self, work: Iterable[Work]) -> Iterator[Row]:
        """See `Engine`; traces come in jobs, in the order in which these are done."""
        waiting, num_running = iter(work), 0
        while True:
            while self._idle and (job := self._next_job(waiting)):
                hand = self._idle.pop()
                self._busy[hand.actor.record.remote(job.work)] = hand, job
                num_running += 1
            if self._idle and not num_running:
                return
            job_done, rows = self._wait()
            num_running -= job_done
            yield from rows

    def self_test(self, work: Sequence[Work], max_tokens: int | None) -> str:
        """See `Engine`: on one worker."""
        while not self._idle:
            self._wait()
        try:
            told: str = self._get(self._idle[-1].actor.self_test.remote(work, max_tokens))
        except _LOST as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"a worker died of the self-test: {reason}") from None
        return told

    def close(self) -> None:
        """Ends the workers, and Ray if it was started or joined for them."""
        for hand in [*self._idle, *(hand for hand, _ in self._busy.values())]:
            ray.kill(hand.actor)
        self._idle, self._busy = [], {}
        if self._owns_ray:
            ray.shutdown()

    def _next_job(self, waiting: Iterator[Work]) -> _Job | None:
        if self._again:
            return self._again.popleft()
        work = list(islice(waiting, self._job_size))
        return _Job(work) if work else None

    def _hire(self) -> None:
        """Starts a worker; it gets its first job once it has loaded the LM."""
        on_gpu = torch.device(self._config.device).type != "cpu"
        num_gpus = self._config.tensor_parallel if on_gpu else 0
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=num_gpus)
        hand = _Hand(actor.remote(self._config, self._answering))
        self._busy[hand.actor.load.remote()] = hand, None

    def _wait(self) -> tuple[bool, list[Row]]:
        """Waits until something has happened.

        Returns:
            Whether a job has left its worker, done or lost, and the traces that it gave.
        """
        (ref,), _ = ray.wait(list(self._busy), num_returns=1)
        hand, job = self._busy.pop(ref)
        try:
            result = self._get(ref)
        except _LOST as error:
            self._lose(hand, job, error)
            return job is not None, []
        except BaseException:  # it can be asked something else, and is ended by `close`
            self._idle.append(hand)
            raise
        self._idle.append(hand)
        if job is None:
            self._welcome(hand, result)
            return False, []
        return True, result

    def _get(self, ref: Any) -> Any:
        """What a worker gave.

        Raises:
            InputError: The worker's own.
        """
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise

    def _welcome(self, hand: _Hand, loaded: Loaded) -> None:
        hand.loaded, self._num_dead_loading = loaded, 0
        self._first = self._first or loaded
        expected = self._first.recorder
        differ = sorted(k for k in expected if loaded.recorder[k] != expected[k])
        if differ:
            raise InputError(
                f"workers on {self._first.host} and {loaded.host} differ in {', '.join(differ)}: "
                "expected the same LM and code on every machine"
            )

    def _lose(self, hand: _Hand, job: _Job | None, error: Exception) -> None:
        """Replaces a worker and puts its job back."""
        reason = str(error).strip().partition("\n")[0]
        name = f"worker {hand.loaded.pid} on {hand.loaded.host}" if hand.loaded else "a new worker"
        tqdm.write(f"lost {name}: {reason}")
        ray.kill(hand.actor)  # it may only be out of reach
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
        InputError: If there is no such cluster, or it does not let us in.
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
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"cannot use Ray at {address!r}: {reason}") from None


def _check_address(address: str) -> None:
    """Finds out in seconds what Ray would wait minutes for."""
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
    """How many workers there are to be.

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
