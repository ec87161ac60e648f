"""The questions that a run learned from: there, only a head that did not see them is evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


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

    @property
    def trainings(self) -> list[tuple[int, int]]:
        """The seed and the fold of every training that kept questions back."""
        return [(seed, k) for seed, of in self.folds.items() for k in sorted(set(of.values()))]

    def to_json(self) -> dict[str, Any]:
        """The questions once, in order, and beside them their folds."""
        questions = sorted(self.questions)
        folds = {
            seed: [of.get(question) for question in questions] for seed, of in self.folds.items()
        }
        return {"questions": questions, "folds": folds}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Learned:
        """Rebuilds what `to_json` gave.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: If it is of another form.
        """
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
        return cls(frozenset(questions), folds)
