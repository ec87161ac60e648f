"""What records: settings that go to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from haltwise import InputError
from lms.ask import AskConfig

_TRIAL_TOKENS = 256


@dataclass(frozen=True)
class Answering:
    """How a task is asked and answered: the part of it that workers need."""

    scorer: str
    """The answer rule: a key of haltwise.policy.answers.READERS."""
    cue: str
    """Said after a thought to force an answer."""
    answer_end: str
    """See haltwise.Halting."""
    instruction: str
    """Follows every question."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(AskConfig):
    """What runs the LM, and what it is asked for."""

    engine: Literal["hf", "vllm"] = "hf"
    """What runs the LM: transformers, or vLLM, which is faster on a GPU and sees neither the
    end-of-thinking token's probability nor hidden states."""
    tensor_parallel: int = 1
    """GPUs that share one LM; vLLM only."""
    batch_size: int = 64
    """Questions at once. vLLM starts the next ones when all have ended: give it many."""
    hidden: bool = False
    """Record last-layer states too: two bytes times the LM's width at every decision point."""

    def trial_budget(self) -> int:
        """Tokens of a question in a short trial: a few decision points."""
        return max(_TRIAL_TOKENS, 4 * (self.every or 0))

    def check(self) -> None:
        """Checks the settings before any work.

        Raises:
            InputError: If a number makes no sense, or the engine cannot do what is asked.
        """
        for name in ("batch_size", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
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
