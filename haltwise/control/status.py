"""What the books tell a person: what every group loses and saves, and what it is served."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from haltwise.control.betting import Float
from haltwise.control.bookkeeper import after
from haltwise.control.books import Books
from haltwise.control.estimates import LOSSES, Interval
from haltwise.control.governor import GroupState, is_open
from haltwise.control.group_names import usual_price
from haltwise.control.groups import EVERYTHING
from haltwise.control.ledger import Ledger
from haltwise.control.library import Library, Note, Shelved, experiment, promotion, rollback
from haltwise.control.store import is_database, store_of
from haltwise.control.trial import ENOUGH
from haltwise.errors import InputError
from haltwise.policy.cascade_head import is_cascade

_NET, _DISAGREEMENT = LOSSES.index("net-em-loss"), LOSSES.index("disagreement")
_SERVED_BESIDE = "; the usual price: what --control observe serves, as here"


def group_status(
    books: Books, name: str, prices: Float, kind: int, usual_price: float
) -> dict[str, Any]:
    """Returns, as a JSON object, what a group loses and saves, and what it is served.

    Args:
        books: The books.
        name: The group's.
        prices: (K,) that the steps stand for.
        kind: The kind of loss, as in `LOSSES`.
        usual_price: That of its requests that name none, see `group_names.usual_price`.
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
        "target": books.groups.promise_of(name).target,
        "audits_due": books.groups.audits_due(name),
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


def reference_of(head: str) -> str:
    """Returns what a head's losses and savings are measured against, by its digest."""
    return "large LM" if is_cascade(head) else "full answer"


def _told(interval: Interval, step: int) -> dict[str, float]:
    """Returns the estimate at a step and the ends of its interval; at step 0 nothing is lost."""
    ends = vars(interval) if step else {name: np.zeros(1) for name in vars(interval)}
    return {name: round(float(values[max(step - 1, 0)]), 6) for name, values in ends.items()}


def _of_kind(interval: Interval, kind: int) -> Interval:
    """Returns the intervals (K,) of one kind of loss."""
    return Interval(interval.low[kind], interval.estimate[kind], interval.high[kind])


def head_status(library: Library, head: str, shelved: Shelved) -> dict[str, Any]:
    """Returns, as a JSON object, what one head would be served, and how it compares.

    Args:
        library: The books.
        head: Its digest.
        shelved: Its books.
    """
    groups, prices = shelved.books.groups, np.array(shelved.prices)
    told = {
        "head": head,
        "role": _role(library, head),
        "price": price_of(prices, shelved.step),
        "ceiling": price_of(prices, groups.ceiling([])),
        "audits": shelved.books.sum_of(EVERYTHING).num_audits,
    }
    if head == library.champion:
        return told
    trial = shelved.trial.status(shelved.step, library.shelf[library.champion].step)
    return told | {"stopped": shelved.stopped, "trial": trial}


def _role(library: Library, head: str) -> str:
    """Returns what a head is: champion, canary, previous or challenger."""
    if head == library.champion:
        return "champion"
    if library.canary is not None and library.canary.head == head:
        return "canary"
    return "previous" if head == library.previous else "challenger"


def read_library(state: str | Path) -> Library:
    """Returns the books in a store, whoever serves by them now.

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
        library = Library.from_json(saved["books"])
        for _, note in ledger.exchange({}, number):
            library = after(library, note)
    finally:
        ledger.close()
    return library


def promote(state: str | Path, head: str, anyway: bool) -> str:
    """Lets a challenger serve, which all processes of a state see within a second.

    Args:
        state: The store, see `store_of`.
        head: As much of its digest as tells it from others.
        anyway: Whether it serves all at once, whatever is known of it.

    Returns:
        What a person is told.

    Raises:
        InputError: If there are no books, no such challenger, nobody knows yet that it is as good,
            or another one serves a share.
    """
    note = promotion(read_library(state), head, anyway)
    _write(state, note)
    return f"{note.promotes} serves from now on" if anyway else _begins(note)


def begin_experiment(state: str | Path, head: str, share: float) -> str:
    """Lets a challenger serve a share of all requests until a rollback, see `promote`.

    Raises:
        InputError: If there are no books, no such challenger, it is known to be worse, another one
            serves a share, or that is none.
    """
    note = experiment(read_library(state), head, share)
    _write(state, note)
    return _begins(note)


def roll_back(state: str | Path) -> str:
    """Takes back the newest step of who serves, see `promote`.

    Raises:
        InputError: If there are no books, or there is nothing to take back.
    """
    taken_back, serves = rollback(read_library(state))
    _write(state, Note(rolls_back=True))
    return f"{taken_back} is taken back, {serves} serves from now on"


def _begins(note: Note) -> str:
    assert note.tries is not None
    return f"{note.tries.head} serves {100 * note.tries.share:g} % from now on"


def _write(state: str | Path, note: Note) -> None:
    """Writes a note into the books of a state."""
    ledger = Ledger(store_of(state))
    try:
        ledger.exchange({f"by hand {uuid.uuid4().hex}": note.to_json()}, ledger.load()[1])
    finally:
        ledger.close()


def table_of(library: Library) -> str:
    """Returns what a person is told of the books, a line for each group, and for each head.

    Where the usual prices are served, a group has a line for its usual price too: what audits vouch
    for is served to nobody there.
    """
    books, prices = library.books, np.array(library.shelf[library.champion].prices)
    target = books.groups.promise.target
    due = books.groups.audits_due()
    width = max(map(len, ["group", *books.groups.groups]))
    lines = [
        f"target {target:g}; {len(books.groups.under_way)} audits under way, {len(books.awaited)} "
        f"labels due, {due} audits due before {_what_is_due(library)}",
        *_lines_of_broken_off(books),
        *_lines_of_range(books),
        "price: what the audits vouch for, which --control apply serves"
        f"{_SERVED_BESIDE * _serves_usual(library)}",
        f"{'group':{width}}{'requests':>10}{'audits':>8}{'price':>10}{'ceiling':>10}  "
        f"{'breaker':8}{'target, %':>10}"
        f"{'differs, %':>23}{'EM loss, %':>23}{'saving, %':>23}",
    ]
    for name in books.groups.groups:
        usual = 0.0 if library.usual is None else usual_price(name, library.usual)
        one = group_status(books, name, prices, _DISAGREEMENT, usual)
        net = group_status(books, name, prices, _NET, usual)
        lines.append(
            f"{name:{width}}{one['requests']:>10}{one['audits']:>8}{one['price']:>10.4g}"
            f"{one['ceiling']:>10.4g}  {one['breaker']:8}{100 * one['target']:>10.4g}"
            f"{_measured(library, one['at_price'], net['at_price'])}"
        )
        if _serves_usual(library):
            at = one["at_usual_price"]
            lines.append(
                f"{'  at the usual price':{width + 18}}{at['price']:>10.4g}{'':30}"
                f"{_measured(library, at, net['at_usual_price'])}"
            )
    return "\n".join([*lines, "", *_lines_of_heads(library), *_lines_of_canary(library)])


def _serves_usual(library: Library) -> bool:
    """Returns whether requests are served the usual prices, whatever the audits vouch for."""
    return library.usual is not None and library.usual.is_served


def _measured(library: Library, at: Mapping[str, Any], net: Mapping[str, Any]) -> str:
    """Returns the cells of what a group loses and saves at one price.

    Args:
        library: The books.
        at: The price, and the share of answers that differ and the saving there.
        net: The same with the exact match that is lost.
    """
    if not at["price"]:  # no measurement: what halts nothing loses nothing
        nobody = "the large LM answers" if is_cascade(library.champion) else "nothing is halted"
        return f"{nobody:>23}"
    return "".join(f"{_percent(part):>23}" for part in (at["loss"], net["loss"], at["saving"]))


def _lines_of_broken_off(books: Books) -> list[str]:
    """Returns what a person is told of audits that tell nothing, if there are any."""
    num, why = books.num_broken_off, books.why_broken_off
    return (
        [f"{num} audits broken off, which tell nothing; the newest: {why or 'unknown'}"]
        if num
        else []
    )


def _lines_of_range(books: Books) -> list[str]:
    """Returns how long requests may be that figures are about, and how many audits were longer."""
    num, told = (
        books.num_too_long,
        f"figures are of requests of up to {books.most_tokens:.0f} tokens",
    )
    return [f"{told}; {num} longer audits are left out" if num else told]


def _what_is_due(library: Library) -> str:
    """Returns what does not happen before the first certificate."""
    if is_cascade(library.champion):
        return "the small LM answers under apply; all beside the large LM alone"
    return "apply halts anything"


def _lines_of_heads(library: Library) -> list[str]:
    """Returns a line for each head; the evidence is enough from `ENOUGH` on."""
    lines = [f"{'head':14}{'role':12}{'price':>10}{'ceiling':>10}{'audits':>8}  compared"]
    for name, shelved in library.shelf.items():
        one = head_status(library, name, shelved)
        told = f"{name[:12]:14}{one['role']:12}{one['price']:>10.4g}{one['ceiling']:>10.4g}"
        told += f"{one['audits']:>8}"
        if trial := one.get("trial"):
            lost, saved = (100 * trial[key] for key in ("loses_more", "saves_more"))
            evidence = trial["evidence"]
            told += f"  {trial['known']}: {trial['pairs']} pairs, loses {lost:+.1f} points, "
            told += f"saves {saved:+.1f}; evidence against worse {evidence['worse']:.3g}, "
            told += f"against dearer {evidence['dearer']:.3g}, of {ENOUGH:g} each"
            told += f"; stopped, {one['stopped']}" if one["stopped"] else ""
        lines.append(told)
    return lines


def _lines_of_canary(library: Library) -> list[str]:
    """Returns what a person is told of the challenger that serves a share, if one does."""
    canary = library.canary
    if canary is None:
        return []
    told = canary.status()
    way = f"audit {canary.audits} of {told['audits_a_step']}" if canary.climbs else "held"
    lines = ["", f"{canary.head[:12]} serves {100 * canary.share:g} % ({way})"]
    for name, one in told["served"].items():
        lines.append(
            f"  {name:12}{one['requests']:>10} requests, {one['failures']:g} failed, "
            f"{one['complaints']:g} complaints"
        )
    return lines


def _percent(interval: Mapping[str, float]) -> str:
    low, estimate, high = (100 * interval[name] for name in ("low", "estimate", "high"))
    return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"
