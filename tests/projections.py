"""Projections of hidden states, for tests that do not care which."""

import numpy as np

from haltwise import Projection


def some_projection(size: int) -> Projection:
    """Orthonormal directions of states with some number of values, and a center."""
    rng = np.random.default_rng(size)
    basis = np.linalg.qr(rng.normal(size=(size, 16)))[0]
    return Projection(basis.T.astype(np.float32, order="C"), rng.random(size, dtype=np.float32))
