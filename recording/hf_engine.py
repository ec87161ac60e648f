"""Recording with transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from haltwise.engine.decoder import Decoder
from lms.ask import check_room
from lms.language_model import LanguageModel
from lms.self_test import self_test
from recording.config import EngineConfig, TaskFormat
from recording.trace_row import (
    SeededQuestion,
    TraceRow,
    UnfinishedTrace,
    fitting_prompts,
    known_lm,
    recorder_metadata,
    with_prompts,
)
from traces import SIGNALS


class HfEngine:
    """The `recording.engine.RecordingEngine` that runs the LM in transformers.

    Args:
        config: Which LM runs where, and how it is asked.
        task_format: How the task's answers are asked for and read.

    Raises:
        InputError: If the LM cannot be loaded or run.
    """

    def __init__(self, config: EngineConfig, task_format: TaskFormat) -> None:
        """Loads the LM."""
        self._lm = lm = LanguageModel.load(config.lm, config.device, config)
        self._halting = config.halting(lm.chat, task_format)
        self._max_tokens = config.budget(lm.context)
        self._temperature = lm.temperature if config.temperature is None else config.temperature
        self._decoder = Decoder(
            lm.model,
            lm.tokenizer,
            self._halting,
            config.batch_size,
            self._max_tokens,
            self._temperature,
            signals=[name for name in SIGNALS if name != "hidden" or config.hidden],
        )
        rules = self._decoder.rules
        check_room(lm.context, self._max_tokens, len(rules.close_ids) + rules.max_answer_tokens)
        self.recorder = recorder_metadata(
            "hf",
            known_lm(lm),
            self._halting,
            len(rules.close_ids),
            self._max_tokens,
            self._temperature,
            self._decoder.measured,
            task_format.instruction,
        )
        self.description = lm.chat.describe()

    def record(self, work: Iterable[SeededQuestion]) -> Iterator[TraceRow]:
        """Answers questions in refilled slots, and yields each trace as it ends.

        A question that is too long for the LM is left out, with a message.

        Raises:
            InputError: If a question cannot be asked, or the LM's logits are not numbers.
        """
        return record(self._lm, self._decoder, work)

    def self_test(self, work: Sequence[SeededQuestion], max_tokens: int | None) -> str:
        """Tries a few questions at once, and returns a report for a person.

        Raises:
            InputError: If halting this LM cannot work.
        """
        jobs = fitting_prompts(self._lm, work, self._decoder.max_prompt)
        chosen = [question for (question, _), _ in jobs]
        found = self_test(
            self._lm,
            chosen,
            self._halting,
            max_tokens=min(self._max_tokens, max_tokens or self._max_tokens),
            temperature=self._temperature,
            num=len(chosen),
        )
        return str(found)

    def close(self) -> None:
        """Does nothing: the engine holds nothing but memory."""


def record(
    lm: LanguageModel, decoder: Decoder, work: Iterable[SeededQuestion]
) -> Iterator[TraceRow]:
    """Answers questions in refilled slots and yields each trace as it ends.

    Args:
        lm: The LM.
        decoder: The decoder that runs it; all of its slots are used, and what it measures is
            recorded.
        work: The questions with their sampling seeds; those that are too long are left out.
    """
    waiting = with_prompts(lm, work, decoder.max_prompt)
    running: dict[int, UnfinishedTrace] = {}
    while True:
        free = [slot for slot in range(decoder.num_slots) if slot not in running]
        prompts, fresh = [], {}
        for slot, (job, prompt) in zip(free, waiting, strict=False):
            prompts.append(prompt)
            fresh[slot] = UnfinishedTrace(*job, signals={name: [] for name in decoder.measured})
        decoder.start(
            np.array(list(fresh), dtype=np.int64),
            prompts,
            [recording.seed for recording in fresh.values()],
        )
        running |= fresh
        if not running:
            return
        slots = np.array(list(running))
        at_point = decoder.advance(slots)
        here = slots[at_point]
        probes = decoder.force(here)
        signals = decoder.signals(here, probes)
        for i, (slot, probe) in enumerate(zip(here.tolist(), probes, strict=True)):
            running[slot].see(probe, signals, i)
        for slot in slots[~at_point].tolist():
            thought = decoder.thoughts[slot]
            if thought.ended:
                recording = running.pop(slot)
                yield recording.row(lm.name, decoder.rules, thought)
