"""Exact match against tokens: a run's head, the baselines, and what hindsight could do.

python evaluate.py --head checkpoints/RUN --traces FILE_OR_FOLDER --json out.json --plot out.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.baselines import (
    BASELINES,
    Head,
    Policy,
    Signal,
    decisions,
    hindsight,
    hindsight_give_up,
    signal_under,
)
from command import run, write_json
from evaluation.frozen import frozen_rows
from evaluation.live import run_beside
from evaluation.outcome import (
    Outcome,
    Row,
    halt_outcome,
    never_outcome,
    outcome_row,
    sweep,
    unavailable_row,
)
from evaluation.plot import plot_frontiers
from evaluation.protocol import Points, load_operating_points
from evaluation.table import format_table
from haltwise import HaltHead, InputError
from haltwise.halting import Probing
from lms.language_model import LanguageModel
from lms.tasks import SPLITS, questions
from traces import Traces, read_traces


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare a run's head with baselines on recorded traces, every number frozen before."""

    head: Path
    """Run folder, written by train.py."""
    traces: Path | None = None
    """Trace file, or folder of *.parquet shards. Default: what the run was trained from."""
    split: str = "test"
    """Which rows: train, dev, test, or all."""
    json: Path | None = None
    """Write every row as JSON here."""
    plot: Path | None = None
    """Draw exact match against tokens here, a PNG file."""
    live: bool = False
    """Also run the head beside the LM, on the questions of these traces."""


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates, prints the table, and writes the files asked for.

    Returns:
        The JSON object: head; traces (path, digest and number of those evaluated); rows (every
        policy over its grid); frozen (every policy at the run's points, with intervals).

    Raises:
        InputError: If the run or the traces cannot be used, or do not fit each other, or a file
            could not be written.
    """
    _check_outputs(config)
    head, gates = HaltHead.load(config.head), load_operating_points(config.head)
    path = config.traces or Path(_run_config(config.head)["traces"])
    traces = read_traces(path)
    head.config.halting.check_recorded(traces.recorder, str(path))
    learned = np.isin(traces.split, ["train", "dev"])
    if config.split != "test" and traces.select(learned).digest == head.config.traces:
        print("The head was trained on these train and dev questions: its rows are not evidence.")
    if config.split != "all":
        traces = traces.of_split(config.split)
    rows, frozen = compare(traces, config.split, head, gates)
    report: dict[str, Any] = {
        "head": str(config.head),
        "traces": {"path": str(path), "digest": traces.digest, "num": len(traces)},
        "rows": rows,
        "frozen": frozen,
    }
    print(format_table(frozen))
    if config.live:
        report["live"] = _live(config, head, traces, gates)
    if config.plot is not None:
        plot_frontiers(rows, frozen, config.plot)
    if config.json is not None:
        write_json(config.json, report)
    return report


def compare(
    traces: Traces, split: str, head: HaltHead, gates: Mapping[float, Points]
) -> tuple[list[Row], list[Row]]:
    """All policies on some traces, probed as the head needs it.

    Args:
        traces: What to evaluate on; nothing is tuned on it.
        split: Its name.
        head: The head.
        gates: Frozen points by gate. A baseline they do not name is not available.

    Returns:
        Rows over every policy's grid, and frozen rows.

    Raises:
        InputError: If the points name an unknown policy, or the head's signals are missing.
    """
    probing = head.config.halting.probing
    policies: dict[str, Policy] = {policy.name: policy for policy in (Head(head), *BASELINES)}
    unknown = sorted({name for points in gates.values() for name in points} - set(policies))
    if unknown:
        raise InputError(f"operating points of unknown policies {unknown}: know {list(policies)}")
    signals = {name: signal_under(policy, traces, probing) for name, policy in policies.items()}
    rules = parameter_free(traces, probing)
    sweeps = {
        name: _sweep_rows(traces, split, policy, signals[name], probing)
        for name, policy in policies.items()
    }
    frozen = []
    for gate, points in gates.items():
        outcomes: dict[str, Outcome | None] = {
            name: _at_point(traces, policy, signals[name], points, probing)
            for name, policy in policies.items()
        }
        frozen += frozen_rows(traces, split, gate, points, outcomes | rules, sweeps)
    rows = [outcome_row(traces, outcome, name, None, split) for name, outcome in rules.items()]
    return rows + [row for swept in sweeps.values() for row in swept], frozen


def _check_outputs(config: EvaluateConfig) -> None:
    """Finds before the work what would fail after it."""
    if config.plot is not None and config.plot.suffix != ".png":
        raise InputError(f"--plot {config.plot}: expected a name that ends in .png")
    for path in (config.json, config.plot):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: found no folder {path.parent}, expected one to write into")
        if path is not None and path.is_dir():
            raise InputError(f"{path} is a folder, expected the name of a file")


def parameter_free(traces: Traces, probing: Probing) -> dict[str, Outcome]:
    """Outcomes of the rules that have no number."""
    return {
        "never": never_outcome(traces),
        "hindsight": halt_outcome(traces, hindsight(traces), probing),
        "hindsight_give_up": halt_outcome(traces, hindsight_give_up(traces), probing),
    }


def _sweep_rows(
    traces: Traces, split: str, policy: Policy, signal: Signal | None, probing: Probing
) -> list[Row]:
    if signal is None:
        return [unavailable_row(policy.name, split)]
    outcomes = sweep(traces, decisions(policy, signal), probing)
    return [
        outcome_row(traces, outcome, policy.name, at, split) for at, outcome in outcomes.items()
    ]


def _at_point(
    traces: Traces, policy: Policy, signal: Signal | None, points: Points, probing: Probing
) -> Outcome | None:
    if signal is None or policy.name not in points:
        return None
    parameter = points[policy.name]
    if parameter is None:
        return never_outcome(traces)
    return halt_outcome(traces, policy.halts(signal, parameter), probing)


def _live(
    config: EvaluateConfig, head: HaltHead, traces: Traces, gates: Mapping[float, Points]
) -> dict[str, Any] | None:
    """Runs the head beside its LM, at the strictest operating point where it halts at all.

    Returns:
        What `run_beside` found; None if every operating point is to never halt.

    Raises:
        InputError: If the run was trained on another LM's traces.
    """
    prices = [gates[gate]["head"] for gate in sorted(gates)]
    price = next((price for price in prices if price is not None), None)
    if price is None:
        print("\nThe head never halts at any operating point: nothing to run beside the LM.")
        return None
    trained = _run_config(config.head).get("config", {})
    missing = [key for key in ("lm", "device", "task", "num_questions") if key not in trained]
    if missing or not {"max_tokens", "temperature"} <= set(traces.recorder):
        raise InputError(
            f"{config.head}: not a run on traces recorded by collect.py, which --live needs"
        )
    lm = LanguageModel.load(trained["lm"], trained["device"])
    if lm.name not in traces.model:
        raise InputError(
            f"the traces are of {traces.model[0]}, expected {lm.name} to run it beside"
        )
    asked = [
        question
        for split in SPLITS
        for question in questions(trained["task"], split, trained["num_questions"], trained["seed"])
    ]
    comparison = run_beside(head, lm, asked, traces, price)
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
