"""A thought as its tokens come in, where it can be halted, and the answer that is forced then."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from haltwise.policy.answers import READERS
from haltwise.policy.halting import DecisionRule, Halting

#: A thought begins within so many tokens; later its marker is only mentioned.
LONGEST_OPENING = 64

#: More tokens than any thought has.
NEVER = 2**62

_BOX = r"\boxed{"

#: Why a thought ended. "halted" is the head's doing and "capped" that of its cap; "token budget"
#: stands for any other limit of the LM; "no thought" is an LM that answered without one, and
#: "cut off" a request that was broken off.
Reason = Literal["halted", "capped", "closed by the LM", "token budget", "no thought", "cut off"]


class PointRules:
    """The rules by which thoughts begin, end and have decision points, and answers are read.

    A token is a text here, as servers tell it; `haltwise.engine.token_rules.TokenRules` reads
    token ids.

    Args:
        halting: Has the decision rule, the markers of a thought, and how answers end and are read.

    Raises:
        InputError: If the decision rule cannot be run.
    """

    def __init__(self, halting: Halting) -> None:
        """Reads the decision rule."""
        rule = DecisionRule(halting.decision_rule)
        rule.check_runnable()
        #: Tokens between points, or None if they follow a text.
        self.every = rule.every
        #: The same while the answer repeats: a point lies at a multiple of it.
        self.every_repeated = rule.every_repeated
        self._after = rule.after or ""
        #: Decision points that a thought can have, or None if there is no limit.
        self.max_points = rule.max_points
        self.think_start, self.think_end = halting.think_start, halting.think_end
        #: The function that reads an answer from a text.
        self.read_answer = READERS[halting.answer_rule]
        #: A forced answer is cut after this many tokens.
        self.max_answer_tokens = halting.max_answer_tokens
        #: The text that ends a forced answer; empty if the LM ends it.
        self.answer_end = halting.answer_end
        # "... the answer is \boxed{" leaves only the rest of the box to the LM.
        self._opening = _BOX if halting.close_text.rstrip().endswith(_BOX) else ""

    def is_point(self, position: int, text: str) -> bool:
        """Whether a decision point follows the token at this position.

        Args:
            position: Tokens so far.
            text: The token's text, and before it as much as the rule looks back.
        """
        if self.every_repeated:
            return position % self.every_repeated == 0
        return self._after in text

    @property
    def num_looked_back(self) -> int:
        """Characters before a token in which a text may begin that a decision point follows."""
        return max(len(self._after) - 1, 0)

    def text_added(self, half: list[Any], token: Any) -> str:
        """Returns the text that the next token adds.

        Args:
            half: The tokens before it whose last character has not ended; it is kept up to date.
            token: The token.
        """
        return str(token)

    def decode(self, tokens: Sequence[Any], skip_special_tokens: bool = True) -> str:
        """Returns the text of some tokens."""
        return "".join(tokens)

    def read(self, answer: "ForcedAnswer") -> "Probe":
        """Reads a forced answer from its tokens, in the box that the close text opens."""
        text = self.decode(answer.tokens)
        text = self._opening + text if text.strip() else ""
        return Probe(**vars(answer), text=text, answer=self.read_answer(text))

    def is_readable(self, text: str) -> bool:
        """Tells whether an answer can be read from a text."""
        return bool(self.read_answer(text))

    def is_complete(self, tokens: Sequence[Any]) -> bool:
        """Tells whether a forced answer with some tokens has come to the text that ends it."""
        return bool(self.answer_end) and _ends(self.decode(tokens), self.answer_end)


def _ends(answer: str, end: str) -> bool:
    """Tells whether an end text is in an answer, outside of the braces that the answer opens."""
    depth, text = 0, answer.lstrip()
    for i, letter in enumerate(text):
        if not depth and text.startswith(end, i):
            return True
        depth = max(0, depth + {"{": 1, "}": -1}.get(letter, 0))
    return False


class Thought:
    """How far the thought of one request has come.

    Only the first thought of an answer counts: what an LM thinks after it has closed that one, or
    after it was halted, is part of its answer.

    Args:
        rules: Shared by all thoughts of an LM.
        prompt: What the LM was given; the thought has begun if it ends inside of one.
    """

    def __init__(self, rules: PointRules, prompt: str = "") -> None:
        """Stands before the first token."""
        self._rules = rules
        self._tail, self._before = "", ""
        self._half: list[Any] = []  # the newest tokens, if they end inside of a character
        self.cap: int | None = None
        """Thinking tokens at which it is to be closed, if there is such a cap."""
        self.tokens: list[Any] = []
        """Everything generated so far: ids, or texts."""
        self.begun = False
        """Whether the LM thinks, or has thought."""
        self.position = 0
        """Tokens of the thought so far; whatever the LM wrote before it counts too."""
        self.closed = False
        """Whether the thought has been closed, by the LM or for it."""
        self.ended = False
        """Whether nothing more is generated."""
        self.finished = False
        """Whether the LM itself has ended its answer."""
        self.num_points = 0
        """Decision points so far."""
        self.at_point = False
        """Whether the newest token is at a decision point."""
        self.gap = 0
        """Tokens since the previous decision point, or since the start."""
        self._due = rules.every or 0  # tokens before which there is no point
        self._latest = 0  # tokens at the latest decision point
        self._answer = 0  # the key of the forced answer that was told last
        self.read_prompt(prompt)

    def copy(self) -> "Thought":
        """Returns a thought that stands where this one does, and goes on by itself."""
        twin = copy.copy(self)
        twin.tokens, twin._half = list(self.tokens), list(self._half)
        return twin

    def read_prompt(self, prompt: str) -> None:
        """Finds out whether a prompt, or the end of one, leaves the LM inside of a thought."""
        start, end = self._rules.think_start, self._rules.think_end
        self.begun = not start or prompt.rfind(start) > prompt.rfind(end)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, an end token included."""
        return len(self.tokens)

    @property
    def is_over(self) -> bool:
        """Whether nothing can be halted any more; a thought that has not begun soon never will."""
        never_begins = not self.begun and self.num_tokens >= LONGEST_OPENING
        return self.closed or self.ended or never_begins

    @property
    def at_cap(self) -> bool:
        """Whether the open thought has reached its cap."""
        reached = self.cap is not None and self.position >= self.cap
        return reached and self.begun and not self.is_over

    @property
    def waits(self) -> bool:
        """Whether it is to be decided how the thought goes on."""
        return self.at_point or self.at_cap

    def next_look(self, at_points: bool = True) -> int:
        """Returns the tokens, more than there are, before which there is nothing to decide.

        Args:
            at_points: Whether anything is to be decided at decision points, or only at the cap.
        """
        num, look = self.num_tokens, NEVER
        if self.is_over:
            return NEVER
        if at_points and self._has_points_left:
            every = self._rules.every_repeated
            look = num + 1 if every is None else (max(num, self._due - 1) // every + 1) * every
        return look if self.cap is None else min(look, max(self.cap, num + 1))

    @property
    def _has_points_left(self) -> bool:
        most = self._rules.max_points
        return most is None or self.num_points < most

    def add(self, token: Any) -> None:
        """Takes in the next token."""
        self.tokens.append(token)
        self.gap = 1 if self.at_point else self.gap + 1
        self.at_point = False
        if self.closed or (not self.begun and self.num_tokens > LONGEST_OPENING):
            return
        rules, text = self._rules, self._rules.text_added(self._half, token)
        marker = rules.think_end if self.begun else rules.think_start
        seen = self._tail + text
        found = bool(marker) and marker in seen
        self._tail = seen[-len(marker) :] if marker and not found else ""
        if self.begun and not found:
            is_due = self._has_points_left and self.num_tokens >= self._due
            self.at_point = is_due and rules.is_point(self.num_tokens, self._before + text)
            if self.at_point:
                self.num_points += 1
                self._latest = self.num_tokens
                self._due = self.num_tokens + (rules.every or 0)
            if rules.num_looked_back:
                self._before = (self._before + text)[-rules.num_looked_back :]
        self.position = self.num_tokens
        self.closed = self.begun and found
        self.begun = self.begun or found

    def answered(self, key: int) -> None:
        """Takes in the forced answer at the latest decision point, on which the next may hang.

        Args:
            key: Its key, see `haltwise.policy.signals.answer_keys`; 0 is no answer.
        """
        if key and key == self._answer:
            self._due = self._latest + (self._rules.every_repeated or 0)
        self._answer = key

    def end(self, by_lm: bool) -> None:
        """Notes that the newest token was the last: the LM's own end, or some limit's.

        There is nothing to decide at the last token, even if a decision point lies there.
        """
        self.ended, self.finished, self.at_point = True, by_lm, False

    def text(self) -> str:
        """Returns everything generated, special tokens included."""
        return self._rules.decode(self.tokens, skip_special_tokens=False)

    def answer_text(self) -> str:
        """Returns what follows the thought, or everything if the thought was never closed."""
        return self._rules.decode(self.tokens[self.position :] if self.closed else self.tokens)

    def why_ended(self) -> Reason:
        """Returns why the thought ended if nobody halted it."""
        if not self.begun:
            return "no thought" if self.is_over else "cut off"
        if self.closed or self.finished:
            return "closed by the LM"
        return "token budget" if self.ended else "cut off"


@dataclass
class ForcedAnswer:
    """What an LM answers greedily when its thought is closed."""

    tokens: list[Any]
    """Its tokens, ids or texts, without the one that ended it."""
    logprobs: list[float]
    """Natural log of the probability of each of `tokens`; empty if unknown."""
    num_tokens: int
    """Tokens generated, the one that ended the answer included."""

    @property
    def confidence(self) -> float:
        """Exp of the mean of `logprobs`; 0 if the LM ended without a token of an answer.

        NaN if there are tokens of unknown probability.
        """
        if self.logprobs:
            return float(np.exp(np.mean(self.logprobs)))
        return float("nan") if self.tokens else 0.0

    @property
    def worst_logprob(self) -> float:
        """The smallest of `logprobs`; NaN if there is none."""
        return min(self.logprobs, default=float("nan"))


@dataclass
class Probe(ForcedAnswer):
    """A forced answer that has been read."""

    text: str
    """The text that the answer was read from."""
    answer: str
    """The answer; empty if none could be read."""
