"""A challenger that serves a share of all requests: step by step until all, or held at a share.

Who is served by it is drawn by a key for each session, else user, else request, so that nobody
changes between heads; a larger share has everybody of a smaller one. Replays of audits have said
before that it is as good. What they cannot see, requests that fail and people who complain, is
watched while it serves: with p the probability of the challenger and A whether it was drawn, the
mean of (A - p) * harm is above 0 only if the challenger harms more often, and who bets on that by
a share of 1 / p has a capital that grows in no mean if it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.betting import log_mean_exp
from haltwise.control.draws import draw
from haltwise.errors import InputError

#: The shares of all requests that a challenger serves, one after the other, before it has all.
SHARES = (0.01, 0.05, 0.25)
#: Audits that each of them waits for.
STEP_AUDITS = 100
# What is bet on every harm, as shares of the largest bet that cannot lose everything, and the
# capital from which on it is known that a challenger harms more.
_BETS = np.array([0.05, 0.2, 0.45])
_HARMED = 100.0


@dataclass(frozen=True)
class Harm:
    """How often requests of either head were harmed."""

    champion: float = 0.0
    """Sum of the champion's harm."""
    challenger: float = 0.0
    log_capital: tuple[float, ...] = (0.0,) * len(_BETS)
    """Of each bet that the challenger harms more often."""

    @classmethod
    def of(cls, harm: float, is_challenger: bool, probability: float) -> Harm:
        """Returns that of one request.

        Args:
            harm: In [0, 1].
            is_challenger: Whether the challenger has served it.
            probability: With which the challenger was to serve it, in (0, 1).
        """
        gain = _BETS / probability * (is_challenger - probability) * harm
        own = harm if is_challenger else 0.0
        return cls(harm - own, own, tuple(np.log1p(gain).tolist()))

    def __add__(self, other: Harm) -> Harm:
        """Returns that of both's requests."""
        pairs = zip(self.log_capital, other.log_capital, strict=True)
        return Harm(
            self.champion + other.champion,
            self.challenger + other.challenger,
            tuple(one + more for one, more in pairs),
        )

    @property
    def is_more(self) -> bool:
        """Whether it is known that the challenger harms more often than the champion."""
        return bool(log_mean_exp(np.array(self.log_capital)) >= np.log(_HARMED))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Harm:
        """Rebuilds it from parsed JSON."""
        return cls(**{**data, "log_capital": tuple(data["log_capital"])})


@dataclass(frozen=True)
class Arms:
    """What became of the requests of either head."""

    head: str
    """The challenger."""
    champion: int = 0
    """Requests that the champion has served."""
    challenger: int = 0
    failures: Harm = Harm()
    """That requests failed."""
    complaints: Harm = Harm()
    """That people complained, as much as they did."""

    def __add__(self, other: Arms) -> Arms:
        """Returns that of both's requests; others of another challenger are none."""
        if other.head != self.head:
            return self
        return Arms(
            self.head,
            self.champion + other.champion,
            self.challenger + other.challenger,
            self.failures + other.failures,
            self.complaints + other.complaints,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Arms:
        """Rebuilds it from parsed JSON."""
        harms = {name: Harm.from_json(data[name]) for name in ("failures", "complaints")}
        return cls(**{**data, **harms})


@dataclass(frozen=True)
class Canary:
    """A challenger that serves a share of all requests."""

    head: str
    """Its digest."""
    share: float
    """Of all requests."""
    climbs: bool = True
    """Whether it goes on to larger shares, and at last serves all."""
    audits: int = 0
    """Since it has this share."""
    arms: Arms = field(default_factory=lambda: Arms(""))

    @classmethod
    def begin(cls, head: str, held_at: float | None = None) -> Canary:
        """Returns the canary of who begins.

        Args:
            head: Its digest.
            held_at: The share that it keeps; None for one that climbs.

        Raises:
            InputError: If that is no share.
        """
        if held_at is not None and not 0 < held_at < 1:
            raise InputError(f"share is {held_at}, expected between 0 and 1")
        return cls(head, held_at or SHARES[0], held_at is None, arms=Arms(head))

    def takes(self, key: bytes, unit: str) -> bool:
        """Returns whether it serves somebody.

        Args:
            key: Of the installation.
            unit: Whom; the same is always served by the same head.
        """
        return draw(key, f"{self.head} {unit}", "arm") < self.share

    @property
    def harm(self) -> str:
        """Why it has to stop serving, as far as its requests tell; empty if it need not."""
        if self.arms.failures.is_more:
            return "its requests fail more often"
        return "more people complain" if self.arms.complaints.is_more else ""

    @property
    def is_due(self) -> bool:
        """Whether its step has had its audits."""
        return self.climbs and self.audits >= STEP_AUDITS

    def next(self) -> Canary | None:
        """Returns it with the next larger share; None if that is all."""
        larger = [share for share in SHARES if share > self.share]
        return replace(self, share=larger[0], audits=0) if larger else None

    def status(self) -> dict[str, Any]:
        """Returns a JSON object for a person."""
        arms = {
            name: {
                "requests": getattr(self.arms, name),
                "failures": getattr(self.arms.failures, name),
                "complaints": round(getattr(self.arms.complaints, name), 3),
            }
            for name in ("champion", "challenger")
        }
        told = {name: getattr(self, name) for name in ("head", "share", "climbs", "audits")}
        return told | {"audits_a_step": STEP_AUDITS if self.climbs else None, "served": arms}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Canary:
        """Rebuilds it from parsed JSON."""
        return cls(**{**data, "arms": Arms.from_json(data["arms"])})
