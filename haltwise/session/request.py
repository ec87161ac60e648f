"""What a request asks, what is known of it while it runs, and what happened to its thought."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from haltwise.errors import InputError
from haltwise.policy.head import HeadConfig
from haltwise.policy.signals import Signals
from haltwise.session.thought import Reason, Thought

log = logging.getLogger("haltwise.session")

# Counts are kept as 64-bit integers, and no context is nearly as long.
_MOST_TOKENS = 2**53
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


@dataclass(frozen=True)
class Terms:
    """The terms of one request."""

    price: float
    """In exact match per 1,000 tokens; at 0 the head never halts."""
    min_tokens: int = 0
    """Thinking tokens before which the head does not halt."""
    max_tokens: int | None = None
    """Thinking tokens at which the thought is closed, whatever the head says."""
    segment: str | None = None
    """What kind of question it is, as the head's training traces name kinds; None is unknown."""
    segment_prices: Mapping[str, float] = field(default_factory=dict, repr=False, hash=False)
    """By segment, the price of who names the segment and no price."""
    is_named: bool = field(default=False, repr=False, compare=False)
    """Whether somebody has named the price for this request or its client; else it is the usual
    one."""
    looked_at: bool = False
    """Whether its decision points are looked at even at a price of 0; only a control asks that."""

    @classmethod
    def of_head(cls, config: HeadConfig) -> Terms:
        """Returns a head's own terms."""
        return cls(config.default_price, segment_prices=config.segment_prices)

    def __post_init__(self) -> None:
        """Checks the values; text that is a number is taken for it.

        Raises:
            InputError: If one is negative, not a number, or they contradict each other.
        """
        if not isinstance(self.segment, str | None):
            raise InputError(f"segment is {self.segment!r}, expected text")
        object.__setattr__(self, "price", _number("price", self.price))
        object.__setattr__(self, "min_tokens", _count("min_tokens", self.min_tokens))
        if not 0 <= self.price < math.inf:
            raise InputError(f"price is {self.price}, expected 0 or more, and finite")
        if self.max_tokens is None:
            return
        object.__setattr__(self, "max_tokens", _count("max_tokens", self.max_tokens))
        if self.max_tokens < max(self.min_tokens, 1):
            raise InputError(
                f"max_tokens is {self.max_tokens}, expected at least {max(self.min_tokens, 1)}"
            )

    @property
    def names_unknown_segment(self) -> bool:
        """Whether the named segment has no price of its own, though others have."""
        return bool(self.segment and self.segment_prices) and (
            self.segment not in self.segment_prices
        )

    @classmethod
    def read(cls, asked: Mapping[str, Any], default: Terms) -> Terms:
        """Returns terms as somebody states them; what is left out is as in the default.

        Args:
            asked: Any of "price", "min_tokens", "max_tokens", as numbers or text, "off", as a
                truth value: then the price is 0, and "segment", whose price holds if none is
                named.
            default: The terms of who states nothing.

        Raises:
            InputError: If a key is unknown or a value makes no sense.
        """
        unknown = sorted(set(asked) - {"price", "off", "min_tokens", "max_tokens", "segment"})
        if unknown:
            raise InputError(
                f"{unknown[0]!r}: expected price, off, min_tokens, max_tokens or segment"
            )
        terms = replace(default, **{key: asked[key] for key in asked if key != "off"})
        if "price" in asked:
            terms = terms.naming(terms.price)
        elif "segment" in asked:
            own = terms.segment_prices.get(terms.segment or "", default.price)
            if terms.names_unknown_segment:
                _tell_unknown(str(terms.segment), tuple(terms.segment_prices))
            terms = replace(terms, price=own)
        return terms.naming(0.0) if _truth("off", asked.get("off", False)) else terms

    def naming(self, price: float) -> Terms:
        """Returns the terms with a price that somebody names, whatever the segment."""
        return replace(self, price=price, segment_prices={}, is_named=True)

    @classmethod
    def within(cls, asked: Mapping[str, Any], limits: Terms) -> Terms:
        """Returns the terms that a client asks for, under a cap that only the operator can lift.

        Args:
            asked: As for `read`.
            limits: The operator's terms. The cap is the smaller one of both.

        Raises:
            InputError: As `read`, and if the client's terms contradict the operator's.
        """
        terms = cls.read(asked, replace(limits, max_tokens=None))
        if limits.max_tokens is not None and terms.min_tokens > limits.max_tokens:
            told = f"min_tokens is {terms.min_tokens}, expected at most {limits.max_tokens}"
            raise InputError(f"{told}, the operator's cap")
        caps = [cap for cap in (terms.max_tokens, limits.max_tokens) if cap is not None]
        return replace(terms, max_tokens=min(caps, default=None))


@lru_cache(maxsize=100)  # once a name, of which clients may have any number
def _tell_unknown(segment: str, known: tuple[str, ...]) -> None:
    """Warns that a segment has no price of its own, and says which have."""
    told = "segment %.60r has no price of its own, as %s have: the default price holds"
    log.warning(told, segment, ", ".join(sorted(known)))


@dataclass(frozen=True)
class ThoughtRequest:
    """What is known of a request before its first token."""

    terms: Terms
    """The terms that it asks for; what it leaves out is as the operator has it."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else its adapter knows: "row" in `generate`, "prompt" (its number) in a batch job, the
    request's own `extra_args` in vLLM, "endpoint", "model" and "tenant" (a digest of its API key)
    in the proxy."""


@dataclass(frozen=True)
class Spent:
    """What a whole request took, as far as its adapter knows; None is unknown."""

    input_tokens: int | None = None
    """Of all prompts."""
    cached_tokens: int | None = None
    """Those of them that the server's cache had."""
    reasoning_tokens: int | None = None
    """Of the thought."""
    output_tokens: int | None = None
    """All that were generated, those of the thought and of looks at answers included."""
    outcome: str | None = None
    """How it ended: the answer's finish reason, "cut off", or "passed on" where nobody watched."""
    seconds: float | None = None
    """From its arrival to its end."""
    cost_nano: int | None = None
    """In nano-dollars, where somebody has said what tokens cost."""


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
    escalated: bool = False
    """Whether a large LM has answered in place of the one that thought."""
    spent: Spent = Spent()
    """What the whole request took."""

    @property
    def halted(self) -> bool:
        """Whether the thought was closed for the LM, by the head or by its cap."""
        return self.reason in ("halted", "capped") and not self.escalated


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
    point: tuple[Signals, int] | None = None
    """The signals of all rows that were decided about together at its newest decision point, and
    its own place among them."""


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} is {value!r:.40}, expected a number") from None


def _count(name: str, value: Any) -> int:
    number = _number(name, value)
    if not (number.is_integer() and 0 <= number <= _MOST_TOKENS):
        raise InputError(f"{name} is {value!r:.40}, expected a whole number, 0 or more")
    return int(number)


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise InputError(f"{name} is {value!r:.40}, expected true or false")
    return text in _TRUE
