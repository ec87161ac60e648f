"""Paces spending: the dearer requests are than a budget allows for, the sooner they are halted.

Urgency is a share in [0, 1]: at 0 a request is served the price that it asks for, at 1 the highest
one that is certified. It moves by online gradient descent on a budget's price,

    urgency <- clip(urgency + step * (cost - allowance) / allowance)

where the allowance is what is left, shared among the requests that are still expected (Balseiro
and Gur, 2019, Learning in repeated auctions with budgets). The raw cost stands there and no moving
average of it: with one, a burst is paid twice.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from haltwise.control.budgets import Amount, Standing

# How far a request that costs twice its allowance moves the urgency.
_STEP = 0.02
# Of how much more than its allowance a single request is felt, in allowances.
_MOST_FELT = 5.0
# Of a window, what the operator's guess of its requests weighs as much as.
_GUESS = 0.03
# Accounts whose urgency is remembered.
_MOST_ACCOUNTS = 10_000


class Pace:
    """How urgent it is for each account that its requests cost less."""

    def __init__(self) -> None:
        """Nothing is urgent."""
        #: By account, in the order in which they were moved.
        self.urgency: OrderedDict[str, float] = OrderedDict()

    def of(self, standings: list[Standing]) -> float | None:
        """Returns how urgent a request is: as its most pressed account; None if none is paced.

        Args:
            standings: How its accounts stand.
        """
        paced = (one.account.name for one in standings if one.account.budget.requests)
        return max((self.urgency.get(name, 0.0) for name in paced), default=None)

    def spent(self, standing: Standing, cost: Amount) -> None:
        """Takes in what a request has cost.

        Args:
            standing: How one of its accounts stood when it came.
            cost: What it has cost.
        """
        name, budget = standing.account.name, standing.account.budget
        if budget.requests is None:
            return
        num = expected(standing)
        shares = [
            _excess(spent, left / num)
            for limit, spent, left in (
                (budget.nano, cost.nano, standing.left.nano),
                (budget.tokens, cost.tokens, standing.left.tokens),
            )
            if limit is not None
        ]
        moved = self.urgency.pop(name, 0.0) + _STEP * max(shares)
        self.urgency[name] = min(max(moved, 0.0), 1.0)
        if len(self.urgency) > _MOST_ACCOUNTS:
            self.urgency.popitem(last=False)


def expected(standing: Standing) -> float:
    """Returns how many requests of the window are still expected, this one included.

    The operator's guess and the requests so far tell it, the more of the window has passed the more
    the latter.

    Args:
        standing: How the account stands; its budget has a guess.
    """
    guess = standing.account.budget.requests or 0
    whole = (_GUESS * guess + standing.requests) / (_GUESS + standing.passed)
    return max(whole * (1 - standing.passed), 1.0)


def _excess(spent: float, allowance: float) -> float:
    """Returns by how many allowances something is above one."""
    if allowance <= 0:
        return _MOST_FELT
    excess = (spent - allowance) / allowance
    return min(excess, _MOST_FELT) if math.isfinite(excess) else _MOST_FELT
