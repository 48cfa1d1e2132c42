"""Which locations of a level a region of interest leaves, by the plain definition."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import Bools


def inspected_cells(masks: Bools, height: int, width: int) -> Bools:
    """(n, height, width), the locations whose cells hold a pixel that is inspected; masks are (n, H, W)."""
    _, rows_of_input, columns_of_input = masks.shape
    found = np.zeros((len(masks), height, width), np.bool_)
    for y, x in np.ndindex(height, width):
        rows = slice(y * rows_of_input // height, -(-(y + 1) * rows_of_input // height))
        columns = slice(x * columns_of_input // width, -(-(x + 1) * columns_of_input // width))
        found[:, y, x] = masks[:, rows, columns].any(axis=(1, 2))
    return found
