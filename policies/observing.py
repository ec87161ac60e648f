"""Fits to the training traces how features become observations."""

from __future__ import annotations

from envs.replay import point_features, projection_of
from haltwise import Halting, Observing
from traces import Traces

# The price range, times the mean length of a training trace in thousands of tokens: what the
# whole of such a trace costs at either end, in exact match.
_PRICES = (0.0005, 4.0)
# The same of a cascade, times the mean bill of the large LM for a question. Lower prices change
# nothing any more, and at higher ones nothing is worth to be escalated.
_CASCADE_PRICES = (0.02, 2.0)


def observing_of(traces: Traces, groups: tuple[str, ...], halting: Halting) -> Observing:
    """Fits standardisation, projection and price range to the training traces.

    Raises:
        InputError: If the traces lack a signal that a group needs.
    """
    mean_ktok = float(traces.num_tokens.mean()) / 1000
    low, high = (price / mean_ktok for price in _PRICES)
    return observing_at_prices(traces, groups, halting, (low, high))


def observing_at_prices(
    traces: Traces, groups: tuple[str, ...], halting: Halting, price_range: tuple[float, float]
) -> Observing:
    """Fits standardisation and projection to the training traces, for a given price range.

    Raises:
        InputError: If the traces lack a signal that a group needs.
    """
    projection = projection_of(traces, groups)
    features = point_features(traces, groups, halting.max_points, projection)
    return Observing.fit(groups, features, price_range, projection)


def cascade_prices(large: Traces, price_ratio: float) -> tuple[float, float]:
    """Returns the price range of a cascade: from where escalating costs next to nothing.

    At its ends the large LM's answer to a question costs 2 % of a right answer, and two of them.

    Args:
        large: Traces of the large LM.
        price_ratio: What one of its tokens costs, in tokens of the small LM.
    """
    mean_ktok = price_ratio * float(large.num_tokens.mean()) / 1000
    low, high = (price / mean_ktok for price in _CASCADE_PRICES)
    return low, high
