"""Heads that never saw a question, to judge a run's policy on questions that it learned from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from agents.baselines import Head
from agents.fit import fold_folder
from haltwise import HaltHead

#: By seed and question id, the fold that kept the question back.
Folds = Mapping[int, Mapping[str, int]]


def save_kept_back(run: Path, cache: Path, folds: Folds, checkpoint: int) -> None:
    """Copies the folds' heads at one of CHECKPOINTS from `out_of_fold`'s cache into a run."""
    for seed, k in _each(folds):
        source = fold_folder(cache, seed, k) / str(checkpoint)
        shutil.copytree(source, kept_back_folder(run, seed, k), dirs_exist_ok=True)


def load_kept_back(run: Path, folds: Folds) -> dict[tuple[int, int], HaltHead]:
    """The heads of a run's folds, by seed and fold.

    Raises:
        InputError: If one is missing or damaged.
    """
    return {at: HaltHead.load(kept_back_folder(run, *at)) for at in _each(folds)}


def load_judges(run: Path, folds: Folds) -> list[Head]:
    """A run's head, with the heads of its folds for questions that it learned from.

    Returns:
        One a seed; the bare head alone if nothing was trained by folds.

    Raises:
        InputError: If a head is missing or damaged.
    """
    head, kept_back = HaltHead.load(run), load_kept_back(run, folds)
    judges = [
        Head(head, {question: kept_back[seed, k] for question, k in fold.items()})
        for seed, fold in folds.items()
    ]
    return judges or [Head(head)]


def kept_back_folder(run: Path, seed: int, k: int) -> Path:
    """Where the head of a fold is."""
    return run / "kept_back" / f"{seed}-{k}"


def _each(folds: Folds) -> list[tuple[int, int]]:
    return [(seed, k) for seed, fold in folds.items() for k in sorted(set(fold.values()))]
