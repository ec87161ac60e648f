"""Questions, and which split each belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lms.scorers import scorer_of

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Question:
    """One question: what is asked, the answer it should get, and where it belongs."""

    question_id: str
    """The name of the question, unique and stable: the same text has the same id."""
    task: str
    """The name of the data set that the question belongs to."""
    segment: str
    """The group of the question within its task, such as its difficulty; empty if there is none."""
    text: str
    """The text that is asked, before any LM's template is put around it."""
    gold: str
    """The gold answer; for the scorers text and strict there may be several, one a line."""
    split: str
    """The split that the question belongs to: train, dev or test."""
    scorer: str = "short"
    """The rule by which its answers are read and compared: a key of
    `haltwise.policy.answers.READERS`."""

    def is_right(self, answer: str) -> bool:
        """Says whether an answer, as it was read, is the gold answer; "" never is.

        Raises:
            InputError: If the gold answer cannot be compared with anything.
        """
        return scorer_of(self.scorer)(answer, self.gold)


def question_digest(text: str) -> str:
    """Returns a hash of what a question asks: a name that no order and no file changes."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(digest: str) -> str:
    """Returns the split of a question: of all questions a tenth is test, and a tenth is dev.

    The text alone decides, so no draw and no file can put one question into two splits.

    Args:
        digest: The question's `question_digest`.
    """
    return {0: "test", 1: "dev"}.get(int(digest, 16) % 10, "train")
