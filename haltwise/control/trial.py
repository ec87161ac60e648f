"""How a challenger compares with the champion: pairs of what both would have lost and saved.

An audit tells what either head would have lost and cost at each of its prices. So the heads are
compared at all pairs of prices: what counts is the pair that would be served now, whatever would
have been when an audit was drawn. Where labels are due, a pair counts with the worst for whatever
is to be shown, and is put right once they come.

Shapes: K prices of the challenger; J steps of the champion, the first of which halts nothing; S
stakes.
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
    """What one head would have lost and saved on one audit, (K,) at each of its prices."""

    losses: tuple[float | None, ...]
    """(K,) None where it is not known before labels come."""
    answers: tuple[str, ...]
    """(K + 1,) what tells the answer at each price from others, and the full one; empty where that
    is not told."""
    saved: tuple[float, ...]
    """(K,) the share of the full answer's tokens."""
    step: int
    """The step that it would have been served."""

    def labelled(self, losses: Float | None) -> Side:
        """Returns it with losses (K,) by labels; None if there are none."""
        return self if losses is None else replace(self, losses=tuple(losses.tolist()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Side:
        """Rebuilds a side from parsed JSON."""
        lists = {name: tuple(data[name]) for name in ("losses", "answers", "saved")}
        return cls(**lists, step=data["step"])


@dataclass(frozen=True)
class Pair:
    """A challenger and the champion on one audit."""

    challenger: Side
    champion: Side

    @property
    def lost_more(self) -> Float:
        """(K + 1, J) what the challenger lost more at its steps; NaN where that is not known yet.

        What both have answered in the same way is no loss of either.
        """
        sides = self.challenger, self.champion
        new, old = (np.array([0.0, *one.losses], dtype=np.float64) for one in sides)
        mine, others = (np.array([one.answers[-1], *one.answers[:-1]]) for one in sides)
        same = (mine[:, None] == others) & (mine != "")[:, None]
        return np.where(same, 0.0, new[:, None] - old)

    @property
    def saved_more(self) -> Float:
        """(K, J) the share of the full answer's tokens that the challenger saved more."""
        new, old = np.array(self.challenger.saved), np.array([0.0, *self.champion.saved])
        more: Float = np.clip(new[:, None] - old, -1, 1)
        return more

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pair:
        """Rebuilds a pair from parsed JSON."""
        return cls(*(Side.from_json(data[name]) for name in ("challenger", "champion")))


@dataclass(frozen=True, eq=False)
class Trial:
    """Pairs of a challenger and the champion, from the challenger's first audit on.

    Each capital is that of who bets against a claim about the mean of the pairs, in logs; it
    reaches `ENOUGH` with a probability of at most 1 / `ENOUGH` if the claim holds, whenever one
    looks.
    """

    worse: Float
    """(K, J, S) against "the challenger loses `MARGIN` more, or more than that"."""
    dearer: Float
    """(K, J, S) against "the challenger saves no more"."""
    as_good: Float
    """(S,) against "the challenger loses at most `MARGIN` more", as both would have been served."""
    lost: Float
    """(K, J) sum of what the challenger has lost more; what is not known counts as lost."""
    saved: Float
    """(K, J) sum of the shares of the full tokens that it has saved more."""
    num: int = 0
    """Pairs."""
    unknown: Mapping[str, Pair] = field(default_factory=dict)
    """By request, the pairs that labels may put right."""

    @classmethod
    def begin(cls, num_prices: int, num_champions: int) -> Trial:
        """Returns the trial that no audit has told anything about.

        Args:
            num_prices: K.
            num_champions: The champion's prices, J - 1.
        """
        each, stakes = np.zeros((num_prices, num_champions + 1)), np.zeros(len(STAKES))
        capital = each[..., None] + stakes
        return cls(capital, capital, stakes, each, each)

    def after(self, request: str, pair: Pair) -> Trial:
        """Returns the trial after an audit.

        Args:
            request: The audit's id.
            pair: What it tells of both heads.
        """
        more = pair.saved_more
        moved = replace(
            self,
            num=self.num + 1,
            dearer=self.dearer + growth(-more, 0.0),
            saved=self.saved + more,
        )
        return moved._counted(request, pair, 1)

    def labelled(self, request: str, challenger: Float | None, champion: Float | None) -> Trial:
        """Returns the trial after labels have come for an audit that it waits for.

        Args:
            request: The audit's id.
            challenger: (K,) what the challenger lost at each price; None if that was known.
            champion: (J - 1,) the same of the champion.
        """
        before = self.unknown[request]
        told = Pair(before.challenger.labelled(challenger), before.champion.labelled(champion))
        return self._counted(request, before, -1)._counted(request, told, 1)

    def expired(self, request: str) -> Trial:
        """Returns the trial after an audit waits for labels no more: it stays as it has counted."""
        return self._keep(request, None)

    def _counted(self, request: str, pair: Pair, sign: int) -> Trial:
        """Returns the trial with a pair more, or with one less."""
        more = pair.lost_more
        served = more[pair.challenger.step, pair.champion.step]
        worst, best = np.where(np.isnan(more), 1.0, more)[1:], np.nan_to_num(served, nan=-1.0)
        moved = replace(
            self,
            worse=self.worse + sign * growth(worst, MARGIN),
            as_good=self.as_good + sign * np.log1p(STAKES / (1 + MARGIN) * (best - MARGIN)),
            lost=self.lost + sign * worst,
        )
        return moved._keep(request, pair if np.isnan(more).any() else None)

    def _keep(self, request: str, pair: Pair | None) -> Trial:
        others = {name: one for name, one in self.unknown.items() if name != request}
        return replace(self, unknown=others if pair is None else others | {request: pair})

    def is_ready(self, step: int, champion: int) -> bool:
        """Returns whether it is known that the challenger loses little more, and saves more.

        The challenger's prices are tested in their order, so that a step is as good as all below
        it, which keeps the probability of a wrong claim for whichever of them is served.

        Args:
            step: The step that the challenger would be served now.
            champion: The step that the champion is served now.
        """
        if not step or not _enough(self.dearer[step - 1, champion]):
            return False
        return all(_enough(one) for one in self.worse[:step, champion])

    @property
    def is_worse(self) -> bool:
        """Whether it is known that the challenger loses more than `MARGIN` more."""
        return _enough(self.as_good)

    def known(self, step: int, champion: int) -> str:
        """Returns what is known, worse, ready or not known yet; see `is_ready`."""
        if self.is_worse:
            return "worse"
        return "ready" if self.is_ready(step, champion) else "not known yet"

    def status(self, step: int, champion: int) -> dict[str, Any]:
        """Returns, as a JSON object, what the pairs tell; see `is_ready`."""
        num, at = max(self.num, 1), (slice(max(step - 1, 0), step), champion)
        below = log_mean_exp(self.worse[:step, champion])
        logs = {
            "worse": below.min(initial=np.inf) if step else 0.0,
            "dearer": log_mean_exp(self.dearer[at]).sum(),
            "as_good": log_mean_exp(self.as_good),
        }
        evidence = {
            name: round(float(np.exp(min(float(log), 50.0))), 3) for name, log in logs.items()
        }
        means = {
            "loses_more": float(self.lost[at].sum() / num),
            "saves_more": float(self.saved[at].sum() / num),
        }
        told = {"pairs": self.num, "unknown": len(self.unknown)}
        return told | {"known": self.known(step, champion), "evidence": evidence} | means

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
