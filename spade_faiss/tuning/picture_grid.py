"""Maps of one picture in several inputs, brought to one grid over the whole picture, so that they can be compared.

What an input does not show of a picture has no score there, and counts as below all others: nobody would find a defect in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.features.placement import Placement, place

# The rows and columns of the grid, about those of the smallest input that is in use.
SIDE = 224
Ints = npt.NDArray[np.int64]


def whole(width: int, height: int) -> Placement:
    """Where a picture of so many pixels lies on the grid: all of it, stretched."""
    return Placement((width, height), (SIDE, SIDE), (0, 0), (SIDE, SIDE))


def on_picture(maps: FloatArray, sizes: Sequence[tuple[int, int]], preprocess: Preprocess) -> FloatArray:
    """(n, SIDE, SIDE): the maps (n, H, W) of n pictures at the points of their grids; minus infinity where nothing is shown.

    Args:
        maps: the score maps.
        sizes: the width and height of each picture, in pixels.
        preprocess: how pictures lie in the input.
    """
    found = np.full((len(maps), SIDE, SIDE), -np.inf, np.float32)
    for scores, own, (width, height) in zip(maps, found, sizes, strict=True):
        where = place(width, height, preprocess)
        rows, row_shown = _points(SIDE, where.resized[1], where.offset[1], scores.shape[0])
        columns, column_shown = _points(SIDE, where.resized[0], where.offset[0], scores.shape[1])
        own[np.ix_(row_shown, column_shown)] = scores[np.ix_(rows[row_shown], columns[column_shown])]
    return found


def visible_in(size: tuple[int, int], placement: Placement, inside: Bools) -> Bools:
    """(height, width) of the picture: True where the input shows it, inside a part (h, w) of the input."""
    rows, row_shown = _points(size[0], placement.resized[1], placement.offset[1], inside.shape[0])
    columns, column_shown = _points(size[1], placement.resized[0], placement.offset[0], inside.shape[1])
    found: Bools = inside[np.ix_(rows, columns)] & row_shown[:, None] & column_shown[None, :]
    return found


def _points(count: int, resized: int, offset: int, side: int) -> tuple[Ints, Bools]:
    """(count,) the rows, or columns, of an input that evenly spread points of a picture fall on, and whether it shows them."""
    at = ((np.arange(count) + 0.5) * resized / count).astype(np.int64) + offset
    return np.clip(at, 0, side - 1), (at >= 0) & (at < side)
