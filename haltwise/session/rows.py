"""The rows of a batch: on what terms each runs, and what happened to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from haltwise.errors import InputError
from haltwise.policy.head import HaltHead
from haltwise.session.monitor import HaltMonitor
from haltwise.session.terms import Terms

Reason = Literal["halted", "capped", "closed by the LM", "token budget"]


@dataclass
class RowReport:
    """What happened to one row of a batch."""

    price: float
    """In exact match per 1,000 tokens."""
    reason: Reason = "token budget"
    """Why the thought ended: the head halted it, or its cap did; "token budget" stands for any
    stopping criterion."""
    position: int = 0
    """Tokens of the thought."""
    answer: str = ""
    """The forced answer, if the row was halted and did not answer by itself."""
    num_probe_tokens: int = 0
    """Tokens generated to look at answers; they are no part of the output."""
    num_bad_signals: int = 0
    """Decision points with signals that were not finite; the row went on."""

    @property
    def halted(self) -> bool:
        """Whether the thought was closed for the LM."""
        return self.reason in ("halted", "capped")


def row_terms(
    head: HaltHead, num_rows: int, price: Any, min_tokens: Any, max_tokens: Any
) -> list[Terms]:
    """The terms of each row.

    Args:
        head: Its default price stands for a price of None.
        num_rows: R.
        price: One, or one a row; the others too.
        min_tokens: See `Terms`.
        max_tokens: See `Terms`.

    Raises:
        InputError: If there are more or fewer than rows, or a value makes no sense.
    """
    price = head.config.default_price if price is None else price
    columns = []
    for name, value in (("price", price), ("min_tokens", min_tokens), ("max_tokens", max_tokens)):
        column = np.asarray(value, dtype=object)
        if column.shape not in ((), (num_rows,)):
            raise InputError(
                f"{column.size} values of {name} for {num_rows} rows, expected one, or one a row"
            )
        columns.append(np.broadcast_to(column, num_rows).tolist())
    return [Terms(*values) for values in zip(*columns, strict=True)]


def monitor_of(head: HaltHead, terms: Sequence[Terms]) -> HaltMonitor:
    """A monitor whose rows run on some terms."""
    monitor = HaltMonitor(head, len(terms))
    for row, row_terms in enumerate(terms):
        monitor.reset(np.array([row]), row_terms)
    return monitor
