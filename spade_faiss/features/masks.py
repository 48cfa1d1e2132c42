"""Decides which pixels of a mask file are defective.

A mask comes in one of two kinds, and they must not be taken for each other:
- A *binary* mask has two values, black and white. Where it was saved as JPEG or resized, pixels between them appear: noise, and
  soft edges. They are cut in the middle.
- A *label map* has a number for each class of defect, and 0 elsewhere. Every class is defective, whatever its number.

The dark pixels, those in the lower half that are not 0, decide which kind it is. The steps between neighbors tell noise and
soft edges from classes: classes lie side by side with nothing between them, so that three neighbors in a row have two values at
most, except where a class is one pixel wide. On a soft edge and in noise, three neighbors have three values.

A label map that was resized or saved as JPEG has soft edges, too. But its dark classes are flat areas of one gray, larger than
any that noise makes; then half of the darkest one is where defects begin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Bools
from spade_faiss.features.pixels import Decoded, to_rgb

Values = npt.NDArray[Any]

# White, in masks of 8 bits, and in those of 10 to 16 that were written as 16.
_TOPS = (255, 1023, 4095, 16383, 65535)
# Of the steps from one value to another, at most this share may lead on to a third value in a map of labels.
_SOFT_SHARE = 0.2
# JPEG noise around black stays below this share of the range, and so do the last traces of a blurred edge.
_NOISE = 0.1
# Where 3 x 3 pixels differ by no more than this share of the range, they are flat.
_FLAT = 0.016
# A class has so many flat pixels, so large a share of the dark ones, and so many times those of grays so far from its own.
_LEAST_PIXELS, _LEAST_SHARE, _PEAK, _APART = 32, 0.02, 3, 9


def find_defective(decoded: Decoded) -> Bools:
    """(H, W), True where a mask is defective, by its colors or by its alpha.

    A mask may be drawn in alpha: then its color says nothing, for it is the same everywhere, or bright everywhere. If color and
    alpha both say something, they have to agree.

    Raises:
        InputError: if they do not.
    """
    brightness, alpha = _channels(decoded)
    by_color = _defective(brightness)
    if alpha is None or alpha.min() == alpha.max():
        return by_color
    by_alpha = _defective(alpha)
    if brightness.min() == brightness.max() or by_color.all() or not by_color.any() or by_alpha.all() or not by_alpha.any():
        # What marks everything, or nothing, says nothing.
        return by_alpha if by_alpha.any() and not by_alpha.all() else by_color
    opaque, clear = alpha == alpha.max(), alpha == alpha.min()
    if (by_color != by_alpha)[opaque | clear].any():
        raise InputError(
            f"its color marks {by_color.sum()} pixels as defective, its alpha {by_alpha.sum()}, and they disagree on "
            f"{(by_color != by_alpha).sum()}; save it without alpha, or draw it in alpha with one color"
        )
    return by_alpha


def _channels(decoded: Decoded) -> tuple[Values, Values | None]:
    """The brightest channel of each pixel, and alpha if there is one."""
    pixels = decoded.pixels
    if isinstance(pixels, np.ndarray):
        if pixels.ndim == 2:
            return pixels, None
        count = pixels.shape[2]
        alpha = pixels[..., count - 1] if count in (2, 4) else None
        return pixels[..., : count - (alpha is not None)].max(axis=2), alpha
    if pixels.mode == "P" and "transparency" not in pixels.info and (labels := _palette_labels(pixels)) is not None:
        return labels, None
    alpha = None
    if pixels.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in pixels.info:
        alpha = np.asarray(pixels.convert("LA" if pixels.mode == "La" else "RGBA"))[..., -1]
    return np.asarray(to_rgb(decoded)).max(axis=2), alpha


def _palette_labels(image: Image.Image) -> Values | None:
    """The numbers of a palette image, where its colors do not say what is the background: then 0 is.

    They say it where black is one of them, and not the only one.
    """
    numbers = np.asarray(image)
    colors = np.asarray(image.convert("RGB")).max(axis=2)
    return numbers if numbers.min() == 0 < numbers.max() and (colors.min() > 0 or colors.max() == 0) else None


def _defective(values: Values) -> Bools:
    """Which pixels of one channel are defective, see the text of this module."""
    least, most = int(values.min()), int(values.max())
    if least == most:
        return values > 0
    top = next(top for top in _TOPS if most <= top)
    half = top // 2
    dark = (values > 0) & (values <= half)
    if not dark.any():
        return values > 0
    if _is_label_map(values, dark):
        # The background is 0. Beside bright classes, it may be the darkest there is: of 1 and 128, it is 1.
        return values > (least if most > half else 0)
    # Where there is no class but dark ones, everything that is not 0 belongs to one.
    return values > (_darkest_class(values, dark, top) // 2 or (half if most > half else 0))


def _is_label_map(values: Values, dark: Bools) -> Any:
    """Whether dark pixels are classes: they have neighbors of their own value, and steps do not lead on to a third value."""
    steps = soft = 0
    alike = np.zeros(values.shape, np.bool_)
    for lines, same in ((values, alike), (values.T, alike.T)):
        differs = lines[:, 1:] != lines[:, :-1]
        steps += differs.sum()
        if lines.shape[1] > 2:
            soft += (differs[:, 1:] & differs[:, :-1] & (lines[:, 2:] != lines[:, :-2])).sum()
        same[:, 1:] |= ~differs
        same[:, :-1] |= ~differs
    return 2 * (alike & dark).sum() >= dark.sum() and soft <= _SOFT_SHARE * steps


def _darkest_class(values: Values, dark: Bools, top: int) -> int:
    """The gray of the darkest class that covers flat areas; 0 if there is none."""
    from scipy import ndimage  # takes longer to import than many images take to read, and only masks need it

    spread = ndimage.maximum_filter(values, 3).astype(np.int64) - ndimage.minimum_filter(values, 3)
    flat = values[spread <= _FLAT * top].astype(np.int64) * 255 // top
    count = np.bincount(flat, minlength=256)
    # A class is a peak of a few grays: around it, there is little that is flat. Of a wide blur, grays are flat alike.
    near = np.convolve(count, np.ones(5, np.int64), mode="same")
    around = np.maximum(np.roll(near, _APART), np.roll(near, -_APART))
    is_peak = (near >= max(_LEAST_PIXELS, _LEAST_SHARE * dark.sum())) & (near >= _PEAK * around)
    found = np.flatnonzero(is_peak[int(_NOISE * 255) + 1 : 128]) + int(_NOISE * 255) + 1
    if not len(found):
        return 0
    first = int(found[0])
    return (first - 2 + int(count[first - 2 : first + 6].argmax())) * top // 255
