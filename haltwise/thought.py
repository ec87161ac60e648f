"""Thoughts: how they begin, where they can be halted, how their forced answers are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from haltwise.answers import read_answer
from haltwise.errors import InputError
from haltwise.halting import MEAN_LOGPROB, DecisionRule, Halting
from haltwise.slots import ForcedAnswer

_BOX = r"\boxed{"


@dataclass
class Probe(ForcedAnswer):
    """A forced answer that has been read."""

    text: str
    """What to read the answer from."""
    answer: str
    """Empty if none could be read."""


class ThoughtRules:
    """How an LM's thoughts begin, where they have decision points, and how they are closed.

    Args:
        tokenizer: The LM's.
        halting: Decision rule and close text.
        think_start: Text after which a thought begins.
        think_end: Text with which the LM itself closes a thought.
        read_answer: Reads an answer from a forced answer's text.

    Raises:
        InputError: If the decision or confidence rule cannot be run, or a text that closes a
            thought has no tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        halting: Halting,
        think_start: str = "<think>",
        think_end: str = "</think>",
        read_answer: Callable[[str], str] = read_answer,
    ) -> None:
        """Encodes the texts that close a thought."""
        rule = DecisionRule(halting.decision_rule)
        rule.check_runnable()
        if halting.confidence_rule != MEAN_LOGPROB:
            raise InputError(
                f"confidence rule {halting.confidence_rule!r} cannot be run, only {MEAN_LOGPROB!r}"
            )
        self.every, self._after = rule.every, rule.after or ""
        #: Decision points that a thought can have, if there is a limit.
        self.max_points = rule.max_points
        self.tokenizer = tokenizer
        self.think_start, self.think_end = think_start, think_end
        self.close_ids = self._encode(halting.close_text)
        #: The token with which the LM itself begins to close a thought.
        self.end_id = self._encode(think_end)[0]
        self._read_answer = read_answer
        # "... the answer is \boxed{" leaves only the rest of the box to the LM.
        self._opening = _BOX if halting.close_text.rstrip().endswith(_BOX) else ""
        self._texts: dict[int, str] = {}

    def is_point(self, position: int, text: str) -> bool:
        """Whether a decision point follows a token of a thought, at some position."""
        if self.every:
            return position % self.every == 0
        return self._after in text

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
        return Probe(**vars(answer), text=text, answer=self._read_answer(text))

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise InputError(f"close text {text!r} has no tokens: nothing to close")
        return tokens


class Thought:
    """One thought, token by token.

    Args:
        rules: Shared by all thoughts of an LM.
        prompt: What the LM was given; the thought begins at once if it ends inside of one.
    """

    def __init__(self, rules: ThoughtRules, prompt: str) -> None:
        """Reads the markers in the prompt."""
        self._rules = rules
        self._begun = prompt.rfind(rules.think_start) > prompt.rfind(rules.think_end)
        self._tail = ""
        self.tokens: list[int] = []
        """Everything generated so far."""
        self.position = 0
        """Tokens of the thought so far; whatever the LM wrote before it counts too."""
        self.closed = False
        """Whether the LM itself has closed the thought."""
        self.num_points = 0
        """Decision points so far."""
        self.at_point = False
        """Whether the newest token is at a decision point."""

    def add(self, token: int) -> None:
        """Takes in the next token."""
        self.tokens.append(token)
        self.at_point = False
        if self.closed:
            return
        rules, text = self._rules, self._rules.token_text(token)
        marker = rules.think_end if self._begun else rules.think_start
        seen = self._tail + text
        found = marker in seen
        self._tail = "" if found else seen[-len(marker) :]
        if self._begun and not found:
            within = rules.max_points is None or self.num_points < rules.max_points
            self.at_point = within and rules.is_point(len(self.tokens), text)
            self.num_points += self.at_point
        self.position = len(self.tokens)
        self.closed = self._begun and found
        self._begun = self._begun or found

    def text(self) -> str:
        """Everything generated, special tokens included."""
        return self._rules.decode(self.tokens, skip_special_tokens=False)

    def answer_text(self) -> str:
        """What to read the LM's own answer from: what follows the thought, or else everything."""
        return self._rules.decode(self.tokens[self.position :] if self.closed else self.tokens)
