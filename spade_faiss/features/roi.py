"""Regions of interest as arrays: their cells, and what they are at another size and on the grid of a level."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.roi import Roi
from spade_faiss.core.types import Bools, IntArray

# Those of the inputs and the levels of a few banks; regions of pictures may be as large as photos.
_KEPT, _MOST_KEPT_CELLS = 32, 1 << 20


def mask_of(roi: Roi) -> Bools:
    """(H, W), True inside; read-only."""
    return _kept_mask(roi) if roi.height * roi.width <= _MOST_KEPT_CELLS else _mask(roi)


def _mask(roi: Roi) -> Bools:
    inside = np.arange(len(roi.lengths)) % 2 == 1
    mask = np.repeat(inside, roi.lengths).reshape(roi.height, roi.width)
    mask.flags.writeable = False
    return mask


_kept_mask = lru_cache(maxsize=_KEPT)(_mask)


@lru_cache(maxsize=_KEPT)
def cells_of(roi: Roi) -> IntArray:
    """(m,), the numbers `y * W + x` of the cells inside, ascending; read-only."""
    cells: IntArray = np.flatnonzero(mask_of(roi))
    cells.flags.writeable = False
    return cells


@lru_cache(maxsize=_KEPT)
def nearest_cells(roi: Roi) -> IntArray:
    """(H * W,), for each cell, which of `cells_of` is nearest to it: itself, if it is inside; read-only."""
    from scipy import ndimage  # takes longer to import than an image takes to score, and few searches need it

    y, x = ndimage.distance_transform_edt(~mask_of(roi), return_distances=False, return_indices=True)
    nearest: IntArray = np.searchsorted(cells_of(roi), (y * roi.width + x).ravel()).astype(np.int64)
    nearest.flags.writeable = False
    return nearest


def resized(roi: Roi, height: int, width: int) -> Bools:
    """(height, width), a region at another size: a pixel is inside if its center falls into a cell that is."""
    rows = (2 * np.arange(height) + 1) * roi.height // (2 * height)
    columns = (2 * np.arange(width) + 1) * roi.width // (2 * width)
    return mask_of(roi)[rows[:, None], columns]


def on_grid(roi: Roi, height: int, width: int) -> Roi:
    """The region of a map whose (height, width) locations cover the grid of a region.

    A location is inside if its cell holds anything that is: all that is inside lies in the cell of such a location.

    Raises:
        InputError: for more locations along a side than the grid has cells.
    """
    if height > roi.height or width > roi.width:
        raise InputError(
            f"a region of interest of {roi.height} x {roi.width} pixels is too coarse for a level of {height} x {width} "
            "locations"
        )
    return Roi.of(cells_with_any(mask_of(roi)[np.newaxis], height, width)[0])


def cells_with_any(masks: Bools, height: int, width: int) -> Bools:
    """(n, height, width), whether anything is True in each of the cells that cover masks (n, H, W)."""
    return _any_along(_any_along(masks, 1, height), 2, width)


def _any_along(masks: Bools, axis: int, cells: int) -> Bools:
    """Whether anything is True in each of the cells that cover an axis; neighbors share the line that both touch."""
    length = masks.shape[axis]
    edges = np.arange(cells + 1) * length
    # `reduceat` takes pairs of a start and an end, which may not lie behind the last line.
    pairs = np.stack([edges[:-1] // cells, -(-edges[1:] // cells)], axis=1).ravel()
    padded = np.pad(masks, [(0, int(other == axis)) for other in range(masks.ndim)])
    any_of: Bools = np.logical_or.reduceat(padded, pairs, axis=axis)
    return any_of[(slice(None),) * axis + (slice(None, None, 2),)]
