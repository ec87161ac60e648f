"""How an LM is halted: the conditions that a head is trained under and is valid for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from haltwise.errors import InputError
from haltwise.policy.answers import READERS
from haltwise.policy.features import signals_of
from haltwise.policy.signals import signals_from

Probing = Literal["always", "at_halt"]

#: The confidence rule of haltwise's own recorder.
MEAN_LOGPROB = "exp of the mean of answer_logprobs"

_LIMIT = re.compile(r", at most (\d+)$")
_EVERY = re.compile(r"every (\d+) tokens(?:, every (\d+) while the answer repeats)?")
_AFTER = re.compile(r"after (.+)", re.DOTALL)


@dataclass(frozen=True)
class DecisionRule:
    """Where decision points lie in a thought.

    A rule is written "every 16 tokens", or "after TEXT" for a point after every token whose text
    contains TEXT or ends it. By "every 512 tokens, every 64 while the answer repeats" a point lies
    close behind one whose forced answer is that of the point before it, and far from others. If
    ", at most 30" follows, there are no more points after the 30th. A recording may state any other
    rule: its traces can be replayed, but no LM can be run under a rule that is only a name.
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
        return self._spacing[0]

    @property
    def every_repeated(self) -> int | None:
        """The same behind a point whose answer repeats that of the point before it."""
        return self._spacing[1]

    @property
    def looks_at_answers(self) -> bool:
        """Whether it hangs on forced answers where the next point lies."""
        return self.every != self.every_repeated

    @property
    def _spacing(self) -> tuple[int | None, int | None]:
        found = _EVERY.fullmatch(_LIMIT.sub("", self.text))
        return (int(found[1]), int(found[2] or found[1])) if found else (None, None)

    @property
    def after(self) -> str | None:
        """The text that a point follows, or None if the rule is another one."""
        found = _AFTER.fullmatch(_LIMIT.sub("", self.text))
        return found[1] if found else None

    def check_runnable(self) -> None:
        """Refuses a rule that an LM cannot be run under.

        Raises:
            InputError: If the rule is none of those of the class, has a spacing of 0 tokens or one
                that is no multiple of the closer one, or allows no point.
        """
        far, close = self._spacing
        is_spaced = far and close and far % close == 0
        if not (is_spaced or self.after) or self.max_points == 0:
            raise InputError(
                f"decision rule {self.text!r} is none that can be run: expected "
                "'every K tokens', 'every K tokens, every J while the answer repeats' or "
                "'after TEXT', and perhaps ', at most N'; J, K and N >= 1, K a multiple of J"
            )

    def replays(self, other: DecisionRule) -> bool:
        """Whether traces that were recorded under this rule hold every point of another one."""
        spacing = self.every
        if self == other:
            return True
        if not spacing or self.looks_at_answers or self.max_points is not None:
            return False
        return not any(each is None or each % spacing for each in other._spacing)


@dataclass(frozen=True)
class Halting:
    """The conditions of every halting decision.

    They are part of a head, which refuses traces and LMs under other conditions.
    """

    probing: Probing
    """always: an answer is forced at every decision point, and the head sees it; at_halt: an
    answer is forced only when the head halts."""
    decision_rule: str
    """Where decision points lie, see `DecisionRule`."""
    close_text: str
    """The text that is appended to a thought to force an answer. Its tokens are prefilled and do
    not count as generated."""
    confidence_rule: str
    """How the LM's confidence in a forced answer is computed."""
    max_answer_tokens: int = 16
    """A forced answer is cut after this many tokens."""
    answer_rule: str = "short"
    """How an answer is read from what follows the thought: a key of
    `haltwise.policy.answers.READERS`."""
    answer_end: str = ""
    """A forced answer ends with this text, unless it is between braces. If it is empty, only the
    LM's own end token ends an answer."""
    think_start: str = "<think>"
    """A thought begins after this text. If it is empty, the thought begins at once."""
    think_end: str = "</think>"
    """The LM itself closes a thought with this text. If it is empty, only its end token does."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If `probing` or `answer_rule` is unknown, `max_answer_tokens` is below 1,
                what should be a text is none, only one end of a thought has a text, or the
                decision rule looks at answers and probing is at_halt.
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
        if self.probing == "at_halt" and DecisionRule(self.decision_rule).looks_at_answers:
            raise InputError(
                f"decision rule {self.decision_rule!r} looks at answers, but probing is at_halt"
            )
        if not isinstance(self.max_answer_tokens, int) or self.max_answer_tokens < 1:
            raise InputError(
                f"max_answer_tokens is {self.max_answer_tokens!r}, expected a number from 1"
            )

    @classmethod
    def of_recorder(cls, recorder: Mapping[str, Any], probing: Probing | None = None) -> Halting:
        """Returns the conditions that traces were recorded under, as far as the files tell.

        Args:
            recorder: The files' `haltwise.recorder` metadata.
            probing: The probing to halt under, if it is not the recorder's.

        Raises:
            InputError: If the metadata state what cannot be a condition.
        """
        unknown = {"decision_rule": "", "close_text": "", "confidence_rule": ""}
        names = (*TEXTS, "max_answer_tokens")
        stated = unknown | {name: recorder[name] for name in names if name in recorder}
        return cls(probing=probing or recorder.get("probing", "always"), **stated)

    @property
    def max_points(self) -> int | None:
        """Decision points that a thought can have, or None if there is no limit."""
        return DecisionRule(self.decision_rule).max_points

    def why_not_run(self) -> str:
        """Says why a head can be replayed under these conditions, but not run; no text if it can.

        Traces that another program has written need not tell what an LM is to be halted like.
        """
        missing = [name for name in ("decision_rule", "close_text") if not getattr(self, name)]
        if missing:
            return (
                f"haltwise.recorder states no {' and no '.join(missing)}: a head that is trained "
                "on these traces can be judged on recorded traces, but not run beside an LM"
            )
        try:
            self.check_runnable()
        except InputError as error:
            return str(error)
        return ""

    def check_runnable(self) -> None:
        """Refuses conditions that can be replayed alone.

        Raises:
            InputError: If decision points cannot be found in a running thought, or a head would see
                another confidence there than it has learned from.
        """
        DecisionRule(self.decision_rule).check_runnable()
        if self.probing == "always" and self.confidence_rule != MEAN_LOGPROB:
            raise InputError(
                f"confidence rule {self.confidence_rule!r} is none that can be run: expected "
                f"{MEAN_LOGPROB!r}, or probing at_halt"
            )

    def check_groups(self, groups: Sequence[str]) -> None:
        """Refuses features that cannot be seen under these conditions.

        Raises:
            InputError: If a feature group is made from forced answers and probing is at_halt, or
                if a group counts the points that are left and the decision rule has no limit.
        """
        of_answers = set(signals_from("forced_answer"))
        unseen = [group for group in groups if of_answers.intersection(signals_of([group]))]
        if unseen and self.probing == "at_halt":
            raise InputError(
                "probing at_halt shows no forced answer: expected probing always, or no feature "
                f"group {', '.join(unseen)}"
            )
        counting = [group for group in groups if "points_left" in signals_of([group])]
        if counting and self.max_points is None:
            raise InputError(
                f"decision rule {self.decision_rule!r} has no limit, up to which points could be "
                f"counted: expected one with ', at most N', or no feature group "
                f"{', '.join(counting)}"
            )

    def differs(self, other: Halting) -> str:
        """Says which conditions differ from another head's, and what it expects; none: no text."""
        names = [one.name for one in fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        told = [f"{name} is {own!r}, expected {its!r}" for name, own, its in pairs if own != its]
        return "; ".join(told)

    def check_recorded(self, recorder: Mapping[str, Any], source: str) -> None:
        """Refuses traces that were recorded under other conditions.

        A file may leave out what its writer did not know. What it states must agree.

        Args:
            recorder: The file's `haltwise.recorder` metadata.
            source: The file's name, for the message.

        Raises:
            InputError: If the file states another condition.
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


#: The conditions that are texts, in order.
TEXTS = tuple(condition.name for condition in fields(Halting) if condition.type == "str")
