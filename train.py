"""Trains a halting policy and exports its head.

    python train.py                              the embedded LM: record, replay, live, export
    python train.py --traces FILE_OR_FOLDER      recorded traces of any LM
    python train.py --live                       PPO on the running LM from the start

Writes a run folder: config.json, head.safetensors and head.json, operating_points.json, the
questions that it learned from and the heads of its folds, the results out of fold (JSON, PNG) and
on test questions (JSON, HTML, PNG), the agent (zip) and TensorBoard's files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agents.balance import balance
from agents.baselines import BASELINES, Head, Policy, decisions, price_grid, signal_under
from agents.fit import CHECKPOINTS, FitConfig, fit, fit_live, observing_of, out_of_fold
from agents.kept_back import save_kept_back
from agents.ppo import Agent, PPOConfig, export
from agents.supervised import SUPERVISED, Supervised
from collect import CollectConfig
from collect import main as collect
from command import run, write_json
from envs.live import LiveEnv
from envs.replay import available_groups
from evaluate import EvaluateConfig, parameter_free
from evaluate import main as evaluate
from evaluation.frozen import Choice, choose_points
from evaluation.learned import Learned, save_learned
from evaluation.outcome import Outcome, sweep
from evaluation.plot import plot_frontiers
from evaluation.protocol import folds, save_operating_points, strictest_price
from evaluation.table import format_table
from evaluation.trials import Trials, format_trials, try_checkpoints
from haltwise import HaltHead, Halting, HeadConfig, InputError, feature_names
from haltwise.policy.halting import Probing
from lms.ask import AskConfig, questions
from lms.language_model import LanguageModel
from traces import MAX_TRACES, Chunks, TraceFiles, Traces

_CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AskConfig):
    """Train a halting policy with PPO and export its head."""

    traces: Path | None = None
    """Recorded traces to train on, a file or a folder. Default: those of the LM, recorded first
    if there are none."""
    live: bool = False
    """Train on the running LM from the start, with no replay before."""
    run_dir: Path | None = None
    """Run folder. Default: a new dated one under checkpoints/."""
    resume: bool = False
    """Go on with the interrupted run in --run-dir."""
    num_questions: int = 800
    """Questions a split to record, at most."""
    max_traces: int = MAX_TRACES
    """Traces in memory at most. Of more, the head learns a chunk at a time; all else, from the
    standardisation to the operating points, comes from a sample of that many, by question."""
    groups: tuple[str, ...] | None = None
    """Feature groups that the head reads. Default: all that the traces have the signals for."""
    probing: Probing | None = None
    """always looks at a forced answer at every decision point; at_halt forces one only on halting
    (for --groups pace). Default: as the traces were recorded."""
    folds: int = 5
    """Folds for choosing the operating points."""
    seeds: int = 3
    """Trainings of every fold, each with its own division into folds: the points are chosen on
    their mean, and their spread is reported."""
    seed: int = 0
    """Of everything random; the first of the seeds."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Training on recorded traces."""
    live_ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            total_timesteps=50_000, num_envs=64, n_steps=32, batch_size=512, learning_rate=1e-4
        )
    )
    """Training on the running LM, after replay; with --live instead of it."""


def main(config: TrainConfig) -> Path:
    """Trains, chooses the operating points, exports.

    Returns:
        The run folder.

    Raises:
        InputError: If something that was passed cannot be used; nothing is left half-written.
    """
    torch.set_num_threads(1)
    _check(config)
    path = (config.traces or _record(config)).resolve()
    recorded = TraceFiles.open(path)
    # Test questions are never learned from, nor anything chosen on them.
    traces = _Material.of(recorded, config)
    head = _head_config(traces, config)
    head.halting.check_recorded(recorded.recorder, str(path))
    fold = {
        seed: folds(traces.sample.question_id, config.folds, seed)
        for seed in range(config.seed, config.seed + config.seeds)
    }
    run_dir = _open_run(config, path, recorded.digest(recorded.rows()))
    if traces.num_more:
        print(f"{traces.num_more:,} traces are not in the sample that points are chosen on.")
    if config.live:
        trained = _train_beside(config, run_dir, head, traces)
    else:
        trained = _train_from(config, run_dir, head, traces, fold)
    choice = _choose(config, head, traces.learned_from, trained)
    _finish(run_dir, export(trained.agent, head), choice, trained)
    print(format_table(choice.frozen))
    if "test" in recorded.split:
        print("\nThe exported head, loaded again:\n")
        evaluate(
            EvaluateConfig(
                head=run_dir,
                max_traces=config.max_traces,
                json=run_dir / "test.json",
                report=run_dir / "test.html",
                plot=run_dir / "test.png",
                live=config.traces is None,
            )
        )
    print(f"wrote {run_dir}")
    return run_dir


def _check(config: TrainConfig) -> None:
    if config.live and config.traces is not None:
        raise InputError("--live trains on the running LM: expected no --traces with it")
    if config.resume and config.run_dir is None:
        raise InputError("--resume goes on with a run: expected --run-dir DIR with it")
    if config.run_dir is not None and config.run_dir.exists() and not config.resume:
        raise InputError(
            f"{config.run_dir} exists: expected a new folder, or --resume to go on with it"
        )
    least = {"folds": 2, "seeds": 1, "num_questions": 1, "max_traces": 1, "seed": 0}
    small = [name for name, at_least in least.items() if getattr(config, name) < at_least]
    if small:
        found = ", ".join(f"{name} is {getattr(config, name)}" for name in small)
        raise InputError(f"{found}: expected at least {', '.join(str(least[n]) for n in small)}")
    goes_on_live = config.traces is None and not config.live
    if goes_on_live and config.live_ppo.net_width != config.fit.ppo.net_width:
        raise InputError(
            f"live_ppo.net_width is {config.live_ppo.net_width}, fit.ppo.net_width "
            f"{config.fit.ppo.net_width}: expected the same, one network learns both"
        )
    if config.groups is not None:
        feature_names(config.groups)


def _record(config: TrainConfig) -> Path:
    """Records the LM's traces where they are not yet; a started recording is completed."""
    lm = LanguageModel.load(config.lm, config.device, config)
    asked = {field.name: getattr(config, field.name) for field in fields(AskConfig)}
    usual = asdict(AskConfig(lm=config.lm, device=config.device, task=config.task))
    parts = [lm.name, lm.revision[:8], config.device.partition(":")[0], Path(config.task).stem]
    parts += [str(config.num_questions), str(config.seed)]
    if asked != usual:
        parts.append(hashlib.sha256(repr(asked).encode()).hexdigest()[:6])
    out = _CHECKPOINTS / "traces" / "-".join(parts).replace("/", "-").replace(":", "-")
    collect(CollectConfig(out=out, num=config.num_questions, seed=config.seed, **asked))
    return out


@dataclass(frozen=True)
class _Material:
    """Traces of the train and dev splits, of which some are in memory."""

    recorded: TraceFiles
    rows: NDArray[np.bool_]
    """What the head learns from."""
    sample: Traces
    """In memory; all of them if they are not too many."""
    learned_from: Traces
    """Those of the sample that the head learns from."""
    max_traces: int

    @classmethod
    def of(cls, recorded: TraceFiles, config: TrainConfig) -> _Material:
        """Reads the sample.

        Raises:
            InputError: If there is no train or dev trace, or a value is not as the schema says.
        """
        rows = recorded.rows("train", "dev")
        sampled = recorded.sample(rows, config.max_traces)
        sample = recorded.read(sampled)
        if not config.live:
            return cls(recorded, rows, sample, sample, config.max_traces)
        learned_from = sample.of_split("train")
        return cls(
            recorded, sampled & recorded.rows("train"), sample, learned_from, config.max_traces
        )

    @property
    def num_more(self) -> int:
        """Traces that the head learns from and that are not in the sample."""
        return int(self.rows.sum()) - len(self.learned_from)

    def chunks(self, seed: int) -> Traces | Chunks:
        """What the head learns from, a chunk at a time if it is too much."""
        if not self.num_more:
            return self.learned_from
        return self.recorded.chunks(self.rows, self.max_traces, seed)


def _head_config(material: _Material, config: TrainConfig) -> HeadConfig:
    """What the head will be valid for: the conditions that the traces were recorded under."""
    traces, recorder = material.learned_from, material.recorded.recorder
    halting = Halting.of_recorder(recorder, config.probing)
    groups = config.groups or available_groups(traces, halting)
    halting.check_groups(groups)
    observing = observing_of(traces, groups, halting)
    return HeadConfig(
        observing=observing,
        halting=halting,
        default_price=observing.price_range[0],
        lm=", ".join(np.unique(traces.model).tolist()),
        tokenizer=recorder.get("tokenizer", ""),
        traces=material.recorded.digest(material.rows),
        command=shlex.join(sys.argv),
    )


def _open_run(config: TrainConfig, traces: Path, digest: str) -> Path:
    """Makes the run folder and writes down what is about to be done.

    Raises:
        InputError: If the folder exists and is not to be resumed, or holds another run.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = config.run_dir or _CHECKPOINTS / f"run-{stamp}"
    same = replace(config, resume=False, run_dir=None, traces=traces)
    settings = json.loads(json.dumps(asdict(same), default=str)) | {"digest": digest}
    if config.resume:
        if not run_dir.is_dir():
            raise InputError(f"{run_dir}: no such run to go on with")
        if _settings(run_dir / "config.json") != settings:
            raise InputError(
                f"{run_dir} was not begun with these settings and traces: expected the same"
            )
        return run_dir
    run_dir.mkdir(parents=True)
    packages = ("gymnasium", "numpy", "stable-baselines3", "torch", "transformers")
    write_json(
        run_dir / "config.json",
        {
            "command": shlex.join(sys.argv),
            "config": settings,
            "traces": str(traces),
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
        },
    )
    return run_dir


def _settings(path: Path) -> Any:
    """What a run was begun with; None if the file cannot be read."""
    try:
        return json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _commit() -> str | None:
    """The commit that is run, marked if files differ from it; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class _Trained:
    """An agent, and how it does where it has not learned."""

    agent: Agent
    learned: Learned
    judged_on: Traces
    """Traces that points are chosen on."""
    outcomes: dict[float, Outcome]
    """By price, on those."""
    trials: Trials | None
    """None without folds."""


def _train_beside(
    config: TrainConfig, run_dir: Path, head: HeadConfig, material: _Material
) -> _Trained:
    """Trains on the running LM alone."""
    learned_from = material.learned_from
    agent = _train_live(config, run_dir, head, learned_from, None)
    judged_on = material.sample.of_split("dev")
    outcomes = _outcomes(Head(export(agent, head)), judged_on, head.halting.probing)
    learned = Learned(frozenset(learned_from.question_id.tolist()))
    return _Trained(agent, learned, judged_on, outcomes or {}, None)


def _train_from(
    config: TrainConfig,
    run_dir: Path,
    head: HeadConfig,
    material: _Material,
    fold: Mapping[int, NDArray[np.int64]],
) -> _Trained:
    """Trains on recorded traces, fold by fold first; and where there is one, on the running LM."""
    traces = material.sample
    trials, learned = _try(config, run_dir, head, traces, fold), _learned(material, fold)
    save_kept_back(run_dir, run_dir / "folds", learned.folds, trials.best)
    agent = _train_replay(config, run_dir, head, material, CHECKPOINTS[trials.best])
    if config.traces is None:
        agent = _train_live(config, run_dir, head, traces, agent)
    return _Trained(agent, learned, traces, trials.outcomes, trials)


def _choose(
    config: TrainConfig, head: HeadConfig, learned_from: Traces, trained: _Trained
) -> Choice:
    """The operating points of the head and the baselines."""
    kept_back = trained.learned.folds.get(config.seed, {})
    models = [Supervised(name, learned_from, kept_back, head) for name in SUPERVISED]
    probing = head.halting.probing
    outcomes = {"head": trained.outcomes} | {
        policy.name: _outcomes(policy, trained.judged_on, probing)
        for policy in (*BASELINES, *models)
    }
    return choose_points(trained.judged_on, outcomes, parameter_free(trained.judged_on, probing))


def _try(
    config: TrainConfig,
    run_dir: Path,
    head: HeadConfig,
    traces: Traces,
    fold: Mapping[int, NDArray[np.int64]],
) -> Trials:
    """Trains fold by fold with every seed, and tells what came of it."""
    prices = price_grid(head.observing)
    decided = out_of_fold(traces, fold, head, config.fit, prices, run_dir / "folds")
    weights = balance(np.array(prices), head.observing)
    trials = try_checkpoints(traces, decided, prices, weights, head.halting.probing)
    print(format_trials(trials, CHECKPOINTS))
    return trials


def _learned(material: _Material, fold: Mapping[int, NDArray[np.int64]]) -> Learned:
    question_id = material.sample.question_id.tolist()
    by_seed = {seed: dict(zip(question_id, of.tolist(), strict=True)) for seed, of in fold.items()}
    return Learned(material.recorded.question_ids(material.rows), by_seed)


def _train_replay(
    config: TrainConfig, run_dir: Path, head: HeadConfig, material: _Material, share: float
) -> Agent:
    return fit(
        material.chunks(config.seed),
        head,
        config.fit,
        config.seed,
        share=share,
        log_dir=run_dir / "tensorboard",
        checkpoint=run_dir / "replay.zip",
        progress_bar=True,
    )


def _train_live(
    config: TrainConfig, run_dir: Path, head: HeadConfig, traces: Traces, start: Agent | None
) -> Agent:
    """PPO on the running LM, on the questions of some traces; from another agent or afresh."""
    asked = set(traces.question_id.tolist())
    pool = [
        question
        for question in questions(config, ("train", "dev"), config.num_questions, config.seed)
        if question.question_id in asked
    ]
    env = LiveEnv(
        LanguageModel.load(config.lm, config.device, config),
        pool,
        head.halting,
        head.observing,
        config.live_ppo.num_envs,
        max_tokens=traces.recorder["max_tokens"],
        temperature=traces.recorder["temperature"],
    )
    return fit_live(
        env,
        head,
        config.live_ppo,
        config.seed,
        mean_points=traces.num_points / len(traces),
        start=start,
        log_dir=run_dir / "tensorboard",
        checkpoint=run_dir / "live.zip",
    )


def _outcomes(policy: Policy, traces: Traces, probing: Probing) -> dict[float, Outcome] | None:
    signal = signal_under(policy, traces, probing)
    return None if signal is None else sweep(traces, decisions(policy, signal), probing)


def _finish(run_dir: Path, head: HaltHead, choice: Choice, trained: _Trained) -> None:
    """Writes what the run came to; the head last, since a folder with a head is a whole run."""
    content: dict[str, Any] = {"rows": choice.rows, "frozen": choice.frozen}
    if trained.trials is not None:
        content["trials"] = trained.trials.rows
    save_learned(run_dir, trained.learned)
    write_json(run_dir / "out_of_fold.json", content)
    plot_frontiers(choice.rows, choice.frozen, run_dir / "out_of_fold.png")
    save_operating_points(run_dir, choice.gates)
    # A head without a point that halts keeps its lowest price.
    price = strictest_price(choice.gates) or head.config.default_price
    HaltHead(replace(head.config, default_price=price), head.weights).save(run_dir)


if __name__ == "__main__":
    run(main, TrainConfig)
