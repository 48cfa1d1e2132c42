"""Regions of a score map above a threshold: boxes and masks, in pixels of the backbone's input and of the original image.

Masks are COCO's run-length encoding: the counts of pixels that are alternately outside and inside, column after column, outside
first; as numbers, or as the text that `pycocotools.mask.decode` takes. Source: `rleEncode` and `rleToString` in
https://github.com/cocodataset/cocoapi/blob/8c9bcc3/common/maskApi.c. A compiled dependency is not simpler than thirty lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.conformal import Doubles
from spade_faiss.features.pictures import Mask
from spade_faiss.features.placement import Placement

# Pixels that touch, diagonally too, are one region, as in the metrics.
_NEIGHBORHOOD = np.ones((3, 3), np.bool_)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a region is, in pixels of one picture.

    `size`: (height, width) of the picture. `box`: (x, y, width, height) of the region. `area`: its pixels. `peak`: (y, x) of
    its strongest pixel. `counts`: its mask, COCO's run lengths.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    area: int
    peak: tuple[int, int]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A connected part of a map above a threshold.

    `score`: of its strongest pixel. `p_value`: of that score among the maxima of normal maps. `input`: where it is in the
    backbone's input. `original`: where in the image, of which the input may show a part, at another scale.
    """

    score: float
    p_value: float
    input: Extent
    original: Extent


def find_regions(
    scores: FloatArray, threshold: float, p_value: Callable[[Doubles], Doubles], placement: Placement
) -> list[Region]:
    """The regions of one map above a threshold, strongest first.

    Args:
        scores: (H, W); NaN throughout for an image without a map, which has none.
        threshold: a pixel is in a region if its score is above.
        p_value: scores (n,) to their p-values.
        placement: how the image lies in the backbone's input.
    """
    labels, count = ndimage.label(scores > threshold, _NEIGHBORHOOD)
    found = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        mask = labels[rows, columns] == label
        inside = np.where(mask, scores[rows, columns], -np.inf)
        y, x = np.unravel_index(int(inside.argmax()), mask.shape)
        corner = rows.start, columns.start
        at = _extent(mask, corner, scores.shape, (int(y), int(x)))
        found.append((float(inside[y, x]), at, _in_original(inside, corner, at.peak, placement)))
    assert len(found) == count
    found.sort(key=lambda region: (-region[0], region[1].box))
    p = p_value(np.array([score for score, _, _ in found], np.float64))
    return [
        Region(score=score, p_value=float(own), input=at, original=original)
        for (score, at, original), own in zip(found, p, strict=True)
    ]


def encode(mask: Mask, corner: tuple[int, int] = (0, 0), size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Run lengths of a picture that is False but for `mask` (h, w).

    Args:
        mask: a part of the picture.
        corner: (y, x) of the part in the picture.
        size: (height, width) of the picture; the mask's own unless given.
    """
    height, width = mask.shape if size is None else size
    x, y = np.nonzero(mask.T)
    place = (x + corner[1]) * height + y + corner[0]
    starts = np.flatnonzero(np.diff(place, prepend=-2) > 1)
    first = place[starts]
    last = place[np.append(starts[1:], len(place)) - 1] + 1 if len(place) else place
    edges = np.stack([first, last], axis=1).ravel()
    runs = np.diff(edges, prepend=0, append=height * width)
    return tuple(runs.tolist() if runs[-1] or len(runs) == 1 else runs[:-1].tolist())


def to_text(counts: Sequence[int]) -> str:
    """Run lengths as COCO's text: in groups of 5 bits, from the fourth on as the difference from the last but one."""
    text = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            group, rest = rest & 0x1F, rest >> 5
            more = rest != (-1 if group & 0x10 else 0)
            text.append(chr(48 + (group | 0x20 if more else group)))
    return "".join(text)


def from_text(text: str) -> tuple[int, ...]:
    """The run lengths of COCO's text.

    Raises:
        InputError: for what is no such text.
    """
    counts: list[int] = []
    value = shift = 0
    for char in text:
        group = ord(char) - 48
        if not 0 <= group < 64:
            raise InputError(f"{char!r} does not belong into a mask's text")
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            value -= (1 << shift) if group & 0x10 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise InputError("a mask's text ends in the middle of a number")
    return tuple(counts)


def decode(counts: Sequence[int], size: tuple[int, int]) -> Mask:
    """(height, width), the mask of COCO's run lengths.

    Raises:
        InputError: for runs that do not make up the picture.
    """
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise InputError(f"runs of {sum(counts)} pixels are no mask of {size[0]} x {size[1]}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(size[1], size[0]).T


def _extent(mask: Mask, corner: tuple[int, int], size: tuple[int, ...], peak: tuple[int, int]) -> Extent:
    """The extent of a mask that touches all four sides of its part of a picture; `peak` is within the part."""
    (top, left), (height, width) = corner, mask.shape
    return Extent(
        size=(size[0], size[1]),
        box=(left, top, width, height),
        area=int(mask.sum()),
        peak=(top + peak[0], left + peak[1]),
        counts=encode(mask, corner, size),
    )


def _in_original(inside: FloatArray, corner: tuple[int, int], peak: tuple[int, int], placement: Placement) -> Extent:
    """The original's pixels whose centers fall into the region; where it covers none, the one that its peak falls into.

    `inside`: (h, w), the region's scores in its box, and -inf around them.
    """
    (width, height), (left, top) = placement.original, placement.offset
    ys, rows = _pixels_under(corner[0] - top, inside.shape[0], placement.resized[1], height)
    xs, columns = _pixels_under(corner[1] - left, inside.shape[1], placement.resized[0], width)
    at_peak = (
        _pixel_under(peak[0] - top, placement.resized[1], height),
        _pixel_under(peak[1] - left, placement.resized[0], width),
    )
    scores = inside[np.ix_(rows, columns)]
    large = scores > -np.inf
    if not large.any():
        return _extent(np.ones((1, 1), np.bool_), at_peak, (height, width), (0, 0))
    y, x = np.flatnonzero(large.any(axis=1)), np.flatnonzero(large.any(axis=0))
    part = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
    start = int(ys[y[0]]), int(xs[x[0]])
    own = at_peak[0] - start[0], at_peak[1] - start[1]
    covered = 0 <= own[0] < y.size and 0 <= own[1] < x.size and large[part][own]
    if not covered:  # the original is coarser
        row, column = np.unravel_index(int(scores[part].argmax()), scores[part].shape)
        own = int(row), int(column)
    return _extent(large[part], start, (height, width), own)


def _pixels_under(start: int, length: int, resized: int, original: int) -> tuple[Ints, Ints]:
    """The original's pixels along an axis whose centers fall into `length` pixels of the resized one, and into which."""
    scale = original / resized
    pixels = np.arange(max(0, math.floor(start * scale) - 1), min(original, math.ceil((start + length) * scale) + 1))
    cells = np.floor((pixels + 0.5) / scale).astype(np.int64) - start
    inside = (cells >= 0) & (cells < length)
    return pixels[inside], cells[inside]


def _pixel_under(position: int, resized: int, original: int) -> int:
    """The original's pixel that the center of a pixel of the resized one falls into."""
    return min(max(0, math.floor((position + 0.5) * original / resized)), original - 1)
