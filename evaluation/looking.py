"""Sets decision rules beside each other on one dense recording: where to look, net of every look.

A rule says at which tokens a policy looks and may halt. Looks cost tokens, and halting comes late
where they are far apart. A dense recording holds the points of every coarser rule, so that all of
them are replayed from it, on the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command import write_json
from evaluation.compare import Policies, swept
from evaluation.evaluate_run import Trained
from evaluation.frontier import savings_at_losses
from evaluation.intervals import Float, Resamples, interval
from evaluation.outcome import Outcome
from evaluation.rows import LookingRow, to_json, without_intervals
from evaluation.table import format_looking
from haltwise import InputError
from policies.baselines import BASELINES, Random
from traces import Traces

# The EM that may be lost, at which savings are read.
_LOSSES = (0.0, 0.005, 0.01, 0.02, 0.03)


def compare_rules(
    trained: Trained,
    path: Path,
    rules: Sequence[str],
    split: str,
    max_traces: int,
    json: Path | None,
) -> list[LookingRow]:
    """Replays decision rules, prints a table, and writes a file.

    The head, which was trained under its own rule, and every baseline decide under each of them,
    at all of their numbers.

    Args:
        trained: The run, whose head's own rule is the one to compare with.
        path: The recorded traces, a file or a folder.
        rules: The other rules.
        split: Which of the traces to judge: train, dev, test, or all.
        max_traces: The most traces to hold in memory; of more, a sample by question.
        json: The JSON file to write; None writes none.

    Returns:
        A row for each policy and rule.

    Raises:
        InputError: If a rule cannot be replayed from the traces, or they do not fit the head.
        OSError: If the file cannot be written.
    """
    own = trained.open_traces(path)
    every = [own, *(trained.open_under(path, rule) for rule in rules)]
    names = [trained.head.config.halting.decision_rule, *rules]
    if len(set(names)) < len(names):
        raise InputError(f"--rule: {sorted(names)} has one twice, the head's own is the first")
    rows = own.sample(trained.judged_rows(own, split), max_traces)
    found = looking_rows(trained, names, [files.read(rows) for files in every])
    print(format_looking(found))
    if json is not None:
        write_json(json, {"split": split, "rules": to_json(found)})
    return found


def looking_rows(
    trained: Trained, rules: Sequence[str], read: Sequence[Traces]
) -> list[LookingRow]:
    """Makes a row for each policy and rule.

    Args:
        trained: The run.
        rules: The decision rules, the one to compare with first.
        read: The same traces under each of them.
    """
    drawn = Resamples.draw(read[0].question_id)
    found = [_outcomes(trained, traces) for traces in read]
    names = [name for name in found[0] if all(name in one for one in found)]
    rows = []
    for name in names:
        each = [
            _Curve.of(traces, one[name], drawn) for traces, one in zip(read, found, strict=True)
        ]
        for rule, traces, curve in zip(rules, read, each, strict=True):
            lead = curve.resampled - each[0].resampled
            rows.append(
                LookingRow(
                    rule=rule,
                    policy=name,
                    num_points=traces.num_points / len(traces),
                    savings=dict(zip(_in_points(), curve.savings, strict=True)),
                    saving=float(np.mean(curve.savings)),
                    saving_lead=float(np.mean(curve.savings) - np.mean(each[0].savings)),
                    saving_lead_interval=interval(lead),
                )
            )
    return rows if drawn.num_questions > 1 else [without_intervals(row) for row in rows]


def _in_points() -> list[str]:
    return [f"{100 * loss:g}" for loss in _LOSSES]


def _outcomes(trained: Trained, traces: Traces) -> dict[str, list[Outcome]]:
    """Returns, by policy, what each of its numbers comes to."""
    simple = {policy.name: [policy] for policy in BASELINES if not isinstance(policy, Random)}
    policies: Policies = {"head": trained.judges(traces), **simple}
    probing = trained.head.config.halting.probing
    found = {name: swept(each, traces, probing) for name, each in policies.items()}
    return {name: list(one.values()) for name, one in found.items() if one is not None}


@dataclass(frozen=True, eq=False)
class _Curve:
    """What a policy saves under a rule."""

    savings: list[float]
    """At each of the losses."""
    resampled: Float
    """(R,) their mean in each resample."""

    @classmethod
    def of(cls, traces: Traces, outcomes: Sequence[Outcome], drawn: Resamples) -> _Curve:
        savings, each = savings_at_losses(traces, outcomes, _LOSSES, drawn)
        return cls(savings.tolist(), np.mean(each, axis=0))
