"""Trains a halting policy and exports its head.

    python train.py                              the embedded LM: record, replay, live, export
    python train.py --traces FILE_OR_FOLDER      recorded traces of any LM
    python train.py --live                       PPO on the running LM from the start
    python train.py --state STATE --audit-traces FOLDER --parent RUN
                                                 a head that serves goes on from its own audits

It writes a run folder: config.json, head.safetensors and head.json, operating_points.json, the
questions that it learned from and the heads of its folds, the results out of fold (JSON, PNG) and
on test questions (JSON, HTML, PNG), the agent (safetensors) and TensorBoard's files.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import installed  # noqa: F401, tells what is missing

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from agents.balance import balance
from agents.fit import (
    CHECKPOINTS,
    START_CHECKPOINTS,
    START_EVERY,
    FitConfig,
    OutOfFold,
    fit,
    fit_live,
    fold_folder,
    out_of_fold,
)
from agents.parent import Parent
from agents.ppo import Agent, PPOConfig, export
from command import alone, progress, run, warn, whole_folder
from envs.live import LiveEnv
from envs.replay import availability
from evaluation.compare import parameter_free, swept
from evaluation.drift import Drift, drift_between
from evaluation.evaluate_run import Outputs, Trained, evaluate_run
from evaluation.frozen import Choice, choose_points
from evaluation.honest import price_words
from evaluation.outcome import Outcome
from evaluation.plot import plot_frontiers
from evaluation.protocol import GATES, folds, own_price
from evaluation.results import Report
from evaluation.rows import to_json
from evaluation.table import format_honest, format_segments, format_table
from evaluation.training_curve import CurvePoint, curve_point
from evaluation.trials import (
    Trials,
    balanced_returns,
    compare_returns,
    format_trials,
    try_checkpoints,
)
from evaluation.verdict import Verdict, conclusion
from haltwise import HaltHead, Halting, HeadConfig, InputError, feature_names
from haltwise.errors import check_ranges, option
from haltwise.policy.halting import Probing
from haltwise.policy.head import told_by
from lms.ask import AskConfig, questions
from lms.language_model import LanguageModel
from lms.scorers import agreeing
from policies import baselines
from policies.head import HeadPolicy, price_grid
from policies.observing import observing_of
from policies.supervised import SUPERVISED, Supervised
from recording.audits import ServedAudits
from recording.collect import CollectConfig, collect
from runs import Learned, Run
from traces import MAX_TRACES, Chunks, TraceFiles, Traces
from traces.soundness import LEAST_EM, check_sound

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
# Of fewer questions than these a parent learns nothing.
_FEWEST_NEW = 10


@dataclass(frozen=True, kw_only=True)
class TrainConfig(AskConfig):
    """Train a halting policy with PPO and export its head."""

    traces: Path | None = None
    """Recorded traces to train on, a file or a folder. Default: those of the LM, recorded first
    if there are none."""
    parent: Path | None = None
    """Run whose head to go on from, with what it has learned and with the network that it has. It
    learns from its own audits, as far as they are of questions that it has not learned from, and
    never from the half of the questions that is kept back."""
    state: str | None = None
    """With --parent: the --state of the haltwise serve that knows that head."""
    audit_traces: Path | None = None
    """With --parent: the --audit-traces of that haltwise serve."""
    look: bool = False
    """With --parent: only tell what has changed since it has learned, and write nothing."""
    live: bool = False
    """Train on the running LM from the start, without training on recorded traces before."""
    run_dir: Path | None = None
    """Run folder to write. Default: a new dated one under checkpoints/."""
    resume: bool = False
    """Go on with the interrupted run in --run-dir."""
    num_questions: int = 800
    """The most questions of each split to record."""
    max_traces: int = MAX_TRACES
    """The most traces to hold in memory. Of more, the head learns a chunk at a time; all else,
    from the standardisation to the operating points, comes from a sample of that many, by
    question."""
    groups: tuple[str, ...] | None = None
    """Feature groups that the head reads. Default: all that the traces have the signals for."""
    rule: str | None = None
    """Decision rule to train and halt under, such as "every 512 tokens, every 64 while the answer
    repeats", if the traces hold all of its points. Default: the rule of their recording."""
    probing: Probing | None = None
    """always looks at a forced answer at every decision point; at_halt forces one only on halting
    (for --groups pace). Default: as the traces were recorded."""
    folds: int = 5
    """Number of folds of the cross-validation that the operating points are chosen by."""
    seeds: int = 3
    """How often to train on the folds, each time with a new division into folds: the points are
    chosen on the mean of the trainings, and their spread is reported."""
    seed: int = 0
    """Seed of everything random, and the first of the seeds."""
    min_em: float = LEAST_EM
    """Train only on traces whose exact match, never halted, is at least this. An LM or a scorer
    that is hardly ever right has nothing to lose, so that every saving looks safe."""
    verbose: bool = False
    """Print the tables of every policy and every seed too, which the run folder has as well."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Training on recorded traces."""
    live_ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            total_timesteps=50_000, num_envs=64, n_steps=32, batch_size=512, learning_rate=1e-4
        )
    )
    """Training on the running LM, after that on recorded traces; with --live instead of it."""

    @property
    def has_lm(self) -> bool:
        """Whether the LM is here, to be recorded and run."""
        return self.traces is None and self.parent is None


def main(config: TrainConfig) -> Path:
    """Trains, chooses the operating points, exports the head, and judges it on test questions.

    Returns:
        The run folder.

    Raises:
        InputError: If something that was passed cannot be used; nothing is left half-written.
    """
    torch.set_num_threads(1)
    _check(config)
    parent = None if config.parent is None else Parent.load(config.parent)
    if parent is not None:
        if config.look:
            _look(config, parent)
            return parent.folder
        config = _of_size(config, parent)
        if not config.resume:
            config = _begun_from_audits(config, parent)
        path = _named(config).audits.resolve()
    else:
        path = (config.traces or _record(config)).resolve()
    prepared = _Prepared.of(path, config, parent)
    for doubt in prepared.doubts:
        warn(doubt)
    recorded, traces = prepared.material.recorded, prepared.material
    head, fold = prepared.head, prepared.fold
    opened = _open_run(config, path, prepared.digest, parent)
    # Not the folder itself: the head that is saved there locks it, too.
    with alone(opened.tensorboard):
        if traces.num_more:
            print(f"{traces.num_more:,} traces are not in the sample that points are chosen on.")
        if config.live:
            learning = _train_beside(config, opened, head, traces)
        else:
            learning = _train_from(config, opened, head, traces, fold, parent)
        choice = _choose(config, head, traces.learned_from, learning)
        _finish(opened, export(learning.agent, head), choice, learning)
        if config.verbose:
            print(format_table(choice.frozen))
            print(format_honest(choice.honest))
            print(format_segments(choice.segments))
        print(f"wrote {opened.folder}")
        if "test" in recorded.split:
            print("The exported head, loaded again, on the test questions:")
            verdict = _evaluate(config, opened).verdict
            if parent is not None:
                print(_beside(parent, opened, recorded, config.max_traces))
        else:
            print("Out of fold, on the questions that the price was chosen on:")
            verdict = _verdict(choice, learning)
            print(verdict.words)
        own, by_segment = own_price(choice.gates), choice.segment_prices
        judged_on = learning.judged_on
        print(price_words(own, by_segment, choice.honest, judged_on, verdict.advice))
    return opened.folder


def _beside(parent: Parent, opened: Run, recorded: TraceFiles, max_traces: int) -> str:
    """Says how a run's head compares with its parent on questions that neither learned from."""
    rows = recorded.rows("test") & parent.fresh(recorded)
    if not rows.any():
        return "Its parent has learned from all of the test questions: nothing compares the two."
    traces = recorded.read(recorded.sample(rows, max_traces))
    head = opened.head()
    weights = balance(np.array(price_grid(head.config.observing)), head.config.observing)
    own, others = (
        balanced_returns(
            swept([HeadPolicy(one)], traces, one.config.halting.probing) or {}, weights
        )
        for one in (head, parent.head)
    )
    more, (low, high) = compare_returns(traces.question_id, own, others)
    num = len(np.unique(traces.question_id))
    return (
        f"On the {num} kept-back questions, the mean return over all prices is {more:+.3f} "
        f"[{low:+.3f}, {high:+.3f}] beside that of its parent."
    )


def _evaluate(config: TrainConfig, opened: Run) -> Report:
    """Judges the run on the test questions of its traces, and writes the results into it."""
    trained = Trained.load(opened)
    outputs = Outputs(opened.test_json, opened.test_page, opened.test_plot)
    path = opened.beginning().traces
    return evaluate_run(
        trained,
        path,
        "test",
        config.max_traces,
        outputs,
        live=config.has_lm,
        verbose=config.verbose,
    )


def _verdict(choice: Choice, learning: _Learning) -> Verdict:
    """Says what the head is worth on the questions that its points were chosen on."""
    num_questions = len(np.unique(learning.judged_on.question_id))
    return conclusion(choice.frozen, [], num_questions, evidence=True)


def _check(config: TrainConfig) -> None:
    """Refuses settings that do not fit each other, before any work is done.

    Raises:
        InputError: If they do not.
    """
    if config.live and config.traces is not None:
        raise InputError("--live trains on the running LM: expected no --traces with it")
    _check_parent(config)
    if config.resume and config.run_dir is None:
        raise InputError("--resume goes on with a run: expected --run-dir DIR with it")
    if config.run_dir is not None and config.run_dir.exists() and not config.resume:
        raise InputError(
            f"{config.run_dir} exists: expected a new folder, or --resume to go on with it"
        )
    least = {"folds": 2, "seeds": 1, "num_questions": 1, "max_traces": 1, "seed": 0}
    small = [name for name, at_least in least.items() if getattr(config, name) < at_least]
    if small:
        found = ", ".join(f"{option(name)} is {getattr(config, name)}" for name in small)
        raise InputError(f"{found}: expected at least {', '.join(str(least[n]) for n in small)}")
    most = 2**31 - 1 - config.seeds
    check_ranges(config, {"seed": (config.seed <= most, f"0 to {most}")})
    if config.has_lm:
        _asking(config, _CHECKPOINTS).check()
    config.fit.pathwise.check("fit.pathwise.")
    config.fit.ppo.check("fit.ppo.")
    config.live_ppo.check("live_ppo.")
    goes_on_live = config.has_lm and not config.live
    if goes_on_live and config.live_ppo.net_width != config.fit.ppo.net_width:
        raise InputError(
            f"--live-ppo.net-width is {config.live_ppo.net_width}, --fit.ppo.net-width "
            f"{config.fit.ppo.net_width}: expected the same, one network learns both"
        )
    if config.groups is not None:
        try:
            feature_names(config.groups)
        except InputError as error:
            raise InputError(f"--groups: {error}") from None


def _check_parent(config: TrainConfig) -> None:
    """Refuses settings that do not go together with a parent, or without one.

    Raises:
        InputError: If they do not.
    """
    audits = {"state": config.state, "audit_traces": config.audit_traces}
    if config.parent is None:
        alone = [name for name, value in (audits | {"look": config.look or None}).items() if value]
        if alone:
            raise InputError(f"{option(alone[0])} is of audits: expected --parent RUN with it")
        return
    missing = [option(name) for name, value in audits.items() if value is None]
    if missing:
        raise InputError(
            f"--parent goes on from its own audits: expected {' and '.join(missing)}, as the "
            "haltwise serve has that keeps them"
        )
    names = ("traces", "live", "rule", "groups", "probing")
    others = [option(name) for name in names if getattr(config, name)]
    if others:
        raise InputError(f"--parent says what is learned: expected no {', '.join(others)} with it")


def _served(config: TrainConfig) -> ServedAudits:
    """Returns the audits that the settings name."""
    assert config.state is not None and config.audit_traces is not None
    return ServedAudits(config.state, config.audit_traces)


def _look(config: TrainConfig, parent: Parent) -> None:
    """Tells what has changed since a parent has learned, and leaves nothing."""
    audits = _served(config)
    audits.check_knows(parent.head.digest, str(parent.folder))
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "audits"
        audits.copy(copy)
        print(_drift(audits, copy, parent, config.max_traces))


def _of_size(config: TrainConfig, parent: Parent) -> TrainConfig:
    """Returns the settings with a network of the parent's size."""
    num_hidden = int(parent.head.weights["b0"].size)
    return replace(
        config, fit=replace(config.fit, ppo=replace(config.fit.ppo, net_width=num_hidden))
    )


def _begun_from_audits(config: TrainConfig, parent: Parent) -> TrainConfig:
    """Makes the run folder, with the audits that there are now, whole or not at all.

    Returns:
        The settings that go on with that run.

    Raises:
        InputError: If there is nothing to learn from the audits, or they do not fit the parent.
    """
    audits, run_dir = _served(config), _named(config).folder
    audits.check_knows(parent.head.digest, str(parent.folder))
    config = replace(config, run_dir=run_dir)
    with whole_folder(run_dir) as folder:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        begun = Run(folder)
        folder.mkdir()
        num = audits.copy(begun.audits)
        drift = _drift(audits, begun.audits, parent, config.max_traces)
        print(drift)
        prepared = _Prepared.of(begun.audits, config, parent)
        splits = Counter(prepared.material.recorded.split.tolist())
        told = {
            "state": config.state,
            "parent": {"run": str(parent.folder), "digest": parent.head.digest},
            "audits": num,
            "splits": dict(splits),
            "learned_from": int(prepared.material.rows.sum()),
            "drift": drift.to_json(),
        }
        path = Run(run_dir).audits.resolve()
        begun.begin(_beginning(config, path, prepared.digest, parent) | told)
    return replace(config, resume=True)


def _drift(audits: ServedAudits, copy: Path, parent: Parent, max_traces: int) -> Drift:
    """Finds what has changed since a parent has learned.

    What was before are its own traces, if they are audits of the same installation, and else the
    earlier half of the audits: nothing else was asked and seen in the same way.
    """
    rows = audits.rows()
    now = parent.read(copy, max_traces)
    known = [rows.get(name) for name in now.trace_id.tolist()]
    # Of those without a row, the place in the files says when they came: before all others.
    now = now.select(np.argsort([0.0 if one is None else one.at for one in known], kind="stable"))
    before = _own_audits(parent, now, max_traces)
    if before is None:
        middle = np.arange(len(now)) < len(now) // 2
        before, now = now.select(middle), now.select(~middle)
    else:
        now = now.select(~np.isin(now.trace_id, before.trace_id))
    told = {name: (row.segment, row.input_tokens) for name, row in rows.items()}
    return drift_between(before, now, parent.head.config, told)


def _own_audits(parent: Parent, now: Traces, max_traces: int) -> Traces | None:
    """Returns the traces that a parent has learned from, if they are of the same installation."""
    try:
        found = parent.read(Run(parent.folder).beginning().traces, max_traces)
    except InputError:
        return None
    here = now.recorder.get("installation")
    return found if here and found.recorder.get("installation") == here else None


def _asking(config: TrainConfig, out: Path) -> CollectConfig:
    """Returns the settings of the recording into a folder that comes before the training."""
    asked = {field.name: getattr(config, field.name) for field in fields(AskConfig)}
    return CollectConfig(out=out, num=config.num_questions, seed=config.seed, **asked)


def _record(config: TrainConfig) -> Path:
    """Records the LM's traces, or completes a recording that was begun.

    Returns:
        The folder of the traces, whose name tells the LM, the task and the other settings.
    """
    lm = LanguageModel.load(config.lm, config.device, config)
    asked = {field.name: getattr(config, field.name) for field in fields(AskConfig)}
    usual = asdict(AskConfig(lm=config.lm, device=config.device, task=config.task))
    parts = [lm.name, lm.revision[:8], config.device.partition(":")[0], Path(config.task).stem]
    parts += [str(config.num_questions), str(config.seed)]
    if asked != usual:
        parts.append(hashlib.sha256(repr(asked).encode()).hexdigest()[:6])
    out = _CHECKPOINTS / "traces" / "-".join(parts).replace("/", "-").replace(":", "-")
    collect(_asking(config, out))
    return out


@dataclass(frozen=True)
class _Prepared:
    """What a training begins with."""

    material: _Material
    head: HeadConfig
    """What the head will be valid for."""
    fold: dict[int, NDArray[np.int64]]
    """By seed, the fold (N,) of each trace of the sample."""
    digest: str
    """That of all traces."""
    doubts: list[str]
    """What may be wrong with them."""

    @classmethod
    def of(cls, path: Path, config: TrainConfig, parent: Parent | None) -> _Prepared:
        """Reads recorded traces, and refuses those that nothing can be learned from.

        Raises:
            InputError: If they are such, or do not fit the settings or the parent.
        """
        files = TraceFiles.open(path, agreeing)
        if parent is None:
            recorded = files.replayed(config.rule) if config.rule else files
        else:
            recorded = files.under(parent.head.config.halting.decision_rule)
        doubts = check_sound(recorded, config.min_em)
        # Test questions are never learned from, nor anything chosen on them.
        material = _Material.of(recorded, config, parent)
        if parent is None:
            head = _head_config(material, config)
            head.halting.check_recorded(recorded.recorder, str(path))
        else:
            digest = recorded.digest(material.rows)
            head = parent.child(material.learned_from, digest)
        fold = {
            seed: folds(material.sample.question_id, config.folds, seed)
            for seed in range(config.seed, config.seed + config.seeds)
        }
        return cls(material, head, fold, recorded.digest(recorded.rows()), doubts)


@dataclass(frozen=True)
class _Material:
    """Traces of the train and dev splits, of which some are in memory; R recorded rows in all."""

    recorded: TraceFiles
    rows: NDArray[np.bool_]
    """(R,) which recorded rows the head learns from."""
    sample: Traces
    """The traces in memory: of the two splits all, or a sample if they are too many."""
    learned_from: Traces
    """Those of the sample that the head learns from."""
    max_traces: int
    """The most traces to hold in memory."""

    @classmethod
    def of(cls, recorded: TraceFiles, config: TrainConfig, parent: Parent | None) -> _Material:
        """Reads the sample into memory.

        Raises:
            InputError: If there is no train or dev trace, too few are of questions that the parent
                has not learned from, or a value is not as the schema says.
        """
        rows = recorded.rows("train", "dev")
        if parent is not None:
            rows = rows & parent.fresh(recorded)
            _check_enough(recorded, rows, config)
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
        """How many traces the head learns from that are not in the sample."""
        return int(self.rows.sum()) - len(self.learned_from)

    def chunks(self, seed: int) -> Traces | Chunks:
        """Returns the traces that the head learns from, in chunks if they are too many."""
        if not self.num_more:
            return self.learned_from
        return self.recorded.chunks(self.rows, self.max_traces, seed)


def _check_enough(recorded: TraceFiles, rows: NDArray[np.bool_], config: TrainConfig) -> None:
    """Refuses audits of which a parent has little to learn.

    Raises:
        InputError: If their questions are fewer than make folds, or than anything is learned from.
    """
    num, least = len(np.unique(recorded.question[rows])), max(_FEWEST_NEW, config.folds)
    if num < least:
        kept_back = len(np.unique(recorded.question[recorded.split == "test"]))
        raise InputError(
            f"{config.audit_traces}: {num} questions that the parent has not learned from, beside "
            f"{kept_back} that are kept back: expected at least {least}"
        )


def _head_config(material: _Material, config: TrainConfig) -> HeadConfig:
    """Returns what the head will be valid for: the conditions that the traces were recorded under.

    Raises:
        InputError: If the traces or the groups asked for do not fit the probing asked for.
    """
    traces, recorder = material.learned_from, material.recorded.recorder
    halting = Halting.of_recorder(recorder, config.probing)
    if why_not := halting.why_not_run():
        warn(why_not)
    groups = config.groups or _available(traces, halting)
    halting.check_groups(groups)
    observing = observing_of(traces, groups, halting)
    return HeadConfig(
        observing=observing,
        halting=halting,
        default_price=0.0,  # until one is chosen
        lm=", ".join(np.unique(traces.model).tolist()),
        **told_by(recorder),
        installation=recorder.get("installation", ""),
        traces=material.recorded.digest(material.rows),
        command=shlex.join(sys.argv),
    )


def _available(traces: Traces, halting: Halting) -> tuple[str, ...]:
    """Returns the feature groups that traces have the signals for; tells a person of the others."""
    found = availability(traces, halting)
    for gap in found.gaps:
        warn(gap)
    for group, reason in found.left_out.items():
        print(f"Left out feature group {group}: {reason.partition(': expected')[0]}.")
    return found.groups


def _named(config: TrainConfig) -> Run:
    """Returns the run of the settings, in a new dated folder where they name none."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Run(config.run_dir or _CHECKPOINTS / f"run-{stamp}")


def _open_run(config: TrainConfig, traces: Path, digest: str, parent: Parent | None) -> Run:
    """Makes the run folder and writes down what is about to be done, or goes on with a run.

    Raises:
        InputError: If the folder exists and is not to be resumed, or holds another run.
    """
    opened, content = _named(config), _beginning(config, traces, digest, parent)
    if config.resume:
        _check_same(opened, content["config"])
    else:
        opened.begin(content)
    return opened


def _beginning(
    config: TrainConfig, traces: Path, digest: str, parent: Parent | None
) -> dict[str, Any]:
    """Returns what a run is begun with."""
    same = replace(config, resume=False, run_dir=None, traces=traces)
    settings = json.loads(json.dumps(asdict(same), default=str)) | {"digest": digest}
    if parent is not None:
        settings["parent_digest"] = parent.head.digest
    packages = ("gymnasium", "numpy", "stable-baselines3", "torch", "transformers")
    return {
        "command": shlex.join(sys.argv),
        "config": settings,
        "traces": str(traces),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _check_same(opened: Run, settings: Mapping[str, Any]) -> None:
    """Refuses to go on with what is no run, or was begun with other settings.

    Raises:
        InputError: If that is so.
    """
    if not opened.folder.is_dir():
        raise InputError(f"{opened.folder}: no such run to go on with")
    try:
        begun_with = opened.beginning().settings
    except InputError:
        begun_with = {}
    if begun_with != settings:
        names = [name for name in settings if begun_with.get(name) != settings[name]]
        differ = f"; {', '.join(names)} differ" if begun_with and names else ""
        raise InputError(
            f"{opened.folder} was not begun with these settings and traces: expected the same"
            + differ
        )


def _commit() -> str | None:
    """Returns the commit that is run, marked if files differ from it; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class _Learning:
    """An agent, and how it does on questions that it has not learned from."""

    agent: Agent
    learned: Learned
    judged_on: Traces
    """The traces that points are chosen on."""
    outcomes: dict[float, Outcome]
    """By price, the head's outcomes on those traces."""
    trials: Trials | None
    """What the trainings fold by fold came to; None without folds."""
    curve: Sequence[CurvePoint] = ()
    """What they came to on the way."""


def _train_beside(
    config: TrainConfig, opened: Run, head: HeadConfig, material: _Material
) -> _Learning:
    """Trains on the running LM alone, and judges the agent on the dev split."""
    learned_from = material.learned_from
    agent = _train_live(config, opened, head, learned_from, None)
    judged_on = material.sample.of_split("dev")
    outcomes = swept([HeadPolicy(export(agent, head))], judged_on, head.halting.probing)
    learned = Learned(
        frozenset(learned_from.question_id.tolist()),
        texts=material.recorded.texts(material.rows),
    )
    return _Learning(agent, learned, judged_on, outcomes or {}, None)


def _train_from(
    config: TrainConfig,
    opened: Run,
    head: HeadConfig,
    material: _Material,
    fold: Mapping[int, NDArray[np.int64]],
    parent: Parent | None,
) -> _Learning:
    """Trains on recorded traces, first fold by fold, then on all of them.

    If no traces were passed, the LM that was recorded is there: the agent goes on beside it.
    """
    traces, start = material.sample, None if parent is None else parent.head
    trials, curve = _try(config, opened, head, traces, fold, start)
    learned = _learned(material, fold)
    opened.copy_kept_back(
        {at: fold_folder(opened.folds, *at) / str(trials.taken) for at in learned.trainings}
    )
    agent = _train_replay(config, opened, head, material, CHECKPOINTS[trials.taken], start)
    if config.has_lm:
        agent = _train_live(config, opened, head, traces, agent)
    if parent is not None:
        learned = parent.with_own(learned)
    return _Learning(agent, learned, traces, trials.outcomes, trials, curve)


def _choose(
    config: TrainConfig, head: HeadConfig, learned_from: Traces, learning: _Learning
) -> Choice:
    """Chooses the operating points of the head and the baselines."""
    kept_back = learning.learned.folds.get(config.seed, {})
    models = [Supervised(name, learned_from, kept_back, head) for name in SUPERVISED]
    probing = head.halting.probing
    simple = progress([*baselines.BASELINES, *models], "simple policies")
    outcomes = {"head": learning.outcomes} | {
        policy.name: swept([policy], learning.judged_on, probing) for policy in simple
    }
    return choose_points(learning.judged_on, outcomes, parameter_free(learning.judged_on, probing))


def _try(
    config: TrainConfig,
    opened: Run,
    head: HeadConfig,
    traces: Traces,
    fold: Mapping[int, NDArray[np.int64]],
    parent: HaltHead | None,
) -> tuple[Trials, list[CurvePoint]]:
    """Trains fold by fold with every seed; returns what that came to, at last and on the way."""
    prices = price_grid(head.observing)
    decided = out_of_fold(traces, fold, head, config.fit, prices, opened.folds, parent)
    weights = balance(np.array(prices), head.observing)
    trials = try_checkpoints(traces, decided, prices, weights, head.halting.probing)
    curve = _curve(config, head, traces, decided, trials.taken)
    _log_trials(trials, config.fit.ppo.total_timesteps, opened)
    _log_curve(curve, opened)
    if config.verbose:
        print(format_trials(trials, CHECKPOINTS))
    return trials, curve


def _curve(
    config: TrainConfig, head: HeadConfig, traces: Traces, decided: OutOfFold, taken: int
) -> list[CurvePoint]:
    """Judges the trainings by folds on their way, on the questions that were kept from them."""
    prices = price_grid(head.observing)[::START_EVERY]
    weights = balance(np.array(prices), head.observing)

    def point(each: Sequence[NDArray[np.bool_]], **where: Any) -> CurvePoint:
        """Judges one decision (number of prices, P) a seed."""
        return curve_point(traces, each, prices, weights, head.halting.probing, **where)

    starting = [decided.starting(seed) for seed in decided]
    after = [decided[seed][:, ::START_EVERY] for seed in decided]
    start, total = config.fit.pathwise.steps, config.fit.ppo.total_timesteps
    return [
        *(
            point([of[k] for of in starting], ppo=False, step=round(share * start))
            for k, share in enumerate(START_CHECKPOINTS)
        ),
        point([of[0] for of in after], ppo=False, step=start, taken=taken == 0),
        *(
            point([of[k] for of in after], ppo=True, step=round(share * total), taken=k == taken)
            for k, share in enumerate(CHECKPOINTS)
        ),
    ]


def _log_curve(curve: Sequence[CurvePoint], opened: Run) -> None:
    """Writes TensorBoard's curves of the questions that were kept back, over all of a training."""
    for ppo, name in ((False, "folds_start"), (True, "folds")):
        with SummaryWriter(str(opened.tensorboard / name)) as writer:
            for point in (point for point in curve if point.ppo == ppo):
                for scalar, value in point.scalars.items():
                    writer.add_scalar(f"train/{scalar}", value, point.step)


def _log_trials(trials: Trials, total: int, opened: Run) -> None:
    """Writes TensorBoard's curve of the questions that were kept back from each training."""
    with SummaryWriter(str(opened.tensorboard / "folds")) as writer:
        for k, share in enumerate(CHECKPOINTS):
            here = [trial for trial in trials.each if trial.checkpoint == k]
            curves = {
                "return": [trial.balanced_return for trial in here],
                "area": [trial.area for trial in here],
            }
            for gate in GATES:
                curves[f"em_change_{gate}"] = [trial.points[gate].em_delta for trial in here]
                curves[f"saving_{gate}"] = [trial.points[gate].saving for trial in here]
            for name, values in curves.items():
                writer.add_scalar(f"folds/{name}", np.mean(values), round(share * total))


def _learned(material: _Material, fold: Mapping[int, NDArray[np.int64]]) -> Learned:
    """Returns which questions are learned from, and by seed which fold (N,) keeps each back."""
    question_id = material.sample.question_id.tolist()
    by_seed = {seed: dict(zip(question_id, of.tolist(), strict=True)) for seed, of in fold.items()}
    recorded, rows = material.recorded, material.rows
    return Learned(recorded.question_ids(rows), by_seed, recorded.texts(rows))


def _train_replay(
    config: TrainConfig,
    opened: Run,
    head: HeadConfig,
    material: _Material,
    share: float,
    parent: HaltHead | None = None,
) -> Agent:
    """Trains on recorded traces, up to a share of PPO's decisions."""
    if share < 1:  # else the progress bar looks like that of a training that broke off
        print(_ended_early(share))
    return fit(
        material.chunks(config.seed),
        head,
        config.fit,
        config.seed,
        parent=parent,
        share=share,
        log_dir=opened.tensorboard,
        checkpoint=opened.replay_agent,
        progress_bar=True,
    )


def _ended_early(share: float) -> str:
    """Says, for a person, why the training on all traces is not a whole one."""
    if not share:
        return "In the folds, PPO made the head no better: the head stays as it was before PPO."
    return f"In the folds, more of PPO made the head no better: PPO ends after {share:.0%} of it."


def _train_live(
    config: TrainConfig, opened: Run, head: HeadConfig, traces: Traces, start: Agent | None
) -> Agent:
    """Trains on the running LM, on the questions of some traces.

    Args:
        config: The settings.
        opened: The run.
        head: What the agent observes.
        traces: The traces, which also tell how the LM was run.
        start: The agent to go on from; None starts afresh.
    """
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
        log_dir=opened.tensorboard,
        checkpoint=opened.live_agent,
    )


def _finish(opened: Run, head: HaltHead, choice: Choice, learning: _Learning) -> None:
    """Writes the results of the run; the head last, since a folder with a head is a whole run."""
    content: dict[str, Any] = {"rows": to_json(choice.rows), "frozen": to_json(choice.frozen)}
    content |= {"honest": to_json(choice.honest), "segments": to_json(choice.segments)}
    content["target"] = learning.judged_on.target
    if learning.trials is not None:
        content["trials"] = [trial.to_json() for trial in learning.trials.each]
        content["curve"] = to_json(learning.curve)
    opened.save_learned(learning.learned)
    opened.save_out_of_fold(content)
    plot_frontiers(choice.rows, choice.frozen, opened.out_of_fold_plot)
    opened.save_operating_points(choice.gates)
    price, by_segment = own_price(choice.gates), choice.segment_prices
    config = replace(head.config, default_price=price, segment_prices=by_segment)
    opened.save_head(HaltHead(config, head.weights))


if __name__ == "__main__":
    run(main, TrainConfig)
