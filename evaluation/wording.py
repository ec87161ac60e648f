"""How names and numbers are told to a person, in the page and on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

from policies.catalogue import in_words

# Ends of an interval that differ by no more than this are equal.
_ROUNDING = 1e-9


def policy_title(policy: str) -> str:
    """Returns the readable name of a policy; an unknown one keeps its own."""
    title, _ = in_words().get(policy, (policy.replace("_", " "), ""))
    return title


def gate_title(gate: float) -> str:
    """Returns, in words, what the points of a gate may lose."""
    points = 100 * gate
    return f"at most {points:g} point{'' if points == 1 else 's'}" if points else "nothing"


def kind_title(by: str) -> str:
    """Returns what the groups of a kind are called."""
    return "LM" if by == "model" else by


def signed(value: float, digits: int) -> str:
    """Returns a number with its sign, as it is printed."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """Returns a share in %, as every saving and rate is printed."""
    return f"{100 * share:.1f}".replace("-", "\N{MINUS SIGN}")


def points(share: float) -> str:
    """Returns a change of a share in points of a hundred, as every EM change is printed."""
    return signed(100 * share, 2)


def lead(share: float) -> str:
    """Returns a lead in saving in points of a hundred, as every such lead is printed."""
    return signed(100 * share, 1)


def exact_match(share: float) -> str:
    """Returns an EM in points of a hundred, as every EM is printed."""
    return f"{100 * share:.2f}"


def number(value: float) -> str:
    """Returns a number without a unit, as prices, thresholds and features are printed."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def counted(num: int, noun: str) -> str:
    """Returns a number of things, with the noun in the singular or the plural."""
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def gained(share: float) -> str:
    """Says in words how EM changed."""
    return f"{'gained' if share > 0 else 'lost'} {exact_match(abs(share))} points"


def between(interval: Sequence[float] | None, form: Callable[[float], str]) -> str:
    """Returns an interval as it is printed; empty where there is none."""
    return f"[{form(interval[0])}, {form(interval[1])}]" if is_known(interval) else ""


def is_known(interval: Sequence[float] | None) -> TypeGuard[Sequence[float]]:
    """Returns whether an interval says something.

    One of no width, where all resamples agree, is no evidence.
    """
    return interval is not None and interval[1] - interval[0] > _ROUNDING
