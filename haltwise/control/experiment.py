"""What a randomised comparison of two heads has told, from the record of the requests.

While a challenger serves a share of all requests, who is served by which head is drawn for each
session, else user, else request. So what replays of audits cannot see is the head's own doing:
time, failures, complaints, and what answers cost in truth. Of each unit the mean over its requests
counts once. With p the probability of the challenger, A whether it was drawn and m the mean of the
units before, (A / p - (1 - A) / (1 - p)) (Y - m) has the effect on Y as its mean (Horvitz and
Thompson, 1952, centred). A request that is an audit tells nothing of its head, which halted
nothing; one that is none stands for 1 / (1 - its probability to be one), since each head's requests
are audited at a rate of their own. The interval around the mean holds at all times at once: of what
happens or does not by `betting.half_width`; of tokens and seconds, whose largest values are far
from usual ones, by `betting.normal_half_width` from `FEWEST` units on.

What exact match is lost is not told here but by pairs, `haltwise.control.trial`: there an audit
tells it of both heads at once, and nobody has to be served worse for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from haltwise.control.betting import FEWEST, Float, half_width, normal_half_width
from haltwise.control.library import Library
from haltwise.control.record import TABLES
from haltwise.control.roster import FAILED
from haltwise.control.store import store_of
from haltwise.errors import InputError

Kind = Literal["tokens", "seconds", "failures", "complaints"]

#: What is measured of a request, and the largest value that counts.
LARGEST: dict[Kind, float] = {
    "tokens": 32_768.0,
    "seconds": 600.0,
    "failures": 1.0,
    "complaints": 1.0,
}
_LEVEL = 0.05
# From which evidence on the shares do not fit the draws.
_MISMATCH = 1_000.0


@dataclass(frozen=True)
class Served:
    """One request that has ended while its head was drawn."""

    unit: str
    """Whose session, else user, else request it is."""
    is_challenger: bool
    probability: float
    """Of the challenger."""
    values: Mapping[Kind, float | None]
    """What is measured of it; None is unknown."""
    weight: float = 1.0
    """What it stands for, in the mean 1; 0 if it was an audit, or all of a unit were."""


@dataclass(frozen=True)
class Effect:
    """What the challenger changes in the mean of a unit."""

    kind: Kind
    units: int
    """Those of which it is known."""
    champion: float
    """The mean of the champion's units; NaN if there are none."""
    challenger: float
    low: float
    """The end of the interval, the estimate, and the other end of what the challenger adds."""
    estimate: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What a randomised comparison has told until now."""

    champion: str
    """The head that serves the others."""
    challenger: str
    units: tuple[int, int]
    """The champion's and the challenger's of which something could be seen."""
    unseen: tuple[int, int]
    """Their other ones: all of their requests were audits, or came before both heads halted."""
    mismatch: float
    """Evidence that units were not drawn as they were to be."""
    effects: tuple[Effect, ...]
    verdict: str
    """In a sentence."""


def compare(state: str | Path, library: Library, budget: int | None = None) -> Comparison:
    """Returns what the newest randomised comparison of a state has told.

    Args:
        state: The store, see `store_of`.
        library: Its books.
        budget: Units after which the comparison is to end, with a winner or without.

    Raises:
        InputError: If no request was served while heads were drawn, or the budget is none.
    """
    if budget is not None and budget < 1:
        raise InputError(f"budget is {budget}, expected at least 1 unit")
    rows = _rows(state)
    champion, challenger = _heads(library, rows)
    rows = [row for row in rows if row["head"] in (champion, challenger)]
    drawn = _units(_served(row, challenger) for row in rows)
    units = _units(_served(row, challenger) for row in _observable(rows))
    kinds: tuple[Kind, ...] = tuple(LARGEST)
    effects = tuple(effect(units, kind) for kind in kinds)
    seen, of_all = _by_head(one for one in units if one.weight), _by_head(drawn)
    unseen = of_all[0] - seen[0], of_all[1] - seen[1]
    mismatch = evidence_of_mismatch(drawn)
    found = {one.kind: one for one in effects}
    verdict = _verdict(library, challenger, mismatch, found, seen, budget)
    return Comparison(champion, challenger, seen, unseen, mismatch, effects, verdict)


def effect(units: Sequence[Served], kind: Kind) -> Effect:
    """Returns what the challenger changes, from units in the order in which they began."""
    known = [one for one in units if one.values[kind] is not None or not one.weight]
    values = np.array([one.values[kind] or 0.0 for one in known], dtype=np.float64)
    values = values.clip(0, LARGEST[kind]) / LARGEST[kind]
    drawn = np.array([one.is_challenger for one in known], dtype=bool)
    share = np.array([one.probability for one in known], dtype=np.float64)
    counts = np.array([one.weight for one in known], dtype=np.float64)
    num = len(known)
    sums, total = np.cumsum(counts * values) - counts * values, np.cumsum(counts) - counts
    before = np.divide(sums, total, out=np.zeros(num), where=total > 0)
    weights = counts * np.where(drawn, 1 / share, -1 / (1 - share)) if num else values
    scale = float(np.abs(weights).max(initial=1.0))
    scores = weights * (values - before) / scale
    width = _half_width(scores, kind)
    low, estimate, high = (
        LARGEST[kind] * scale * (float(scores.sum()) + end) / max(num, 1)
        for end in (-width, 0.0, width)
    )
    most = LARGEST[kind]
    old, new = (most * _mean(values, counts * (drawn == arm)) for arm in (False, True))
    told = int((counts > 0).sum())
    return Effect(kind, told, old, new, max(low, -most), estimate, min(high, most))


def _half_width(scores: Float, kind: Kind) -> float:
    """Returns how far a sum of scores, each within 1 of 0, may be from that of their means."""
    num = len(scores)
    if num < FEWEST or kind not in ("tokens", "seconds"):
        return float(half_width(float((scores**2).sum()), _LEVEL / 2))
    return float(normal_half_width(num, scores.std(), _LEVEL))


def evidence_of_mismatch(units: Iterable[Served]) -> float:
    """Returns the evidence that units were not drawn with the probabilities that were told.

    It is the likelihood of the draws if nothing is known of the share (Beta(1, 1) mixture), over
    that of the share that was told, for each share; larger than x with a probability of at most
    1 / x, whenever one looks, if all is well.
    """
    log = 0.0
    counts: dict[float, list[int]] = {}
    for one in units:
        counts.setdefault(one.probability, [0, 0])[one.is_challenger] += 1
    for share, (others, drawn) in counts.items():
        log += math.lgamma(others + 1) + math.lgamma(drawn + 1) - math.lgamma(others + drawn + 2)
        log -= drawn * math.log(share) + others * math.log(1 - share)
    return math.exp(min(log, 50.0))


def _units(served: Iterable[Served]) -> list[Served]:
    """Returns one for each unit, in the order in which they began, with its mean values."""
    by_unit: dict[str, list[Served]] = {}
    for one in served:
        by_unit.setdefault(one.unit, []).append(one)
    found = []
    for unit, requests in by_unit.items():
        first = requests[0]
        mine = [one for one in requests if one.is_challenger == first.is_challenger]
        values = {kind: _mean_of_unit(mine, kind) for kind in LARGEST}
        weight = sum(one.weight for one in mine) / len(mine)
        found.append(Served(unit, first.is_challenger, first.probability, values, weight))
    return found


def _mean_of_unit(requests: Iterable[Served], kind: Kind) -> float | None:
    known = [
        (one.weight, value)
        for one in requests
        if one.weight and (value := one.values[kind]) is not None
    ]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if known else None


def _observable(rows: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Returns the requests behind the last one, of tenant and segment, that had to be an audit.

    As long as a head's price is not certified, all of its requests are: nothing is seen of it then.
    """

    def traffic(row: Mapping[str, object]) -> tuple[object, object]:
        return row["tenant"], row["segment"]

    last = {traffic(row): n for n, row in enumerate(rows) if row["audited"] and not _weight(row)}
    return [row for n, row in enumerate(rows) if n > last.get(traffic(row), -1)]


def _weight(row: Mapping[str, object]) -> float:
    """Returns what a request would stand for if it was no audit; 0 if it had to be one."""
    left = 1.0 - float(str(row["audit_probability"]))
    return 1.0 / left if left > 0 else 0.0


def _by_head(units: Iterable[Served]) -> tuple[int, int]:
    """Returns the numbers of the champion's and of the challenger's units."""
    are_challengers = [one.is_challenger for one in units]
    return len(are_challengers) - sum(are_challengers), sum(are_challengers)


def _rows(state: str | Path) -> list[dict[str, object]]:
    """Returns the requests whose head was drawn, the oldest first."""
    asked = (
        'SELECT id, tenant, session, "user", segment, head, head_probability, audited, '
        "audit_probability, output_tokens, seconds, outcome, (SELECT max(1 - value) FROM label "
        "WHERE label.request = request.id AND source = 'user') "
        "FROM request WHERE head_probability IS NOT NULL ORDER BY at"
    )
    names = [
        "id",
        "tenant",
        "session",
        "user",
        "segment",
        "head",
        "probability",
        "audited",
        "audit_probability",
        "tokens",
        "seconds",
        "outcome",
        "complaint",
    ]
    with closing(store_of(state).connect(TABLES)) as opened:
        rows = [dict(zip(names, row, strict=True)) for row in opened.execute(asked)]
    if not rows:
        raise InputError(
            "no request was served while heads were drawn, expected a challenger that serves a "
            "share: haltwise experiment --head, or promote"
        )
    return rows


def _heads(library: Library, rows: Sequence[Mapping[str, object]]) -> tuple[str, str]:
    """Returns the champion and the challenger of the newest comparison.

    Raises:
        InputError: If only one of them has served.
    """
    newest = list(dict.fromkeys(str(row["head"]) for row in reversed(rows)))[:2]
    if library.canary is not None:
        challenger = library.canary.head
    else:
        stopped = [one for one in newest if one in library.shelf and library.shelf[one].stopped]
        challenger = stopped[0] if stopped else library.champion
    others = [one for one in newest if one != challenger]
    if not others:
        raise InputError("only the challenger has served, expected requests of both heads")
    return others[0], challenger


def _served(row: Mapping[str, object], challenger: str) -> Served:
    told, is_challenger = float(str(row["probability"])), row["head"] == challenger
    unit = f"{row['tenant']} {row['session'] or row['user'] or row['id']}"
    tokens, seconds, complaint = (row[name] for name in ("tokens", "seconds", "complaint"))
    return Served(
        unit,
        is_challenger,
        told if is_challenger else 1 - told,
        {
            "tokens": None if tokens is None else float(str(tokens)),
            "seconds": None if seconds is None else float(str(seconds)),
            "failures": float(row["outcome"] == FAILED),
            "complaints": 0.0 if complaint is None else float(str(complaint)),
        },
        0.0 if row["audited"] else _weight(row),
    )


def _verdict(
    library: Library,
    challenger: str,
    mismatch: float,
    effects: Mapping[Kind, Effect],
    seen: tuple[int, int],
    budget: int | None,
) -> str:
    """Returns what may be concluded; that nobody wins is what holds until something is known."""
    if mismatch >= _MISMATCH:
        return "The shares do not fit the draws, so that nothing can be concluded: look for why."
    if 0 in seen:
        return (
            "Nothing is known yet: all requests of a head are audits until a price of it is "
            "certified, and audits tell of no head; haltwise status tells how far both are."
        )
    harms = [kind for kind in ("seconds", "failures", "complaints") if effects[kind].low > 0]
    one = library.shelf.get(challenger)
    if one is not None and one.trial.is_worse:
        return "The champion wins: the challenger loses more, as audits tell."
    if harms:
        return f"The champion wins: the challenger has more {', '.join(harms)}."
    if effects["tokens"].low > 0:
        return "The champion wins: the challenger costs more tokens."
    if effects["tokens"].high < 0 and challenger == library.champion:
        return "The challenger wins: it costs fewer tokens, and serves all requests already."
    if effects["tokens"].high < 0 and library.known(challenger) == "ready":
        return "The challenger wins: it costs fewer tokens, and audits tell that it is as good."
    if budget is not None and (num := sum(seen)) >= budget:
        return f"No winner: {num} units have been served, and the budget is {budget}."
    if effects["tokens"].high < 0:
        return "No winner yet: it costs fewer tokens, but nobody knows yet that it is as good."
    return "No winner yet: it is not known which of them costs fewer tokens."


def _mean(values: Float, weights: Float) -> float:
    return float(np.average(values, weights=weights)) if weights.any() else math.nan


def _more(unseen: int) -> str:
    return f" and {unseen} unseen (audits)" if unseen else ""


def table_of(found: Comparison) -> str:
    """Returns what a person is told, a line for each kind of effect."""
    lines = [
        f"champion {found.champion[:12]}: {found.units[0]} units{_more(found.unseen[0])}; "
        f"challenger {found.challenger[:12]}: {found.units[1]}{_more(found.unseen[1])}; "
        f"evidence that they were not drawn so: {found.mismatch:.3g} of {_MISMATCH:g}",
        f"{'of a unit':14}{'units':>8}{'champion':>12}{'challenger':>12}{'it adds, 95 %':>32}",
    ]
    for one in found.effects:
        adds = f"{one.estimate:.4g} [{one.low:.4g}, {one.high:.4g}]"
        means = f"{one.champion:>12.4g}{one.challenger:>12.4g}"
        lines.append(f"{one.kind:14}{one.units:>8}{means}{adds:>32}")
    return "\n".join([*lines, found.verdict])
