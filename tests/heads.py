"""Heads with random weights, for tests that hold for any."""

import numpy as np

from haltwise import HaltHead, Halting, HeadConfig, Observing, feature_names
from haltwise.policy.halting import Probing


def random_head(
    seed: int,
    groups: tuple[str, ...] = ("confidence", "agreement"),
    num_hidden: int = 8,
    probing: Probing = "always",
) -> HaltHead:
    """A head with steep random weights: its decisions hang on many features and on the price."""
    rng = np.random.default_rng(seed)
    num = len(feature_names(groups))
    observing = Observing(
        groups, tuple(rng.normal(size=num)), tuple(rng.uniform(0.5, 2, num)), (0.1, 10.0)
    )
    shapes = {
        "w0": (num_hidden, num + 1),
        "b0": (num_hidden,),
        "w1": (num_hidden, num_hidden),
        "b1": (num_hidden,),
        "w2": (1, num_hidden),
        "b2": (1,),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    halting = Halting(probing, "every 20 tokens", "</think>", "source")
    return HaltHead(HeadConfig(observing, halting, default_price=1.0), weights)
