"""What records traces, whatever runs the LM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from haltwise import InputError
from recording.config import Answering, EngineConfig
from recording.hf_engine import HfEngine
from recording.recording import Row, Work


class Engine(Protocol):
    """An LM that is ready to be recorded."""

    recorder: dict[str, Any]
    """What is kept beside the traces."""
    description: str
    """How the LM is asked and how it thinks, for a person."""

    def record(self, work: Iterable[Work]) -> Iterator[Row]:
        """Answers questions with sampling seeds, in any order, and yields each trace.

        A question that is too long for the LM is told and left out.

        Raises:
            InputError: If a question cannot be asked, or the LM's logits are not numbers.
        """

    def self_test(self, work: Sequence[Work], max_tokens: int | None) -> str:
        """Tries a few questions, before hours are spent on many; what it finds, for a person.

        Args:
            work: The questions.
            max_tokens: Token budget of each, if it is to be smaller than a recording's.

        Raises:
            InputError: If halting this LM cannot work.
        """

    def close(self) -> None:
        """Lets go of what it holds."""


def open_engine(config: EngineConfig, answering: Answering) -> Engine:
    """Loads the LM into the engine that the settings name.

    Raises:
        InputError: If the engine is not installed, or the LM cannot be used.
    """
    if config.engine == "hf":
        return HfEngine(config, answering)
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed: expected it for --engine vllm (pip install vllm)")
    from recording.vllm_engine import VllmEngine

    return VllmEngine(config, answering)
