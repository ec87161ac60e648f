"""Which LM is asked what, and how it is halted: shared by recording, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from haltwise import MEAN_LOGPROB, Halting, InputError
from lms.chat import Chat
from lms.language_model import LMConfig
from lms.questions import Question
from lms.sources import AnswerFormat, DataConfig, QuestionTask, open_task

_EVERY, _EVERY_OF_EMBEDDED = 64, 12
_MAX_TOKENS, _MAX_TOKENS_OF_EMBEDDED = 4096, 768


@dataclass(frozen=True, kw_only=True)
class AskConfig(LMConfig, DataConfig):
    """Which LM is asked what, and how it is halted."""

    every: int | None = None
    """The number of thinking tokens between decision points. Default: 64, or 12 for the embedded
    LM."""
    close_text: str | None = None
    """The text that is appended to a thought to force an answer. Default: what closes the LM's
    thoughts, and then the task's cue."""
    answer_end: str | None = None
    """The text that ends a forced answer, unless it stands between braces; if it is empty, only the
    LM's end token ends one. Default: the task's own."""
    max_answer_tokens: int = 16
    """A forced answer is cut after this many tokens."""
    max_tokens: int | None = None
    """The token budget of a question, its answer included. Default: 4096, or half of the LM's
    context if that is less; for the embedded LM 768."""
    temperature: float | None = None
    """The temperature of sampling; 0 is greedy. Default: the LM's own, or 0 behind a server."""

    @property
    def is_embedded(self) -> bool:
        """Whether the LM is the embedded one of this repository."""
        return self.lm == "embedded"

    def open(self) -> QuestionTask:
        """Returns the task that the settings name.

        Raises:
            InputError: If there is no such task, or its data cannot be read.
        """
        return open_task(self)

    def budget(self, context: float) -> int:
        """Returns the token budget of a question, its answer included.

        Args:
            context: The number of tokens that the LM sees at once.
        """
        if self.max_tokens is not None:
            return self.max_tokens
        if self.is_embedded:
            return _MAX_TOKENS_OF_EMBEDDED
        return int(min(_MAX_TOKENS, context // 2))

    def halting(self, chat: Chat, task: AnswerFormat) -> Halting:
        """Returns how an LM is halted while it is recorded: probed at every decision point.

        Args:
            chat: How the LM is asked and how it thinks.
            task: How the task's answers are asked for and read.

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


def check_room(context: float, max_tokens: int, num_forced: int) -> None:
    """Refuses a token budget that leaves no room in the LM's context for any question.

    Args:
        context: The number of tokens that the LM sees at once.
        max_tokens: The token budget of a question, its answer included.
        num_forced: The most tokens of the close text and a forced answer together.

    Raises:
        InputError: If a prompt of one token does not fit.
    """
    most = context - num_forced - 1
    if most < 1:
        raise InputError(
            f"the LM's context is {context:,.0f} tokens, and the close text and a forced answer "
            f"take {num_forced:,}: expected a smaller --max-answer-tokens, or a longer context"
        )
    if max_tokens > most:
        raise InputError(
            f"--max-tokens is {max_tokens:,}, expected at most {most:,.0f}: the LM's context is "
            f"{context:,.0f} tokens, of which the close text and a forced answer take "
            f"{num_forced:,}, and the question takes some too"
        )


def check_closes(halting: Halting) -> None:
    """Refuses a close text that leaves a thought open.

    Raises:
        InputError: If the text that closes the LM's thoughts is not in it.
    """
    if halting.think_end not in halting.close_text:
        raise InputError(
            f"close text {halting.close_text!r} does not close a thought: expected "
            f"{halting.think_end!r} in it; set --close-text, or other think markers"
        )


def asked_before(settings: Mapping[str, Any]) -> AskConfig:
    """Returns the part of a run's settings that says which LM was asked what.

    Args:
        settings: The settings of a run, by the names of the config's fields.

    Raises:
        KeyError: If a setting is missing.
    """
    asked = {field.name: settings[field.name] for field in fields(AskConfig)}
    for name in ("data_file", "examples"):
        asked[name] = asked[name] and Path(asked[name])
    return AskConfig(**asked)


def questions(config: AskConfig, splits: Sequence[str], num: int, seed: int) -> Iterator[Question]:
    """Yields the questions of some splits, one split after the other, at most `num` of each.

    Raises:
        InputError: If there is no such task or split, or its data cannot be asked.
    """
    task = config.open()
    for split in splits:
        yield from task.questions(split, num, seed)
