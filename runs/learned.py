"""The questions that a run learned from: there, only a head that did not see them is evidence."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from haltwise import InputError

_FILE = "questions.json"


@dataclass(frozen=True)
class Learned:
    """What a head was learned from, and which folds kept what back."""

    questions: frozenset[str]
    """Question ids; of an adapted head also those that it was adapted to."""
    folds: dict[int, dict[str, int]] = field(default_factory=dict)
    """By seed, the fold that kept a question back, if one did; empty without training by folds."""

    def among(self, question_id: NDArray[np.str_]) -> NDArray[np.bool_]:
        """Which of some questions (N,) were learned from."""
        return np.isin(question_id, list(self.questions))


def save_learned(run: Path, learned: Learned) -> None:
    """Writes what a head was learned from into its run folder."""
    questions = sorted(learned.questions)
    folds = {
        seed: [of.get(question) for question in questions] for seed, of in learned.folds.items()
    }
    (run / _FILE).write_text(json.dumps({"questions": questions, "folds": folds}) + "\n")


def load_learned(run: Path) -> Learned:
    """Reads what a run was learned from.

    Raises:
        InputError: If the run does not tell, or the file is not readable.
    """
    path = run / _FILE
    try:
        content = json.loads(path.read_text())
        questions = content["questions"]
        if not isinstance(questions, list) or not questions:
            raise ValueError("no list of questions")
        questions = [str(question) for question in questions]
        folds = {
            int(seed): {
                question: int(k) for question, k in zip(questions, of, strict=True) if k is not None
            }
            for seed, of in content["folds"].items()
        }
    except FileNotFoundError:
        raise InputError(f"no {_FILE} in {run}: expected a folder written by train.py") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not readable ({error!r})") from None
    return Learned(frozenset(questions), folds)
