"""Forced answers: what an LM says when its thought is closed for it."""

from dataclasses import dataclass

import numpy as np


@dataclass
class ForcedAnswer:
    """What an LM answers greedily when its thought is closed."""

    tokens: list[int]
    """Its tokens, without the one that ended it."""
    logprobs: list[float]
    """Natural log of the probability of each of `tokens`."""
    num_tokens: int
    """Tokens generated, the one that ended the answer included."""

    @property
    def confidence(self) -> float:
        """Exp of the mean of `logprobs`; 0 if the LM ended without a token of an answer."""
        return float(np.exp(np.mean(self.logprobs))) if self.logprobs else 0.0

    @property
    def worst_logprob(self) -> float:
        """The smallest of `logprobs`; NaN if there is none."""
        return min(self.logprobs, default=float("nan"))


@dataclass
class Probe(ForcedAnswer):
    """A forced answer that has been read."""

    text: str
    """The text that the answer was read from."""
    answer: str
    """The answer; empty if none could be read."""
