"""The projection: a few directions of an LM's hidden states, learned from recorded ones.

Shapes: P points or B rows, D size of a hidden state, K = 16 directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from haltwise.errors import InputError
from haltwise.policy.signals import Float

#: K.
NUM_DIRECTIONS = 16

# States taken to double precision at a time: to learn from them, and how many numbers to project.
_STATES = 1024
_NUMBERS = 2**15
# A direction with less variance, relative to the first, shows rounding only.
_LEAST_VARIANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Projection:
    """What a head sees of hidden states: features = (hidden - center) @ directions.T."""

    directions: Float
    """(K, D) float32; a direction without spread is zero."""
    center: Float
    """(D,) float32."""

    def __post_init__(self) -> None:
        """Checks both arrays.

        Raises:
            InputError: If a shape or type is another one, or a value is not finite.
        """
        for name, shape in (
            ("directions", (NUM_DIRECTIONS, self.center.size)),
            ("center", (self.center.size,)),
        ):
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                found = (array.shape, str(array.dtype))
                raise InputError(f"projection {name} is {found}, expected {(shape, 'float32')}")
            if not np.isfinite(array).all():
                raise InputError(f"projection {name} has values that are not finite")
        check_size(self.center.size)

    @classmethod
    def fit(cls, states: NDArray[Any]) -> Projection:
        """The principal components of some states (P, D), those with most variance first.

        The largest entry of a direction is positive.

        Raises:
            InputError: If there is no state, one is not finite, or D is below K.
        """
        num, size = states.shape
        if not num:
            raise InputError("no hidden states to learn a projection from: expected at least one")
        check_size(size)
        center: NDArray[np.float64] = np.mean(states, axis=0, dtype=np.float64)
        scatter = np.zeros((size, size))
        for rows in _chunks(num, _STATES):
            offset = states[rows].astype(np.float64) - center
            scatter += offset.T @ offset
        if not np.isfinite(scatter).all():
            raise InputError("a hidden state is not finite: expected numbers")
        variances, vectors = np.linalg.eigh(scatter)  # ascending
        variances, directions = variances[: -NUM_DIRECTIONS - 1 : -1], vectors.T[::-1]
        directions = directions[:NUM_DIRECTIONS]
        largest = np.abs(directions).argmax(axis=1)[:, None]
        directions = directions * np.sign(np.take_along_axis(directions, largest, axis=1))
        spreads = variances > _LEAST_VARIANCE * variances[0]
        directions = np.where(spreads[:, None], directions, 0.0)
        return cls(directions.astype(np.float32, order="C"), center.astype(np.float32))

    def features(self, states: NDArray[Any]) -> Float:
        """Features (B, K) of states (B, D); a NaN state gives NaN features.

        Raises:
            InputError: If D is not that of the projection.
        """
        if states.shape[1] != self.center.size:
            raise InputError(
                f"hidden states have {states.shape[1]} values, the head's projection expects "
                f"{self.center.size}: it was learned from another LM"
            )
        features = np.empty((len(states), NUM_DIRECTIONS), dtype=np.float32)
        # In double precision a row's features do not depend on the rows beside it.
        directions = self.directions.astype(np.float64).T
        for rows in _chunks(len(states), max(_NUMBERS // self.center.size, 1)):
            features[rows] = (states[rows].astype(np.float64) - self.center) @ directions
        return features

    def __eq__(self, other: object) -> bool:
        """Whether both have the same arrays."""
        if not isinstance(other, Projection):
            return NotImplemented
        return np.array_equal(self.directions, other.directions) and np.array_equal(
            self.center, other.center
        )

    def __hash__(self) -> int:
        """Equal for equal projections."""
        return hash(self.directions.tobytes())


def check_size(size: int) -> None:
    """Refuses hidden states with fewer values than there are directions.

    Raises:
        InputError: If D is below K.
    """
    if size < NUM_DIRECTIONS:
        raise InputError(
            f"hidden states have {size} values, expected at least {NUM_DIRECTIONS}, "
            "or a head without the feature group 'hidden'"
        )


def _chunks(num: int, length: int) -> Iterator[slice]:
    return (slice(first, first + length) for first in range(0, num, length))
