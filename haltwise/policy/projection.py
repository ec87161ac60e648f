"""The projection: what a head sees of an LM's hidden states, learned from recorded ones.

It is the place of a state along the few directions in which the recorded states spread most.

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

#: K, the directions that are kept.
NUM_DIRECTIONS = 16

# What is taken to double precision at a time: states to learn from, and numbers to project.
_STATES = 1024
_NUMBERS = 2**15
# A direction with less variance, relative to the first, shows rounding only.
_LEAST_VARIANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of hidden states: features = (hidden - center) @ directions.T."""

    directions: Float
    """(K, D) float32; a direction in which the states did not spread is zero."""
    center: Float
    """(D,) float32, the mean of the states."""

    def __post_init__(self) -> None:
        """Checks both arrays.

        Raises:
            InputError: If an array has another shape or type, or a value that is not finite, or
                if D is below K.
        """
        size = self.center.size
        check_tensor("projection directions", self.directions, (NUM_DIRECTIONS, size))
        check_tensor("projection center", self.center, (size,))
        check_size(size)

    @classmethod
    def fit(cls, states: NDArray[Any]) -> Projection:
        """Learns the principal components of some states (P, D), those with most variance first.

        The sign of a direction is such that its largest entry is positive.

        Raises:
            InputError: If there is no state, one of them is not finite, or D is below K.
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
        """Returns the features (B, K) of states (B, D); a NaN state gives NaN features.

        Raises:
            InputError: If D is not that of the states that the projection was learned from.
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
        """Tells whether the other one is a projection with the same arrays."""
        if not isinstance(other, Projection):
            return NotImplemented
        return np.array_equal(self.directions, other.directions) and np.array_equal(
            self.center, other.center
        )

    def __hash__(self) -> int:
        """Returns a number that is equal for equal projections."""
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


def check_tensor(name: str, tensor: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuses what cannot be a part of a head, by its name for the message.

    Raises:
        InputError: If it is not float32 of the expected shape, or has a value that is not finite.
    """
    if tensor.shape != shape or tensor.dtype != np.float32:
        found = (tensor.shape, str(tensor.dtype))
        raise InputError(f"{name} is {found}, expected {(shape, 'float32')}")
    if not np.isfinite(tensor).all():
        raise InputError(f"{name} has values that are not finite")


def _chunks(num: int, length: int) -> Iterator[slice]:
    """Cuts a number of rows into slices of some length; the last one may be shorter."""
    return (slice(first, first + length) for first in range(0, num, length))
