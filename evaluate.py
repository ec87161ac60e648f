"""Compares a run's head with baselines and hindsight, in exact match and in tokens.

python evaluate.py --head RUN --traces FILE_OR_FOLDER --json out.json --report out.html
python evaluate.py --head RUN --traces FILE_OR_FOLDER --explain TRACE_ID --price 0.2
python evaluate.py --head RUN --traces FOLDER --beside FOLDER FOLDER --json out.json --plot out.png
python evaluate.py --head RUN --traces DENSE --rule "every 512 tokens" "every 128 tokens"
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import installed  # noqa: F401, tells what is missing

from command import run
from evaluation.decision_path import decision_path
from evaluation.evaluate_run import Outputs, Trained, evaluate_run
from evaluation.looking import compare_rules
from evaluation.results import Report
from evaluation.rows import LookingRow, RecordingRow
from evaluation.side_by_side import Entrant, compare_recordings
from haltwise import InputError
from haltwise.errors import check_ranges
from haltwise.policy.head import NEVER_HALTS
from runs import Run
from traces import MAX_TRACES, TraceFiles
from traces.store import read_columns


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare a run's head with baselines on recorded traces, each at numbers frozen before."""

    head: Path
    """Run folder, written by train.py."""
    traces: Path | None = None
    """Trace file, or folder of *.parquet shards. Default: what the run was trained from."""
    split: str = "test"
    """Which of the traces to judge: train, dev, test, or all. Questions that the run learned from
    are judged by the heads of its folds that never saw them; those outside of its sample have no
    such heads, and are no evidence."""
    max_traces: int = MAX_TRACES
    """The most traces to hold in memory. Of more, a sample of that many is judged, by question."""
    json: Path | None = None
    """Write everything that was found as JSON here."""
    report: Path | None = None
    """Write a page for people here, an HTML file, and its figures into the run's tensorboard/."""
    plot: Path | None = None
    """Draw exact match against tokens here, a PNG file."""
    explain: str | None = None
    """Print the decision path of this trace in plain words instead of comparing."""
    price: float | None = None
    """The price at which --explain lets the head decide. Default: the head's own."""
    beside: tuple[Path, ...] = ()
    """Set recordings of the same questions beside --traces instead: of other LMs, quantisations or
    engines. Each is judged alone, and halted by the head at its own price."""
    beside_heads: tuple[Path, ...] = ()
    """Runs whose heads halt the recordings of --beside, one for each, instead of --head."""
    rule: tuple[str, ...] = ()
    """Decision rules to look and halt under, instead of the head's own alone, such as "every 512
    tokens, every 64 while the answer repeats", if the traces hold all of their points. The head and
    every baseline are compared under each, by what they save net of every look."""
    live: bool = False
    """Also run the head beside the LM, on the questions of these traces."""
    verbose: bool = False
    """Print the tables of every policy and the worst errors too, which the page has as well."""


def main(config: EvaluateConfig) -> Report | list[RecordingRow] | list[LookingRow] | None:
    """Evaluates, prints the table, and writes the files asked for.

    Returns:
        What was found; with --beside, a row for each recording; with --rule, one for each
        policy and rule; None with --explain.

    Raises:
        InputError: If the run or the traces cannot be used, or do not fit each other, or a file
            could not be written.
    """
    _check(config)
    trained = Trained.load(Run(config.head))
    path = config.traces or trained.run.beginning().traces
    if config.explain is not None:
        print(_explained(trained.open_traces(path), config.explain, config.price, trained))
        return None
    if config.beside:
        entrants = [Entrant(path, trained), *_entrants(config, trained)]
        return compare_recordings(
            entrants, config.split, config.max_traces, config.json, config.plot
        )
    if config.rule:
        return compare_rules(
            trained, path, config.rule, config.split, config.max_traces, config.json
        )
    outputs = Outputs(config.json, config.report, config.plot)
    report = evaluate_run(
        trained,
        path,
        config.split,
        config.max_traces,
        outputs,
        live=config.live,
        verbose=config.verbose,
    )
    if not report.other_price:  # else the verdict is not about the price that is served
        print(report.verdict.advice)
    return report


def _entrants(config: EvaluateConfig, trained: Trained) -> list[Entrant]:
    """Reads the runs whose heads are to halt the recordings of --beside.

    Raises:
        InputError: If one cannot be used.
    """
    if not config.beside_heads:
        return [Entrant(path, trained) for path in config.beside]
    pairs = zip(config.beside, config.beside_heads, strict=True)
    return [Entrant(path, Trained.load(Run(run))) for path, run in pairs]


def _check_beside(config: EvaluateConfig) -> None:
    """Refuses what does not fit a comparison of recordings.

    Raises:
        InputError: If heads and recordings are not as many, or something else is asked for too.
    """
    num_heads, num = len(config.beside_heads), len(config.beside)
    if num_heads not in (0, num):
        raise InputError(f"--beside-heads names {num_heads} runs, expected {num}, as in --beside")
    others = (config.report, config.explain)
    if num and (config.live or config.verbose or any(other is not None for other in others)):
        raise InputError(
            "--beside compares recordings: expected no --report, --explain, --live, --verbose "
            "with it"
        )


def _check_rule(config: EvaluateConfig) -> None:
    """Refuses what does not fit a comparison of decision rules.

    Raises:
        InputError: If something else is asked for too.
    """
    others = (config.report, config.plot, config.explain)
    if config.rule and (
        config.live or config.verbose or config.beside or any(one is not None for one in others)
    ):
        raise InputError(
            "--rule compares decision rules: expected no --beside, --report, --plot, --explain, "
            "--live, --verbose with it"
        )


def _check(config: EvaluateConfig) -> None:
    """Refuses, before the work, what would fail after it.

    Raises:
        InputError: If outputs do not fit each other, or one could not be written.
    """
    price = config.price
    check_ranges(config, {"price": (price is None or 0 < price < inf, "above 0, and finite")})
    _check_beside(config)
    _check_rule(config)
    outputs = [path for path in (config.json, config.report, config.plot) if path is not None]
    if config.explain is not None and (outputs or config.live):
        raise InputError("--explain prints one trace: expected no --json, --report, --plot, --live")
    if config.price is not None and config.explain is None:
        raise InputError("--price is that of --explain: expected --explain TRACE_ID with it")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise InputError("two files are to be written under the same name")
    for name, path, suffix in (("plot", config.plot, ".png"), ("report", config.report, ".html")):
        if path is not None and path.suffix != suffix:
            raise InputError(f"--{name} {path}: expected a name that ends in {suffix}")
    for path in outputs:
        if not path.parent.is_dir():
            raise InputError(f"{path}: found no folder {path.parent}, expected one to write into")
        if path.is_dir():
            raise InputError(f"{path} is a folder, expected the name of a file")
        if Run(config.head).is_part(path):
            raise InputError(f"{path} is a part of the run, expected another name")


def _explained(recorded: TraceFiles, trace_id: str, price: float | None, trained: Trained) -> str:
    """Tells the decision path of one trace, at a price or else the head's own.

    Raises:
        InputError: If there is no such trace, or the head never halts at the price.
    """
    rows = recorded.rows_of_trace(trace_id)
    if not rows.any():
        ((first, *_),) = next(read_columns(recorded.shards[0], ("trace_id",)))
        raise InputError(f"no trace {trace_id!r} among these {len(rows)}, the first is {first!r}")
    traces, words = recorded.read(rows), recorded.words([trace_id])[trace_id]
    if price is None and trained.head.config.default_price == 0:
        raise InputError(f"{NEVER_HALTS} Expected --price with --explain.")
    price = trained.head.config.default_price if price is None else price
    question_id = str(traces.question_id[0])
    told = decision_path(traces, trained.trainings[0].judge(question_id), price, words)
    learned = trained.learned
    known = (rows & recorded.rows_of_questions(learned.questions, learned.texts)).any()
    if known and not any(question_id in fold for fold in learned.folds.values()):
        told = f"The head learned from this question: what it does here is no evidence.\n{told}"
    return told


if __name__ == "__main__":
    run(main, EvaluateConfig)
