"""Evaluates a run on recorded traces: finds everything that the page and the JSON tell of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from command import write_json
from evaluation.behaviour import Behaviour, behaviour
from evaluation.compare import Policies, compare
from evaluation.frozen import strongest
from evaluation.groups import group_rows
from evaluation.honest import chosen_points
from evaluation.live import Comparison, run_beside
from evaluation.plot import plot_frontiers
from evaluation.protocol import strictest_price
from evaluation.report import log_to_tensorboard, write_report
from evaluation.results import JudgedTraces, Report
from evaluation.table import format_cases, format_honest, format_table
from evaluation.training_curve import CurvePoint
from haltwise import HaltHead, InputError
from lms.ask import asked_before, questions
from lms.language_model import LanguageModel
from lms.questions import SPLITS
from lms.scorers import agreeing
from policies import baselines
from policies.head import HeadPolicy, judging_heads
from policies.supervised import SUPERVISED, Supervised
from runs import Gates, Learned, Run
from traces import MAX_TRACES, TraceFiles, Traces
from traces.stream import RowMask


@dataclass(frozen=True)
class Trained:
    """What a run has trained, read into memory."""

    run: Run
    head: HaltHead
    gates: Gates
    learned: Learned
    trainings: list[HeadPolicy]
    """The head, once for each training: on questions that it learned from, the heads of that
    training's folds decide in its place."""

    @classmethod
    def load(cls, run: Run) -> Trained:
        """Reads what a run has trained.

        Raises:
            InputError: If something is missing or damaged.
        """
        head, gates, learned = run.head(), run.operating_points(), run.learned()
        trainings = judging_heads(head, run.kept_back(learned), learned.folds)
        return cls(run, head, gates, learned, trainings)

    def judges(self, traces: Traces) -> list[HeadPolicy]:
        """Returns the trainings that differ on some traces.

        It is only the first if the head learned from none of their questions: there, one head
        decides in all of them.
        """
        fresh = not self.learned.among(traces.question_id).any()
        return self.trainings[:1] if fresh else self.trainings

    def open_traces(self, path: Path) -> TraceFiles:
        """Opens recorded traces that the head is valid for.

        Raises:
            InputError: If they cannot be read, or were recorded under other conditions.
        """
        return TraceFiles.of_head(path, self.head.config, agreeing)

    def judged_rows(self, files: TraceFiles, split: str) -> RowMask:
        """Returns the rows to judge: those of a split, or of "all".

        Questions that the run learned from under another id are left out, with a message: of those
        nobody knows which fold kept them back.

        Raises:
            InputError: If no row is left.
        """
        learned = self.learned
        rows = files.rows(*([] if split == "all" else [split]))
        by_text = files.rows_of_questions((), learned.texts)
        renamed = rows & by_text & ~files.rows_of_questions(learned.questions)
        num = len(np.unique(files.question[renamed]))
        if num and (renamed == rows).all():
            raise InputError(
                f"the head learned from all {num} questions, under other ids: expected others"
            )
        if num:
            print(f"Left out {num} questions that the head learned from, under other ids.")
        return rows & ~renamed

    def open_under(self, path: Path, rule: str) -> TraceFiles:
        """Opens such traces under another decision rule than the head's own.

        Raises:
            InputError: If the rule cannot be replayed from them.
        """
        return TraceFiles.open(path, agreeing).replayed(rule)


@dataclass(frozen=True)
class Outputs:
    """The files that an evaluation is to write; None leaves one out."""

    json: Path | None = None
    page: Path | None = None
    plot: Path | None = None


def evaluate_run(
    trained: Trained,
    path: Path,
    split: str,
    max_traces: int,
    outputs: Outputs,
    *,
    live: bool,
    verbose: bool,
) -> Report:
    """Evaluates a run, writes the files asked for, and prints the verdict last.

    Args:
        trained: The run.
        path: The recorded traces, a file or a folder.
        split: Which of them to judge: train, dev, test, or all.
        max_traces: The most traces to hold in memory; of more, a sample by question is judged.
        outputs: The files to write. With a page, its figures go into the run's TensorBoard files.
        live: Whether to run the head beside its LM, too.
        verbose: Whether to print the tables and the worst errors, too.

    Returns:
        Everything that was found.

    Raises:
        InputError: If the traces cannot be used, or do not fit the run.
        OSError: If a file cannot be written.
    """
    recorded = trained.open_traces(path)
    rows = trained.judged_rows(recorded, split)
    traces = recorded.read(recorded.sample(rows, max_traces))
    if not traces.num_points:
        raise InputError(f"{path}: no decision point in these {len(traces)} traces, expected some")
    report = _report(traces, path, split, trained)
    report = replace(report, behaviour=_in_words(report.behaviour, recorded))
    if len(traces) < rows.sum():
        sampled = f"A sample of {len(traces):,} of the {rows.sum():,} traces, by question."
        report = replace(report, judged=f"{sampled} {report.judged}")
    print(f"{report.traces.target} {report.judged}".strip())
    if verbose:
        tables = [format_table(report.frozen), *map(format_cases, report.behaviour[:1])]
        print("", *tables, *([format_honest(report.honest)] if report.honest else []), sep="\n")
    if live:
        report = replace(report, ran_live=True, live=_live(trained, traces))
    _write(outputs, report, trained.run)
    print("", report.verdict.words, *filter(None, [report.other_price]), sep="\n")
    return report


def _report(traces: Traces, path: Path, split: str, trained: Trained) -> Report:
    """Finds everything about a run that replaying some traces tells."""
    judges, gates, config = trained.judges(traces), trained.gates, trained.head.config
    simple: Policies = {policy.name: [policy] for policy in baselines.BASELINES}
    policies = {"head": judges, **simple, **_supervised(trained)}
    honest = chosen_points(trained.run.out_of_fold().get("honest", ()))
    compared = compare(traces, split, policies, gates, config.halting.probing, honest)
    in_words, evidence = judged(traces, trained)
    num_questions = len(np.unique(traces.question_id))
    return Report(
        head=str(trained.run.folder),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        traces=JudgedTraces(str(path), traces.digest, len(traces), num_questions, traces.target),
        split=split,
        judged=in_words,
        num_trainings=len(judges),
        evidence=evidence,
        rows=compared.rows,
        frozen=compared.frozen,
        honest=compared.honest,
        strongest={gate: strongest(compared.frozen, gate) for gate in gates},
        groups=group_rows(traces, compared.outcomes),
        behaviour=_behaviour(traces, judges, gates),
        certificate=config.certificate,
        own_price=config.default_price,
        curve=_curve(trained.run),
    )


def _curve(run: Run) -> list[CurvePoint]:
    """Reads what a run's trainings came to on the way.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        return [CurvePoint.from_json(point) for point in run.out_of_fold().get("curve", ())]
    except TypeError as error:
        raise InputError(f"{run.folder}: its curve over the training has {error}") from None


def _supervised(trained: Trained) -> dict[str, list[Supervised]]:
    """Returns the supervised baselines that the points name.

    They are to be fitted again from the traces that the run learned from.

    Returns:
        By name, the policy; none for a name if those traces are not there any more.
    """
    gates, learned, config = trained.gates, trained.learned, trained.head.config
    names = [name for name in SUPERVISED if any(name in points for points in gates.values())]
    if not names:
        return {}
    try:
        began = trained.run.beginning()
        recorded = TraceFiles.open(began.traces, agreeing).under(config.halting.decision_rule)
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
    max_traces = began.settings.get("max_traces", MAX_TRACES)
    own = recorded.read(recorded.sample(rows, max_traces))
    kept_back = next(iter(learned.folds.values()), {})
    return {name: [Supervised(name, own, kept_back, config)] for name in names}


def judged(traces: Traces, trained: Trained) -> tuple[str, bool]:
    """Says how the rows of what is trained came about, and whether they are evidence."""
    known = set(traces.question_id[trained.learned.among(traces.question_id)].tolist())
    num = len(np.unique(traces.question_id))
    if not known:
        return f"None of the {num} questions was learned from.", True
    some = f"{len(known)} of the {num} questions {'were' if len(known) > 1 else 'was'} learned from"
    folds = trained.learned.folds
    if folds and all(fold.keys() >= known for fold in folds.values()):
        live = trained.run.live_agent.exists()
        return (
            f"{some}; those are judged out of fold, by what never saw them (trainings: {len(folds)}"
            f"{', on replay alone: the head then went on beside the LM' if live else ''}). The "
            "points were chosen on these same questions, so an EM change at the gate is by choice."
        ), True
    return f"{some}: the rows of the head, and of what else is trained, are not evidence.", False


def _behaviour(traces: Traces, judges: Sequence[HeadPolicy], gates: Gates) -> list[Behaviour]:
    """Finds what the head does inside the thoughts, at each gate where it halts."""
    signals = [judge.signal(traces) for judge in judges]
    found = []
    for gate, points in gates.items():
        price = points["head"]
        if price is not None:
            log_odds = [
                judge.log_odds(signal, price) for judge, signal in zip(judges, signals, strict=True)
            ]
            first = judges[0]
            found.append(behaviour(gate, traces, log_odds, first.judge, price, first.head.config))
    return found


def _in_words(found: Sequence[Behaviour], recorded: TraceFiles) -> list[Behaviour]:
    """Adds to the cases of errors what is recorded of them for a person to read."""
    words = recorded.words([case.trace_id for each in found for case in each.cases])
    return [
        replace(each, cases=[case.with_words(words[case.trace_id]) for case in each.cases])
        for each in found
    ]


def _live(trained: Trained, traces: Traces) -> Comparison | None:
    """Runs the head beside its LM, at the price of the strictest gate where it halts at all.

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
    settings = trained.run.beginning().settings
    try:
        config, num, seed = asked_before(settings), settings["num_questions"], settings["seed"]
        _ = traces.recorder["max_tokens"], traces.recorder["temperature"]
    except KeyError as missing:
        raise InputError(
            f"{trained.run.folder}: neither the run nor the traces say {missing}: expected a run "
            "of this version on traces recorded by collect.py, which --live needs"
        ) from None
    lm = LanguageModel.load(config.lm, config.device, config)
    if lm.name not in traces.model:
        found = ", ".join(np.unique(traces.model).tolist()) or "no LM"
        raise InputError(
            f"the questions that were not learned from are of {found}, expected {lm.name}"
        )
    asked = list(questions(config, SPLITS, num, seed))
    comparison = run_beside(trained.head, lm, asked, traces.select(traces.model == lm.name), price)
    print(f"\n{comparison}")
    return comparison


def _write(outputs: Outputs, report: Report, run: Run) -> None:
    """Writes the files asked for, the figures first, since those may fail."""
    if outputs.plot is not None:
        plot_frontiers(report.rows, report.frozen, outputs.plot)
    if outputs.page is not None:
        write_report(report, outputs.page)
    if outputs.json is not None:
        write_json(outputs.json, report.to_json())
    if outputs.page is not None:
        log_to_tensorboard(report, run.tensorboard / f"report-{report.split}")
