"""Thoughts: how they begin, where they can be halted, how their forced answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from haltwise.errors import InputError
from haltwise.policy.answers import READERS
from haltwise.policy.halting import MEAN_LOGPROB, DecisionRule, Halting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A thought begins within so many tokens: later its marker is only mentioned.
LONGEST_OPENING = 64

_BOX = r"\boxed{"


@dataclass
class ForcedAnswer:
    """What an LM answers greedily when its thought is closed."""

    tokens: list[int]
    """Without the token that ended the answer."""
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
        """Smallest of `logprobs`; NaN if there is none."""
        return min(self.logprobs, default=float("nan"))


@dataclass
class Probe(ForcedAnswer):
    """A forced answer that has been read."""

    text: str
    """What to read the answer from."""
    answer: str
    """Empty if none could be read."""


class PointRules:
    """How thoughts begin and end, and where they have decision points.

    Args:
        halting: Has the decision rule and the markers.

    Raises:
        InputError: If the decision rule cannot be run.
    """

    def __init__(self, halting: Halting) -> None:
        """Reads the decision rule."""
        rule = DecisionRule(halting.decision_rule)
        rule.check_runnable()
        self.every, self._after = rule.every, rule.after or ""
        #: Decision points that a thought can have, if there is a limit.
        self.max_points = rule.max_points
        self.think_start, self.think_end = halting.think_start, halting.think_end

    def is_point(self, position: int, text: str) -> bool:
        """Whether a decision point follows a token of a thought, at some position."""
        if self.every:
            return position % self.every == 0
        return self._after in text


class Progress:
    """How far one thought has come, text by text.

    Args:
        rules: Shared by all thoughts of an LM.
        prompt: What the LM was given; the thought begins at once if it ends inside of one.
    """

    def __init__(self, rules: PointRules, prompt: str) -> None:
        """Reads the markers in the prompt."""
        self._points = rules
        self._tail = ""
        opened = prompt.rfind(rules.think_start) > prompt.rfind(rules.think_end)
        self.begun = not rules.think_start or opened
        """Whether the LM thinks, or has thought."""
        self.num_tokens = 0
        """Tokens generated so far."""
        self.position = 0
        """Tokens of the thought so far; whatever the LM wrote before it counts too."""
        self.closed = False
        """Whether the LM itself has closed the thought."""
        self.num_points = 0
        """Decision points so far."""
        self.at_point = False
        """Whether the newest token is at a decision point."""

    def add_text(self, text: str) -> None:
        """Takes in the text of the next token."""
        self.num_tokens += 1
        self.at_point = False
        if self.closed or (not self.begun and self.num_tokens > LONGEST_OPENING):
            return
        rules = self._points
        marker = rules.think_end if self.begun else rules.think_start
        seen = self._tail + text
        found = bool(marker) and marker in seen
        self._tail = seen[-len(marker) :] if marker and not found else ""
        if self.begun and not found:
            within = rules.max_points is None or self.num_points < rules.max_points
            self.at_point = within and rules.is_point(self.num_tokens, text)
            self.num_points += self.at_point
        self.position = self.num_tokens
        self.closed = self.begun and found
        self.begun = self.begun or found


class ThoughtRules(PointRules):
    """How thoughts are read from an LM's tokens, and how they are closed.

    Args:
        tokenizer: The LM's.
        halting: Decision rule, markers, close text, and how answers end and are read.

    Raises:
        InputError: If the decision or confidence rule cannot be run, or a text that closes a
            thought has no tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, halting: Halting) -> None:
        """Encodes the texts that close a thought."""
        super().__init__(halting)
        if halting.confidence_rule != MEAN_LOGPROB:
            raise InputError(
                f"confidence rule {halting.confidence_rule!r} cannot be run, only {MEAN_LOGPROB!r}"
            )
        self.tokenizer = tokenizer
        self.close_ids = self._encode(halting.close_text)
        if not (self.think_end or tokenizer.eos_token):
            raise InputError(
                "the tokenizer has no eos_token: expected one, for an LM that reasons in the open"
            )
        #: The token with which the LM itself begins to close a thought.
        self.end_id = self._encode(self.think_end or tokenizer.eos_token or "")[0]
        #: Reads an answer from a text.
        self.read_answer = READERS[halting.answer_rule]
        self._answer_end = halting.answer_end
        # "... the answer is \boxed{" leaves only the rest of the box to the LM.
        self._opening = _BOX if halting.close_text.rstrip().endswith(_BOX) else ""
        self._texts: dict[int, str] = {}

    def token_text(self, token: int) -> str:
        """Text of one token, special or not."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.decode([token], skip_special_tokens=False)
        return text

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of some tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def read(self, answer: ForcedAnswer) -> Probe:
        """Reads a forced answer: from its tokens, in the box that the close text opens."""
        text = self.decode(answer.tokens)
        text = self._opening + text if text.strip() else ""
        return Probe(**vars(answer), text=text, answer=self.read_answer(text))

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Whether a forced answer has come to the text that ends it."""
        return bool(self._answer_end) and _ends(self.decode(tokens), self._answer_end)

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise InputError(f"close text {text!r} has no tokens: nothing to close")
        return tokens


def _ends(answer: str, end: str) -> bool:
    """Whether some text is in an answer, outside of the braces that the answer itself opens."""
    depth, text = 0, answer.lstrip()
    for i, letter in enumerate(text):
        if not depth and text.startswith(end, i):
            return True
        depth = max(0, depth + {"{": 1, "}": -1}.get(letter, 0))
    return False


class Thought(Progress):
    """One thought, token by token; arguments as of `Progress`."""

    def __init__(self, rules: ThoughtRules, prompt: str) -> None:
        """Reads the markers in the prompt."""
        super().__init__(rules, prompt)
        self._rules = rules
        self.tokens: list[int] = []
        """Everything generated so far."""

    def add(self, token: int) -> None:
        """Takes in the next token."""
        self.tokens.append(token)
        self.add_text(self._rules.token_text(token))

    def text(self) -> str:
        """Everything generated, special tokens included."""
        return self._rules.decode(self.tokens, skip_special_tokens=False)

    def answer_text(self) -> str:
        """What to read the LM's own answer from: what follows the thought, or else everything."""
        return self._rules.decode(self.tokens[self.position :] if self.closed else self.tokens)
