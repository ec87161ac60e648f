"""A mixture of heads is a head: its log-odds are the mean of theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from haltwise import HaltHead, InputError
from haltwise.policy.mixture import mixture
from tests.heads import random_head, sure_head


def others(num: int) -> list[HaltHead]:
    """Heads that see the same in the same way."""
    first = random_head(0)
    return [HaltHead(first.config, random_head(seed).weights) for seed in range(num)]


def without_past(head: HaltHead) -> HaltHead:
    """The head, without what it sees past its hidden layers."""
    num = head.weights["b1"].size
    return HaltHead(head.config, head.weights | {"w2": head.weights["w2"][:, :num].copy()})


@pytest.mark.parametrize("past", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.2, 0.3, 0.5), (0, 1, 0)])
def test_log_odds_are_the_weighted_mean(weights: tuple[float, ...], past: tuple[int, ...]) -> None:
    heads = [one if n in past else without_past(one) for n, one in enumerate(others(3))]
    mixed = mixture(heads, weights)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, len(mixed.config.features))).astype(np.float32)
    prices = np.geomspace(*mixed.config.observing.price_range, 40)
    each = np.array([head.log_odds(features, prices) for head in heads])
    expected = np.average(each, axis=0, weights=weights)
    np.testing.assert_allclose(mixed.log_odds(features, prices), expected, rtol=1e-4, atol=1e-4)
    assert mixed.config.certificate is None


def test_heads_that_do_not_fit_are_refused() -> None:
    one, two = others(2)
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="weights"):
            mixture([one, two], weights)
    with pytest.raises(InputError, match="0 heads and 0 weights"):
        mixture([], [])
    stricter = HaltHead(replace(two.config, threshold=0.6), two.weights)
    for other in (stricter, sure_head()):
        with pytest.raises(InputError, match="heads differ in what they see"):
            mixture([one, other], [1.0, 1.0])
