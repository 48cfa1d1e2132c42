"""Averages maps over the neighborhood of each location."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import FloatArray


def pooled(maps: FloatArray, side: int) -> FloatArray:
    """(n, H, W, C): each location's mean over the square of `side` x `side` cells around it, those outside of the map being 0.

    The same, to the last bit, as `scipy.ndimage.uniform_filter(maps, (1, side, side, 1), mode="constant")`, whose import takes
    longer than a picture takes to score, and which goes over the map line by line, while this goes over all lines at once.

    Args:
        maps: (n, H, W, C) float32.
        side: odd.
    """
    return np.ascontiguousarray(_pooled_rows(_pooled_rows(maps, side).swapaxes(1, 2), side).swapaxes(1, 2))


def _pooled_rows(maps: FloatArray, side: int) -> FloatArray:
    """The mean of each row and those around it, along the second axis: a running sum in float64, as scipy's is."""
    rows, reach = maps.shape[1], side // 2
    found = np.empty(maps.shape, np.float32)
    total = np.zeros((len(maps), *maps.shape[2:]))
    for row in range(min(reach, rows)):
        total += maps[:, row]
    step = np.empty_like(total)
    for row in range(rows):
        enters, leaves = row + reach, row - reach - 1
        if enters < rows and leaves >= 0:
            # The difference first, as scipy does: rounding depends on it.
            total += np.subtract(maps[:, enters], maps[:, leaves], out=step, dtype=np.float64)
        elif enters < rows:
            total += maps[:, enters]
        elif leaves >= 0:
            total -= maps[:, leaves]
        np.divide(total, side, out=found[:, row], casting="same_kind")
    return found
