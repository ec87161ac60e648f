"""Benchmarks on one core: speed and memory beside what else is at hand.

    python -m benchmarks.run
    python -m benchmarks.run --parts environment ppo --traces FILE_OR_FOLDER

It prints a table, and writes JSON with every measurement. Contestants take turns, and ratios are
between measurements of one round; "spread" is from the smallest to the largest round.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from agents.ppo import PPOConfig
from benchmarks import (
    bound,
    control,
    curve,
    environment,
    memory,
    overhead,
    ppo,
    promotion,
    proxy,
    recorder,
    resumed,
    servers,
    stopping,
    votes,
    wall_clock,
)
from benchmarks.bound import BoundConfig
from benchmarks.control import ControlConfig
from benchmarks.curve import CurveConfig
from benchmarks.environment import EnvironmentConfig
from benchmarks.memory import MemoryConfig, TrainingMemoryConfig
from benchmarks.overhead import OverheadConfig
from benchmarks.ppo import PPOBenchConfig
from benchmarks.promotion import PromotionConfig
from benchmarks.proxy import ProxyBenchConfig
from benchmarks.recorder import RecorderConfig
from benchmarks.resumed import ResumedConfig
from benchmarks.servers import ServersConfig
from benchmarks.stopping import StoppingBenchConfig
from benchmarks.synthetic import synthetic_traces
from benchmarks.timing import BenchResult
from benchmarks.votes import VotesConfig
from benchmarks.wall_clock import WallClockConfig
from command import run, write_json
from haltwise import InputError
from traces import read_traces

BenchPart = Literal[
    "environment",
    "ppo",
    "recorder",
    "memory",
    "training_memory",
    "overhead",
    "wall_clock",
    "proxy",
    "servers",
    "control",
    "promotion",
    "bound",
    "resumed",
    "votes",
    "stopping",
    "curve",
]

# Settings of parts that are files or names.
_NO_NUMBERS = ("lm", "lms", "run", "large", "groups", "head", "ways")
_NUM_TRACES = 2_700
_PACKAGES = ("gymnasium", "numpy", "stable-baselines3", "torch", "transformers")


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory beside what else is at hand."""

    parts: tuple[BenchPart, ...] = get_args(BenchPart)
    """The parts of the table to measure."""
    traces: Path | None = None
    """A file or folder of traces for environment, ppo, control, promotion, bound, resumed, votes,
    stopping and curve. Default: synthetic."""
    json: Path = Path(__file__).parent.parent / "checkpoints" / "bench.json"
    """The JSON file for every measurement."""
    repeats: int = 3
    """The number of rounds; memory is measured once."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """How fast environments take steps."""
    ppo: PPOBenchConfig = field(default_factory=PPOBenchConfig)
    """How fast PPO trains."""
    recorder: RecorderConfig = field(default_factory=RecorderConfig)
    """What recording costs."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The peak memory of recording and of training."""
    training_memory: TrainingMemoryConfig = field(default_factory=TrainingMemoryConfig)
    """The peak memory of a whole training, all of its processes together."""
    overhead: OverheadConfig = field(default_factory=OverheadConfig)
    """What a head costs beside `generate`."""
    wall_clock: WallClockConfig = field(default_factory=WallClockConfig)
    """How much time a head saves against the tokens that it saves."""
    proxy: ProxyBenchConfig = field(default_factory=ProxyBenchConfig)
    """What the proxy adds to the server that it stands before."""
    servers: ServersConfig = field(default_factory=ServersConfig)
    """How much time a head saves behind the proxy against the tokens that it saves."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """How well the governor keeps its promise, by simulation on the traces."""
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    """How often challengers take over, by simulation on the traces."""
    bound: BoundConfig = field(default_factory=BoundConfig)
    """What could be saved at most by the signals of the traces."""
    resumed: ResumedConfig = field(default_factory=ResumedConfig)
    """What is lost where a forced answer cannot be read."""
    votes: VotesConfig = field(default_factory=VotesConfig)
    """Several thoughts of one question, halted jointly; intervals stand where spreads do."""
    stopping: StoppingBenchConfig = field(default_factory=StoppingBenchConfig)
    """What it takes and costs to end the start from traces by held-out questions."""
    curve: CurveConfig = field(default_factory=CurveConfig)
    """What heads save that have learned from few questions and from many."""


def main(config: BenchConfig) -> None:
    """Measures, prints and writes.

    Raises:
        InputError: If a setting cannot be used.
    """
    _check(config)
    torch.set_num_threads(1)
    traces = synthetic_traces(_NUM_TRACES) if config.traces is None else read_traces(config.traces)
    measures: dict[BenchPart, Callable[[], list[BenchResult]]] = {
        "environment": partial(environment.measure, traces, config.environment, config.repeats),
        "ppo": partial(ppo.measure, traces, config.ppo, config.repeats),
        "recorder": partial(recorder.measure, config.recorder, config.repeats),
        "memory": partial(memory.measure, config.memory),
        "training_memory": partial(memory.measure_training, config.training_memory),
        "overhead": partial(overhead.measure, config.overhead, config.repeats),
        "wall_clock": partial(wall_clock.measure, config.wall_clock, config.repeats),
        "proxy": partial(proxy.measure, config.proxy, config.repeats),
        "servers": partial(servers.measure, config.servers, config.repeats),
        "control": partial(control.measure, traces, config.control, config.traces),
        "promotion": partial(promotion.measure, traces, config.promotion),
        "bound": partial(bound.measure, traces, config.bound),
        "resumed": partial(resumed.measure, traces, config.resumed),
        "votes": partial(votes.measure, traces, config.traces, config.votes),
        "stopping": partial(stopping.measure, traces, config.stopping),
        "curve": partial(curve.measure, traces, config.curve),
    }
    results: list[BenchResult] = []
    print(_line("", "median", "spread", ""))
    for part in config.parts:
        found = measures[part]()
        for heading, group in groupby(found, key=lambda result: result.part):
            print("\n".join([heading, *map(_format, group)]), flush=True)
        results += found
    write_json(config.json, _report(config, results))
    print(f"wrote {config.json}")


def _check(config: BenchConfig) -> None:
    if not config.parts or config.repeats < 1:
        raise InputError(
            f"parts is {config.parts}, repeats {config.repeats}: expected at least 1 of each"
        )
    for part in get_args(BenchPart):
        for name, value in vars(getattr(config, part)).items():
            if name in _NO_NUMBERS or isinstance(value, PPOConfig):
                continue
            if min(np.ravel(value), default=0) <= 0:
                raise InputError(f"{part}.{name} is {value}, expected above 0")
    if not config.json.absolute().parent.is_dir():
        raise InputError(f"{config.json}: no such folder, expected one to write into")


def _report(config: BenchConfig, results: list[BenchResult]) -> dict[str, Any]:
    return {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "traces": "synthetic" if config.traces is None else str(config.traces),
        "results": [asdict(result) | {"median": result.median} for result in results],
    }


def _format(result: BenchResult) -> str:
    low, high = min(result.values), max(result.values)
    spread = f"{_number(low)} - {_number(high)}" if len(result.values) > 1 else ""
    return _line(f"  {result.name}", _number(result.median), spread, result.unit)


def _line(name: str, middle: str, spread: str, unit: str) -> str:
    return f"{name:<72}{middle:>12}{spread:>24}  {unit}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    run(main, BenchConfig)
