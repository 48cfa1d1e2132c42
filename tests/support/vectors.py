"""Vectors that are hard to search, and all distances between them in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def brute(xq: Floats, xb: Floats) -> npt.NDArray[np.float64]:
    return np.asarray(((xq[:, None].astype(np.float64) - xb[None].astype(np.float64)) ** 2).sum(axis=2))


def near_duplicates(d: int = 48) -> tuple[Floats, Floats]:
    """Queries that are rows of the base, in two far clusters of near duplicates: no center makes their norms small."""
    rng = np.random.default_rng(7)
    far = np.where(np.arange(400)[:, None] % 2, 1000.0, -1000.0)
    xb = (far + 1e-2 * rng.normal(size=(400, d))).astype(np.float32)
    return xb[rng.permutation(400)[:60]], xb
