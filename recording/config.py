"""The settings of an engine that records: every worker gets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from haltwise import InputError
from haltwise.errors import check_ranges
from lms.ask import AskConfig
from lms.language_model import check_name

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

    engine: Literal["hf", "vllm", "openai"] = "hf"
    """What runs the LM: hf is transformers; vllm is faster on a GPU; openai is a server that runs
    already, at --base-url. The last two see neither the probability of the end-of-thinking token
    nor hidden states."""
    base_url: str | None = None
    """The address of the server, such as http://127.0.0.1:8080, for --engine openai; --lm is the
    name that the server has for the LM."""
    server_kind: Literal["auto", "llama-server", "vllm", "sglang", "ollama"] = "auto"
    """What kind of server it is; auto asks it."""
    api_key_env: str | None = None
    """The environment variable with the server's API key, if it wants one."""
    patience: float = 600.0
    """The seconds for which a server that is gone, or too busy, is asked again."""
    tensor_parallel: int = 1
    """The number of GPUs that share one LM; for vLLM only."""
    batch_size: int = 64
    """The number of questions at once. vLLM starts the next ones when all have ended: give it
    many. A server is asked no more at once than it tells that it takes."""
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
        if self.engine != "openai":
            check_name(self.lm)
        elif not self.lm.strip():
            raise InputError("--lm names no LM, expected the server's name of one")
        counts = ("batch_size", "tensor_parallel", "max_answer_tokens", "every", "max_tokens")
        given = {name: value for name in counts if (value := getattr(self, name)) is not None}
        ranges = {name: (value >= 1, "at least 1") for name, value in given.items()}
        hot = self.temperature
        ranges["temperature"] = (hot is None or 0 <= hot < np.inf, "0 or more, and finite")
        ranges["patience"] = (0 <= self.patience < np.inf, "seconds, 0 or more")
        check_ranges(self, ranges)
        if self.engine != "vllm" and self.tensor_parallel > 1:
            raise InputError(
                f"--tensor-parallel is {self.tensor_parallel}: expected 1, or --engine vllm"
            )
        if self.engine != "hf" and self.hidden:
            whose = "vLLM" if self.engine == "vllm" else "a server"
            raise InputError(
                f"{whose} shows no hidden states: expected --engine hf, or no --hidden"
            )
        if (self.engine == "openai") != (self.base_url is not None):
            raise InputError(
                f"--engine is {self.engine!r} and --base-url {self.base_url!r}: expected --engine "
                "openai and --base-url, or neither"
            )
