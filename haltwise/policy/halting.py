"""How an LM is halted: the rules that a head is trained under and is valid for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from haltwise.errors import InputError
from haltwise.policy.answers import READERS
from haltwise.policy.features import GROUP_SIGNALS

Probing = Literal["always", "at_halt"]

#: The texts among the conditions.
TEXTS = (
    "decision_rule",
    "close_text",
    "confidence_rule",
    "answer_rule",
    "answer_end",
    "think_start",
    "think_end",
)

#: Confidence as haltwise's own recorder computes it.
MEAN_LOGPROB = "exp of the mean of answer_logprobs"

_OF_ANSWERS = {"confidence", "answer", "worst_logprob", "probe_tokens"}
_LIMIT = re.compile(r", at most (\d+)$")
_EVERY = re.compile(r"every (\d+) tokens")
_AFTER = re.compile(r"after (.+)", re.DOTALL)


@dataclass(frozen=True)
class DecisionRule:
    """Where decision points lie in a thought.

    Written "every 16 tokens", or "after TEXT" for a point after every token whose text
    contains TEXT; with ", at most 30" behind it, there are no more points after the 30th. A
    recording may name any other rule: its traces can be replayed, but an LM cannot be run under
    a rule that is only a name.
    """

    text: str

    @property
    def max_points(self) -> int | None:
        """Decision points that a thought can have, or None if there is no limit."""
        found = _LIMIT.search(self.text)
        return int(found[1]) if found else None

    @property
    def every(self) -> int | None:
        """Thinking tokens between points, or None if the rule is another one."""
        found = _EVERY.fullmatch(_LIMIT.sub("", self.text))
        return int(found[1]) if found else None

    @property
    def after(self) -> str | None:
        """The text that a point follows, or None if the rule is another one."""
        found = _AFTER.fullmatch(_LIMIT.sub("", self.text))
        return found[1] if found else None

    def check_runnable(self) -> None:
        """Refuses a rule that an LM cannot be run under.

        Raises:
            InputError: If the rule is neither "every K tokens" with K >= 1 nor "after TEXT", or
                allows no point.
        """
        if not (self.every or self.after) or self.max_points == 0:
            raise InputError(
                f"decision rule {self.text!r} can be replayed but not run: expected "
                "'every K tokens' or 'after TEXT', and perhaps ', at most N', K and N >= 1"
            )


@dataclass(frozen=True)
class Halting:
    """The conditions of every halting decision: part of the head, and checked against it."""

    probing: Probing
    """always: an answer is forced at every point and is seen; at_halt: only when halting."""
    decision_rule: str
    """See DecisionRule."""
    close_text: str
    """Appended to the thought to force an answer; prefill, not generation."""
    confidence_rule: str
    """How `confidence` is computed from the forced answer."""
    max_answer_tokens: int = 16
    """A forced answer is cut after this many tokens."""
    answer_rule: str = "short"
    """How an answer is read from what follows the thought: a key of
    `haltwise.policy.answers.READERS`."""
    answer_end: str = ""
    """A forced answer ends with this text, outside of its braces; empty: only with the LM's own
    end token."""
    think_start: str = "<think>"
    """A thought begins after this text; empty: at once."""
    think_end: str = "</think>"
    """The LM itself closes a thought with this text; empty: only with its end token."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If `probing` or `answer_rule` is unknown, `max_answer_tokens` is below 1,
                a text is something else, or a thought has an end but no start.
        """
        if self.probing not in ("always", "at_halt"):
            raise InputError(f"probing is {self.probing!r}, expected 'always' or 'at_halt'")
        for name in TEXTS:
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected text")
        if self.answer_rule not in READERS:
            known = ", ".join(READERS)
            raise InputError(f"answer_rule is {self.answer_rule!r}, expected one of {known}")
        if bool(self.think_start) != bool(self.think_end):
            found = (self.think_start, self.think_end)
            raise InputError(f"think_start and think_end are {found}, expected both or none")
        if not isinstance(self.max_answer_tokens, int) or self.max_answer_tokens < 1:
            raise InputError(
                f"max_answer_tokens is {self.max_answer_tokens!r}, expected a number from 1"
            )

    @classmethod
    def of_recorder(cls, recorder: Mapping[str, Any], probing: Probing | None = None) -> Halting:
        """The conditions that traces were recorded under, as far as their writer knew them.

        Args:
            recorder: The files' `haltwise.recorder` metadata.
            probing: Another than the recorder's.

        Raises:
            InputError: If they make no sense.
        """
        unknown = {"decision_rule": "", "close_text": "", "confidence_rule": ""}
        names = (*TEXTS, "max_answer_tokens")
        stated = unknown | {name: recorder[name] for name in names if name in recorder}
        return cls(probing=probing or recorder.get("probing", "always"), **stated)

    @property
    def max_points(self) -> int | None:
        """Decision points that a thought can have, or None if there is no limit."""
        return DecisionRule(self.decision_rule).max_points

    def check_groups(self, groups: Sequence[str]) -> None:
        """Refuses features that cannot be seen under these conditions.

        Raises:
            InputError: If probing is at_halt and a feature group is made from forced answers, or
                if one counts the points that are left and the decision rule has no limit.
        """
        unseen = [group for group in groups if not _OF_ANSWERS.isdisjoint(GROUP_SIGNALS[group])]
        if unseen and self.probing == "at_halt":
            raise InputError(f"features {unseen} need a forced answer, but probing is at_halt")
        if "limit" in groups and self.max_points is None:
            raise InputError(
                f"features 'limit' need points_left: expected a decision rule with ', at most N', "
                f"found {self.decision_rule!r}"
            )

    def check_recorded(self, recorder: dict[str, Any], source: str) -> None:
        """Refuses traces that were recorded under other conditions.

        A file may leave out what its writer did not know; what it states must agree.

        Args:
            recorder: The file's `haltwise.recorder` metadata.
            source: The file's name, for the message.

        Raises:
            InputError: If a stated condition differs.
        """
        for name in (*TEXTS, "max_answer_tokens"):
            expected = getattr(self, name)
            if name in recorder and recorder[name] != expected:
                raise InputError(
                    f"{source}: {name} is {recorder[name]!r}, the head expects {expected!r}"
                )
        if self.probing == "always" and recorder.get("probing", "always") != "always":
            raise InputError(
                f"{source}: recorded without probes, the head needs one at every point"
            )
