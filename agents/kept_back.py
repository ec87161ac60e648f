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

_FOLDER = "kept_back"


def save_kept_back(run: Path, cache: Path, folds: Folds, checkpoint: int) -> None:
    """Copies the folds' heads at one of CHECKPOINTS from `out_of_fold`'s cache into a run."""
    for seed, k in _each(folds):
        source = fold_folder(cache, seed, k) / str(checkpoint)
        shutil.copytree(source, _folder(run, seed, k), dirs_exist_ok=True)


def load_judges(run: Path, folds: Folds) -> list[Head]:
    """A run's head, with the heads of its folds for questions that it learned from.

    Returns:
        One a seed; the bare head alone if nothing was trained by folds.

    Raises:
        InputError: If a head is missing or damaged.
    """
    head = HaltHead.load(run)
    by_fold = {(seed, k): HaltHead.load(_folder(run, seed, k)) for seed, k in _each(folds)}
    judges = [
        Head(head, {question: by_fold[seed, k] for question, k in fold.items()})
        for seed, fold in folds.items()
    ]
    return judges or [Head(head)]


def _each(folds: Folds) -> list[tuple[int, int]]:
    return [(seed, k) for seed, fold in folds.items() for k in sorted(set(fold.values()))]


def _folder(run: Path, seed: int, k: int) -> Path:
    return run / _FOLDER / f"{seed}-{k}"
