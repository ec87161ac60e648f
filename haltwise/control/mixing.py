"""Weights of heads by what audits have told of them, for a mixture that is an entry of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from haltwise.control.betting import Float
from haltwise.control.estimates import LOSSES
from haltwise.control.groups import EVERYTHING
from haltwise.control.library import Library
from haltwise.control.status import read_library
from haltwise.errors import InputError
from haltwise.policy.head import HaltHead
from haltwise.policy.mixture import mixture

# Where nobody has labelled an answer that differs, it counts as lost.
_NET = LOSSES.index("net-em-loss")


def mix(state: str | Path, folders: Sequence[Path], price: float | None, out: Path) -> str:
    """Writes the mixture of heads that the audits of a state weigh.

    Args:
        state: The store, see `store_of`.
        folders: Of the heads.
        price: At which they are weighed; None for the first one's own.
        out: The folder for the mixture.

    Returns:
        What a person is told.

    Raises:
        InputError: If a head is none or unknown to the state, no audit tells of it, the heads do
            not fit each other, the price is none, or the folder is there.
    """
    if out.exists():
        raise InputError(f"{out} is there, expected a folder that is not")
    if len(folders) < 2:
        raise InputError(f"{len(folders)} heads are named, expected 2 at least")
    heads = [HaltHead.load(folder) for folder in folders]
    at = heads[0].config.default_price if price is None else price
    if not 0 < at < np.inf:
        raise InputError(f"price is {at}, expected above 0: --price")
    weights = weights_of(read_library(state), [head.digest for head in heads], at)
    mixture(heads, weights.tolist()).save(out)
    told = ", ".join(f"{share:.3f} {name}" for share, name in zip(weights, folders, strict=True))
    return f"{out}: {told}"


def weights_of(library: Library, heads: Sequence[str], price: float) -> Float:
    """Returns how much each head (M,) counts: exponential weights by what it would have cost.

    What a head costs on an audit is what it loses, plus the price of its tokens; a weight falls by
    exp(-rate * cost), with the rate sqrt(8 ln M / audits) that keeps the regret of following the
    weights at sqrt(audits * ln M / 2) (Cesa-Bianchi and Lugosi, 2006, Prediction, Learning, and
    Games, theorem 2.2). Audits count by the inverse of their probability, as everywhere.

    Args:
        library: The books.
        heads: Their digests.
        price: In exact match per 1,000 tokens.

    Raises:
        InputError: If a head is not in the books, or no audit tells of it.
    """
    costs, nums = [], []
    for head in heads:
        if head not in library.shelf:
            raise InputError(f"head {head[:12]} is unknown to the state, expected a --challenger")
        one = library.shelf[head]
        sums = one.books.sum_of(EVERYTHING)
        step = int(np.searchsorted(one.prices, price, side="right"))
        if not sums.num_audits or not step:
            told = "no audit tells of it" if step else f"{price:g} is below all of its prices"
            raise InputError(f"head {head[:12]}: {told}")
        over = sums.floor * max(sums.num_requests, 1)
        tokens = sums.tokens[step - 1] * sums.most_tokens
        costs.append((sums.loss[_NET, step - 1] + price / 1000 * tokens) / over)
        nums.append(sums.num_audits)
    num = min(nums)
    rate = np.sqrt(8 * np.log(len(heads)) / num)
    logs = -rate * num * np.array(costs)
    raised = np.exp(logs - logs.max())
    weights: Float = raised / raised.sum()
    return weights
