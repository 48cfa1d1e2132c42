"""Resizes and smooths maps, by products with small matrices, one axis at a time."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
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


def taps(length: int, target: int) -> tuple[npt.NDArray[np.int32], FloatArray] | None:
    """The two positions that `upsample` makes each one of along an axis, and their weights, in the order of its sums.

    Args:
        length: the length of the axis.
        target: the length that it is resized to.

    Returns:
        (target, 2) int32 positions, the second one -1 where one is enough, and (target, 2) float32 weights; None where a
        position is made of more than two.
    """
    matrix = _resampling(length, target, 0.0)
    counts = np.diff(matrix.indptr)
    if counts.max() > 2 or counts.min() < 1:
        return None
    positions, weights = np.full((target, 2), -1, np.int32), np.zeros((target, 2), np.float32)
    line = np.repeat(np.arange(target), counts)
    column = np.arange(len(matrix.indices)) - matrix.indptr[line]
    positions[line, column], weights[line, column] = matrix.indices, matrix.data
    return positions, weights


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
