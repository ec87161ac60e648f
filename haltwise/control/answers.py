"""An answer of an audit, and what has to be the same in two that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from haltwise.policy.answers import READERS, normal_text


@dataclass(frozen=True)
class GivenAnswer:
    """An answer of an audit."""

    read: str
    """As the head's answer rule reads it, the same for equal answers; empty if it reads none."""
    text: str
    """Its text, which counts where nothing is read."""
    num_tokens: int
    """Tokens that are generated for it, its thought's included, but not those of earlier looks."""
    logprobs: Sequence[float] = ()
    """Natural log of the probability of each of its tokens; empty if unknown."""

    @classmethod
    def of_label(cls, gold: str, answer_rule: str) -> GivenAnswer:
        """Returns the right answer that somebody tells, as an answer rule reads it."""
        return cls(READERS[answer_rule](f"\\boxed{{{gold}}}"), gold, 0)

    @property
    def compared(self) -> str:
        """What has to be the same in answers that agree."""
        return f"read {self.read}" if self.read else f"said {normal_text(self.text)}"
