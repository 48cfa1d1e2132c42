"""Regions of a score map above a threshold: boxes and masks, in pixels of the backbone's input and of the original image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.components import components
from spade_faiss.decisions.conformal import Doubles
from spade_faiss.decisions.run_lengths import encode, to_text
from spade_faiss.features.pictures import Mask
from spade_faiss.features.placement import Placement

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a region is, in pixels of one picture.

    Args:
        size: (height, width) of the picture.
        box: (x, y, width, height) of the region.
        area: the number of its pixels.
        peak: (y, x) of its strongest pixel.
        counts: the run lengths of its mask, see `run_lengths`.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    area: int
    peak: tuple[int, int]
    counts: tuple[int, ...]

    def numbers(self) -> dict[str, Any]:
        """The extent for report.json."""
        return {
            "box": self.box,
            "area": self.area,
            "peak": self.peak,
            "segmentation": {"size": self.size, "counts": to_text(self.counts)},
        }


@dataclass(frozen=True, kw_only=True)
class Region:
    """A connected part of a map above a threshold.

    Args:
        score: the score of its strongest pixel.
        p_value: the p-value of that score among the maxima of normal maps.
        input: where the region is in the backbone's input.
        original: where it is in the image, of which the input may show a part at another scale.
    """

    score: float
    p_value: float
    input: Extent
    original: Extent

    def numbers(self) -> dict[str, Any]:
        """The region for report.json."""
        return {
            "score": self.score,
            "p_value": self.p_value,
            "input": self.input.numbers(),
            "original": self.original.numbers(),
        }


def find_regions(
    scores: FloatArray, threshold: float, p_value: Callable[[Doubles], Doubles], placement: Placement
) -> list[Region]:
    """Find the regions of one map above a threshold.

    Args:
        scores: (H, W) pixel scores; NaN everywhere for an image without a map, which has no regions.
        threshold: a pixel is in a region if its score is above.
        p_value: gives the (n,) p-values of n scores.
        placement: how the image lies in the backbone's input.

    Returns:
        The regions, strongest first.
    """
    found = []
    for rows, columns, mask in components(scores > threshold):  # pixels that touch, diagonally too, as in the metrics
        inside = np.where(mask, scores[rows, columns], -np.inf)
        y, x = np.unravel_index(int(inside.argmax()), mask.shape)
        corner = rows.start, columns.start
        at = _extent(mask, corner, scores.shape, (int(y), int(x)))
        found.append((float(inside[y, x]), at, _in_original(inside, corner, at.peak, placement)))
    found.sort(key=lambda region: (-region[0], region[1].box))
    p = p_value(np.array([score for score, _, _ in found], np.float64))
    return [
        Region(score=score, p_value=float(own), input=at, original=original)
        for (score, at, original), own in zip(found, p, strict=True)
    ]


def _extent(
    mask: Mask, corner: tuple[int, int], size: tuple[int, ...], peak: tuple[int, int], columns: Ints | None = None
) -> Extent:
    """The extent of a mask that touches all four sides of its part of a picture; `peak` is relative to the part.

    For `columns`, see `run_lengths.encode`.
    """
    columns = np.arange(mask.shape[1]) if columns is None else columns
    (top, left), height, width = corner, len(mask), len(columns)
    return Extent(
        size=(size[0], size[1]),
        box=(left, top, width, height),
        area=int(mask.sum(axis=0)[columns].sum()),
        peak=(top + peak[0], left + peak[1]),
        counts=encode(mask, corner, size, columns),
    )


def _in_original(inside: FloatArray, corner: tuple[int, int], peak: tuple[int, int], placement: Placement) -> Extent:
    """The original's pixels whose centers fall into the region; if there are none, the one that its peak falls into.

    Args:
        inside: (h, w), the region's scores in its box, and -inf around them.
        corner: (y, x) of the box in the backbone's input.
        peak: (y, x) of the strongest pixel in the backbone's input.
        placement: how the image lies in the backbone's input.
    """
    (width, height), (left, top) = placement.original, placement.offset
    ys, rows = _pixels_under(corner[0] - top, inside.shape[0], placement.resized[1], height)
    xs, columns = _pixels_under(corner[1] - left, inside.shape[1], placement.resized[0], width)
    at_peak = (
        _pixel_under(peak[0] - top, placement.resized[1], height),
        _pixel_under(peak[1] - left, placement.resized[0], width),
    )
    # Of the original's height and the input's width: all pixels of a photo would be as large as the photo.
    tall: Mask = np.greater(inside, -np.inf)[rows]
    y = np.flatnonzero(tall[:, np.unique(columns)].any(axis=1))
    x = np.flatnonzero(np.asarray(tall.any(axis=0))[columns])
    if not y.size:
        return _extent(np.ones((1, 1), np.bool_), at_peak, (height, width), (0, 0))
    tall, columns = tall[y[0] : y[-1] + 1], columns[x[0] : x[-1] + 1]
    start = int(ys[y[0]]), int(xs[x[0]])
    own = at_peak[0] - start[0], at_peak[1] - start[1]
    covered = 0 <= own[0] < y.size and 0 <= own[1] < x.size and tall[own[0], columns[own[1]]]
    if not covered:  # the original has fewer pixels than the input
        scores = inside[np.ix_(rows[y[0] : y[-1] + 1], columns)]
        row, column = np.unravel_index(int(scores.argmax()), scores.shape)
        own = int(row), int(column)
    return _extent(tall, start, (height, width), own, columns)


def _pixels_under(start: int, length: int, resized: int, original: int) -> tuple[Ints, Ints]:
    """Along one axis, the original's pixels whose centers fall into `length` pixels of the resized image, and into which."""
    scale = original / resized
    pixels = np.arange(max(0, math.floor(start * scale) - 1), min(original, math.ceil((start + length) * scale) + 1))
    cells = np.floor((pixels + 0.5) / scale).astype(np.int64) - start
    inside = (cells >= 0) & (cells < length)
    return pixels[inside], cells[inside]


def _pixel_under(position: int, resized: int, original: int) -> int:
    """Along one axis, the original's pixel that the center of a pixel of the resized image falls into."""
    return min(max(0, math.floor((position + 0.5) * original / resized)), original - 1)
