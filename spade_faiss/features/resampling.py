"""Resizes and smooths maps, by products with small matrices, one axis at a time."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage, sparse

from spade_faiss.core.types import FloatArray

# SciPy cuts the Gaussian off at 4 sigma, and rounds that to whole pixels.
_LEAST_SIGMA = 0.125


def upsample(maps: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resize maps (n, h, w, ...) to (n, H, W, ...) bilinearly, with aligned pixel centers (torch's align_corners=False)."""
    return resample(maps, size, 0.0)


def resample(maps: FloatArray, size: tuple[int, int], sigma: float) -> FloatArray:
    """Resize maps (n, h, w, ...) as `upsample` does, and smooth them by a Gaussian of `sigma` pixels of the result."""
    n, h, w, *rest = maps.shape
    rows = _resampling(h, size[0], sigma) @ np.moveaxis(maps, 1, 0).reshape(h, -1)
    columns = np.moveaxis(rows.reshape(size[0], n, w, -1), 2, 0).reshape(w, -1)
    resized = (_resampling(w, size[1], sigma) @ columns).reshape(size[1], size[0], n, *rest)
    return np.ascontiguousarray(np.moveaxis(resized, (2, 1), (0, 1)))


@lru_cache(maxsize=64)
def _resampling(length: int, target: int, sigma: float) -> sparse.csr_array:
    """Compute the matrix, (target, length), that resizes an axis bilinearly and smooths it.

    Both are linear and work on one axis at a time, so that a product with a small matrix replaces them; the matrix is what
    scipy makes of the unit vectors. Nearly all of it is 0, so it is sparse. That also avoids NumPy's BLAS threads, which spin
    after each product and would take the cores from FAISS's threads.
    """
    resized = ndimage.zoom(np.eye(length), (target / length, 1), order=1, mode="nearest", grid_mode=True)
    # Below, nothing but the location itself has a weight; the square of a tiny sigma would be 0.
    if sigma >= _LEAST_SIGMA:
        resized = ndimage.gaussian_filter1d(resized, sigma, axis=0)
    return sparse.csr_array(resized.astype(np.float32))
