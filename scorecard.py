"""Distils a run's head to a scorecard: a few rules with points, which a person can use.

    python scorecard.py --head RUN --run-dir NEW
    python scorecard.py --head RUN --run-dir NEW --rules 8

A thought is halted where the points of the rules that hold reach a bar, which falls as the price
rises. The card is a head like any other: served, evaluated, certified and explained by the same
commands. It learns from the traces of the run, test questions aside; what it is worth is told out
of fold, by cards that are distilled from the heads of the run's folds.

It writes a run folder: config.json, operating_points.json, head.safetensors and head.json, the
questions that were learned from, the cards of the folds, and scorecard.json, which has the rules.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import installed  # noqa: F401, tells what is missing

import numpy as np
import torch
from tqdm import tqdm

from agents.distil import distil
from agents.scorecard import format_card
from command import run, whole_folder
from evaluation.compare import parameter_free, swept
from evaluation.frontier import saving_at_em
from evaluation.frozen import choose_points
from evaluation.honest import price_words
from evaluation.outcome import Outcome, average, em_delta, saving
from evaluation.protocol import own_price
from haltwise import HaltHead, InputError
from haltwise.errors import check_ranges
from lms.scorers import agreeing
from policies import baselines
from policies.head import HeadPolicy, judging_heads, price_grid
from runs import Learned, Run
from traces import MAX_TRACES, TraceFiles, Traces

# The EM losses at which frontiers are read, and the baseline that is beside the heads.
_LOSSES = (0.0, 0.005, 0.01, 0.02)
_BESIDE = baselines.Evidence.name


@dataclass(frozen=True)
class ScorecardConfig:
    """Distil a run's head to a scorecard that a person can read."""

    head: Path
    """Run folder, written by train.py, with the heads of its folds."""
    run_dir: Path
    """Run folder to write; it must not exist."""
    rules: int = 15
    """The most rules."""
    traces: Path | None = None
    """The traces that the run learned from, if they lie elsewhere now."""


def main(config: ScorecardConfig) -> Path:
    """Distils a head, tells what the card is worth, and writes it as a new run.

    Returns:
        The new run folder.

    Raises:
        InputError: If the run or its traces cannot be used; nothing is left half-written.
    """
    torch.set_num_threads(1)
    check_ranges(config, {"rules": (config.rules >= 1, "at least 1")})
    if config.run_dir.exists():
        raise InputError(f"{config.run_dir} exists: expected a new folder")
    old = Run(config.head)
    head, learned = old.head(), old.learned()
    if not learned.folds:
        raise InputError(
            f"{config.head} has no heads of folds, which tell what a card is worth: expected a run "
            "that was trained on recorded traces"
        )
    kept_back = old.kept_back(learned)
    path = (config.traces or old.beginning().traces).resolve()
    traces = _read(path, old, head, learned)
    if traces.target:
        print(traces.target)
    cards = _by_fold(kept_back, learned, traces, config.rules)
    card = distil(head, traces, config.rules)
    own = card.to_head(replace(head.config, command=shlex.join(sys.argv)))

    judged_on = traces.select(_kept_back_by_all(traces, learned))
    networks, own_judges = (
        judging_heads(one, folds, learned.folds) for one, folds in ((head, kept_back), (own, cards))
    )
    outcomes: dict[str, Mapping[float, Outcome] | None] = {
        policy.name: swept(policy, judged_on, head.config.halting.probing)
        for policy in baselines.BASELINES
    }
    outcomes["head"] = _out_of_fold(own_judges, judged_on)
    choice = choose_points(
        judged_on, outcomes, parameter_free(judged_on, head.config.halting.probing)
    )
    price = own_price(choice.gates)
    own = HaltHead(
        replace(own.config, default_price=price, segment_prices=choice.segment_prices), own.weights
    )
    frontiers = {
        "scorecard": _frontier(judged_on, outcomes["head"]),
        "network": _frontier(judged_on, _out_of_fold(networks, judged_on)),
        _BESIDE: _frontier(judged_on, outcomes[_BESIDE]),
    }
    alike = _alike(networks, own_judges, judged_on)

    settings = json.loads(json.dumps(asdict(config), default=str))
    with whole_folder(config.run_dir) as folder:
        written = Run(folder)
        written.begin({"command": own.config.command, "config": settings, "traces": str(path)})
        written.save_kept_back(cards)
        written.save_learned(learned)
        written.save_operating_points(choice.gates)
        measured = {"decides_as_the_network": alike, "savings_at_em_losses": frontiers}
        written.save_scorecard(card.to_json(head.config.observing) | measured)
        written.save_head(own)
    print(format_card(card, head.config.observing, price))
    print(_measured(frontiers, alike, judged_on))
    print(price_words(price, choice.segment_prices, choice.honest, judged_on))
    print(f"wrote {config.run_dir}")
    return config.run_dir


def _read(path: Path, old: Run, head: HaltHead, learned: Learned) -> Traces:
    """Reads the traces that a run learned from.

    Raises:
        InputError: If they are not there any more as they were.
    """
    halting = head.config.halting
    files = TraceFiles.open(path, agreeing).under(halting.decision_rule)
    halting.check_recorded(files.recorder, str(path))
    rows = files.rows_of_questions(learned.questions) & (files.split != "test")
    if files.digest(rows) != head.config.traces:
        raise InputError(f"{path}: not the traces that {old.folder} learned from, expected those")
    return files.read(files.sample(rows, old.beginning().settings.get("max_traces", MAX_TRACES)))


def _by_fold(
    kept_back: Mapping[tuple[int, int], HaltHead], learned: Learned, traces: Traces, num_rules: int
) -> dict[tuple[int, int], HaltHead]:
    """Distils the heads of the folds, each from traces that it learned from; by seed and fold."""
    cards = {}
    for (seed, k), head in tqdm(kept_back.items(), "folds"):
        fold = learned.folds[seed]
        own = np.array([fold.get(question) != k for question in traces.question_id.tolist()])
        cards[seed, k] = distil(head, traces.select(own), num_rules).to_head(head.config)
    return cards


def _kept_back_by_all(traces: Traces, learned: Learned) -> np.ndarray:
    """Returns which traces (N,) are of questions that a fold of every seed kept back."""
    known = set.intersection(*(set(fold) for fold in learned.folds.values()))
    return np.isin(traces.question_id, list(known))


def _out_of_fold(judges: Sequence[HeadPolicy], traces: Traces) -> dict[float, Outcome]:
    """Returns, by price, the outcomes of the heads that never saw a question; the mean of seeds."""
    each = [swept(judge, traces, judge.head.config.halting.probing) or {} for judge in judges]
    return {price: average([outcomes[price] for outcomes in each]) for price in each[0]}


def _alike(networks: Sequence[HeadPolicy], cards: Sequence[HeadPolicy], traces: Traces) -> float:
    """Returns the share of points and prices at which cards decide as their networks do."""
    prices = price_grid(networks[0].head.config.observing)
    alike = []
    for network, card in zip(networks, cards, strict=True):
        theirs, own = network.signal(traces), card.signal(traces)
        alike += [
            (network.halts(theirs, price) == card.halts(own, price)).mean() for price in prices
        ]
    return float(np.mean(alike))


def _frontier(
    traces: Traces, outcomes: Mapping[float, Outcome] | None
) -> dict[float, float | None]:
    """Returns the saving at each of the EM losses; None where the policy does not reach that EM."""
    points = [
        (em_delta(traces, outcome), saving(traces, outcome))
        for outcome in (outcomes or {}).values()
    ]
    return {loss: saving_at_em(points, -loss) for loss in _LOSSES}


def _measured(
    frontiers: Mapping[str, Mapping[float, float | None]], alike: float, traces: Traces
) -> str:
    """Returns in words, with a table, what a card is worth beside what it was distilled from."""
    num = len(np.unique(traces.question_id))
    titles = [f"-{100 * loss:g}" if loss else "0" for loss in _LOSSES]
    lines = [
        f"Out of fold, on {num:,} questions: the card decides as the network does at {alike:.1%} "
        "of all points and prices.",
        "Saving %, at a change of exact match, in points, of:",
        f"  {'':<10}" + "".join(title.rjust(7) for title in titles),
    ]
    for name, savings in frontiers.items():
        cells = ["" if share is None else f"{100 * share:.1f}" for share in savings.values()]
        lines.append(f"  {name:<10}" + "".join(cell.rjust(7) for cell in cells))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main, ScorecardConfig)
