"""Training on recorded traces: once on all of them, or fold by fold to judge it honestly."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents.pathwise import PathwiseConfig, start_from_traces
from agents.ppo import Agent, HaltLog, PPOConfig, export, log_odds_net, make_ppo, set_log_odds
from envs.batched import BatchedEnv
from envs.replay import ReplayEnv, observed_features
from haltwise import HaltHead, HeadConfig, InputError
from haltwise.policy.signals import Float
from policies.observing import observing_at_prices
from traces import Chunks, Traces, chunks_of

#: Shares of PPO's decisions after which an agent is tried out of fold. 0 is its start.
CHECKPOINTS = (0.0, 0.25, 0.5, 1.0)

# Points that a head decides on.
_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class FitConfig:
    """How an agent is trained on recorded traces."""

    pathwise: PathwiseConfig = field(default_factory=PathwiseConfig)
    """The start, before PPO."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO on replay."""


def fit(
    traces: Traces | Chunks,
    head: HeadConfig,
    config: FitConfig,
    seed: int,
    *,
    share: float = 1.0,
    reached: Callable[[Agent], None] | None = None,
    log_dir: Path | None = None,
    checkpoint: Path | None = None,
    progress_bar: bool = False,
) -> Agent:
    """Trains an agent on recorded traces.

    Args:
        traces: To replay. The schedule is spread evenly over chunks, and PPO takes a new one
            between two rollouts: with more chunks than rollouts it does not come to them all.
        head: What the agent observes, and under which halting conditions.
        config: Schedule.
        seed: Of everything random.
        share: Of PPO's decisions, where it ends; its schedule is for all of them.
        reached: Called with the agent at each of CHECKPOINTS.
        log_dir: Where TensorBoard's files go, if anywhere.
        checkpoint: A file to save the agent to as it learns, and to go on from if it is there.
        progress_bar: Whether to show one.

    Raises:
        InputError: If no trace has a decision point.
    """
    torch.set_num_threads(1)
    chunks = chunks_of(traces)
    one_pass = iter(chunks)
    first = next(one_pass, None)
    if first is None:
        raise InputError("no trace has a decision point: there is nothing to decide")
    env = ReplayEnv(first, head.observing, head.halting, config.ppo.num_envs)
    ppo = make_ppo(
        env,
        head.observing,
        config.ppo,
        mean_points=first.num_points / len(first),
        seed=seed,
        log_dir=log_dir,
    )
    if checkpoint is not None and checkpoint.exists():
        _restore(ppo, checkpoint)
    elif config.pathwise.steps:
        net = log_odds_net(ppo)
        start_from_traces(net, chunks, head.observing, head.halting, config.pathwise, seed)
        set_log_odds(ppo, net)
    del first
    total = config.ppo.total_timesteps
    callbacks: list[BaseCallback] = [_Checkpoints(total, share, reached)]
    if len(chunks) > 1:
        callbacks.append(_Streaming(env, one_pass, share * total / len(chunks)))
    learn(ppo, total, "replay", checkpoint, progress_bar, callbacks)
    return ppo


def fit_live(
    env: BatchedEnv,
    head: HeadConfig,
    config: PPOConfig,
    seed: int,
    *,
    mean_points: float,
    start: Agent | None,
    log_dir: Path,
    checkpoint: Path,
) -> Agent:
    """Trains an agent on a running LM.

    Args:
        env: Plays it.
        head: What the agent observes.
        config: Schedule.
        seed: Of everything random.
        mean_points: Decision points of a mean trace.
        start: An agent to go on from, trained on replay; None starts afresh.
        log_dir: Where TensorBoard's files go.
        checkpoint: A file to save the agent to as it learns, and to go on from if it is there.
    """
    ppo = make_ppo(env, head.observing, config, mean_points=mean_points, seed=seed, log_dir=log_dir)
    if checkpoint.exists():
        _restore(ppo, checkpoint)
    elif start is not None:
        ppo.policy.load_state_dict(start.policy.state_dict())
    learn(ppo, config.total_timesteps, "live", checkpoint, progress_bar=True)
    return ppo


def learn(
    ppo: Agent,
    total_timesteps: int,
    name: str,
    checkpoint: Path | None,
    progress_bar: bool,
    callbacks: Sequence[BaseCallback] = (),
) -> None:
    """Runs PPO up to some number of decisions, saving it as it goes.

    Args:
        ppo: The agent; it goes on from the decisions it has made already.
        total_timesteps: Decisions in all.
        name: Of the TensorBoard run.
        checkpoint: Where to save, if anywhere.
        progress_bar: Whether to show one.
        callbacks: To call besides.
    """
    callbacks = [HaltLog(), *callbacks]
    if checkpoint is not None:
        callbacks.append(_Saving(checkpoint))
    if ppo.num_timesteps < total_timesteps:
        ppo.learn(
            total_timesteps - ppo.num_timesteps,
            callback=callbacks,
            log_interval=1,
            tb_log_name=name,
            reset_num_timesteps=False,
            progress_bar=progress_bar,
        )
    if checkpoint is not None:
        _save(ppo, checkpoint)


class _Checkpoints(BaseCallback):
    """Shows the agent at each of CHECKPOINTS, and ends the learning at one of them."""

    def __init__(self, total: int, share: float, reached: Callable[[Agent], None] | None) -> None:
        super().__init__()
        self._ahead = [at * total for at in CHECKPOINTS]
        self._end, self._reached = share * total, reached

    def _on_step(self) -> bool:
        # The rollout that follows the end is begun and dropped.
        return not self._over

    def _on_rollout_start(self) -> None:
        self._pass()

    def _on_training_end(self) -> None:
        self._pass()

    def _pass(self) -> None:
        done = self.model.num_timesteps
        while self._ahead and done >= self._ahead[0]:
            self._ahead.pop(0)
            if self._reached is not None:
                self._reached(cast(Agent, self.model))
        self._over = done >= self._end


class _Streaming(BaseCallback):
    """Replays another chunk of traces from time to time; unfinished episodes are dropped."""

    def __init__(self, env: ReplayEnv, chunks: Iterator[Traces], each: float) -> None:
        """Takes the environment of the first chunk, the others, and decisions for each."""
        super().__init__()
        self._env, self._chunks, self._each = env, chunks, each
        self._num_loaded = 1

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps < self._num_loaded * self._each:
            return
        traces = next(self._chunks, None)
        if traces is not None:
            self._num_loaded += 1
            self._env.load(traces)
            model: Any = self.model
            model._last_obs = model.env.reset()
            model._last_episode_starts = np.ones(self._env.num_envs, dtype=bool)


class _Saving(BaseCallback):
    """Saves the agent after every tenth rollout."""

    _EVERY = 10

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._num_rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._num_rollouts and self._num_rollouts % self._EVERY == 0:
            _save(cast(Agent, self.model), self._path)
        self._num_rollouts += 1


def _save(ppo: Agent, path: Path) -> None:
    temporary = path.with_name(f"{path.stem}.part.zip")
    ppo.save(temporary)
    os.replace(temporary, path)


def _restore(ppo: Agent, checkpoint: Path) -> None:
    ppo.set_parameters(str(checkpoint), device="cpu")
    ppo.num_timesteps = PPO.load(checkpoint, device="cpu").num_timesteps


@dataclass(frozen=True)
class _Fold:
    traces: Path  # a pickle of all of them: a job is light, and a worker keeps what it selects
    kept_back: NDArray[np.bool_]  # (N,)
    head: HeadConfig
    config: FitConfig
    prices: tuple[float, ...]
    seed: int
    folder: Path
    decided: Path


def out_of_fold(
    traces: Traces,
    fold: Mapping[int, NDArray[np.int64]],
    head: HeadConfig,
    config: FitConfig,
    prices: Sequence[float],
    cache: Path,
) -> Mapping[int, NDArray[np.bool_]]:
    """Where agents that never saw a trace's question would halt it.

    One agent a seed and fold, trained on the other folds, in as many processes as there are
    cores.

    Args:
        traces: N traces with P points.
        fold: The fold (N,) of each, by seed. The seed is that of the training, too.
        head: What the agents observe. Each fold standardises and projects by its own training
            traces.
        config: Schedule.
        prices: Where to read the agents.
        cache: Folder that keeps finished folds, so that an interrupted job goes on, and their
            agents' heads at each of CHECKPOINTS: see `fold_folder`.

    Returns:
        By seed: halting decisions (C, number of prices, P) at each of CHECKPOINTS, put together
        when they are asked for.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = {
        (seed, int(k)): cache / f"{seed}-{k}.npy" for seed in fold for k in np.unique(fold[seed])
    }
    missing = [at for at, path in paths.items() if not path.exists()]
    everything = cache / "traces.pickle"
    if missing:
        with everything.open("wb") as file:
            pickle.dump(traces, file, protocol=pickle.HIGHEST_PROTOCOL)
    jobs = [
        _Fold(
            everything,
            fold[seed] == k,
            head,
            config,
            tuple(prices),
            seed,
            fold_folder(cache, seed, k),
            paths[seed, k],
        )
        for seed, k in missing
    ]
    try:
        for _ in tqdm(_each(jobs, os.cpu_count() or 1), "folds", len(missing)):
            pass
    finally:
        everything.unlink(missing_ok=True)
    of_point = {seed: of[traces.trace_of_point] for seed, of in fold.items()}
    return _Decided(paths, of_point)


def _each(jobs: Sequence[_Fold], num_cores: int) -> Iterator[None]:
    """Fits folds in as many processes as there are cores; on one core in this one."""
    workers = min(len(jobs), num_cores)
    if workers < 2:
        yield from map(_fit_fold, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with _light_processes(), ProcessPoolExecutor(workers, spawn) as pool:
        yield from pool.map(_fit_fold, jobs)


@contextmanager
def _light_processes() -> Iterator[None]:
    """Processes that are started here do not import the running script.

    They would, as multiprocessing does, and with it LMs, figures and more that no fold needs:
    some 250 MB a process.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


class _Decided(Mapping[int, NDArray[np.bool_]]):
    """The decisions of every seed, of which no more are in memory than are asked for."""

    def __init__(
        self, paths: Mapping[tuple[int, int], Path], fold: Mapping[int, NDArray[np.int64]]
    ) -> None:
        """Takes the file of each seed and fold, and the fold (P,) of each point by seed."""
        self._paths, self._fold = paths, fold

    def __len__(self) -> int:
        return len(self._fold)

    def __iter__(self) -> Iterator[int]:
        return iter(self._fold)

    def __getitem__(self, seed: int) -> NDArray[np.bool_]:
        fold = self._fold[seed]
        each = {
            k: np.load(path, mmap_mode="r") for (of, k), path in self._paths.items() if of == seed
        }
        shape = next(iter(each.values())).shape[:-1]
        decided = np.empty((*shape, len(fold)), dtype=bool)
        for k, halts in each.items():
            decided[:, :, fold == k] = halts
        return decided


def fold_folder(cache: Path, seed: int, k: int) -> Path:
    """The folder of a fold's heads, one folder each of CHECKPOINTS: "0", "1", ..."""
    return cache / f"{seed}-{k}"


def _fit_fold(job: _Fold) -> None:
    """Saves decisions (C, number of prices, P) on the traces kept back, and the fold's heads."""
    gc.collect()  # the last job's agent and environment refer to each other
    with job.traces.open("rb") as file:
        traces: Traces = pickle.load(file)
    train, held_out = traces.select(~job.kept_back), traces.select(job.kept_back)
    del traces
    groups, halting = job.head.observing.groups, job.head.halting
    observing = observing_at_prices(train, groups, halting, job.head.observing.price_range)
    config = HeadConfig(observing, halting, job.head.default_price)
    features = observed_features(held_out, observing, halting)
    decided: list[NDArray[np.bool_]] = []

    def decide(ppo: Agent) -> None:
        head = export(ppo, config)
        head.save(job.folder / str(len(decided)))
        decided.append(_halts(head, features, job.prices))

    ppo = fit(train, config, job.config, job.seed, reached=decide)
    if not decided:  # no PPO at all
        decide(ppo)
    temporary = job.decided.with_suffix(".part.npy")
    np.save(temporary, np.stack(decided + decided[-1:] * (len(CHECKPOINTS) - len(decided))))
    os.replace(temporary, job.decided)


def _halts(head: HaltHead, features: Float, prices: Sequence[float]) -> NDArray[np.bool_]:
    """Decisions (number of prices, P); the layers of many points would take too much memory."""
    pieces = np.split(features, range(_AT_A_TIME, len(features), _AT_A_TIME))
    each = [np.stack([head.halts(piece, price) for price in prices]) for piece in pieces]
    return np.concatenate(each, axis=1)
