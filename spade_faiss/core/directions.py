"""The directions along which vectors vary most."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import FloatArray

_SEED = 1234
_ITERATIONS = 4
# Directions that are iterated beside those that are asked for, so that these are found sooner.
OVERSAMPLED = 8


def principal_directions(x: FloatArray, count: int) -> FloatArray:
    """(count, d) orthonormal directions along which vectors (n, d) vary most, the strongest first, by subspace iteration."""
    rng = np.random.default_rng(_SEED)
    d = x.shape[1]
    span = rng.standard_normal((d, min(d, count + OVERSAMPLED)))
    for _ in range(_ITERATIONS):
        span, _ = np.linalg.qr(x.T @ (x @ span.astype(np.float32)))
    projected = (x @ span.astype(np.float32)).astype(np.float64)
    _, rotation = np.linalg.eigh(projected.T @ projected)
    directions, _ = np.linalg.qr(span @ rotation[:, ::-1])
    return np.ascontiguousarray(directions.T[:count], np.float32)
