"""How far windows reach where images have regions of interest of their own: until they hold as many vectors as asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import IntArray

Reach = npt.NDArray[np.int32]

# The most that counting and `reach_of` take at a time, for each location of each image.
BYTES_A_LOCATION = 192


def reach_of(held: IntArray, inspected: npt.NDArray[np.bool_], radius: int, kappa: int) -> Reach:
    """How many cells the window of each location reaches up, down, left and right.

    That is `radius`, or, where the windows of all images of its gallery hold fewer than `kappa` vectors, the least number of
    cells with which they hold so many. Where there are not so many vectors at all, the window is the whole map.

    Args:
        held: (n, H, W), how many images of each gallery hold a vector at a location.
        inspected: (n, H, W), which locations are searched for.
        radius: the least that a window reaches.
        kappa: number of vectors to find for each location.

    Returns:
        (n, H, W) int32; -1 for locations that are not searched for.
    """
    n, height, width = held.shape
    # Of all rows above and columns before a place, so that a rectangle is four numbers.
    sums = np.zeros((n, height + 1, width + 1), np.int64)
    np.cumsum(held, axis=1, out=sums[:, 1:, 1:])
    np.cumsum(sums[:, 1:, 1:], axis=2, out=sums[:, 1:, 1:])
    reach = np.where(inspected, radius, -1).astype(np.int32)
    image, y, x = np.nonzero(inspected)
    for further in range(radius + 1, max(height, width, radius + 1)):
        top, bottom = np.maximum(y - further + 1, 0), np.minimum(y + further, height)
        left, right = np.maximum(x - further + 1, 0), np.minimum(x + further, width)
        vectors = sums[image, bottom, right] - sums[image, top, right] - sums[image, bottom, left] + sums[image, top, left]
        short = vectors < kappa
        image, y, x = image[short], y[short], x[short]
        if not len(image):
            break
        reach[image, y, x] = further
    return reach
