"""Rules without a number to tune: never halting, and what is possible in hindsight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from policies.policy import Halts
from traces import Traces


def hindsight(traces: Traces) -> Halts:
    """Halts (P,) at the first correct answer.

    No policy has a better EM; the saving is one that such an EM could come with.
    """
    return traces.correct


def hindsight_give_up(traces: Traces) -> Halts:
    """Halts (P,) at the first correct answer, and at once where no answer is ever correct.

    The LM's own last answer counts among them: where it is correct, the trace goes on.
    """
    return traces.correct | traces.hopeless[traces.trace_of_point]


@dataclass(frozen=True)
class Rule:
    """A rule that has nothing to tune."""

    name: str
    """The rule's name in tables and in JSON."""
    title: str
    """The rule's readable name, for the page and its figures."""
    sentence: str
    """What the rule does, in a sentence for the page."""
    halts: Callable[[Traces], Halts] | None
    """Returns where the rule would halt (P,); None is a rule that neither halts nor probes."""


RULES = (
    Rule("never", "never halting", "Thinks to the end, unprobed: what all is compared with.", None),
    Rule(
        "hindsight",
        "hindsight",
        "Halts at the first correct answer, which only the gold answer tells: a bound.",
        hindsight,
    ),
    Rule(
        "hindsight_give_up",
        "hindsight, giving up",
        "As hindsight, and halts at once where no answer is ever correct: a bound.",
        hindsight_give_up,
    ),
)

RULE_NAMES = tuple(rule.name for rule in RULES)
