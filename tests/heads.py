"""Heads for tests: one with random weights, and one whose decisions are known beforehand."""

import numpy as np

from haltwise import MEAN_LOGPROB, HaltHead, Halting, HeadConfig, Observing, feature_names
from haltwise.policy.halting import Probing

CLOSE = "\n</think>\n\n"


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


def sure_head(
    close: str = CLOSE, rule: str = "every 4 tokens", probing: Probing = "at_halt"
) -> HaltHead:
    """Halts where the mean log probability since the last point is above a bar that price lowers.

    Its log-odds are tanh(tanh(logprob + 1.25 + log10(price))): the bar is at -1.25 at a price of
    1, -2.25 at 10, -3.25 at 100, and -0.25 at 0.1. A plan's thought is then halted after 20
    tokens, 12, 4, and never. If it looks at answers, it has to have seen one, but not which. Its LM
    reasons in the open if the close text has no marker.
    """
    seen = ("confidence",) if probing == "always" else ()
    groups = ("pace", "distribution", "reflection", *seen)
    names = feature_names(groups)
    mean = [-1.25 if name == "logprob" else 0.0 for name in names]
    observing = Observing(groups, tuple(mean), (1.0,) * len(names), (0.1, 10.0))
    w0 = np.zeros((1, observing.size), dtype=np.float32)
    w0[0, [names.index("logprob"), -1]] = 1.0
    one, zero = np.ones((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
    weights = {"w0": w0, "b0": zero, "w1": one, "b1": zero, "w2": one, "b2": zero}
    start, end = ("<think>", "</think>") if "</think>" in close else ("", "")
    halting = Halting(probing, rule, close, MEAN_LOGPROB, think_start=start, think_end=end)
    return HaltHead(HeadConfig(observing, halting, default_price=1.0), weights)


def place_head(halts_at: int, groups: tuple[str, ...], halting: Halting) -> HaltHead:
    """Halts from some token on at a price of 1, and never at 0.1, whatever else it sees.

    Args:
        halts_at: The number of that token.
        groups: What it sees, with the pace among it.
        halting: Its conditions.
    """
    names = feature_names(groups)
    mean = [np.log1p(halts_at - 0.5) if name == "log_position" else 0.0 for name in names]
    observing = Observing(groups, tuple(mean), (1.0,) * len(names), (0.1, 10.0))
    w0 = np.zeros((1, observing.size), dtype=np.float32)
    w0[0, [names.index("log_position"), -1]] = 1.0, 10.0
    one, zero = np.ones((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
    weights = {"w0": w0, "b0": zero, "w1": one, "b1": zero, "w2": one, "b2": zero}
    return HaltHead(HeadConfig(observing, halting, default_price=1.0), weights)
