"""Trains a cascade of a small and a large LM, and says what it is worth.

    python cascade.py --small FOLDER --large FOLDER --price-ratio 4 --run-dir checkpoints/NAME

Both folders hold recorded traces of the same questions. At every decision point of the small LM the
cascade continues, answers, or escalates the question to the large LM; before the first token it
continues or escalates, at the thought's end it answers or escalates. It learns from the splits
train and dev, and is judged on the split test, beside either LM alone, routers that decide before
the first token, and confidence cascades. Both bills count, in tokens of the small LM; prompts do
not. A last table tells what it is worth to choose an LM and a way to halt for each question.

It writes a run folder: the cascade (cascade.json, cascade.safetensors), its halting head
(head.json, head.safetensors), the questions that it learned from, and the results (test.json).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import installed  # noqa: F401, tells what is missing

import numpy as np

from agents.balance import balance
from agents.cascade import CascadeFitConfig, Trained, fit_cascade
from command import run, write_json
from envs.replay import availability
from evaluation.cascade import (
    CascadeRow,
    Chosen,
    Played,
    format_rows,
    judge,
    questions_needed,
    strongest_of,
    title,
    verdict,
)
from evaluation.protocol import folds
from evaluation.selection import Asked, Selection, SelectionRow, format_selection
from haltwise import HaltHead, Halting, HeadConfig, InputError
from haltwise.errors import check_ranges
from haltwise.policy.cascade import Cascade, CascadeConfig, check_positive
from haltwise.policy.head import told_by
from haltwise.policy.question import QuestionReader
from lms.scorers import agreeing
from policies.cascade import CascadePolicy
from policies.course import Escalating, LargeAnswers
from policies.escalating import (
    ROUTERS,
    Always,
    Capped,
    ConfidenceCascade,
    Halted,
    Hindsight,
    Routed,
    Router,
)
from policies.head import HeadPolicy, price_grid
from policies.observing import cascade_prices, observing_at_prices
from runs import Learned, Run
from traces import Pairs, TraceFiles, Traces, check_recorded, read_pairs

# What begins the names of the policies of each kind that the verdict compares with.
_KINDS = {
    "the best router before the first token": "router",
    "the best confidence cascade": "confidence_cascade",
}


@dataclass(frozen=True, kw_only=True)
class CascadeCommandConfig:
    """Train a cascade of a small and a large LM on traces of both."""

    small: Path
    """Recorded traces of the small LM, a file or a folder."""
    large: Path
    """Recorded traces of the large LM on the same questions, likewise."""
    price_ratio: float
    """What a token of the large LM costs, in tokens of the small one. The cascade is valid for this
    ratio."""
    run_dir: Path
    """Run folder to write, a new one."""
    small_model: str | None = None
    """The LM to take from --small, by its name in the traces. Default: all that is there."""
    large_model: str | None = None
    """Likewise from --large."""
    head: Path | None = None
    """Run folder of a head for the small LM, which then stays as it is. Test questions that it
    learned from are left out. Default: a head is trained together with the rest."""
    large_head: Path | None = None
    """Run folder of a head that halts the large LM, too, at the price of its own tokens. Test
    questions that it learned from are left out. Default: the large LM runs to its end."""
    test: str = "test"
    """The split that the cascade is judged on; it learns from all other questions."""
    folds: int = 5
    """Number of folds of the cross-validation that numbers are chosen by."""
    seed: int = 0
    """Seed of everything random."""
    fit: CascadeFitConfig = field(default_factory=CascadeFitConfig)
    """The training."""


def main(config: CascadeCommandConfig) -> Path:
    """Trains a cascade, freezes it and what it is compared with, and judges all on test questions.

    Returns:
        The run folder.

    Raises:
        InputError: If something that was passed cannot be used.
    """
    _check(config)
    material = _Material.of(config)
    by_fold = folds(material.known.small.question_id, config.folds, config.seed)
    fold = dict(zip(material.known.small.question_id.tolist(), by_fold.tolist(), strict=True))
    print(f"{len(material.known):,} pairs to learn from, {len(material.fresh):,} to judge on.")
    trainings = []
    for k in range(config.folds):
        print(f"fold {k + 1} of {config.folds}", flush=True)
        trainings.append(material.train(config, by_fold != k))
    trained = material.train(config, np.ones(len(material.known), dtype=bool))
    kept_back = {name: trainings[k] for name, k in fold.items()}
    policies = _policies(config, material, trained, fold, kept_back)
    chosen = [
        Played.of(policy, material.known, material.large_known, config.price_ratio).choose()
        for policy in policies
    ]
    rows = judge(material.fresh, material.large_fresh, config.price_ratio, chosen, "cascade")
    strongest = {kind: strongest_of(chosen, begins) for kind, begins in _KINDS.items()}
    selection = _selection(config, material, trained, chosen)
    return _write(config, material, trained, rows, chosen, strongest, selection)


def _check(config: CascadeCommandConfig) -> None:
    """Refuses settings before any work is done.

    Raises:
        InputError: If one cannot be used.
    """
    check_positive("--price-ratio", config.price_ratio)
    check_ranges(config, {"folds": (config.folds >= 2, "at least 2")})
    config.fit.check("fit.")
    if config.run_dir.exists():
        raise InputError(f"{config.run_dir} exists: expected a new folder")


@dataclass(frozen=True)
class _Material:
    """What a cascade is made from."""

    known: Pairs
    """The pairs to learn from and to choose on."""
    fresh: Pairs
    """The pairs to judge on."""
    large_known: LargeAnswers
    """What the large LM answers to them."""
    large_fresh: LargeAnswers
    """Likewise."""
    large_head: HaltHead | None
    """The head that halts the large LM, if one does."""
    head: HaltHead | HeadConfig
    """The head of the small LM, or the conditions of one."""
    told: CascadeConfig
    """The conditions of the cascade; its reader and its price come from training."""

    @classmethod
    def of(cls, config: CascadeCommandConfig) -> _Material:
        """Reads pairs and heads.

        Raises:
            InputError: If they cannot be read, or do not fit each other.
        """
        models = config.small_model, config.large_model
        pairs = read_pairs(config.small, config.large, *models, agreeing)
        is_fresh = pairs.small.split == config.test
        if is_fresh.all() or not is_fresh.any():
            found = ", ".join(repr(str(name)) for name in np.unique(pairs.small.split))
            raise InputError(f"--test is {config.test!r}, expected one of several splits: {found}")
        fresh = is_fresh.copy()
        for folder in (config.head, config.large_head):
            if folder is not None:
                fresh &= ~_learned_from(Run(folder), config.small, pairs.small)
        if not fresh.any():
            raise InputError("a head learned from all test questions, expected others")
        known = pairs.select(~is_fresh)
        large_head = None if config.large_head is None else Run(config.large_head).head()
        if large_head is not None:
            check_recorded(large_head.config, pairs.large.recorder, config.large)
        told = CascadeConfig(
            reader=QuestionReader(),
            price_ratio=config.price_ratio,
            default_price=1.0,
            small_lm=", ".join(np.unique(pairs.small.model).tolist()),
            large_lm=", ".join(np.unique(pairs.large.model).tolist()),
            large_head="" if large_head is None else large_head.digest,
            traces=f"{known.small.digest} {known.large.digest}",
            command=shlex.join(sys.argv),
        )
        known_large, fresh_large = (
            _answers(some, large_head) for some in (known, pairs.select(fresh))
        )
        head = _head(config, known)
        return cls(known, pairs.select(fresh), known_large, fresh_large, large_head, head, told)

    def answers(self, pairs: Pairs) -> LargeAnswers:
        """Returns what the large LM answers to some pairs."""
        return _answers(pairs, self.large_head)

    def train(self, config: CascadeCommandConfig, rows: np.ndarray) -> Trained:
        """Trains on some of the known pairs."""
        some, large = self.known.select(rows), self.large_known.select(rows)
        return fit_cascade(some, large, self.head, self.told, config.fit, config.seed)


def _learned_from(run: Run, path: Path, traces: Traces) -> np.ndarray:
    """Returns which of some traces (N,) of a file are of questions that a run learned from."""
    learned, files = run.learned(), TraceFiles.open(path, agreeing)
    ids = files.question_ids(files.rows_of_questions(learned.questions, learned.texts))
    return np.isin(traces.question_id, list(ids))


def _head(config: CascadeCommandConfig, known: Pairs) -> HaltHead | HeadConfig:
    """Returns the small LM's head, or the conditions of one that reads all that it can.

    Raises:
        InputError: If the head does not fit the traces.
    """
    if config.head is not None:
        head = Run(config.head).head()
        check_recorded(head.config, known.small.recorder, config.small)
        return head
    halting = Halting.of_recorder(known.small.recorder)
    groups = availability(known.small, halting).groups
    prices = cascade_prices(known.large, config.price_ratio)
    observing = observing_at_prices(known.small, groups, halting, prices)
    lm = ", ".join(np.unique(known.small.model).tolist())
    return HeadConfig(
        observing,
        halting,
        default_price=0.0,
        lm=lm,
        **told_by(known.small.recorder),
        traces=known.small.digest,
        command=shlex.join(sys.argv),
    )


def _answers(pairs: Pairs, head: HaltHead | None) -> LargeAnswers:
    """Returns what the large LM answers, halted by a head if there is one."""
    if head is None:
        return LargeAnswers.unhalted(pairs.large)
    policy = HeadPolicy(head)
    signal = policy.signal(pairs.large)
    prices = np.array(price_grid(head.config.observing))
    halts = np.stack([policy.halts(signal, price) for price in prices.tolist()])
    return LargeAnswers.halted(pairs.large, halts, prices, head.config.halting.probing)


def _policies(
    config: CascadeCommandConfig,
    material: _Material,
    trained: Trained,
    fold: Mapping[str, int],
    kept_back: Mapping[str, Trained],
) -> list[Escalating]:
    """Returns the cascade and what it is compared with, each with what kept questions back."""
    cascade = CascadePolicy(trained.cascade, {name: of.cascade for name, of in kept_back.items()})
    head = HeadPolicy(trained.alone, {name: of.alone for name, of in kept_back.items()})
    large = material.large_known.choices
    routers = [Router(model, material.known, fold) for model in ROUTERS]
    probing = trained.alone.config.halting.probing
    prices = price_grid(trained.alone.config.observing)
    policies: list[Escalating] = [cascade, Always("always_small", large)]
    policies += [Always("always_large", large), Capped(), Halted(head)]
    policies += [Routed(router, large, by) for router in routers for by in (None, head)]
    policies += [ConfidenceCascade(large)]
    if probing == "always":  # else the head's answers are not seen before it halts
        policies += [ConfidenceCascade(large, head)]
    return [*policies, Hindsight(material.answers, config.price_ratio, prices, probing)]


def _own_price(chosen: Sequence[Chosen]) -> float | None:
    """Returns the cascade's price at the strictest gate that it is within; None if at none."""
    points = next(of for of in chosen if of.policy.name == "cascade").points
    return next((of[0] for _, of in sorted(points.items()) if of is not None), None)


def _selection(
    config: CascadeCommandConfig,
    material: _Material,
    trained: Trained,
    chosen: Sequence[Chosen],
) -> list[SelectionRow]:
    """Judges the cascade and other ways to choose a strategy, at the prices of training."""
    told, observing = trained.alone.config, trained.cascade.head.config.observing
    prices = price_grid(observing)[::2]
    known = Asked(material.known, material.large_known, config.price_ratio)
    fresh = Asked(material.fresh, material.large_fresh, config.price_ratio)
    price = _own_price(chosen) or float(np.median(prices))
    weights = balance(np.array(prices), observing)
    judged, num = Selection(known, fresh, told, prices, weights, price), len(material.known)
    return judged.rows({of.policy.name: of for of in chosen}, [num // 4, num // 2, num])


def _write(
    config: CascadeCommandConfig,
    material: _Material,
    trained: Trained,
    rows: Sequence[CascadeRow],
    chosen: Sequence[Chosen],
    strongest: Mapping[str, str],
    selection: Sequence[SelectionRow],
) -> Path:
    """Writes the run folder, and prints the tables and the verdict."""
    opened = Run(config.run_dir)
    price = _own_price(chosen)
    cascade = trained.cascade
    if price is not None:
        told = replace(cascade.config, default_price=price)
        cascade = Cascade(cascade.head, told, cascade.weights)
    num_questions = len(np.unique(material.fresh.small.question_id))
    needed = {f"{row.policy} {row.gate:g}": questions_needed(row, num_questions) for row in rows}
    sentence = verdict(rows, strongest, config.price_ratio, num_questions)
    opened.begin({"traces": str(config.small.resolve()), "config": _as_json(config)})
    opened.save_learned(Learned(frozenset(material.known.small.question_id.tolist())))
    cascade.save(opened.folder)
    write_json(
        opened.test_json,
        {
            "verdict": sentence,
            "price_ratio": config.price_ratio,
            "questions": num_questions,
            "strongest": dict(strongest),
            "rows": [asdict(row) for row in rows],
            "questions_needed": needed,
            "selection": [asdict(row) for row in selection],
        },
    )
    print(format_rows(rows))
    print("Both bills count, probes included, in tokens of the small LM; prompts do not.")
    for kind, name in strongest.items():
        print(f"Out of fold, {kind} is: {title(name)}.")
    print(format_selection(selection))
    print(f"wrote {opened.folder}")
    print(sentence)
    return opened.folder


def _as_json(config: CascadeCommandConfig) -> dict[str, object]:
    """Returns the settings as JSON can hold them."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
    }


if __name__ == "__main__":
    run(main, CascadeCommandConfig)
