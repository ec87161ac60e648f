"""Engines: what records traces, whatever runs the LM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from haltwise import InputError
from recording.config import EngineConfig, TaskFormat
from recording.trace_row import SeededQuestion, TraceRow


class RecordingEngine(Protocol):
    """An LM that is ready to be recorded."""

    recorder: dict[str, Any]
    """The metadata that are kept beside the traces: how they are recorded."""
    description: str
    """A description of how the LM is asked and how it thinks, for a person."""

    def record(self, work: Iterable[SeededQuestion]) -> Iterator[TraceRow]:
        """Answers questions, in any order, and yields each trace.

        A question that is too long for the LM is left out, with a message.

        Args:
            work: The questions with their sampling seeds.

        Raises:
            InputError: If a question cannot be asked, or the LM's logits are not numbers.
        """

    def self_test(self, work: Sequence[SeededQuestion], max_tokens: int | None) -> str:
        """Tries a few questions before hours are spent on many, and returns a report for a person.

        Args:
            work: The questions with their sampling seeds.
            max_tokens: The token budget of each question if it is smaller than a recording's; None
                for the same.

        Raises:
            InputError: If halting this LM cannot work.
        """

    def close(self) -> None:
        """Lets go of processes and memory; the engine cannot be used any more."""


def open_engine(config: EngineConfig, task_format: TaskFormat) -> RecordingEngine:
    """Loads the LM into the engine that the settings name.

    Raises:
        InputError: If the engine is not installed, or the LM cannot be used.
    """
    if config.engine == "hf":
        from recording.hf_engine import HfEngine

        return HfEngine(config, task_format)
    if config.engine == "openai":
        try:
            from recording.openai_engine import OpenAIEngine
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] in ("haltwise", "recording"):
                raise
            raise InputError(f"--engine openai: {error}") from None
        return OpenAIEngine(config, task_format)
    if find_spec("vllm") is None:
        raise InputError(
            "vLLM is not installed: expected it for --engine vllm, run pip install vllm -e . in "
            "the clone of haltwise"
        )
    from recording.vllm_engine import VllmEngine

    return VllmEngine(config, task_format)
