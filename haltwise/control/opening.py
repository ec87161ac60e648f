"""Opens a control whose books and record are in a store."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from haltwise.control.audit_traces import AuditTraces
from haltwise.control.betting import Float
from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.books import Books
from haltwise.control.estimates import LOSSES
from haltwise.control.governed import GovernedControl, Mode, Promotion
from haltwise.control.governor import Promise
from haltwise.control.groups import Groups
from haltwise.control.history import History
from haltwise.control.installation import installation_key, key_file_of, tell_if_readable
from haltwise.control.library import Library, Note, Shelved
from haltwise.control.record import TABLES, Record
from haltwise.control.replay import prices_of
from haltwise.control.store import store_of
from haltwise.control.telemetry import Telemetry
from haltwise.errors import InputError
from haltwise.policy.cascade_head import CascadeHead, is_cascade
from haltwise.policy.head import HaltHead
from haltwise.session.request import Terms

log = logging.getLogger("haltwise.control")

# Of the share of requests that is audited at first, what is audited at rest. What is promised holds
# for audits weighted by this share over their own: a small one would let much be lost unnoticed.
_REST = 0.5
# Share of requests that is audited on alert.
_ALERT = 0.5
_NET, _DISAGREEMENT = LOSSES.index("net-em-loss"), LOSSES.index("disagreement")


@dataclass(frozen=True)
class KeptTraces:
    """Which audits are kept as traces, and where."""

    folder: Path
    share: float
    """Share of the audits that are dense, which alone are kept."""
    content: bool = False
    """Whether questions, answers and texts are kept as they are, and not as digests."""


def open_control(
    head: HaltHead,
    mode: Mode,
    state: str | Path,
    target: float,
    audit: float,
    usual: Terms,
    most_tokens: int,
    label_seconds: float = 0.0,
    kept: KeptTraces | None = None,
    key_file: Path | None = None,
    telemetry: Telemetry | None = None,
    challengers: Sequence[HaltHead] = (),
    promotion: Promotion = "ask",
    explore: float = 0.0,
    group_targets: Mapping[str, float] | None = None,
    replay_all: bool = False,
    keep_seconds: float = math.inf,
) -> GovernedControl:
    """Returns a control whose books and record are in a store, which is made if it is not there.

    Args:
        head: The policy; that of a cascade is measured against the large LM alone.
        mode: Whether it only looks, or moves prices.
        state: The store, see `store_of`.
        target: The mean loss that is promised.
        audit: Share of requests that is audited; 0, in observe mode alone, for none.
        usual: The terms of requests that ask for no others.
        most_tokens: The most tokens that an answer can have, of any LM.
        label_seconds: Seconds for which right answers are waited for, see `GovernedControl`.
        kept: Which audits are kept as traces, and where; None keeps none.
        key_file: Has the installation's key, and is made if it is not there; by default one beside
            the store's file.
        telemetry: Is told of every request too; the control closes it.
        challengers: Heads that replay all audits too, and may be promoted.
        promotion: Whether one that is known to be better begins to serve by itself.
        explore: Share of the requests that are served the next stricter price.
        group_targets: By group that is promised a smaller loss than everything, that target.
        replay_all: Whether every request is replayed at all prices, for `off_policy`.
        keep_seconds: For how long the record keeps rows of requests.

    Raises:
        InputError: If a value is out of its range, or a file or the store cannot be used.
    """
    if not 0 < audit <= 1 and not (audit == 0 and mode == "observe"):
        raise InputError(f"audit is {audit}, expected above 0 and at most 1; 0 in observe mode")
    if not 0 <= label_seconds < np.inf:
        raise InputError(f"labels are waited for {label_seconds} s, expected 0 or more, and finite")
    if kept is not None and not 0 < kept.share <= 1:
        raise InputError(f"dense audits are {kept.share} of all, expected above 0 and at most 1")
    if len({head.digest, *(one.digest for one in challengers)}) <= len(challengers):
        raise InputError("two of the heads are the same, expected a --challenger of each once")
    if not 0 <= explore < 1:
        raise InputError(f"explore is {explore}, expected 0 or more, and less than 1")
    share = audit or 1.0
    promise = Promise(target, audit=share, rest=_REST * share, alert=max(_ALERT, share))
    heads, own = {one.digest: one for one in (head, *challengers)}, group_targets or {}
    begun = {name: _begun_books(one, promise, own, most_tokens) for name, one in heads.items()}
    store, key_file = store_of(state), key_file or key_file_of(state)
    with closing(store.connect(TABLES)) as opened:  # what cannot be used gets no key
        is_older = not key_file.exists() and opened.execute("SELECT 1 FROM request LIMIT 1")
    key = installation_key(key_file)
    if is_older:
        told = "%s was not there, and is a new key: what the state knows of questions, tenants and "
        told += "tasks is by another one, expected that of all proxies of the state"
        log.warning(told, key_file)
    tell_if_readable(key_file)
    traces = None
    if kept is not None:
        traces = AuditTraces(kept.folder, head, key, with_content=kept.content)
    kind = _NET if label_seconds else _DISAGREEMENT  # with labels, what the promise is about
    history = History(kind, usual if mode == "observe" else None)
    first = Library(head.digest, {head.digest: begun[head.digest]})
    keeper = Bookkeeper(store, first, {}, history.note)
    if keeper.library.champion not in heads:
        serves = keeper.library.champion
        keeper.close()
        raise InputError(_another(head, serves))
    joins = {name: one for name, one in begun.items() if name not in keeper.library.shelf}
    if joins:
        keeper.put(Note(joins=joins))
    return GovernedControl(
        heads,
        mode,
        keeper,
        Record(store, 10_000, None if telemetry is None else telemetry.tell, keep_seconds),
        key,
        audit,
        usual,
        history,
        label_seconds=label_seconds,
        traces=traces,
        dense_audits=0.0 if kept is None else kept.share,
        telemetry=telemetry,
        promotion=promotion,
        explore=explore,
        replay_all=replay_all,
    )


def _another(head: HaltHead, serves: str) -> str:
    """Returns what a person is told whose state is about another head, or about a cascade."""
    if is_cascade(serves) and is_cascade(head.digest):
        expected = "the same folder, price ratio and LMs"
        return f"the state is about another cascade: expected {expected}, or a state of its own"
    if is_cascade(serves) or is_cascade(head.digest):
        about, given = ("a cascade", "a head") if is_cascade(serves) else ("a head", "a cascade")
        told = f"the state is about {about} and this is {given}"
        return f"{told}: expected {'' if is_cascade(serves) else 'no '}--large, or another state"
    return (
        f"the state is about another head, {serves[:12]}: expected the folder of that one as "
        "--head or as --challenger, or a state of its own; haltwise status tells all of its heads"
    )


def _begun_books(
    head: HaltHead, promise: Promise, targets: Mapping[str, float], most_tokens: int
) -> Shelved:
    """Returns the books of a head that no audit has told anything about."""
    prices = prices_of(head)
    certified = _certified(head, prices, promise.target)
    groups = Groups.begin(promise, len(prices), certified=certified, targets=targets)
    books = Books(groups, {}, most_tokens_of(head, most_tokens))
    return Shelved.begin(books, tuple(prices.tolist()))


def most_tokens_of(head: HaltHead, most_tokens: int) -> float:
    """Returns the most tokens that a request can cost under a head, looks and a large LM included.

    Args:
        head: The policy.
        most_tokens: The most tokens that an answer can have, of any LM.
    """
    return most_tokens * (_room_for_looks(head) + _price_ratio(head))


def _room_for_looks(head: HaltHead) -> int:
    """Returns how much longer than an answer all that is generated for it can be.

    What looks for more tokens than it watches is not worth its looks.
    """
    return 2 if head.config.halting.probing == "always" else 1


def _price_ratio(head: HaltHead) -> float:
    """Returns what a token of the large LM costs; 0 where there is none."""
    return head.price_ratio if isinstance(head, CascadeHead) else 0.0


def _certified(head: HaltHead, prices: Float, target: float) -> int:
    """Returns how many prices the head's certificate vouches for, if it bounds the same loss."""
    certificate = head.config.certificate
    if certificate is None or certificate.price is None or certificate.max_em_drop > target:
        return 0
    return int(np.searchsorted(prices, certificate.price, side="right"))
