"""Exact match against tokens: a run's head, the baselines, and what hindsight could do.

python evaluate.py --head RUN --traces FILE_OR_FOLDER --json out.json --report out.html
python evaluate.py --head RUN --traces FILE_OR_FOLDER --explain TRACE_ID
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import (
    BASELINES,
    Head,
    Policy,
    Signal,
    hindsight,
    hindsight_give_up,
    signal_under,
)
from agents.kept_back import load_judges
from agents.supervised import SUPERVISED, Supervised
from command import run, write_json
from evaluation.behaviour import behaviour
from evaluation.decision_path import decision_path
from evaluation.frozen import AtPoint, report_rows, strongest
from evaluation.groups import group_rows
from evaluation.learned import Learned, load_learned
from evaluation.live import run_beside
from evaluation.outcome import (
    Outcome,
    Row,
    average,
    halt_outcome,
    never_outcome,
)
from evaluation.plot import plot_frontiers
from evaluation.protocol import Points, load_operating_points, strictest_price
from evaluation.report import log_to_tensorboard, write_report
from evaluation.table import format_cases, format_table
from haltwise import HaltHead, InputError
from haltwise.policy.halting import Probing
from lms.ask import asked_before, questions
from lms.language_model import LanguageModel
from lms.questions import SPLITS
from traces import MAX_TRACES, TraceFiles, Traces
from traces.store import read_columns

#: By name: a policy, or several trainings of one, whose outcomes are averaged.
Policies = Mapping[str, Sequence[Policy]]


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare a run's head with baselines on recorded traces, every number frozen before."""

    head: Path
    """Run folder, written by train.py."""
    traces: Path | None = None
    """Trace file, or folder of *.parquet shards. Default: what the run was trained from."""
    split: str = "test"
    """Which rows: train, dev, test, or all. Questions that the run learned from are judged by the
    heads of its folds that never saw them; those outside of its sample have none, and are no
    evidence."""
    max_traces: int = MAX_TRACES
    """Traces in memory at most. Of more, a sample of that many is judged, by question."""
    json: Path | None = None
    """Write everything that was found as JSON here."""
    report: Path | None = None
    """Write a page for people here, an HTML file, and its figures into the run's tensorboard/."""
    plot: Path | None = None
    """Draw exact match against tokens here, a PNG file."""
    explain: str | None = None
    """Print the decision path of this trace in plain words instead of comparing."""
    live: bool = False
    """Also run the head beside the LM, on the questions of these traces."""


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates, prints the table, and writes the files asked for.

    Returns:
        The JSON object. head and command; traces (path, digest, numbers); split; judged (how the
        head's rows came about) and evidence (whether they are any); rows (every policy over its
        grid); frozen (every policy at the run's points, with intervals); strongest (the best
        baseline by gate); groups; behaviour (of the head by gate); certificate. Empty with
        --explain.

    Raises:
        InputError: If the run or the traces cannot be used, or do not fit each other, or a file
            could not be written.
    """
    _check(config)
    trained = _Run.load(config.head)
    path = config.traces or Path(_run_config(config.head)["traces"])
    recorded = TraceFiles.open(path)
    trained.head.config.halting.check_recorded(recorded.recorder, str(path))
    if config.explain is not None:
        print(_explained(recorded, config.explain, trained))
        return {}
    rows = recorded.rows(*([] if config.split == "all" else [config.split]))
    traces = recorded.read(recorded.sample(rows, config.max_traces))
    if not traces.num_points:
        raise InputError(f"{path}: no decision point in these {len(traces)} traces, expected some")
    report = {
        "head": str(config.head),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "traces": {
            "path": str(path),
            "digest": traces.digest,
            "num": len(traces),
            "num_questions": len(np.unique(traces.question_id)),
        },
        "split": config.split,
    } | _report(traces, config.split, trained)
    if len(traces) < rows.sum():
        sampled = f"A sample of {len(traces):,} of the {rows.sum():,} traces, by question."
        report["judged"] = f"{sampled} {report['judged']}"
    print(f"{report['judged']}\n\n{format_table(report['frozen'])}")
    for found in report["behaviour"][:1]:
        print(format_cases(found))
    if config.live:
        report["live"] = _live(trained, traces)
    _write(config, report)
    return report


@dataclass(frozen=True)
class _Run:
    """What a run folder holds."""

    folder: Path
    head: HaltHead
    gates: dict[float, Points]
    learned: Learned
    trainings: list[Head]
    """The head, by training; on questions that it learned from judged by the heads of its folds."""

    @classmethod
    def load(cls, folder: Path) -> _Run:
        """Reads all of it.

        Raises:
            InputError: If something is missing or damaged.
        """
        head, gates = HaltHead.load(folder), load_operating_points(folder)
        learned = load_learned(folder)
        return cls(folder, head, gates, learned, load_judges(folder, learned.folds))

    def judges(self, traces: Traces) -> list[Head]:
        """The trainings that differ on some traces: all of them judge fresh ones by one head."""
        fresh = not self.learned.among(traces.question_id).any()
        return self.trainings[:1] if fresh else self.trainings


def _report(traces: Traces, split: str, trained: _Run) -> dict[str, Any]:
    """What is found about a run on some traces, see `main`."""
    judges, gates, config = trained.judges(traces), trained.gates, trained.head.config
    baselines: Policies = {policy.name: [policy] for policy in BASELINES}
    policies = {"head": judges, **baselines, **_supervised(trained)}
    rows, frozen, outcomes = compare(traces, split, policies, gates, config.halting.probing)
    judged, evidence = _judged(traces, trained)
    return {
        "judged": judged,
        "num_trainings": len(judges),
        "evidence": evidence,
        "rows": rows,
        "frozen": frozen,
        "strongest": {str(gate): strongest(frozen, gate) for gate in gates},
        "groups": group_rows(traces, outcomes),
        "behaviour": _behaviour(traces, judges, gates),
        "certificate": None if config.certificate is None else asdict(config.certificate),
    }


def compare(
    traces: Traces,
    split: str,
    policies: Policies,
    gates: Mapping[float, Points],
    probing: Probing,
) -> tuple[list[Row], list[Row], dict[float, dict[str, Outcome]]]:
    """All policies on some traces, probed as the head needs it.

    Args:
        traces: What to evaluate on; nothing is tuned on it.
        split: Its name.
        policies: "head" among them. One without a training is not available.
        gates: Frozen points by gate. A baseline they do not name is not available.
        probing: See `haltwise.Halting`.

    Returns:
        Rows over every policy's grid; frozen rows; outcomes at the points by gate and policy.

    Raises:
        InputError: If the points name an unknown policy, or the head's signals are missing.
    """
    unknown = sorted({name for points in gates.values() for name in points} - set(policies))
    if unknown:
        known = sorted({*policies, *SUPERVISED})
        raise InputError(f"operating points of unknown policies {unknown}: know {known}")
    rules = parameter_free(traces, probing)
    played = {name: _Played.of(each, traces, probing) for name, each in policies.items()}
    at_points = {
        gate: {
            name: AtPoint(points[name], of.outcome(points[name]))
            for name, of in played.items()
            if of is not None and name in points
        }
        for gate, points in gates.items()
    }
    sweeps = {name: None if of is None else of.sweep() for name, of in played.items()}
    rows, frozen = report_rows(traces, split, sweeps, at_points, rules)
    outcomes = {
        gate: {name: at.outcome for name, at in points.items()}
        for gate, points in at_points.items()
    }
    return rows, frozen, outcomes


@dataclass(frozen=True)
class _Played:
    """A policy, or several trainings of one, on some traces."""

    traces: Traces
    probing: Probing
    policies: Sequence[Policy]
    signals: Sequence[Signal]

    @classmethod
    def of(cls, policies: Sequence[Policy], traces: Traces, probing: Probing) -> _Played | None:
        """None if the policy is not available."""
        signals = [signal_under(policy, traces, probing) for policy in policies]
        known = [signal for signal in signals if signal is not None]
        return cls(traces, probing, policies, known) if known else None

    def outcome(self, parameter: float | None) -> Outcome:
        """At one parameter, the mean over the trainings; None is never halting."""
        if parameter is None:
            return never_outcome(self.traces)
        outcomes = [
            halt_outcome(self.traces, policy.halts(signal, parameter), self.probing)
            for policy, signal in zip(self.policies, self.signals, strict=True)
        ]
        return outcomes[0] if len(outcomes) == 1 else average(outcomes)

    def sweep(self) -> dict[float, Outcome]:
        """Over the grid of the first training."""
        grid = self.policies[0].grid(self.signals[0])
        return {parameter: self.outcome(parameter) for parameter in grid}


def parameter_free(traces: Traces, probing: Probing) -> dict[str, Outcome]:
    """Outcomes of the rules that have no number."""
    return {
        "never": never_outcome(traces),
        "hindsight": halt_outcome(traces, hindsight(traces), probing),
        "hindsight_give_up": halt_outcome(traces, hindsight_give_up(traces), probing),
    }


def _check(config: EvaluateConfig) -> None:
    """Finds before the work what would fail after it."""
    outputs = [path for path in (config.json, config.report, config.plot) if path is not None]
    if config.explain is not None and (outputs or config.live):
        raise InputError("--explain prints one trace: expected no --json, --report, --plot, --live")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise InputError("two files are to be written under the same name")
    for name, path, suffix in (("plot", config.plot, ".png"), ("report", config.report, ".html")):
        if path is not None and path.suffix != suffix:
            raise InputError(f"--{name} {path}: expected a name that ends in {suffix}")
    kept = {"head.json", "operating_points.json", "questions.json", "config.json"}
    for path in outputs:
        if not path.parent.is_dir():
            raise InputError(f"{path}: found no folder {path.parent}, expected one to write into")
        if path.is_dir():
            raise InputError(f"{path} is a folder, expected the name of a file")
        if path.name in kept and path.parent.resolve() == config.head.resolve():
            raise InputError(f"{path} is a part of the run, expected another name")


def _supervised(trained: _Run) -> dict[str, list[Supervised]]:
    """The supervised baselines that the points name, fitted again from what the run learned from.

    Returns:
        By name; nothing to play for it if those traces are not there any more.
    """
    gates, learned, config = trained.gates, trained.learned, trained.head.config
    names = [name for name in SUPERVISED if any(name in points for points in gates.values())]
    if not names:
        return {}
    try:
        run = _run_config(trained.folder)
        recorded = TraceFiles.open(run["traces"])
        rows = recorded.rows_of_questions(learned.questions)
        changed = recorded.digest(rows) != config.traces
    except InputError as error:
        print(f"{', '.join(names)}: not available, the run's own traces cannot be read ({error})")
        return {name: [] for name in names}
    if changed:
        print(
            f"{', '.join(names)}: not available, the run's own traces have changed, "
            "or were digested by another version"
        )
        return {name: [] for name in names}
    max_traces = run.get("config", {}).get("max_traces", MAX_TRACES)
    own = recorded.read(recorded.sample(rows, max_traces))
    kept_back = next(iter(learned.folds.values()), {})
    return {name: [Supervised(name, own, kept_back, config)] for name in names}


def _judged(traces: Traces, trained: _Run) -> tuple[str, bool]:
    """How the rows of what is trained came about, and whether they are evidence."""
    known = set(traces.question_id[trained.learned.among(traces.question_id)].tolist())
    num = len(np.unique(traces.question_id))
    if not known:
        return f"None of the {num} questions was learned from.", True
    some = f"{len(known)} of the {num} questions {'were' if len(known) > 1 else 'was'} learned from"
    folds = trained.learned.folds
    if folds and all(fold.keys() >= known for fold in folds.values()):
        live = (trained.folder / "live.zip").exists()
        return (
            f"{some}; those are judged out of fold, by what never saw them (trainings: {len(folds)}"
            f"{', on replay alone: the head then went on beside the LM' if live else ''}). The "
            "points were chosen on these same questions, so an EM change at the gate is by choice."
        ), True
    return f"{some}: the rows of the head, and of what else is trained, are not evidence.", False


def _behaviour(
    traces: Traces, judges: Sequence[Head], gates: Mapping[float, Points]
) -> list[dict[str, Any]]:
    """What the head does inside the thoughts, at each gate where it halts."""
    signals = [judge.signal(traces) for judge in judges]
    found = []
    for gate, points in gates.items():
        price = points["head"]
        if price is not None:
            log_odds = [
                judge.log_odds(signal, price) for judge, signal in zip(judges, signals, strict=True)
            ]
            of_head = behaviour(traces, log_odds, judges[0].judge, price, judges[0].head.config)
            found.append({"gate": gate} | of_head)
    return found


def _explained(recorded: TraceFiles, trace_id: str, trained: _Run) -> str:
    """The decision path of one trace, at the head's own price.

    Raises:
        InputError: If there is no such trace, or the head never halts.
    """
    rows = recorded.rows_of_trace(trace_id)
    if not rows.any():
        ((first, *_),) = next(read_columns(recorded.shards[0], ("trace_id",)))
        raise InputError(f"no trace {trace_id!r} among these {len(rows)}, the first is {first!r}")
    traces = recorded.read(rows)
    price = trained.head.config.default_price
    if price == 0:
        raise InputError("the head's own price is 0: it never halts, there is nothing to explain")
    question_id = str(traces.question_id[0])
    told = decision_path(traces, trained.trainings[0].judge(question_id), price)
    known = trained.learned.among(traces.question_id).any()
    if known and not any(question_id in fold for fold in trained.learned.folds.values()):
        told = f"The head learned from this question: what it does here is no evidence.\n{told}"
    return told


def _write(config: EvaluateConfig, report: dict[str, Any]) -> None:
    """Writes the files asked for, the figures first: they may fail."""
    if config.plot is not None:
        plot_frontiers(report["rows"], report["frozen"], config.plot)
    if config.report is not None:
        write_report(report, config.report)
    if config.json is not None:
        write_json(config.json, report)
    if config.report is not None:
        log_to_tensorboard(report, config.head / "tensorboard" / f"report-{config.split}")


def _live(trained: _Run, traces: Traces) -> dict[str, Any] | None:
    """Runs the head beside its LM, at the strictest operating point where it halts at all.

    Questions that it learned from are left out.

    Returns:
        What `run_beside` found; None if every operating point is to never halt.

    Raises:
        InputError: If the run was trained on another LM's traces, or no question is left.
    """
    traces = traces.select(~trained.learned.among(traces.question_id))
    price = strictest_price(trained.gates)
    if price is None:
        print("\nThe head never halts at any operating point: nothing to run beside the LM.")
        return None
    settings = _run_config(trained.folder).get("config", {})
    try:
        config, num = asked_before(settings), settings["num_questions"]
        _ = traces.recorder["max_tokens"], traces.recorder["temperature"]
    except KeyError as missing:
        raise InputError(
            f"{trained.folder}: config.json or the traces do not say {missing}: expected a run of "
            "this version on traces recorded by collect.py, which --live needs"
        ) from None
    lm = LanguageModel.load(config.lm, config.device, config)
    if lm.name not in traces.model:
        found = ", ".join(np.unique(traces.model).tolist()) or "no LM"
        raise InputError(
            f"the questions that were not learned from are of {found}, expected {lm.name}"
        )
    asked = list(questions(config, SPLITS, num, settings["seed"]))
    comparison = run_beside(trained.head, lm, asked, traces.select(traces.model == lm.name), price)
    print(f"\n{comparison}")
    return asdict(comparison)


def _run_config(run_folder: Path) -> dict[str, Any]:
    """What train.py wrote about a run.

    Raises:
        InputError: If its config.json is missing or not readable.
    """
    path = run_folder / "config.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        Path(content["traces"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} names no traces: expected a run, or --traces FILE") from None
    return content


if __name__ == "__main__":
    run(main, EvaluateConfig)
