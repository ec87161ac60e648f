"""Which LM is asked what, and how it is halted: shared by recording, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from haltwise import MEAN_LOGPROB, Halting
from lms.chat import Chat
from lms.language_model import LMConfig
from lms.questions import Question
from lms.sources import Answered, DataConfig, Task, open_task

_EVERY, _EVERY_OF_EMBEDDED = 64, 12
_MAX_TOKENS, _MAX_TOKENS_OF_EMBEDDED = 4096, 768


@dataclass(frozen=True, kw_only=True)
class AskConfig(LMConfig, DataConfig):
    """Which LM is asked what, and how it is halted."""

    every: int | None = None
    """Thinking tokens between decision points. Default: 64, for the embedded LM 12."""
    close_text: str | None = None
    """Appended to a thought to force an answer. Default: what closes the LM's thoughts, and the
    task's cue."""
    answer_end: str | None = None
    """A forced answer ends with this text, outside of its braces; empty: only with the LM's end
    token. Default: the task's."""
    max_answer_tokens: int = 16
    """A forced answer is cut after this many tokens."""
    max_tokens: int | None = None
    """Token budget of a question, its answer included. Default: 4096, or half of a smaller context;
    for the embedded LM 768."""
    temperature: float | None = None
    """Of sampling; 0 is greedy. Default: the LM's own."""

    @property
    def is_embedded(self) -> bool:
        """Whether the LM is the one of this repository."""
        return self.lm == "embedded"

    def open(self) -> Task:
        """What is asked.

        Raises:
            InputError: If there is no such task.
        """
        return open_task(self)

    def budget(self, context: float) -> int:
        """Tokens of a question, for an LM that sees so many tokens at once."""
        if self.max_tokens is not None:
            return self.max_tokens
        if self.is_embedded:
            return _MAX_TOKENS_OF_EMBEDDED
        return int(min(_MAX_TOKENS, context // 2))

    def halting(self, chat: Chat, task: Answered) -> Halting:
        """How an LM is halted when it is recorded: probed at every decision point.

        Raises:
            InputError: If the conditions make no sense.
        """
        every = self.every
        if every is None:
            every = _EVERY_OF_EMBEDDED if self.is_embedded else _EVERY
        close_text = chat.close_mark + task.cue if self.close_text is None else self.close_text
        return Halting(
            probing="always",
            decision_rule=f"every {every} tokens",
            close_text=close_text,
            confidence_rule=MEAN_LOGPROB,
            max_answer_tokens=self.max_answer_tokens,
            answer_rule=task.scorer,
            answer_end=task.answer_end if self.answer_end is None else self.answer_end,
            think_start=chat.think_start,
            think_end=chat.think_end,
        )


def asked_before(settings: Mapping[str, Any]) -> AskConfig:
    """The part of a run's settings that says which LM was asked what.

    Raises:
        KeyError: If one is missing.
    """
    asked = {field.name: settings[field.name] for field in fields(AskConfig)}
    for name in ("data_file", "examples"):
        asked[name] = asked[name] and Path(asked[name])
    return AskConfig(**asked)


def questions(config: AskConfig, splits: Sequence[str], num: int, seed: int) -> Iterator[Question]:
    """Questions of some splits, in order; at most `num` of each."""
    task = config.open()
    for split in splits:
        yield from task.questions(split, num, seed)
