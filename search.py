"""Searches for better settings of a training, with exact match and tokens as two objectives.

    python search.py --traces FILE_OR_FOLDER --run-dir DIR
    python search.py --traces FILE_OR_FOLDER --run-dir DIR --num 80      goes on with it

optuna proposes candidates: settings of the start from traces, which does most of the work of a
training, the width of the network, and a feature group to leave out. Each is trained fold by fold
on two thirds of the train and dev questions, and becomes a point of exact match and tokens at each
of some prices. The best one is then set beside the defaults on the last third, by heads that have
learned from all other questions. A search that was killed goes on by the same command.

It writes into the folder: config.json, search.sqlite (all candidates, for optuna), and what it has
found as search.json and as a page, search.html.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import installed  # noqa: F401, tells what is missing

import numpy as np
from numpy.typing import NDArray

from agents.balance import balance
from agents.fit import FitConfig, out_of_fold
from command import alone, run, warn, write_json
from envs.replay import availability
from evaluation.outcome import Outcome, average, sweep
from evaluation.protocol import folds
from evaluation.search import Judged, Point, Searched, Tried, write_search
from haltwise import Halting, HeadConfig, InputError, feature_names
from haltwise.errors import check_ranges
from lms.scorers import agreeing
from policies.head import price_grid
from policies.observing import observing_of
from runs import Run
from traces import MAX_TRACES, TraceFiles, Traces
from traces.soundness import check_sound

if TYPE_CHECKING:  # optuna is loaded where it is used
    from agents.candidates import Candidate, Candidates, Found

# One of so many parts of the questions is kept from the search, to judge what it finds.
_NUM_PARTS = 3
# Every such price of a head's grid is one at which candidates are tried.
_EVERY = 6
# Fewer candidates than these tell nothing of what a setting does.
_FEWEST_TO_RANK = 10


@dataclass(frozen=True)
class SearchConfig:
    """Search for better settings of a training on recorded traces."""

    traces: Path
    """Recorded traces, a file or a folder; test questions are left alone."""
    run_dir: Path
    """Folder to write. One with a search of the same settings goes on."""
    num: int = 40
    """The number of candidates in all, the defaults among them."""
    groups: tuple[str, ...] | None = None
    """Feature groups to search among. Default: all that the traces have the signals for."""
    folds: int = 3
    """Folds in which each candidate is trained."""
    seeds: int = 3
    """How often the best candidate and the defaults are trained to be judged, each time with a new
    division into folds."""
    seed: int = 0
    """Seed of everything random."""
    max_traces: int = MAX_TRACES
    """The most traces to hold in memory; of more, a sample by question."""


def main(config: SearchConfig) -> Path:
    """Tries candidates, judges the best one, and writes what was found.

    Returns:
        The folder.

    Raises:
        InputError: If something that was passed cannot be used, or optuna is not installed.
    """
    _check(config)
    files = TraceFiles.open(config.traces.resolve(), agreeing)
    for doubt in check_sound(files):
        warn(doubt)
    traces = files.read(files.sample(files.rows("train", "dev"), config.max_traces))
    material = _Material.of(traces, config)
    opened = _open(config, traces.digest)
    with alone(opened.folds):
        candidates = _candidates(opened, material, config)
        _try_all(candidates, opened, material, config)
        searched = _searched(candidates, opened, material, config)
        write_json(opened.search_json, searched.to_json())
        write_search(searched, opened.search_page)
    shutil.rmtree(opened.folds)
    print(searched.in_words)
    print(f"Candidate {searched.best}: {searched.options}" if searched.best else "Keep them.")
    print(f"wrote {opened.search_page}")
    return opened.folder


def _check(config: SearchConfig) -> None:
    """Refuses settings that nothing can be searched with, and a search without optuna.

    Raises:
        InputError: If they are such, or it is missing.
    """
    if find_spec("optuna") is None:
        raise InputError("a search needs optuna: run pip install -e '.[search]' in the clone")
    least = {"num": 1, "folds": 2, "seeds": 1, "seed": 0, "max_traces": 1}
    check_ranges(
        config, {name: (getattr(config, name) >= n, f"at least {n}") for name, n in least.items()}
    )
    most = 2**31 - 1 - config.seeds
    check_ranges(config, {"seed": (config.seed <= most, f"0 to {most}")})
    if config.groups is not None:
        try:
            feature_names(config.groups)
        except InputError as error:
            raise InputError(f"--groups: {error}") from None


@dataclass(frozen=True)
class _Material:
    """What is searched on, and what is kept from it."""

    traces: Traces
    """All of the train and dev questions."""
    kept: NDArray[np.bool_]
    """(N,) which of them are kept from the search."""
    halting: Halting
    groups: tuple[str, ...]
    """The feature groups that there are."""

    @classmethod
    def of(cls, traces: Traces, config: SearchConfig) -> _Material:
        """Divides the traces.

        Raises:
            InputError: If there are too few questions, or the groups do not fit the traces.
        """
        halting = Halting.of_recorder(traces.recorder, None)
        groups = config.groups or availability(traces, halting).groups
        halting.check_groups(groups)
        least = _NUM_PARTS * config.folds
        num = len(np.unique(traces.question_id))
        if num < least:
            raise InputError(
                f"{config.traces}: {num} train and dev questions, expected at least {least}"
            )
        kept = folds(traces.question_id, _NUM_PARTS, config.seed) == 0
        return cls(traces, kept, halting, groups)

    @property
    def searched(self) -> Traces:
        """The traces that candidates are tried on."""
        return self.traces.select(~self.kept)

    def head(self, traces: Traces, groups: tuple[str, ...]) -> HeadConfig:
        """Returns what a head observes that learns from some traces."""
        return HeadConfig(observing_of(traces, groups, self.halting), self.halting, 0.0)


def _open(config: SearchConfig, digest: str) -> Run:
    """Makes the folder and writes down what is about to be done, or goes on with a search.

    Raises:
        InputError: If the folder holds something else.
    """
    opened = Run(config.run_dir)
    settings = json.loads(json.dumps(asdict(config), default=str)) | {"digest": digest}
    # More candidates may be asked for, and a better judgement of the best.
    same = {k: v for k, v in settings.items() if k not in ("num", "seeds", "run_dir", "traces")}
    if not opened.folder.exists():
        traces = str(config.traces.resolve())
        opened.begin({"command": shlex.join(sys.argv), "config": same, "traces": traces})
        return opened
    try:
        begun_with = opened.beginning().settings
    except InputError:
        begun_with = {}
    if begun_with != same:
        raise InputError(
            f"{opened.folder} holds no search of these settings and traces: expected a new "
            "folder, or the same ones"
        )
    return opened


def _candidates(opened: Run, material: _Material, config: SearchConfig) -> Candidates:
    """Opens the candidates of a search.

    Raises:
        InputError: If the file is damaged.
    """
    from agents.candidates import Candidates

    prices = price_grid(material.head(material.searched, material.groups).observing)
    ends = (prices[0], prices[-1])
    return Candidates(opened.search_storage, material.groups, ends, config.seed)


def _try_all(
    candidates: Candidates, opened: Run, material: _Material, config: SearchConfig
) -> None:
    """Tries candidates until there are as many as are asked for."""
    searched = material.searched
    fold = {config.seed: folds(searched.question_id, config.folds, config.seed)}
    while candidates.num < config.num:
        candidate = candidates.propose()
        head = material.head(searched, candidate.groups(material.groups))
        prices = sorted({*price_grid(head.observing)[::_EVERY], candidate.price})
        cache = opened.folds / f"tried-{candidate.number}"
        outcomes = _outcomes(searched, fold, head, candidate.fit, prices, cache)
        found = {
            price: (float(at.em.mean()), float(at.cost.mean())) for price, at in outcomes.items()
        }
        candidates.tell(candidate, found)
        shutil.rmtree(cache)
        area = Tried(candidate.number, {}, _points(found, searched, set())).area
        print(f"candidate {candidate.number} of {config.num}: area {100 * area:.3f}", flush=True)


def _outcomes(
    traces: Traces,
    fold: dict[int, NDArray[np.int64]],
    head: HeadConfig,
    fit: FitConfig,
    prices: Sequence[float],
    cache: Path,
) -> dict[float, Outcome]:
    """Returns, by price, what starts from traces come to out of fold, the mean over the seeds."""
    decided = out_of_fold(traces, fold, head, fit, prices, cache, share=0.0)
    each = [
        sweep(traces, dict(zip(prices, at[0], strict=True)), head.halting.probing)
        for at in decided.values()
    ]
    return {price: average([swept[price] for swept in each]) for price in prices}


def _points(found: Found, traces: Traces, on_front: set[float]) -> list[Point]:
    """Returns the points of a candidate, by what it comes to at each price."""
    em, tokens = float(traces.final_correct.mean()), float(traces.num_tokens.mean())
    return [
        Point(price, at, spent, at - em, 1 - spent / tokens, price in on_front)
        for price, (at, spent) in found.items()
    ]


def _searched(
    candidates: Candidates, opened: Run, material: _Material, config: SearchConfig
) -> Searched:
    """Gathers what was found, and judges the best candidate."""
    searched, front = material.searched, candidates.front()
    found = candidates.found()
    tried = [
        Tried(
            one.number,
            one.settings,
            _points(at, searched, {price for number, price in front if number == one.number}),
        )
        for one, at in found
    ]
    areas = [one.area for one in tried]
    best = found[int(np.argmax(areas))][0]
    return Searched(
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        traces=str(config.traces),
        num_questions=len(np.unique(searched.question_id)),
        em=float(searched.final_correct.mean()),
        tokens=float(searched.num_tokens.mean()),
        tried=tried,
        best=best.number,
        options=best.options(material.groups),
        importances=candidates.importances(areas) if len(tried) >= _FEWEST_TO_RANK else {},
        judged=_judge([found[0][0], best], opened, material, config) if best.number else None,
    )


def _judge(
    two: Sequence[Candidate], opened: Run, material: _Material, config: SearchConfig
) -> Judged:
    """Sets the best candidate beside the defaults on the questions that were kept from the search.

    Heads learn from all other questions, out of fold.
    """
    print("judging the best candidate on the questions that the search did not see", flush=True)
    traces, kept = material.traces, material.kept
    seeds = range(config.seed, config.seed + config.seeds)
    fold = {seed: folds(traces.question_id, config.folds, seed) for seed in seeds}
    outcomes = []
    for one in two:
        head = material.head(traces, one.groups(material.groups))
        prices, cache = price_grid(head.observing), opened.folds / f"judged-{one.number}"
        swept = _outcomes(traces, fold, head, one.fit, prices, cache)
        outcomes.append({price: at.select(kept) for price, at in swept.items()})
    weights = balance(np.array(prices), head.observing)
    return Judged.of(traces.select(kept), outcomes[0], outcomes[1], weights)


if __name__ == "__main__":
    run(main, SearchConfig)
