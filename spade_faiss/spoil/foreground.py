"""Where the object of a picture is: defects are drawn on it, not on what lies around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

# The picture is looked at with so many pixels along its longer side; an outline needs no more.
_SIDE = 160
_RING = 0.04  # the width of the border that a background shows in, as a share of the shorter side
# Of the border, so much is of one color where there is a background: beside it, the edge of a table may be seen.
_OF_ONE_COLOR = 0.65
# A border that varies by more, in gray levels, is no background but a part of what fills the picture.
_MOST_VARIED = 24.0
_LEAST_APART = 12.0  # an object differs from its background by at least so many levels
_LEAST_CONTRAST = 30.0  # and half of it by at least so many: what differs by less may be how a surface is lit
_LEAST, _MOST = 0.05, 0.95  # the share of the picture that an object takes
# The largest part takes so much of what was found: many parts of the same size are a texture.
_LARGEST = 0.5
_PART = 0.1  # parts of an object that are smaller, as a share of its largest, are specks


def find_object(picture: Picture) -> Mask:
    """(H, W), True on the object; everywhere, if the picture has no background that can be told.

    A background is what the border shows, if it is nearly of one color; Otsu's threshold of the distance to that color (Otsu,
    "A Threshold Selection Method from Gray-Level Histograms", 1979) tells the object from it.

    Args:
        picture: (H, W, 3) uint8.
    """
    height, width = picture.shape[:2]
    whole = np.ones((height, width), np.bool_)
    step = max(1, round(max(height, width) / _SIDE))
    small = ndimage.uniform_filter(picture.astype(np.float32), (step, step, 0))[step // 2 :: step, step // 2 :: step]
    ring = max(1, round(_RING * min(small.shape[:2])))
    if min(small.shape[:2]) <= 4 * ring:
        return whole
    border = np.concatenate([small[part].reshape(-1, 3) for part in _sides(ring)])
    color = np.median(border, axis=0)
    varied = float(np.quantile(np.abs(border - color).max(axis=1), _OF_ONE_COLOR))
    if varied > _MOST_VARIED:
        return whole
    apart = ndimage.gaussian_filter(np.abs(small - color).max(axis=2), 1.0)
    if float(apart.max()) < _LEAST_CONTRAST:
        return whole
    found = apart > max(_otsu(apart) * 0.6, 1.5 * varied + 4.0, _LEAST_APART)
    found = _without_specks(ndimage.binary_fill_holes(ndimage.binary_opening(found)))
    if not _LEAST <= float(found.mean()) <= _MOST or float(np.median(apart[found])) < _LEAST_CONTRAST:
        return whole
    rows = np.minimum(np.arange(height) // step, found.shape[0] - 1)
    columns = np.minimum(np.arange(width) // step, found.shape[1] - 1)
    return np.ascontiguousarray(found[np.ix_(rows, columns)])


def _sides(ring: int) -> list[tuple[Any, ...]]:
    every = slice(None)
    return [(slice(ring),), (slice(-ring, None),), (every, slice(ring)), (every, slice(-ring, None))]


def _without_specks(found: Mask) -> Mask:
    labels, count = ndimage.label(found)
    if count < 2:
        return found
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    if sizes.max() < _LARGEST * sizes.sum():
        return np.zeros_like(found)
    largest = int(sizes.argmax())
    kept_labels = sizes >= _PART * sizes.max()
    at_border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    # What the picture cuts off lies around the object, unless the object is cut off, too.
    kept_labels[at_border[at_border != largest]] = False
    kept: Mask = kept_labels[labels]
    return kept


def _otsu(values: npt.NDArray[np.float32]) -> float:
    """The value that splits a histogram into two classes of the greatest variance between them."""
    counts, edges = np.histogram(values, 128)
    centers = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centers)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centers[int(np.nanargmax(between))])
