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
    """Unique and stable: the same text has the same id."""
    task: str
    """Data set."""
    segment: str
    """Group within the task, such as its difficulty; empty if there is none."""
    text: str
    """What is asked, before any LM's template."""
    gold: str
    """Reference answer; of the scorers text and strict there may be several, one a line."""
    split: str
    """train, dev or test."""
    scorer: str = "short"
    """The rule by which its answers are read and compared: a key of
    `haltwise.policy.answers.READERS`."""

    def is_right(self, answer: str) -> bool:
        """Whether an answer, as it was read, is the gold answer; "" never is.

        Raises:
            InputError: The gold answer cannot be compared with anything.
        """
        return scorer_of(self.scorer)(answer, self.gold)


def digest_of(text: str) -> str:
    """Names a question by what it asks, whatever order or file it comes from."""
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(digest: str) -> str:
    """The split of a question: a tenth is test, a tenth dev.

    The text alone decides, so no draw and no file can put one question in two of them.
    """
    return {0: "test", 1: "dev"}.get(int(digest, 16) % 10, "train")
