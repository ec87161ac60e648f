"""Makes a scorecard of a run's head: a few rules with points, which a person can use.

    python scorecard.py --head RUN --run-dir NEW
    python scorecard.py --head RUN --run-dir NEW --rules 8

A thought is halted where the points of the rules that hold reach a bar, which falls as the price
rises. The card is a head like any other: served, evaluated, certified and explained by the same
commands. It learns from the traces of the run, test questions aside; what it is worth is told out
of fold, by cards that are made of the heads of the run's folds.

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
from numpy.typing import NDArray

from agents.balance import balance
from agents.learn_scorecard import learn_scorecard
from agents.scorecard import format_card
from command import progress, run, whole_folder
from evaluation.compare import parameter_free, swept
from evaluation.frontier import saving_at_em
from evaluation.frozen import Choice, choose_points
from evaluation.honest import price_words
from evaluation.outcome import Outcome, average, em_delta, saving
from evaluation.protocol import own_price
from evaluation.rows import Interval
from evaluation.trials import balanced_returns, compare_returns
from haltwise import HaltHead, InputError
from haltwise.errors import check_ranges
from haltwise.policy.halting import Probing
from lms.scorers import agreeing
from policies import baselines
from policies.head import HeadPolicy, judging_heads, price_grid
from runs import Learned, Run
from traces import MAX_TRACES, TraceFiles, Traces

# The EM losses at which frontiers are read, and the baseline that is beside the heads.
_LOSSES = (0.0, 0.005, 0.01, 0.02)
_BESIDE = baselines.Evidence()


@dataclass(frozen=True)
class ScorecardConfig:
    """Make a scorecard of a run's head, which a person can read."""

    head: Path
    """Run folder, written by train.py, with the heads of its folds."""
    run_dir: Path
    """Run folder to write; it must not exist."""
    rules: int = 15
    """The most rules."""
    traces: Path | None = None
    """The traces that the run learned from, if they lie elsewhere now."""


def main(config: ScorecardConfig) -> Path:
    """Makes a card of a head, tells what the card is worth, and writes it as a new run.

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
    card = learn_scorecard(head, traces, config.rules)
    own = card.to_head(replace(head.config, command=shlex.join(sys.argv)))
    judged_on = traces.select(_kept_back_by_all(traces, learned))
    judges = judging_heads(own, cards, learned.folds)
    networks = judging_heads(head, kept_back, learned.folds)
    outcomes = _out_of_fold(judges, judged_on)
    choice = _choose(outcomes, judged_on, head.config.halting.probing)
    worth = _Worth.of(judges, outcomes, networks, judged_on)
    price, by_segment = own_price(choice.gates), choice.segment_prices
    priced = replace(own.config, default_price=price, segment_prices=by_segment)

    settings = json.loads(json.dumps(asdict(config), default=str))
    beginning = {"command": own.config.command, "config": settings, "traces": str(path)}
    with whole_folder(config.run_dir) as folder:
        written = Run(folder)
        written.begin(beginning | {"target": traces.target})
        written.save_kept_back(cards)
        written.save_learned(learned)
        written.save_operating_points(choice.gates)
        written.save_scorecard(card.to_json(head.config.observing) | asdict(worth))
        written.save_head(HaltHead(priced, own.weights))
    print(format_card(card, head.config.observing, price))
    print(worth.in_words(len(np.unique(judged_on.question_id))))
    print(price_words(price, by_segment, choice.honest, judged_on))
    print(f"wrote {config.run_dir}")
    return config.run_dir


def _read(path: Path, old: Run, head: HaltHead, learned: Learned) -> Traces:
    """Reads the traces that a run learned from.

    Raises:
        InputError: If they are not there any more as they were.
    """
    files = TraceFiles.of_head(path, head.config, agreeing)
    rows = files.rows_of_questions(learned.questions) & (files.split != "test")
    if files.digest(rows) != head.config.traces:
        raise InputError(f"{path}: not the traces that {old.folder} learned from, expected those")
    return files.read(files.sample(rows, old.beginning().settings.get("max_traces", MAX_TRACES)))


def _by_fold(
    kept_back: Mapping[tuple[int, int], HaltHead], learned: Learned, traces: Traces, num_rules: int
) -> dict[tuple[int, int], HaltHead]:
    """Makes cards of the heads of the folds, of traces that each learned from; by seed and fold."""
    cards = {}
    for (seed, k), head in progress(kept_back.items(), "folds"):
        fold = learned.folds[seed]
        own = np.array([fold.get(question) != k for question in traces.question_id.tolist()])
        cards[seed, k] = learn_scorecard(head, traces.select(own), num_rules).to_head(head.config)
    return cards


def _kept_back_by_all(traces: Traces, learned: Learned) -> NDArray[np.bool_]:
    """Returns which traces (N,) are of questions that a fold of every seed kept back."""
    known = set.intersection(*(set(fold) for fold in learned.folds.values()))
    return np.isin(traces.question_id, list(known))


def _out_of_fold(judges: Sequence[HeadPolicy], traces: Traces) -> dict[float, Outcome]:
    """Returns, by price, the outcomes of the heads that never saw a question; the mean of seeds."""
    each = [swept([judge], traces, judge.head.config.halting.probing) or {} for judge in judges]
    return {price: average([outcomes[price] for outcomes in each]) for price in each[0]}


def _choose(outcomes: Mapping[float, Outcome], traces: Traces, probing: Probing) -> Choice:
    """Chooses the operating points of the cards, by price, and of the baselines."""
    others = {policy.name: swept([policy], traces, probing) for policy in baselines.BASELINES}
    return choose_points(traces, {"head": outcomes, **others}, parameter_free(traces, probing))


@dataclass(frozen=True)
class _Worth:
    """What cards are worth beside the heads that they were made of, out of fold."""

    decides_as_the_network: float
    """The share of all points and prices."""
    return_beside_the_network: tuple[float, Interval]
    """How much larger the mean return is over prices that count alike, with its interval."""
    savings_at_em_losses: dict[str, dict[float, float | None]]
    """By policy and loss of exact match, the saving; None if it does not reach that EM."""

    @classmethod
    def of(
        cls,
        cards: Sequence[HeadPolicy],
        outcomes: Mapping[float, Outcome],
        networks: Sequence[HeadPolicy],
        traces: Traces,
    ) -> _Worth:
        """Compares cards, with their outcomes by price, and heads, one of each for a training."""
        observing, halting = networks[0].head.config.observing, networks[0].head.config.halting
        prices = price_grid(observing)
        alike = []
        for card, network in zip(cards, networks, strict=True):
            own, theirs = card.signal(traces), network.signal(traces)
            alike += [(card.halts(own, at) == network.halts(theirs, at)).mean() for at in prices]
        of_networks = _out_of_fold(networks, traces)
        weights = balance(np.array(prices), observing)
        returns = [balanced_returns(each, weights) for each in (outcomes, of_networks)]
        beside = swept([_BESIDE], traces, halting.probing)
        frontiers = {"scorecard": outcomes, "network": of_networks, _BESIDE.name: beside or {}}
        return cls(
            float(np.mean(alike)),
            compare_returns(traces.question_id, *returns),
            {name: _savings(traces, each) for name, each in frontiers.items()},
        )

    def in_words(self, num_questions: int) -> str:
        """Returns all of it for a person, with a table."""
        more, (low, high) = self.return_beside_the_network
        titles = [f"-{100 * loss:g}" if loss else "0" for loss in _LOSSES]
        lines = [
            f"Out of fold, on {num_questions:,} questions: the card decides as the network does at "
            f"{self.decides_as_the_network:.1%} of all points and prices.",
            f"The mean return over all prices is {more:+.3f} [{low:+.3f}, {high:+.3f}] beside that "
            "of the network.",
            "Saving %, at a change of exact match, in points, of:",
            f"  {'':<10}" + "".join(title.rjust(7) for title in titles),
        ]
        for name, savings in self.savings_at_em_losses.items():
            cells = ["" if share is None else f"{100 * share:.1f}" for share in savings.values()]
            lines.append(f"  {name:<10}" + "".join(cell.rjust(7) for cell in cells))
        return "\n".join(lines) + "\n"


def _savings(traces: Traces, outcomes: Mapping[float, Outcome]) -> dict[float, float | None]:
    """Returns the saving at each of the EM losses, by the outcomes of a policy's parameters."""
    points = [(em_delta(traces, each), saving(traces, each)) for each in outcomes.values()]
    return {loss: saving_at_em(points, -loss) for loss in _LOSSES}


if __name__ == "__main__":
    run(main, ScorecardConfig)
