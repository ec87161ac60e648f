"""The questions that a run learned from: on those, only a head that never saw them is evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Learned:
    """The questions that a head learned from, and which folds kept which of them back."""

    questions: frozenset[str]
    """Question ids; an adapted head's include those that it was adapted to."""
    folds: dict[int, dict[str, int]] = field(default_factory=dict)
    """By seed and question id, the fold that kept the question back, if one did; empty without
    training by folds."""
    texts: frozenset[str] = frozenset()
    """Digests of the questions' texts, see `traces.TraceFiles.texts`, as far as they were recorded:
    a question is the same under another id."""

    def among(self, question_id: NDArray[np.str_]) -> NDArray[np.bool_]:
        """Returns which of some questions (N,) the head learned from."""
        return np.isin(question_id, list(self.questions))

    @property
    def trainings(self) -> list[tuple[int, int]]:
        """The seed and the fold of every training that kept questions back."""
        return [(seed, k) for seed, of in self.folds.items() for k in sorted(set(of.values()))]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object of the questions, in order, and by seed the fold of each."""
        questions = sorted(self.questions)
        folds = {
            seed: [of.get(question) for question in questions] for seed, of in self.folds.items()
        }
        return {"questions": questions, "folds": folds, "texts": sorted(self.texts)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Learned:
        """Rebuilds what `to_json` returned.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: If the content is of another form.
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
        texts = frozenset(str(text) for text in content.get("texts", ()))
        return cls(frozenset(questions), folds, texts)
