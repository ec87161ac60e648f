"""How a challenger compares with the champion: pairs of what both would have lost and saved.

An audit tells what either head would have lost and cost at each of its prices. The champion counts
with the price that it would have been served; the challenger is compared at all of its prices, so
that a price that nobody would have served at first has its evidence once it is. Where labels are
due, a pair counts with the worst for whatever is to be shown, and is put right once they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from haltwise.control.betting import STAKES, Float, growth, log_mean_exp

#: How much more a challenger may lose than the champion, and the evidence that is wanted.
MARGIN = 0.01
ENOUGH = 20.0


@dataclass(frozen=True)
class Side:
    """What one head would have lost on one audit."""

    losses: tuple[float | None, ...]
    """(K,) at each price; None where it is not known before labels come."""
    answers: tuple[str, ...]
    """(K + 1,) what tells the answer at each price from others, and the full one; empty where that
    is not told."""
    step: int
    """The step that it would have been served."""
    saved: tuple[float, ...]
    """(K,) the share of the full answer's tokens that it would have saved at each price."""

    @property
    def saved_at_step(self) -> float:
        """The same at its step."""
        return self.saved[self.step - 1] if self.step else 0.0

    @property
    def lost(self) -> float | None:
        """What it would have lost at its step."""
        return self.losses[self.step - 1] if self.step else 0.0

    @property
    def answer(self) -> str:
        """Its answer."""
        return self.answers[self.step - 1]


@dataclass(frozen=True)
class Pair:
    """What a challenger would have lost more than the champion on one audit."""

    champion: float | None
    """What the champion lost; None where it is not known yet, as everywhere here."""
    challenger: tuple[float | None, ...]
    """(K,) what the challenger lost at each price."""
    same: tuple[bool, ...]
    """(K,) whether its answer is the champion's."""
    step: int
    """The step that the challenger would have been served."""
    champion_step: int
    """The same of the champion."""

    @classmethod
    def of(cls, challenger: Side, champion: Side) -> Pair:
        """Returns the pair of two sides of one audit."""
        answer = champion.answer
        same = tuple(bool(one) and one == answer for one in challenger.answers[:-1])
        return cls(champion.lost, challenger.losses, same, challenger.step, champion.step)

    @property
    def more(self) -> Float:
        """(K,) what was lost more at each price; NaN where it is not known."""
        known = np.array(self.challenger, dtype=np.float64)
        champion = np.nan if self.champion is None else self.champion
        return np.where(self.same, 0.0, known - champion)

    @property
    def more_at_step(self) -> float:
        """The same at the step that would have been served."""
        if self.step:
            return float(self.more[self.step - 1])
        return np.nan if self.champion is None else -self.champion

    @property
    def is_known(self) -> bool:
        """Whether all of it is known."""
        return not np.isnan([*self.more, self.more_at_step]).any()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pair:
        """Rebuilds a pair from parsed JSON."""
        lists = {name: tuple(data[name]) for name in ("challenger", "same")}
        return cls(**{**data, **lists})


@dataclass(frozen=True, eq=False)
class Trial:
    """Pairs of a challenger and the champion, from the challenger's first audit on.

    Each capital is that of who bets against a claim about the mean of the pairs, in logs, (S,) for
    the stakes; it reaches `ENOUGH` with a probability of at most 1 / `ENOUGH` if the claim holds,
    whenever one looks. A price that is higher than another saves at least as much on every audit,
    so that the capitals of `dearer` keep to that for whichever price is served.
    """

    worse: Float
    """(K, S) against "the challenger loses `MARGIN` more, or more than that", at each price."""
    dearer: Float
    """(K, S) against "the challenger saves no more", at each price."""
    lost: Float
    """(K,) sum of what the challenger has lost more at each price; what is not known is lost."""
    saved: Float
    """(K,) sum of the shares of the full tokens that it has saved more at each price."""
    as_good: Float
    """(S,) against "the challenger loses at most `MARGIN` more", at what it would have served."""
    num: int = 0
    """Pairs."""
    unknown: Mapping[str, Pair] = field(default_factory=dict)
    """By request, the pairs that labels may put right."""

    @classmethod
    def begin(cls, num_prices: int) -> Trial:
        """Returns the trial of a challenger with K prices that no audit has told anything about."""
        each, stakes = np.zeros(num_prices), np.zeros(len(STAKES))
        capital = np.zeros((num_prices, len(STAKES)))
        return cls(capital, capital, each, each, stakes)

    def after(self, request: str, challenger: Side, champion: Side) -> Trial:
        """Returns the trial after an audit.

        Args:
            request: The audit's id.
            challenger: What the challenger would have lost and saved.
            champion: The same of the champion.
        """
        pair = Pair.of(challenger, champion)
        saved = np.clip(np.array(challenger.saved) - champion.saved_at_step, -1, 1)
        moved = replace(
            self,
            num=self.num + 1,
            dearer=self.dearer + growth(-saved, 0.0),
            saved=self.saved + saved,
        )
        return moved._counted(request, pair, 1)

    def labelled(self, request: str, challenger: Float | None, champion: Float | None) -> Trial:
        """Returns the trial after labels have come for an audit that it waits for.

        Args:
            request: The audit's id.
            challenger: (K,) what the challenger lost at each price; None if that was known.
            champion: The same of the champion.
        """
        before = told = self.unknown[request]
        if challenger is not None:
            told = replace(told, challenger=tuple(challenger.tolist()))
        if champion is not None and told.champion_step:
            told = replace(told, champion=float(champion[told.champion_step - 1]))
        return self._counted(request, before, -1)._counted(request, told, 1)

    def expired(self, request: str) -> Trial:
        """Returns the trial after an audit waits for labels no more: it stays as it has counted."""
        return self._keep(request, None)

    def _counted(self, request: str, pair: Pair, sign: int) -> Trial:
        """Returns the trial with a pair more, or with one less."""
        more, at_step = pair.more, pair.more_at_step
        worst = np.where(np.isnan(more), 1.0, more)
        best = -1.0 if np.isnan(at_step) else at_step
        as_good = np.log1p(STAKES / (1 + MARGIN) * (best - MARGIN))
        moved = replace(
            self,
            worse=self.worse + sign * growth(worst, MARGIN),
            as_good=self.as_good + sign * as_good,
            lost=self.lost + sign * worst,
        )
        return moved._keep(request, None if pair.is_known else pair)

    def _keep(self, request: str, pair: Pair | None) -> Trial:
        others = {name: one for name, one in self.unknown.items() if name != request}
        return replace(self, unknown=others if pair is None else others | {request: pair})

    def is_ready(self, step: int) -> bool:
        """Returns whether it is known that the challenger loses little more, and saves more.

        Prices are tested in their order, so that a step is as good as all below it, which keeps
        the probability of a wrong claim at 1 / `ENOUGH` for whichever of them is served.

        Args:
            step: The step that the challenger would be served now.
        """
        below = bool(step) and all(_enough(one) for one in self.worse[:step])
        return below and _enough(self.dearer[step - 1])

    @property
    def is_worse(self) -> bool:
        """Whether it is known that the challenger loses more than `MARGIN` more."""
        return _enough(self.as_good)

    def known(self, step: int) -> str:
        """Returns what is known: worse, ready, or not known yet."""
        return "worse" if self.is_worse else "ready" if self.is_ready(step) else "not known yet"

    def status(self, step: int) -> dict[str, Any]:
        """Returns, as a JSON object, what the pairs tell.

        Args:
            step: The step that the challenger would be served now.
        """
        num, at = max(self.num, 1), slice(max(step - 1, 0), step)
        logs = {
            "worse": min((log_mean_exp(one) for one in self.worse[:step]), default=0.0),
            "dearer": log_mean_exp(self.dearer[at]).sum(),
            "as_good": log_mean_exp(self.as_good),
        }
        evidence = {
            name: round(float(np.exp(min(float(log), 50.0))), 3) for name, log in logs.items()
        }
        means = {"loses_more": self.lost[at].sum() / num, "saves_more": self.saved[at].sum() / num}
        known = self.known(step)
        told = {"pairs": self.num, "unknown": len(self.unknown), "known": known}
        return told | {"evidence": evidence, **means}

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        unknown = {request: asdict(pair) for request, pair in self.unknown.items()}
        told = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return told | {"unknown": unknown}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Rebuilds a trial from parsed JSON."""
        values: dict[str, Any] = {
            name: np.array(value) if isinstance(value, list) else value
            for name, value in data.items()
        }
        unknown = {request: Pair.from_json(one) for request, one in data["unknown"].items()}
        return cls(**values | {"unknown": unknown})


def _enough(log_capital: Float) -> bool:
    return bool(log_mean_exp(log_capital) >= np.log(ENOUGH))
