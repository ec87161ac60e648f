"""What each price loses and saves, as audits tell it, with intervals that hold at any time.

An audit is drawn with a probability p that was known before, and tells the loss and the tokens of
every price at once. Weighted by 1 / p, the sum over audits is right in the mean for the sum over
all requests (Horvitz and Thompson, 1952), whatever made p rise or fall before the draw. What
requests that were not audited would have cost is unknown, so they only count.

All sums are of weights floor / p, which are at most 1; so are losses, and tokens as shares of
`most_tokens`, and `half_width` bounds them. The intervals are for the mean of what requests so far
lose in the mean, each given the past: nothing has to stay as it is, and requests need not be alike.

Shapes: K prices, the strictest first; J kinds of loss, as in `LOSSES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise.control.betting import Float, half_width, log_wealth
from haltwise.errors import InputError

#: The losses that are told apart: exact match lost less what halting wins; right answers turned
#: wrong; answers that differ, whether one of them is right or not.
LOSSES = ("net-em-loss", "right-to-wrong", "disagreement")
# The least that each can be, and how far it is from there to 1 where answers differ.
_LEAST: Float = np.array([[-1.0], [0.0], [0.0]])
_SPANS: Float = np.array([[2.0], [1.0], [0.0]])
# Ends of intervals are found to a millionth.
_HALVINGS = 21


@dataclass(frozen=True, eq=False)
class Audit:
    """What one audit tells of K prices."""

    agrees: NDArray[np.bool_]
    """(K,) whether the answer at that price equals the full one, by the task's own scorer."""
    cost: Float
    """(K,) the tokens at that price, as a head that served it would have spent them."""
    full_cost: float
    """The tokens of the full answer, without the audit's own."""
    right: Float | None = None
    """(K,) whether the answer at that price is right, where there is a label; NaN where not."""
    full_right: float | None = None
    """Whether the full answer is right, or None. With `right`, in [0, 1]."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: If a number is missing, negative or none, or lengths differ.
        """
        num = len(self.agrees)
        if len(self.cost) != num or (self.right is not None and len(self.right) != num):
            raise InputError(f"audit of {num} prices with {len(self.cost)} costs or other labels")
        tokens = np.append(self.cost, self.full_cost)
        if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
            raise InputError("an audit's tokens are negative or not finite, expected 0 or more")
        labels = np.append([] if self.right is None else self.right, self._full)
        if not ((labels >= 0) & (labels <= 1) | np.isnan(labels)).all():
            raise InputError("an audit's labels are not all in [0, 1]")

    @property
    def due(self) -> NDArray[np.bool_]:
        """(K,) whether answers differ and it is not known how right both are."""
        missing = np.isnan(self._full) | np.isnan(self._rights)
        due: NDArray[np.bool_] = ~self.agrees & missing
        return due

    @property
    def losses(self) -> Float:
        """(J, K) the losses; where a label is due, the largest that they can be."""
        full, rights = self._full, self._rights
        net = np.where(self.agrees, 0.0, full - rights)
        wrong = np.where(self.agrees, 0.0, full * (1 - rights))
        known = np.stack([net, wrong, ~self.agrees])
        worst: Float = np.where(self.due, 1.0, known)
        return worst

    @property
    def _full(self) -> float:
        return np.nan if self.full_right is None else float(self.full_right)

    @property
    def _rights(self) -> Float:
        return np.full(len(self.agrees), np.nan) if self.right is None else self.right


@dataclass(frozen=True, eq=False)
class Interval:
    """An estimate (...) and the interval around it."""

    low: Float
    estimate: Float
    high: Float


@dataclass(frozen=True, eq=False)
class Sums:
    """What the audits of one group sum up to; sums of several sets of requests may be added."""

    floor: float
    """The least probability that any audit is drawn with."""
    most_tokens: float
    """The most tokens that a request can have, such as the LM's context."""
    num_requests: int
    """The requests, audited or not."""
    num_audits: int
    """The audits among them."""
    loss: Float
    """(J, K) of losses."""
    loss_squares: Float
    """(J, K) of their squares."""
    due: Float
    """(J, K) of how much smaller the losses can be where labels are due."""
    tokens: Float
    """(K + 1,) of tokens as shares of the most, the full answer's last."""
    products: Float
    """(K + 1, 2) of the products of each of these with itself, and with the full answer's."""

    @classmethod
    def none(cls, num_prices: int, floor: float, most_tokens: float) -> Sums:
        """Returns the sums of no request.

        Raises:
            InputError: If the floor is not in (0, 1], or there are no tokens.
        """
        if not 0 < floor <= 1 or not 0 < most_tokens < np.inf:
            raise InputError(
                f"audits are at least {floor} of requests of at most {most_tokens} tokens, "
                "expected a share in (0, 1] and tokens above 0"
            )
        losses = np.zeros((len(LOSSES), num_prices))
        tokens = np.zeros(num_prices + 1)
        pairs = np.zeros((num_prices + 1, 2))
        return cls(floor, most_tokens, 0, 0, losses, losses, losses, tokens, pairs)

    def request(self, num: int = 1) -> Sums:
        """Returns the sums after so many more requests have come, audited or not."""
        return replace(self, num_requests=self.num_requests + num)

    def audit(self, audit: Audit, probability: float) -> Sums:
        """Returns the sums after an audit has told what it tells; its request has come before.

        Args:
            audit: What it tells.
            probability: With which it was drawn, as it was known before the draw.

        Raises:
            InputError: If the probability is below the floor or above 1, or the audit has more
                tokens than there can be.
        """
        return self._moved(audit, probability, 1)

    def label(self, before: Audit, after: Audit, probability: float) -> Sums:
        """Returns the sums after labels have come for an audit that is in them.

        Args:
            before: What the audit told.
            after: What it tells with the labels.
            probability: With which it was drawn.
        """
        return self._moved(before, probability, -1)._moved(after, probability, 1)

    def _moved(self, audit: Audit, probability: float, sign: int) -> Sums:
        if not self.floor <= probability <= 1:
            raise InputError(f"an audit was drawn with {probability}, expected {self.floor} to 1")
        tokens = np.append(audit.cost, audit.full_cost) / self.most_tokens
        if tokens.max() > 1:
            raise InputError(
                f"an audit has {tokens.max() * self.most_tokens:.0f} tokens, expected at most "
                f"{self.most_tokens:.0f}"
            )
        weight = self.floor / probability
        losses = weight * audit.losses
        due = weight * _SPANS * audit.due
        shares = weight * tokens
        pairs = shares[:, None] * np.stack([shares, np.full_like(shares, shares[-1])], axis=-1)
        return replace(
            self,
            num_audits=self.num_audits + sign,
            loss=self.loss + sign * losses,
            loss_squares=self.loss_squares + sign * losses**2,
            due=self.due + sign * due,
            tokens=self.tokens + sign * shares,
            products=self.products + sign * pairs,
        )

    def at(self, step: int) -> Sums:
        """Returns the sums of one price alone, counted from 1; they tell the same of it."""
        price, tokens = [step - 1], [step - 1, -1]
        return replace(
            self,
            loss=self.loss[:, price],
            loss_squares=self.loss_squares[:, price],
            due=self.due[:, price],
            tokens=self.tokens[tokens],
            products=self.products[tokens],
        )

    def losses(self, level: float = 0.05) -> Interval:
        """Returns the mean loss (J, K) of each kind and price over all requests.

        Each interval holds at all times at once with probability 1 - `level`. Where labels are due
        its ends take them for the best and the worst, and the estimate for the worst.
        """
        over = self.floor * max(self.num_requests, 1)
        width = half_width(self.loss_squares, level / 2)
        low = np.maximum((self.loss - self.due - width) / over, _LEAST)
        estimate = np.clip(self.loss / over, _LEAST, 1.0)  # weights of few audits can be too large
        return Interval(low, estimate, np.minimum((self.loss + width) / over, 1.0))

    def savings(self, level: float = 0.05) -> Interval:
        """Returns the share of the full answers' tokens (K,) that each price saves.

        Each interval holds at all times at once with probability 1 - `level`. The claim "it is s"
        says that the sum of (1 - s) times the full tokens, less those at the price, is 0 in the
        mean; the interval is what is not refuted.
        """
        cost, full = self.tokens[:-1], self.tokens[-1]
        estimate = 1 - cost / full if full > 0 else np.zeros_like(cost)
        low, high = (self._last_kept(estimate, end, level / 2) for end in (-1.0, 1.0))
        return Interval(low, estimate, high)

    def _last_kept(self, estimate: Float, end: float, level: float) -> Float:
        """Returns the last share (K,) from the estimate to an end that is not refuted."""
        kept, beyond = estimate, np.full_like(estimate, end)
        whole = ~self._refuted(beyond, level)
        for _ in range(_HALVINGS):
            middle = (kept + beyond) / 2
            refuted = self._refuted(middle, level)
            kept, beyond = np.where(refuted, kept, middle), np.where(refuted, middle, beyond)
        return np.where(whole, end, kept)

    def _refuted(self, share: Float, level: float) -> NDArray[np.bool_]:
        """Returns whether it is refuted (K,) that the prices save these shares (K,)."""
        kept = 1 - share
        far = np.abs(kept * self.tokens[-1] - self.tokens[:-1])
        cost_squares, mixed, full_squares = *self.products[:-1].T, self.products[-1, 0]
        squares = kept**2 * full_squares - 2 * kept * mixed + cost_squares
        # What is summed is within 1 of 0, or within `kept` where that is more.
        scale = np.maximum(kept, 1)
        capital = log_wealth(far / scale, squares.clip(0) / scale**2)
        refuted: NDArray[np.bool_] = capital >= -np.log(level)
        return refuted

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sums:
        """Rebuilds sums from parsed JSON.

        Raises:
            InputError: If a key is missing, unknown or of the wrong form.
        """
        try:
            values: dict[str, Any] = {
                name: np.array(value) if isinstance(value, list) else value
                for name, value in data.items()
            }
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"sums are not readable ({error})") from None
