"""What is known of a request: before its first token, while it runs, and after its thought."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from haltwise.session.terms import Terms
from haltwise.session.thought import Reason, Thought


@dataclass(frozen=True)
class ThoughtRequest:
    """What is known of a request before its first token."""

    terms: Terms
    """The terms that it asks for; what it leaves out is as the operator has it."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else its adapter knows: "row" in `generate`, "prompt" (its number) in a batch job, the
    request's own `extra_args` in vLLM, "endpoint", "model" and "tenant" (a digest of its API key)
    in the proxy."""


@dataclass
class ThoughtReport:
    """What happened to the thought of one request."""

    request: ThoughtRequest = field(compare=False)
    """The request, as it was asked; reports of other requests may be equal."""
    price: float
    """The newest price, in exact match per 1,000 tokens."""
    reason: Reason = "cut off"
    """Why the thought ended."""
    position: int = 0
    """Tokens of the thought."""
    num_points: int = 0
    """Decision points of the thought."""
    answer: str = ""
    """The forced answer, if the request was halted and did not answer by itself."""
    num_probe_tokens: int = 0
    """Tokens generated to look at answers; they are no part of the output."""
    num_bad_signals: int = 0
    """Decision points with signals that were missing or not finite; the thought went on."""
    decided: Reason | None = None
    """What was decided, "halted" or "capped", whether it was carried out or not."""
    decided_at: int | None = None
    """The position at which it was."""
    fallback: str = ""
    """Why a thought that was to be halted went on, if it did."""

    @property
    def halted(self) -> bool:
        """Whether the thought was closed for the LM, by the head or by its cap."""
        return self.reason in ("halted", "capped")


@dataclass
class RunningRequest:
    """A request in one row of a session."""

    terms: Terms
    """The terms on which it began."""
    thought: Thought
    """How far it has come."""
    report: ThoughtReport
    """What has happened to it so far; how far it has come is in `thought`, and `Session.report`
    puts both together."""
    watched: bool
    """Whether the head is to decide about it, as long as there is something to decide."""
    released: bool = False
    """Whether it was left to its LM for good."""
