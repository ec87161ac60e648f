"""Rules without a number: never halting, and what is possible in hindsight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from policies.policy import Halts
from traces import Traces


def hindsight(traces: Traces) -> Halts:
    """Halts (P,) at the first correct answer: the best EM, and the saving it could come with."""
    return traces.correct


def hindsight_give_up(traces: Traces) -> Halts:
    """Halts (P,) at the first correct answer, and at once where no answer is ever correct.

    An answer is also correct if the LM's own last one is.
    """
    return traces.correct | traces.hopeless[traces.trace_of_point]


@dataclass(frozen=True)
class Rule:
    """A rule that has nothing to tune."""

    name: str
    """In tables and in JSON."""
    title: str
    """Readable, for the page and its figures."""
    sentence: str
    """What it does, for the page."""
    halts: Callable[[Traces], Halts] | None
    """Where it would halt (P,); None neither halts nor probes."""


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
