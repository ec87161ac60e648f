"""How features become observations, as the traces to learn from suggest it."""

from __future__ import annotations

from envs.replay import point_features, projection_of
from haltwise import Halting, Observing
from traces import Traces

# Price range over the mean thousand tokens of a training trace.
_PRICES = (0.01, 2.0)


def observing_of(traces: Traces, groups: tuple[str, ...], halting: Halting) -> Observing:
    """Standardisation, projection and price range as the training traces suggest them.

    Raises:
        InputError: If the traces lack a signal that a group needs.
    """
    mean_ktok = float(traces.num_tokens.mean()) / 1000
    low, high = (price / mean_ktok for price in _PRICES)
    return observing_at_prices(traces, groups, halting, (low, high))


def observing_at_prices(
    traces: Traces, groups: tuple[str, ...], halting: Halting, price_range: tuple[float, float]
) -> Observing:
    """Standardisation and projection as the training traces suggest them, for given prices.

    Raises:
        InputError: If the traces lack a signal that a group needs.
    """
    projection = projection_of(traces, groups)
    features = point_features(traces, groups, halting.max_points, projection)
    return Observing.fit(groups, features, price_range, projection)
