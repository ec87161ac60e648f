"""Several heads as one: their log-odds of halting, averaged by weights.

Heads that see the same in the same way have networks of one form, so that their weighted mean is a
head of that form too, only wider: hidden units stand beside each other, and the last layer has the
weights in it. It is saved, certified and served like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from haltwise.errors import InputError
from haltwise.policy.head import HaltHead
from haltwise.policy.signals import Float


def mixture(heads: Sequence[HaltHead], weights: Sequence[float]) -> HaltHead:
    """Returns the head whose log-odds are the weighted mean of others'.

    It has the conditions and the own price of the first one, and no certificate: what was certified
    was each by itself.

    Args:
        heads: M heads.
        weights: (M,) not negative; they are scaled to sum to 1.

    Raises:
        InputError: If there are none, a weight is none, or the heads do not see the same in the
            same way or halt under other conditions.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not heads or len(shares) != len(heads):
        raise InputError(f"{len(heads)} heads and {len(shares)} weights, expected one of each")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise InputError(f"weights are {list(weights)}, expected 0 or more, and one above 0")
    first = heads[0].config
    for head in heads[1:]:
        config = head.config
        seen, halting = config.observing == first.observing, config.halting == first.halting
        if not (seen and halting and config.threshold == first.threshold):
            what = "features, their scales, price range and conditions of halting"
            raise InputError(f"heads differ in what they see, expected the same {what}")
    shares = shares / shares.sum()
    parts = [head.weights for head in heads]
    joined = {
        "w0": np.vstack([one["w0"] for one in parts]),
        "b0": np.concatenate([one["b0"] for one in parts]),
        "w1": _beside([one["w1"] for one in parts]),
        "b1": np.concatenate([one["b1"] for one in parts]),
        "w2": _last(heads, shares),
        "b2": sum(share * one["b2"] for share, one in zip(shares, parts, strict=True)),
    }
    config = replace(first, certificate=None, lm=_joined([head.config.lm for head in heads]))
    return HaltHead(config, {name: np.asarray(one, np.float32) for name, one in joined.items()})


def _beside(blocks: Sequence[Float]) -> Float:
    """Returns a matrix with blocks on its diagonal and zeros beside them."""
    ends = np.cumsum([0, *(len(block) for block in blocks)])
    whole = np.zeros((ends[-1], ends[-1]), dtype=np.float32)
    for block, start, end in zip(blocks, ends[:-1], ends[1:], strict=True):
        whole[start:end, start:end] = block
    return whole


def _last(heads: Sequence[HaltHead], shares: Float) -> Float:
    """Returns the last layer: hidden units of all heads, and what they see past them, if any do."""
    hidden, straight = [], np.zeros(heads[0].config.observing.size)
    looks_past = False
    for head, share in zip(heads, shares, strict=True):
        num, last = head.weights["b1"].size, share * head.weights["w2"][0]
        hidden.append(last[:num])
        if last.size > num:
            straight, looks_past = straight + last[num:], True
    return np.concatenate([*hidden, straight] if looks_past else hidden)[None]


def _joined(names: Sequence[str]) -> str:
    """Returns the LMs of several heads, each once."""
    return ", ".join(dict.fromkeys(one for name in names for one in name.split(", ") if one))
