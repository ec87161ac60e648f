"""How an LM is asked and how it thinks: read from its tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """What a person may say about an LM's chat; the rest is detected."""

    think_start: str | None = None
    """Text after which a thought begins, empty if at once. Default: detected."""
    think_end: str | None = None
    """Text with which the LM itself closes a thought, empty if none. Default: detected."""


@dataclass(frozen=True)
class Chat:
    """An LM's way of being asked and of thinking."""

    tokenizer: PreTrainedTokenizerBase
    think_start: str
    """Text after which a thought begins; empty if the LM reasons in the open."""
    think_end: str
    """Text with which the LM itself closes a thought; empty if it reasons in the open."""
    close_mark: str
    """What closes a thought, blanks included: an answer, or its cue, comes next."""

    def prompt(self, text: str) -> str:
        """The LM's whole input for what a user asks."""
        if not self.tokenizer.chat_template:
            return text
        return _render(self.tokenizer, [{"role": "user", "content": text}], True)


def detect_chat(tokenizer: PreTrainedTokenizerBase, config: ChatConfig) -> Chat:
    """Reads an LM's chat from its tokenizer; what the config says wins."""
    start = "<think>" if config.think_start is None else config.think_start
    end = "</think>" if config.think_end is None else config.think_end
    return Chat(tokenizer, start, end, end)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Any], is_open: bool) -> str:
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_open
    )
    return str(rendered)
