"""What a request asks of the head that runs beside its LM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from haltwise.errors import InputError

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

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If one is negative, not a number, or they contradict each other.
        """
        if not (np.isfinite(self.price) and self.price >= 0):
            raise InputError(f"price is {self.price}, expected 0 or more, and finite")
        if self.min_tokens < 0:
            raise InputError(f"min_tokens is {self.min_tokens}, expected 0 or more")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise InputError(
                f"max_tokens is {self.max_tokens}, expected at least {max(self.min_tokens, 1)}"
            )

    @classmethod
    def read(cls, asked: Mapping[str, Any], default: Terms) -> Terms:
        """Terms as a request states them; what it leaves out is as in the default.

        Args:
            asked: Any of "price", "min_tokens", "max_tokens", as numbers or text, and "off", as a
                truth value: then nothing halts the thought.
            default: Of requests that ask for nothing.

        Raises:
            InputError: If a key is unknown or a value is none.
        """
        unknown = sorted(set(asked) - {"price", "off", "min_tokens", "max_tokens"})
        if unknown:
            raise InputError(f"{unknown[0]!r}: expected price, off, min_tokens or max_tokens")
        found: dict[str, Any] = {}
        if "price" in asked:
            found["price"] = _number("price", asked["price"])
        for name in ("min_tokens", "max_tokens"):
            if name in asked:
                found[name] = _count(name, asked[name])
        terms = replace(default, **found)
        return cls(0.0) if _truth("off", asked.get("off", False)) else terms


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r:.40}, expected a number") from None


def _count(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise InputError(f"{name} is {value!r:.40}, expected a whole number")
    return int(number)


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise InputError(f"{name} is {value!r:.40}, expected true or false")
    return text in _TRUE
