"""What the books tell a person: what every group loses and saves, and what it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from haltwise.control.betting import Float
from haltwise.control.books import Books, Entry
from haltwise.control.estimates import LOSSES, Interval
from haltwise.control.governor import GroupState, is_open
from haltwise.control.ledger import Ledger
from haltwise.control.store import is_database, store_of
from haltwise.errors import InputError

_NET, _DISAGREEMENT = LOSSES.index("net-em-loss"), LOSSES.index("disagreement")


def group_status(
    books: Books, name: str, prices: Float, kind: int, usual_price: float
) -> dict[str, Any]:
    """Returns, as a JSON object, what a group loses and saves, and what it is served.

    Args:
        books: The books.
        name: The group's.
        prices: (K,) that the steps stand for.
        kind: The kind of loss, as in `LOSSES`.
        usual_price: The price of requests that name none.
    """
    state, sums = books.groups.groups[name], books.sum_of(name)
    step, ceiling = books.groups.step([name]), books.groups.ceiling([name])
    losses, savings = _of_kind(sums.losses(), kind), sums.savings()

    def measured(at: int) -> dict[str, Any]:
        return {
            "price": price_of(prices, at),
            "loss": _told(losses, at),
            "saving": _told(savings, at),
        }

    return {
        "requests": sums.num_requests,
        "audits": sums.num_audits,
        "audits_in_epoch": int(state.num_audits),
        "epoch": int(state.epoch),
        "breaker": breaker_of(state),
        "price": price_of(prices, step),
        "ceiling": price_of(prices, ceiling),
        "at_price": measured(step),
        "at_usual_price": measured(int(np.searchsorted(prices, usual_price, side="right"))),
        "by_price": [measured(at + 1) for at in range(len(prices))],
    }


def breaker_of(state: GroupState) -> str:
    """Returns what a group's breaker is: open or closed."""
    return "open" if is_open(state) else "closed"


def price_of(prices: Float, step: int) -> float:
    """Returns the price that a step stands for; step 0 halts nothing."""
    return float(prices[step - 1]) if step else 0.0


def _told(interval: Interval, step: int) -> dict[str, float]:
    """Returns the estimate at a step and the ends of its interval; at step 0 nothing is lost."""
    ends = vars(interval) if step else {name: np.zeros(1) for name in vars(interval)}
    return {name: round(float(values[max(step - 1, 0)]), 6) for name, values in ends.items()}


def _of_kind(interval: Interval, kind: int) -> Interval:
    """Returns the intervals (K,) of one kind of loss."""
    return Interval(interval.low[kind], interval.estimate[kind], interval.high[kind])


def read_books(state: str | Path) -> tuple[Mapping[str, Any], Books]:
    """Returns what the books in a store are about, and the books, whoever serves by them now.

    Args:
        state: The store, see `store_of`.

    Raises:
        InputError: If there is none.
    """
    if not is_database(state) and not Path(state).exists():
        raise InputError(f"{state} is not there, expected the --state of haltwise serve")
    ledger = Ledger(store_of(state))
    try:
        saved, number = ledger.load()
        if saved is None:
            raise InputError(f"{state} has no books, expected the --state of haltwise serve")
        books = Books.from_json(saved["books"])
        for _, entry in ledger.exchange({}, number):
            books = books.after(Entry.from_json(entry))
    finally:
        ledger.close()
    return saved["about"], books


def table_of(about: Mapping[str, Any], books: Books) -> str:
    """Returns what a person is told of the books, a line for each group."""
    prices, target = np.array(about["prices"]), books.groups.promise.target
    due = books.groups.audits_due()
    lines = [
        f"target {target:g}; {len(books.groups.under_way)} audits under way, {len(books.awaited)} "
        f"labels due, {due} audits due before anything is halted",
        f"{'group':32}{'requests':>10}{'audits':>8}{'price':>10}{'ceiling':>10}  {'breaker':8}"
        f"{'differs, %':>21}{'EM loss, %':>21}{'saving, %':>21}",
    ]
    for name in books.groups.groups:
        one = group_status(books, name, prices, _DISAGREEMENT, 0.0)
        net = group_status(books, name, prices, _NET, 0.0)["at_price"]["loss"]
        at = one["at_price"]
        lines.append(
            f"{name[:31]:32}{one['requests']:>10}{one['audits']:>8}{one['price']:>10.4g}"
            f"{one['ceiling']:>10.4g}  {one['breaker']:8}"
            + "".join(f"{_percent(part):>21}" for part in (at["loss"], net, at["saving"]))
        )
    return "\n".join(lines)


def _percent(interval: Mapping[str, float]) -> str:
    low, estimate, high = (100 * interval[name] for name in ("low", "estimate", "high"))
    return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"
