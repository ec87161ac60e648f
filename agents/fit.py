"""Training on recorded traces: once on all of them, or fold by fold to judge it honestly."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from agents.pathwise import PathwiseConfig, start_from_traces
from agents.ppo import Agent, HaltLog, PPOConfig, export, log_odds_net, make_ppo, set_log_odds
from envs.batched import BatchedEnv
from envs.replay import ReplayEnv, point_features
from haltwise import Halting, HeadConfig, Observing
from traces import Traces

#: Price range over the mean thousand tokens of a training trace.
_PRICES = (0.01, 2.0)


@dataclass(frozen=True)
class FitConfig:
    """How an agent is trained on recorded traces."""

    pathwise: PathwiseConfig = field(default_factory=PathwiseConfig)
    """The start, before PPO."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO on replay."""


def observing_of(traces: Traces, groups: tuple[str, ...], halting: Halting) -> Observing:
    """Standardisation and price range as the training traces suggest them.

    Raises:
        InputError: If the traces lack a signal that a group needs.
    """
    mean_ktok = float(traces.num_tokens.mean()) / 1000
    low, high = (price / mean_ktok for price in _PRICES)
    return Observing.fit(groups, point_features(traces, groups, halting.max_points), (low, high))


def fit(
    traces: Traces,
    head: HeadConfig,
    config: FitConfig,
    seed: int,
    *,
    log_dir: Path | None = None,
    checkpoint: Path | None = None,
    progress_bar: bool = False,
) -> Agent:
    """Trains an agent on recorded traces.

    Args:
        traces: To replay.
        head: What the agent observes, and under which halting conditions.
        config: Schedule.
        seed: Of everything random.
        log_dir: Where TensorBoard's files go, if anywhere.
        checkpoint: A file to save the agent to as it learns, and to go on from if it is there.
        progress_bar: Whether to show one.

    Raises:
        InputError: If no trace has a decision point.
    """
    torch.set_num_threads(1)
    env = ReplayEnv(traces, head.observing, head.halting, config.ppo.num_envs)
    ppo = make_ppo(
        env,
        head.observing,
        config.ppo,
        mean_points=traces.num_points / len(traces),
        seed=seed,
        log_dir=log_dir,
    )
    if checkpoint is not None and checkpoint.exists():
        _restore(ppo, checkpoint)
    elif config.pathwise.steps:
        net = log_odds_net(ppo)
        start_from_traces(net, traces, head.observing, head.halting, config.pathwise, seed)
        set_log_odds(ppo, net)
    learn(ppo, config.ppo.total_timesteps, "replay", checkpoint, progress_bar)
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
    ppo: Agent, total_timesteps: int, name: str, checkpoint: Path | None, progress_bar: bool
) -> None:
    """Runs PPO up to some number of decisions, saving it as it goes.

    Args:
        ppo: The agent; it goes on from the decisions it has made already.
        total_timesteps: Decisions in all.
        name: Of the TensorBoard run.
        checkpoint: Where to save, if anywhere.
        progress_bar: Whether to show one.
    """
    callbacks: list[BaseCallback] = [HaltLog()]
    if checkpoint is not None:
        callbacks.append(_Checkpoint(checkpoint))
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


class _Checkpoint(BaseCallback):
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
    train: Traces
    held_out: Traces
    head: HeadConfig
    config: FitConfig
    prices: tuple[float, ...]
    seed: int


def out_of_fold(
    traces: Traces,
    fold: NDArray[np.int64],
    head: HeadConfig,
    config: FitConfig,
    prices: Sequence[float],
    seed: int,
    cache: Path,
) -> dict[float, NDArray[np.bool_]]:
    """Where agents that never saw a trace's question would halt it.

    One agent a fold, trained on the others, in as many processes as there are cores.

    Args:
        traces: N traces with P points.
        fold: (N,) the fold of each.
        head: What the agents observe. Each fold standardises by its own training traces.
        config: Schedule.
        prices: Where to read the agents.
        seed: Of everything random.
        cache: Folder that keeps finished folds, so that an interrupted job goes on.

    Returns:
        Halting decisions (P,) by price.
    """
    cache.mkdir(parents=True, exist_ok=True)
    numbers = [int(k) for k in np.unique(fold)]
    missing = [k for k in numbers if not (cache / f"{k}.npy").exists()]
    jobs = [
        _Fold(traces.select(fold != k), traces.select(fold == k), head, config, tuple(prices), seed)
        for k in missing
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1) or 1, context) as pool:
        for k, halts in zip(
            missing, tqdm(pool.map(_fit_fold, jobs), "folds", len(jobs)), strict=True
        ):
            np.save(cache / "part.npy", halts)
            os.replace(cache / "part.npy", cache / f"{k}.npy")
    decided = np.empty((len(prices), traces.num_points), dtype=bool)
    for k in numbers:
        decided[:, fold[traces.trace_of_point] == k] = np.load(cache / f"{k}.npy")
    return dict(zip(prices, decided, strict=True))


def _fit_fold(job: _Fold) -> NDArray[np.bool_]:
    """Decisions (number of prices, P) on the held-out traces."""
    groups, max_points = job.head.observing.groups, job.head.halting.max_points
    observing = Observing.fit(
        groups, point_features(job.train, groups, max_points), job.head.observing.price_range
    )
    config = HeadConfig(observing, job.head.halting, job.head.default_price)
    head = export(fit(job.train, config, job.config, job.seed), config)
    features = point_features(job.held_out, groups, max_points)
    return np.stack([head.halts(features, price) for price in job.prices])
