"""Score maps as colors: heat maps, overlays on the picture, the outline of the ground truth, and PNG files of them."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import write_bytes
from spade_faiss.core.types import FloatArray
from spade_faiss.report import inferno

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

# The longest side of a picture that the report shows, in pixels; of a larger one it shows squares of pixels as one.
LARGEST_SHOWN = 1024
OUTLINE: Color = (90, 230, 255)
_HALO: Color = (0, 0, 0)
# Maps that say what is usual; more would be read from disk for the same colors.
_USUAL_MAPS = 64
_ALPHA = 0.85  # the opacity of the highest score: the picture stays visible below it
# Those of Okabe and Ito's colors, which all kinds of color vision tell apart, that stand out on photos.
_LEVEL_COLORS: tuple[Color, ...] = ((86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115), (230, 159, 0))


def color_range(
    maxima: FloatArray, map_of: Callable[[int], FloatArray], defective: Sequence[bool] | None = None
) -> tuple[float, float]:
    """The scores at which colors start and end in all pictures of a report, so that they can be compared.

    With labels, colors start at the median maximum of the normal maps and end at the median maximum of the defective ones.
    Without labels, they start at the median of the maps' 95 % quantiles, of 64 maps if there are more, and end at the 99 %
    quantile of all maxima.

    Args:
        maxima: (n,) the highest score of each map.
        map_of: returns one of the maps (H, W), which may be read from a file.
        defective: n labels, or None.

    Returns:
        low and high, low < high.

    Raises:
        InputError: if there are no maps, a score is not finite, or labels and maps differ in number.
    """
    if not len(maxima):
        raise InputError("a color range needs at least one map")
    labels = np.zeros(len(maxima), np.bool_) if defective is None else np.asarray(defective, np.bool_)
    if len(labels) != len(maxima):
        raise InputError(f"{len(labels)} labels for {len(maxima)} maps")
    if defective is None or labels.all():
        evenly = np.linspace(0, len(maxima) - 1, min(len(maxima), _USUAL_MAPS)).round().astype(np.intp)
        low = np.median([np.quantile(map_of(i), 0.95) for i in evenly.tolist()])
    else:
        low = np.median(maxima[~labels])
    high = np.median(maxima[labels]) if labels.any() else np.quantile(maxima, 0.99)
    if not np.isfinite([low, high]).all():
        raise InputError(f"a color range needs finite scores, got {low} to {high}")
    return float(low), float(high if high > low else max(maxima.max(), np.nextafter(low, np.inf)))


def heat_map(scores: FloatArray, low: float, high: float) -> Picture:
    """(H, W, 3) colors for the (H, W) map `scores`: inferno without its ends, from purple at `low` to pale yellow at `high`.

    Inferno's lightness rises evenly, so a score looks as high as it is, also in gray print and to every kind of color vision.
    Of the color maps that were compared on dark and on bright pictures, only its rim and core both stand out on either; turbo
    is as easy to see, but changes hue so often that one defect looks like several.
    """
    return _colors()[np.rint(_strength(scores, low, high) * 255).astype(np.intp)]


def overlay(picture: Picture, scores: FloatArray, low: float, high: float) -> Picture:
    """`picture` (H, W, 3) under the heat map of `scores` (H, W), which is more opaque where the score is higher.

    Pixels that score `low` or less keep their color exactly.

    Raises:
        InputError: if `picture` is no uint8 RGB picture of the map's size.
    """
    _check_size(picture, scores.shape)
    # Opacity rises faster than the score: the color shows how high it is, the opacity only has to make the color visible.
    alpha = _ALPHA * np.sqrt(_strength(scores, low, high))[..., None]
    blend = picture * (1 - alpha) + heat_map(scores, low, high) * alpha
    return np.rint(blend).astype(np.uint8)


def outline(picture: Picture, mask: Mask) -> Picture:
    """A copy of `picture` (H, W, 3) with a line around `mask` (H, W), outside of it, with a dark edge to stand out anywhere.

    Raises:
        InputError: if `picture` is no uint8 RGB picture of the mask's size.
    """
    _check_size(picture, mask.shape)
    inside = np.asarray(mask, dtype=bool)
    line = _grown(inside, _line_width(picture))
    result = picture.copy()
    result[_grown(line, 1) & ~inside] = _HALO
    result[line & ~inside] = OUTLINE
    return result


def shrink_factor(size: Sequence[int]) -> int:
    """How many pixels of a picture of `size` (H, W) the report shows as one, along each axis: 1 up to `LARGEST_SHOWN`."""
    return -(-max(size) // LARGEST_SHOWN)


def shrink(picture: Picture) -> Picture:
    """A picture (H, W, 3) as small as the report shows it; a pixel is the mean of those that it stands for."""
    factor = shrink_factor(picture.shape[:2])
    return picture if factor == 1 else np.asarray(Image.fromarray(picture).reduce(factor))


def shrink_map(scores: FloatArray) -> FloatArray:
    """A map (H, W) as small as `shrink` makes its picture; a pixel is the highest of those that it stands for."""
    factor = shrink_factor(scores.shape)
    return scores if factor == 1 else _reduced(np.maximum, scores, factor)


def shrink_mask(mask: Mask) -> Mask:
    """A mask (H, W) as small as `shrink` makes its picture; a pixel is in it if one of those is that it stands for."""
    factor = shrink_factor(mask.shape)
    return mask if factor == 1 else _reduced(np.logical_or, mask, factor)


def shrink_box(box: Box, size: Sequence[int]) -> Box:
    """(y0, x0, y1, x1) in a picture of `size` (H, W) as the pixels that show it where `shrink` was applied."""
    factor = shrink_factor(size)
    y0, x0, y1, x1 = box
    return y0 // factor, x0 // factor, -(-y1 // factor), -(-x1 // factor)


def cell_box(cell: tuple[int, int], grid: Sequence[int], size: Sequence[int]) -> Box:
    """(y0, x0, y1, x1): the pixels of a `size` (H, W) picture that location `cell` (y, x) of a level's `grid` (h, w) covers."""
    (y, x), (h, w), (height, width) = cell, grid, size
    if not (0 <= y < h and 0 <= x < w):
        raise InputError(f"cell {cell} lies outside of the grid {tuple(grid)}")
    return y * height // h, x * width // w, math.ceil((y + 1) * height / h), math.ceil((x + 1) * width / w)


def color_scale(steps: int) -> list[Color]:
    """The heat map's colors from low to high in `steps` even steps, for a legend."""
    return [(int(r), int(g), int(b)) for r, g, b in _colors()[np.linspace(0, 255, steps).astype(np.intp)]]


def level_colors(levels: Sequence[str]) -> dict[str, Color]:
    """A color for each pyramid level, in the order given; it is the same in every picture and legend."""
    return {level: _LEVEL_COLORS[i % len(_LEVEL_COLORS)] for i, level in enumerate(levels)}


def check_picture(picture: Picture) -> None:
    """Raise InputError unless `picture` is (H, W, 3) uint8."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise InputError(f"a picture must be (height, width, 3) of uint8, got {picture.shape} of {picture.dtype}")


def write_png(path: str | os.PathLike[str], picture: Picture) -> None:
    """Write `picture` (H, W, 3) or (H, W), uint8, as the PNG file `path`, atomically."""
    write_bytes(path, to_png(picture))


def to_png(picture: Picture | Image.Image, compression: int = -1) -> bytes:
    """Return a picture, (H, W, 3) or (H, W) uint8 or one of Pillow's, as a PNG file; `compression` is zlib's, 0 to 9."""
    data = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(data, format="PNG", compress_level=compression)
    return data.getvalue()


_colors = cache(inferno.colors)


def _strength(scores: FloatArray, low: float, high: float) -> npt.NDArray[np.float64]:
    if not low < high:
        raise InputError(f"the color range must rise, got {low} to {high}")
    return np.clip((scores.astype(np.float64) - low) / (high - low), 0, 1)


def _reduced(function: np.ufunc, values: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """Reduce squares of `factor` x `factor` of (H, W) values; those at the end may be smaller."""
    rows = function.reduceat(values, np.arange(0, values.shape[0], factor), axis=0)
    reduced: npt.NDArray[Any] = function.reduceat(rows, np.arange(0, values.shape[1], factor), axis=1)
    return reduced


def _grown(mask: Mask, pixels: int) -> Mask:
    """`mask` (H, W) and all that lies within `pixels` of it, diagonals included."""
    padded = np.pad(mask, pixels)
    steps = range(2 * pixels + 1)
    rows = np.logical_or.reduce([padded[y : y + mask.shape[0]] for y in steps])
    grown: Mask = np.logical_or.reduce([rows[:, x : x + mask.shape[1]] for x in steps])
    return grown


def _line_width(picture: Picture) -> int:
    return max(1, round(int(min(picture.shape[:2])) / 256))


def _check_size(picture: Picture, size: tuple[int, ...]) -> None:
    check_picture(picture)
    if picture.shape[:2] != size:
        raise InputError(f"the picture is {picture.shape[:2]}, its map {size}; both must have the size of the backbone's input")
