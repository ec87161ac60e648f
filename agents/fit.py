"""Trains agents on recorded traces, fold by fold to judge them honestly, and on a running LM."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pickle
import sys
import threading
import time
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
from stable_baselines3.common.callbacks import BaseCallback

from agents.checkpoint import restore_agent, save_agent
from agents.network import LogOdds
from agents.pathwise import PathwiseConfig, start_from_traces
from agents.ppo import (
    Agent,
    HaltLog,
    PPOConfig,
    export,
    log_odds_net,
    make_ppo,
    set_log_odds,
    take_up,
)
from command import progress
from envs.batched import BatchedEnv
from envs.replay import ReplayEnv, observed_features
from haltwise import HaltHead, HeadConfig, InputError
from haltwise.policy.signals import Float
from policies.observing import observing_at_prices
from traces import Chunks, Traces, chunks_of

#: Shares of PPO's decisions after which an agent is tried out of fold. 0 is where PPO begins.
CHECKPOINTS = (0.0, 0.25, 0.5, 1.0)
#: Shares of the start's gradient steps after which it is tried, too; where it ends, PPO begins.
START_CHECKPOINTS = (0.0, 0.1, 0.25, 0.5, 0.75)
#: There it is tried at every such price alone, so that a training takes no longer.
START_EVERY = 10

# PPO decides no more often than this about each point: of a few traces there is nothing more to
# learn after that, and they are soon through.
_MOST_PASSES = 100

# The most points that a head decides on in one pass.
_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class FitConfig:
    """How an agent is trained on recorded traces."""

    pathwise: PathwiseConfig = field(default_factory=PathwiseConfig)
    """The start that the agent gets from recorded traces before PPO."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO on replayed traces."""


def fit(
    traces: Traces | Chunks,
    head: HeadConfig,
    config: FitConfig,
    seed: int,
    *,
    parent: HaltHead | None = None,
    share: float = 1.0,
    reached: Callable[[Agent], None] | None = None,
    starting: Callable[[Agent], None] | None = None,
    log_dir: Path | None = None,
    checkpoint: Path | None = None,
    progress_bar: bool = False,
) -> Agent:
    """Trains an agent on recorded traces.

    Args:
        traces: The traces to replay. The schedule is spread evenly over chunks, and PPO takes a
            new one between two rollouts: with more chunks than rollouts it does not come to them
            all.
        head: What the agent observes, and under which halting conditions.
        config: The settings of the training.
        seed: The seed of everything random.
        parent: A head that observes the same, to go on from; None starts from the evidence.
        share: The share of PPO's decisions after which training ends. The schedule of the
            learning rate is that of the whole training all the same.
        reached: Called with the agent at each of CHECKPOINTS.
        starting: Called with it at each of START_CHECKPOINTS.
        log_dir: The folder that TensorBoard's files go to; None writes none.
        checkpoint: A file to save the agent to as it learns, and to go on from if it is there.
        progress_bar: Whether to tell how far it is.

    Returns:
        The trained agent.

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
        restore_agent(ppo, checkpoint)
    else:
        if parent is not None:
            take_up(ppo, parent)
        if config.pathwise.steps:
            net = log_odds_net(ppo)
            start_from_traces(
                net,
                chunks,
                head.observing,
                head.halting,
                config.pathwise,
                seed,
                log_dir,
                goes_on=parent is not None,
                before=_handing_over(ppo, net, config.pathwise.steps, starting),
                progress_bar=progress_bar,
            )
            set_log_odds(ppo, net)
    total = config.ppo.total_timesteps
    if len(chunks) == 1:
        total = min(total, _MOST_PASSES * first.num_points)
    del first
    callbacks: list[BaseCallback] = [_Checkpoints(total, share, reached)]
    if len(chunks) > 1:
        callbacks.append(_Streaming(env, one_pass, share * total / len(chunks)))
    learn(ppo, total, "replay", checkpoint, progress_bar and share > 0, callbacks)
    return ppo


def _handing_over(
    ppo: Agent, net: LogOdds, steps: int, starting: Callable[[Agent], None] | None
) -> Callable[[int], None] | None:
    """Returns what hands over an agent whose start is at so many steps, if anybody takes it.

    Args:
        ppo: The agent.
        net: Its network, which learns.
        steps: The steps of the whole start.
        starting: Takes the agent at each of START_CHECKPOINTS.
    """
    if starting is None:
        return None

    def hand_over(num_done: int) -> None:
        """Hands the agent over as it is now, as often as it is asked for after so many steps."""
        for _ in range([round(at * steps) for at in START_CHECKPOINTS].count(num_done)):
            set_log_odds(ppo, net)
            starting(ppo)

    return hand_over


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
        env: The environment that runs the LM.
        head: What the agent observes.
        config: The settings of the training.
        seed: The seed of everything random.
        mean_points: The mean number of decision points in a trace.
        start: An agent to go on from, trained on replay; None starts afresh.
        log_dir: The folder that TensorBoard's files go to.
        checkpoint: A file to save the agent to as it learns, and to go on from if it is there.

    Returns:
        The trained agent.
    """
    ppo = make_ppo(env, head.observing, config, mean_points=mean_points, seed=seed, log_dir=log_dir)
    if checkpoint.exists():
        restore_agent(ppo, checkpoint)
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
    """Trains an agent until it has made some number of decisions, saving it as it goes.

    Args:
        ppo: The agent; it goes on from the decisions that it has made already.
        total_timesteps: How many decisions it has made in all when the training ends.
        name: The name of the run in TensorBoard.
        checkpoint: The file to save the agent to; None saves nothing.
        progress_bar: Whether to tell how far it is.
        callbacks: Callbacks that PPO calls beside those for logging and saving.
    """
    callbacks = [HaltLog(), *callbacks]
    if checkpoint is not None:
        callbacks.append(_Saving(checkpoint))
    if progress_bar:
        callbacks.append(_Telling(total_timesteps, name))
    if ppo.num_timesteps < total_timesteps:
        ppo.learn(
            total_timesteps - ppo.num_timesteps,
            callback=callbacks,
            log_interval=1,
            tb_log_name=name,
            reset_num_timesteps=False,
        )
    if checkpoint is not None:
        save_agent(ppo, checkpoint)


class _Checkpoints(BaseCallback):
    """Hands the agent over at each of CHECKPOINTS, and ends the training after a share of it."""

    def __init__(self, total: int, share: float, reached: Callable[[Agent], None] | None) -> None:
        """Remembers when to hand the agent over, and to whom.

        Args:
            total: The decisions in the whole training.
            share: The share of them after which training ends.
            reached: Takes the agent at each of CHECKPOINTS; None takes nothing.
        """
        super().__init__()
        self._ahead = [at * total for at in CHECKPOINTS]
        self._end, self._reached = share * total, reached

    def _on_step(self) -> bool:
        """Returns False, which ends the training, once its share of decisions is made."""
        # PPO can be ended only inside of a rollout: it begins one more, which is dropped.
        return not self._over

    def _on_rollout_start(self) -> None:
        """Hands over the agent as the update before has left it."""
        self._hand_over()

    def _on_training_end(self) -> None:
        """Hands over the agent as the last update has left it."""
        self._hand_over()

    def _hand_over(self) -> None:
        """Hands the agent over once for each checkpoint that it has come to since the last time."""
        done = self.model.num_timesteps
        while self._ahead and done >= self._ahead[0]:
            self._ahead.pop(0)
            if self._reached is not None:
                self._reached(cast(Agent, self.model))
        self._over = done >= self._end


class _Streaming(BaseCallback):
    """Gives the environment another chunk of traces from time to time.

    The episodes that are unfinished then are dropped.
    """

    def __init__(self, env: ReplayEnv, chunks: Iterator[Traces], each: float) -> None:
        """Remembers what to replay.

        Args:
            env: The environment, which replays the first chunk.
            chunks: The other chunks.
            each: How many decisions are made on each chunk.
        """
        super().__init__()
        self._env, self._chunks, self._each = env, chunks, each
        self._num_loaded = 1

    def _on_step(self) -> bool:
        """Returns True: the training goes on."""
        return True

    def _on_rollout_start(self) -> None:
        """Loads the next chunk, if there is one and the decisions for the last one are made."""
        if self.model.num_timesteps < self._num_loaded * self._each:
            return
        traces = next(self._chunks, None)
        if traces is not None:
            self._num_loaded += 1
            self._env.load(traces)
            model: Any = self.model
            model._last_obs = model.env.reset()
            model._last_episode_starts = np.ones(self._env.num_envs, dtype=bool)


class _Telling(BaseCallback):
    """Tells how many decisions are made."""

    def __init__(self, total: int, name: str) -> None:
        """Remembers how many are made in all, and what for."""
        super().__init__()
        self._total, self._name = total, name

    def _on_training_start(self) -> None:
        """Begins with those that are made already."""
        model: Any = self.model
        done = model.num_timesteps
        a_rollout = model.n_steps * model.n_envs
        total = done + a_rollout * math.ceil((self._total - done) / a_rollout)  # whole ones alone
        self._bar = progress(None, self._name, total, initial=done, unit=" decisions")

    def _on_step(self) -> bool:
        """Returns True: the training goes on."""
        self._bar.update(self.training_env.num_envs)
        return True

    def _on_training_end(self) -> None:
        """Tells it for the last time."""
        self._bar.close()


class _Saving(BaseCallback):
    """Saves the agent after every tenth rollout."""

    _EVERY = 10

    def __init__(self, path: Path) -> None:
        """Remembers the file to save to."""
        super().__init__()
        self._path = path
        self._num_rollouts = 0

    def _on_step(self) -> bool:
        """Returns True: the training goes on."""
        return True

    def _on_rollout_start(self) -> None:
        """Saves the agent if ten more rollouts are done, their updates included."""
        if self._num_rollouts and self._num_rollouts % self._EVERY == 0:
            save_agent(cast(Agent, self.model), self._path)
        self._num_rollouts += 1


@dataclass(frozen=True)
class _Fold:
    """One training on all folds but one, for a process to do."""

    traces: Path
    """A pickle of all traces: so jobs are light, and a worker keeps only what it selects."""
    kept_back: NDArray[np.bool_]
    """(N,) whether a trace belongs to the fold that is kept back."""
    head: HeadConfig
    config: FitConfig
    prices: tuple[float, ...]
    """The prices at which the agent decides about the fold."""
    seed: int
    folder: Path
    """The folder that the heads go to."""
    decided: Path
    """The file that the decisions go to."""
    parent: HaltHead | None = None
    """The head to go on from, whose observing is kept."""
    share: float = 1.0
    """The share of PPO's decisions after which training ends."""


def out_of_fold(
    traces: Traces,
    fold: Mapping[int, NDArray[np.int64]],
    head: HeadConfig,
    config: FitConfig,
    prices: Sequence[float],
    cache: Path,
    parent: HaltHead | None = None,
    share: float = 1.0,
) -> OutOfFold:
    """Returns where agents that never saw a trace's question would halt it.

    For every seed and fold one agent is trained on the other folds, in as many processes as there
    are cores.

    Args:
        traces: N traces with P points.
        fold: By seed, the fold (N,) of each trace. The seed is also that of the training.
        head: What the agents observe. Each agent standardises and projects by the traces that it
            is trained on.
        config: The settings of the training.
        prices: The prices at which the agents decide.
        cache: The folder that keeps finished folds, so that an interrupted job goes on, and their
            agents' heads at each of CHECKPOINTS: see `fold_folder`.
        parent: A head that all agents go on from; it has learned from none of the traces.
        share: The share of PPO's decisions after which trainings end; what they come to then
            stands for the later checkpoints too.

    Returns:
        The halting decisions, put together when they are asked for.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = {
        (seed, int(k)): cache / f"{seed}-{k}.npy" for seed in fold for k in np.unique(fold[seed])
    }
    missing = [at for at, path in paths.items() if not (path.exists() and _starting(path).exists())]
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
            parent,
            share,
        )
        for seed, k in missing
    ]
    try:
        for _ in progress(_fit_all(jobs, os.cpu_count() or 1), "folds", len(missing)):
            pass
    finally:
        everything.unlink(missing_ok=True)
    of_point = {seed: of[traces.trace_of_point] for seed, of in fold.items()}
    return OutOfFold(paths, of_point)


def _fit_all(jobs: Sequence[_Fold], num_cores: int) -> Iterator[None]:
    """Does jobs in as many processes as there are cores; on one core, in this process."""
    workers = min(len(jobs), num_cores)
    if workers < 2:
        yield from map(_fit_fold, jobs)
        return
    with _light_processes(), _pool(workers) as pool:
        yield from pool.map(_fit_fold, jobs)


def _pool(workers: int) -> ProcessPoolExecutor:
    """Returns processes that end with this one, however it ends."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, _end_with, (os.getpid(),))


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent has been killed, which cannot tell it so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _light_processes() -> Iterator[None]:
    """Keeps processes that are started inside of it from importing the running script.

    By default multiprocessing imports it in each of them, and with it LMs, figures and more that
    no fold needs: some 250 MB a process.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


class OutOfFold(Mapping[int, NDArray[np.bool_]]):
    """By seed, the decisions of agents about traces whose questions they never saw.

    They are of shape (C, number of prices, P) at C CHECKPOINTS, and are read from files when they
    are asked for.
    """

    def __init__(
        self, paths: Mapping[tuple[int, int], Path], fold: Mapping[int, NDArray[np.int64]]
    ) -> None:
        """Remembers where decisions are found.

        Args:
            paths: By seed and fold, the file of decisions about that fold's points.
            fold: By seed, the fold (P,) of each point.
        """
        self._paths, self._fold = paths, fold

    def __len__(self) -> int:
        """Returns the number of seeds."""
        return len(self._fold)

    def __iter__(self) -> Iterator[int]:
        """Iterates over the seeds."""
        return iter(self._fold)

    def __getitem__(self, seed: int) -> NDArray[np.bool_]:
        """Reads the decisions (C, number of prices, P) of a seed's agents, each on its own fold."""
        return self._read(seed, self._paths)

    def starting(self, seed: int) -> NDArray[np.bool_]:
        """Reads the decisions (S, number of prices, P) at S START_CHECKPOINTS.

        They are at every START_EVERY-th price alone.
        """
        return self._read(seed, {at: _starting(path) for at, path in self._paths.items()})

    def _read(self, seed: int, paths: Mapping[tuple[int, int], Path]) -> NDArray[np.bool_]:
        """Puts the folds of a seed together."""
        fold = self._fold[seed]
        each = {k: np.load(path, mmap_mode="r") for (of, k), path in paths.items() if of == seed}
        shape = next(iter(each.values())).shape[:-1]
        decided = np.empty((*shape, len(fold)), dtype=bool)
        for k, halts in each.items():
            decided[:, :, fold == k] = halts
        return decided


def fold_folder(cache: Path, seed: int, k: int) -> Path:
    """Returns the folder of a fold's heads, which has one folder each of CHECKPOINTS: "0", "1", ...

    Args:
        cache: The folder that `out_of_fold` was given.
        seed: The seed of the training.
        k: The fold that was kept back.
    """
    return cache / f"{seed}-{k}"


def _fit_fold(job: _Fold) -> None:
    """Trains on all folds but one, and saves the heads and their decisions about that one.

    The decisions are of shape (C, number of prices, points of the fold).
    """
    # The last job's agent and environment refer to each other, so only the collector frees them.
    gc.collect()
    with job.traces.open("rb") as file:
        traces: Traces = pickle.load(file)
    train, held_out = traces.select(~job.kept_back), traces.select(job.kept_back)
    del traces
    observing, halting = job.head.observing, job.head.halting
    if job.parent is None:
        groups, prices = observing.groups, observing.price_range
        observing = observing_at_prices(train, groups, halting, prices)
    config = HeadConfig(observing, halting, job.head.default_price)
    features = observed_features(held_out, observing, halting)
    decided: list[NDArray[np.bool_]] = []
    starting: list[NDArray[np.bool_]] = []

    def decide_at_start(ppo: Agent) -> None:
        """Keeps the decisions at some prices."""
        starting.append(_halts(export(ppo, config), features, job.prices[::START_EVERY]))

    def decide(ppo: Agent) -> None:
        """Saves the agent as a head, and keeps the head's decisions."""
        head = export(ppo, config)
        head.save(job.folder / str(len(decided)))
        decided.append(_halts(head, features, job.prices))

    ppo = fit(
        train,
        config,
        job.config,
        job.seed,
        parent=job.parent,
        share=job.share,
        reached=decide,
        starting=decide_at_start,
    )
    if not decided:  # PPO makes no decision at all, so no checkpoint was reached
        decide(ppo)
    starting = starting or [decided[0][::START_EVERY]]  # there is no start, or it ended early
    _save(_starting(job.decided), starting, len(START_CHECKPOINTS))
    _save(job.decided, decided, len(CHECKPOINTS))


def _starting(decided: Path) -> Path:
    """Returns the file of the decisions during a start, which lies beside that of a training."""
    return decided.with_suffix(".start.npy")


def _save(path: Path, each: list[NDArray[np.bool_]], num: int) -> None:
    """Saves decisions, whole or not at all; the last ones stand for those of `num` that lack."""
    temporary = path.with_suffix(".part.npy")
    np.save(temporary, np.stack(each + each[-1:] * (num - len(each))))
    os.replace(temporary, path)


def _halts(head: HaltHead, features: Float, prices: Sequence[float]) -> NDArray[np.bool_]:
    """Returns the head's decisions (number of prices, P) about points, some points at a time.

    The layers of all points at once would take too much memory.
    """
    pieces = np.split(features, range(_AT_A_TIME, len(features), _AT_A_TIME))
    each = [np.stack([head.halts(piece, price) for price in prices]) for piece in pieces]
    return np.concatenate(each, axis=1)
