"""The settings of an engine that records: every worker gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from haltwise import InputError
from lms.ask import AskConfig

# The least token budget of a question in a trial.
_TRIAL_TOKENS = 256


@dataclass(frozen=True)
class TaskFormat:
    """How a task's questions are asked and answered: the part of a task that workers need."""

    scorer: str
    """The answer rule: a key of haltwise.policy.answers.READERS."""
    cue: str
    """The words after a closed thought that lead the LM to its answer; they may be empty."""
    answer_end: str
    """The text that ends a forced answer, see `haltwise.Halting.answer_end`."""
    instruction: str
    """The text that follows every question; it may be empty."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(AskConfig):
    """What runs the LM, and what it is asked for."""

    engine: Literal["hf", "vllm"] = "hf"
    """What runs the LM: hf is transformers; vllm is faster on a GPU, but sees neither the
    probability of the end-of-thinking token nor hidden states."""
    tensor_parallel: int = 1
    """The number of GPUs that share one LM; for vLLM only."""
    batch_size: int = 64
    """The number of questions at once. vLLM starts the next ones when all have ended: give it
    many."""
    hidden: bool = False
    """Record the states of the LM's last layer too: two bytes times the LM's width at every
    decision point."""

    def trial_budget(self) -> int:
        """Returns the token budget of a question in a trial: enough for a few decision points."""
        return max(_TRIAL_TOKENS, 4 * (self.every or 0))

    def check(self) -> None:
        """Checks the settings before any work.

        Raises:
            InputError: If a number makes no sense, or the engine cannot do what is asked.
        """
        for name in ("batch_size", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.every is not None and self.every < 1:
            raise InputError(f"every is {self.every}, expected at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature < np.inf:
            raise InputError(f"temperature is {self.temperature}, expected 0 or more")
        if self.engine == "hf" and self.tensor_parallel > 1:
            raise InputError(
                f"tensor_parallel is {self.tensor_parallel}: expected 1, or --engine vllm"
            )
        if self.engine == "vllm" and self.hidden:
            raise InputError("vLLM shows no hidden states: expected --engine hf, or no --hidden")
