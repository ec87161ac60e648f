"""Adapts a run's head to an LM that it was not trained on.

    python adapt.py --head RUN --traces FILE_OR_FOLDER --run-dir NEW
    python adapt.py --head RUN --traces FILE_OR_FOLDER --run-dir NEW --labelled

LMs differ most in the scale of what they show: how sure they sound, how long they think. So the
head keeps its weights and prices, and its features are standardised by the new LM's own traces,
which needs no label. With labels, a point is made stricter where they refute it, and stays where
they do not: choosing anew on some 50 questions would lose more to chance than it could win.

It writes a run folder: config.json, operating_points.json, head.safetensors and head.json, the
questions that were learned from, and the heads of the run's folds, adapted too.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import installed  # noqa: F401, tells what is missing

import numpy as np

from command import run, whole_folder
from envs.replay import point_features
from evaluation.compare import compare
from evaluation.intervals import interval, resample
from evaluation.outcome import Outcome, saving, sweep
from evaluation.protocol import own_price
from evaluation.table import format_table
from haltwise import HaltHead, InputError, Observing
from haltwise.policy.head import told_by
from lms.scorers import agreeing
from policies import baselines
from policies.head import HeadPolicy
from policies.policy import decisions, signal_under
from runs import Gates, Learned, Run
from traces import MAX_TRACES, TraceFiles, Traces

# With fewer questions, means and spreads are too noisy: from 20 the head loses 3 points of saving,
# from 30 none.
_MIN_QUESTIONS = 30


@dataclass(frozen=True)
class AdaptConfig:
    """Adapt a run's head to another LM, without labels or with about 50 labelled questions."""

    head: Path
    """Run folder, written by train.py."""
    traces: Path
    """Recorded traces of the new LM, a file or a folder; test questions in it are not used."""
    run_dir: Path
    """Run folder to write; it must not exist."""
    labelled: bool = False
    """Whether to look at which answers are correct. Where the traces do not tell, those count that
    agree with the LM's own full answer."""
    max_traces: int = MAX_TRACES
    """The most traces to hold in memory; of more, a sample of questions is used."""
    verbose: bool = False
    """Print, with --labelled, the table of every policy on these traces."""


def main(config: AdaptConfig) -> Path:
    """Adapts a run's head and its points, and writes them as a new run.

    Returns:
        The new run folder.

    Raises:
        InputError: If the run or the traces cannot be used, or do not fit each other; nothing is
            left half-written.
    """
    if config.run_dir.exists():
        raise InputError(f"{config.run_dir} exists: expected a new folder")
    old = Run(config.head)
    source, gates, learned = old.head(), _transferable(old.operating_points()), old.learned()
    path = config.traces.resolve()
    traces = _read(path, source, config.max_traces)
    head = adapt(source, traces)
    if config.labelled:
        if traces.target:
            print(traces.target)
        gates = tighten_points(head, traces, gates)
        head = _at_strictest(head, gates)
        policies = {policy.name: [policy] for policy in (HeadPolicy(head), *baselines.BASELINES)}
        probing = head.config.halting.probing
        if config.verbose:
            print(format_table(compare(traces, "labelled", policies, gates, probing).frozen))
    known = _with_questions(learned, traces, path)
    kept_back = {at: adapt(judge, traces) for at, judge in old.kept_back(known).items()}
    settings = json.loads(json.dumps(asdict(config), default=str))
    beginning = {"command": head.config.command, "config": settings, "traces": str(path)}
    beginning["target"] = traces.target if config.labelled else ""
    with whole_folder(config.run_dir) as folder:
        adapted = Run(folder)
        adapted.begin(beginning)
        adapted.save_kept_back(kept_back)
        adapted.save_learned(known)
        adapted.save_operating_points(gates)
        adapted.save_head(head)
    print(f"standardised by {len(traces)} traces of {head.config.lm}; wrote {config.run_dir}")
    return config.run_dir


def adapt(head: HaltHead, traces: Traces) -> HaltHead:
    """Returns a head with the same weights, and features standardised by another LM's traces.

    Labels have no influence; only the digest of the traces in the head's config covers them.

    Raises:
        InputError: If the traces lack a signal that the head needs, or the head sees hidden states.
    """
    groups, halting = head.config.observing.groups, head.config.halting
    if "hidden" in groups:
        raise InputError(
            "the head sees hidden states, and every LM has its own: expected a head without that "
            "feature group"
        )
    features = point_features(traces, groups, halting.max_points)
    adapted = replace(
        head.config,
        observing=Observing.fit(groups, features, head.config.observing.price_range),
        lm=str(traces.model[0]),
        **told_by(traces.recorder),
        installation=traces.recorder.get("installation", head.config.installation),
        traces=traces.digest,
        command=shlex.join(sys.argv),
        certificate=None,
    )
    return HaltHead(adapted, head.weights)


def _with_questions(learned: Learned, traces: Traces, path: Path) -> Learned:
    """Adds the questions of some traces to what a run learned from; no fold keeps those back.

    Args:
        learned: What the run learned from.
        traces: The traces.
        path: The files that they are from.
    """
    adapted_to, files = set(traces.question_id.tolist()), TraceFiles.open(path, agreeing)
    texts = files.texts(files.rows_of_questions(adapted_to))
    folds = {
        seed: {question: k for question, k in fold.items() if question not in adapted_to}
        for seed, fold in learned.folds.items()
    }
    return Learned(learned.questions | adapted_to, folds, learned.texts | texts)


def _transferable(gates: Gates) -> Gates:
    """Keeps the points of the policies that are not fitted to the traces of one LM."""
    names = {"head", *(policy.name for policy in baselines.BASELINES)}
    return {
        gate: {name: point for name, point in points.items() if name in names}
        for gate, points in gates.items()
    }


def tighten_points(head: HaltHead, traces: Traces, gates: Gates) -> Gates:
    """Makes the points of the head and the baselines stricter where labelled traces refute them.

    Args:
        head: The head, adapted to the LM of the traces.
        traces: Labelled traces.
        gates: By gate, the points of the policies.

    Returns:
        By gate, the new points; a policy whose signal the traces lack is left out.
    """
    probing = head.config.halting.probing
    tightened: Gates = {gate: {} for gate in gates}
    for policy in (HeadPolicy(head), *baselines.BASELINES):
        signal = signal_under(policy, traces, probing)
        if signal is None:
            continue
        halts = decisions(policy, signal)
        for gate, points in gates.items():
            point = points.get(policy.name)
            if point is not None:
                halts |= {point: policy.halts(signal, point)}
                point = tighten(traces, sweep(traces, halts, probing), point, gate)
            if policy.name in points:
                tightened[gate][policy.name] = point
    return tightened


def tighten(
    traces: Traces, outcomes: Mapping[float, Outcome], point: float, gate: float
) -> float | None:
    """Returns a policy's point, or the most saving stricter one that traces do not refute.

    Traces refute a point if the 95 % interval of its EM change on them lies below -gate. Stricter
    points are those that save less.

    Args:
        traces: N labelled traces.
        outcomes: By parameter, the policy's outcomes on those traces.
        point: The parameter that was chosen elsewhere, one of those.
        gate: How much mean EM may be lost, in [0, 1].

    Returns:
        The parameter; None (never halt) if every point that saves anything is refuted.
    """
    saved = {parameter: saving(traces, outcome) for parameter, outcome in outcomes.items()}
    stricter = [at for at in outcomes if 0 < saved[at] < saved[point]]
    for at in [point, *sorted(stricter, key=lambda at: -saved[at])]:
        resampled = resample(traces, {"": outcomes[at]})[""]
        if interval(resampled.em_delta)[1] >= -gate:
            return at
    return None


def _read(path: Path, head: HaltHead, max_traces: int) -> Traces:
    """Reads the traces to adapt to.

    Raises:
        InputError: If they were recorded under other conditions than the head's, are of several
            LMs, or are too few.
    """
    files = TraceFiles.of_head(path, head.config, agreeing, is_same_lm=False)
    traces = files.read(files.sample(files.rows() & (files.split != "test"), max_traces))
    lms = np.unique(traces.model).tolist()
    if len(lms) > 1:
        raise InputError(f"{path}: traces of {', '.join(lms)}, expected one LM to adapt to")
    num = len(np.unique(traces.question_id[np.diff(traces.offsets) > 0]))
    if num < _MIN_QUESTIONS:
        raise InputError(
            f"{path}: {num} questions with a decision point that are not of the test split, "
            f"expected at least {_MIN_QUESTIONS}"
        )
    return traces


def _at_strictest(head: HaltHead, gates: Gates) -> HaltHead:
    """Returns the head with the price of its strictest gate as its own."""
    price = own_price(gates)
    kept = head.config.segment_prices if price == head.config.default_price else {}
    config = replace(head.config, default_price=price, segment_prices=kept)
    return HaltHead(config, head.weights)


if __name__ == "__main__":
    run(main, AdaptConfig)
