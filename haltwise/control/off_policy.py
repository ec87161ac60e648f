"""What other prices would have spent, from all requests that were served, not from audits alone.

A thought that was halted at one price shows where every higher one would have halted it, and
nothing of lower ones; an audit shows both. With s the price that a request was due, T(p) its tokens
at p, A whether it was audited and q the probability of that,

    T(max(p, s)) + A / q (T(p) - T(max(p, s)))

has the mean of T(p): exact from s on, and below it through audits, which only have to tell the
difference (a control variate for Horvitz and Thompson's estimate, 1952). So the intervals are
narrower than those of audits alone wherever most requests are served no lower a price, or the price
changes little. A head that would halt later at a higher price is taken to halt where it was halted.

What a price loses cannot be told so: of a thought that was halted nobody knows the full answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from haltwise.control.betting import FEWEST, Float, normal_half_width
from haltwise.control.course import tokens_at
from haltwise.control.library import Library
from haltwise.control.record import TABLES
from haltwise.control.store import store_of
from haltwise.errors import InputError

_LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Replayed:
    """What one request tells of K prices."""

    due: float
    """The price that it was served, or would have been if it were no audit; what counts is the next
    one of the K."""
    audited: bool
    probability: float
    """Of the audit, as it was known before the draw."""
    tokens: Float
    """(K,) of its thought at each price; below the price that was served, what it really had."""


@dataclass(frozen=True, eq=False)
class Spending:
    """What K prices would have spent in the mean of a request, each with its half-width."""

    prices: Float
    num_requests: int
    num_audits: int
    exact: Float
    """(K,) the share of the requests of which it is known without an audit."""
    tokens: Float
    """(K,) of the thought."""
    width: Float
    by_audits: Float
    """(K,) the same by the audits alone."""
    width_by_audits: Float


def spending(prices: Float, requests: Iterable[Replayed]) -> Spending:
    """Returns what prices (K,) would have spent, see the top of this module.

    Intervals hold at all times at once with a confidence of 95 %, by the time-uniform central limit
    theorem; below 100 requests their width is infinite.
    """
    num = num_audits = 0
    exact, sums, squares = (np.zeros(shape) for shape in (len(prices), *2 * [(2, len(prices))]))
    for one in requests:
        known = prices >= one.due
        weight = one.audited / one.probability if one.audited else 0.0
        at_due = one.tokens[known.argmax()] if known.any() else 0.0  # a price above all of these
        sure = np.where(known, one.tokens, at_due)
        told = np.stack([sure + weight * (one.tokens - sure), weight * one.tokens])
        num, num_audits, exact = num + 1, num_audits + one.audited, exact + known
        sums, squares = sums + told, squares + told**2
    means = sums / max(num, 1)
    deviations = np.sqrt((squares / max(num, 1) - means**2).clip(0))
    widths = normal_half_width(num, deviations, _LEVEL) / max(num, 1)
    return Spending(
        prices, num, num_audits, exact / max(num, 1), means[0], widths[0], means[1], widths[1]
    )


def spending_of(state: str | Path, library: Library) -> Spending:
    """Returns what the champion's prices would have spent, from the record of a state.

    Raises:
        InputError: If no request of the champion's was replayed at all prices.
    """
    prices = np.array(library.shelf[library.champion].prices)
    found = spending(prices, _replayed(state, library.champion, prices))
    if not found.num_requests:
        raise InputError(
            "no request of the head that serves was replayed at all prices, expected some of "
            "haltwise serve --replay-all"
        )
    return found


def _replayed(state: str | Path, head: str, prices: Float) -> Iterator[Replayed]:
    asked = (
        "SELECT price_due, audited, audit_probability, halts FROM request "
        "WHERE head = ? AND halts IS NOT NULL"
    )
    with closing(store_of(state).connect(TABLES)) as opened:
        rows = opened.execute(asked, head)
    for due, audited, probability, halts in rows:
        yield Replayed(due, bool(audited), probability, tokens_at(halts, prices))


def table_of(found: Spending) -> str:
    """Returns what a person is told, a line for each price; in a sentence if that is nothing."""
    told = f"{found.num_requests} requests, {found.num_audits} of them audits"
    if found.num_requests < FEWEST:
        return f"{told}: what other prices would have spent is told from {FEWEST} requests on"
    lines = [
        f"{told}: tokens of the thought in the mean of a request",
        f"{'price':>10}{'known, %':>10}{'by all requests, 95 %':>30}{'by audits alone':>30}",
    ]
    for k in range(len(found.prices)):
        all_of_them = _told(found.tokens[k], found.width[k])
        alone = _told(found.by_audits[k], found.width_by_audits[k])
        known = f"{found.prices[k]:>10.4g}{100 * found.exact[k]:>10.1f}"
        lines.append(f"{known}{all_of_them:>30}{alone:>30}")
    return "\n".join(lines)


def _told(mean: float, width: float) -> str:
    return f"{mean:.1f} [{max(mean - width, 0):.1f}, {mean + width:.1f}]"
