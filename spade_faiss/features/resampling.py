"""Resizes and smooths maps, one axis at a time: each pixel of an axis is a weighted sum of a few cells."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import FloatArray

# SciPy cuts the Gaussian off at 4 sigma, and rounds that to whole pixels.
_TRUNCATE = 4.0
# Below, nothing but the location itself has a weight; the square of a tiny sigma would be 0.
_LEAST_SIGMA = 0.125


class AxisTaps(NamedTuple):
    """Which cells each pixel of an axis is the sum of, in this order.

    Attributes:
        positions: (target, taps) int32 cells, ascending; the last one is repeated where a pixel has fewer.
        weights: (target, taps) float32, 0 for those that are repeated.
        counts: (target,) how many cells each pixel has.
    """

    positions: npt.NDArray[np.int32]
    weights: FloatArray
    counts: npt.NDArray[np.int64]


def upsample(maps: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resize maps (n, h, w, ...) to (n, H, W, ...) bilinearly, with aligned pixel centers (torch's align_corners=False)."""
    return resample(maps, size, 0.0)


def resample(maps: FloatArray, size: tuple[int, int], sigma: float) -> FloatArray:
    """Resize finite maps (n, h, w, ...) as `upsample` does, and smooth them by a Gaussian of `sigma` pixels of the result.

    The Gaussian has scipy's defaults: it is reflected at the border, and truncated at 4 sigma.
    """
    n, h, w, *rest = maps.shape
    rows = _summed(axis_taps(h, size[0], sigma), np.moveaxis(maps, 1, 0).reshape(h, -1))
    columns = np.moveaxis(rows.reshape(size[0], n, w, -1), 2, 0).reshape(w, -1)
    resized = _summed(axis_taps(w, size[1], sigma), columns).reshape(size[1], size[0], n, *rest)
    return np.ascontiguousarray(np.moveaxis(resized, (2, 1), (0, 1)))


def _summed(taps: AxisTaps, values: FloatArray) -> FloatArray:
    """(target, m) of (length, m). No product of matrices: NumPy's BLAS threads spin after each, and take the cores from
    FAISS's threads.
    """
    found = taps.weights[:, :1] * values[taps.positions[:, 0]]
    part = np.empty_like(found)
    for positions, weights in zip(taps.positions.T[1:], taps.weights.T[1:], strict=True):
        np.take(values, positions, axis=0, out=part, mode="clip")
        part *= weights[:, np.newaxis]
        found += part
    return found


def taps(length: int, target: int) -> tuple[npt.NDArray[np.int32], FloatArray] | None:
    """The two positions that `upsample` makes each one of along an axis, and their weights, in the order of its sums.

    Args:
        length: the length of the axis.
        target: the length that it is resized to.

    Returns:
        (target, 2) int32 positions, the second one -1 where one is enough, and (target, 2) float32 weights; None where a
        position is made of more than two.
    """
    found = axis_taps(length, target, 0.0)
    if found.counts.max() > 2:
        return None
    positions, weights = np.full((target, 2), -1, np.int32), np.zeros((target, 2), np.float32)
    positions[:, : found.positions.shape[1]], weights[:, : found.weights.shape[1]] = found.positions, found.weights
    positions[found.counts < 2, 1] = -1
    return positions, weights


@lru_cache(maxsize=64)
def axis_taps(length: int, target: int, sigma: float) -> AxisTaps:
    """How an axis of `length` cells is resized bilinearly to `target` pixels and smoothed.

    Both are linear: the weights are what becomes of the unit vectors, computed as scipy does (`ndimage.zoom` of order 1 in its
    grid mode, `ndimage.gaussian_filter1d`), to the last bit of a float32.
    """
    matrix = _bilinear(length, target)
    if sigma >= _LEAST_SIGMA:
        matrix = _smoothed(matrix, sigma)
    cells: FloatArray = matrix.astype(np.float32)
    counts = np.count_nonzero(cells, axis=1)
    # The numbers of the cells that have a weight, ascending; behind them the others, which are cut off or overwritten.
    order = np.argsort(cells == 0, axis=1, kind="stable")[:, : counts.max()]
    weights = np.take_along_axis(cells, order, axis=1)
    is_missing = np.arange(order.shape[1]) >= counts[:, np.newaxis]
    positions = np.where(is_missing, order[np.arange(target), counts - 1][:, np.newaxis], order).astype(np.int32)
    return AxisTaps(positions, weights, counts)


def _bilinear(length: int, target: int) -> npt.NDArray[np.float64]:
    """(target, length), the weights of the two cells whose centers are next to that of each pixel."""
    at = np.clip((np.arange(target) + 0.5) * (length / target) - 0.5, 0, length - 1)
    lower = np.floor(at).astype(np.int64)
    share, pixels = at - lower, np.arange(target)
    matrix = np.zeros((target, length))
    matrix[pixels, lower] = 1 - share
    matrix[pixels, np.minimum(lower + 1, length - 1)] += share
    return matrix


def _smoothed(lines: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    """(n, m), smoothed along the first axis by a Gaussian that is reflected at the border."""
    n, radius = len(lines), int(_TRUNCATE * sigma + 0.5)
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    weights /= weights.sum()
    reflected = np.arange(-radius, n + radius) % (2 * n)
    padded = lines[np.where(reflected < n, reflected, 2 * n - 1 - reflected)]
    found: npt.NDArray[np.float64] = padded[radius : radius + n] * weights[radius]
    for step in range(radius, 0, -1):  # the order of scipy's sums
        before, behind = padded[radius - step : radius - step + n], padded[radius + step : radius + step + n]
        found += (before + behind) * weights[radius - step]
    return found
