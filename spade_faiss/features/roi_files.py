"""Regions of interest in pictures: read from a mask file, put into the input as pictures are, and applied to them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.roi import Roi
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file
from spade_faiss.features.pages import split_page
from spade_faiss.features.pixels import Decoded, to_rgb
from spade_faiss.features.placement import Placement, place
from spade_faiss.features.roi import resized

# White and black, and what noise or soft edges leave between them, are told apart in the middle.
_HALF = 128
# Sides of pictures are whole numbers: in pictures of one aspect ratio the same place may be off by so many pixels of the input.
_ROUNDING = 1


def read_roi(path: str | Path) -> Roi:
    """Read a region of interest from a black and white picture, whose white part is inspected.

    Raises:
        InputError: for a picture that cannot be read, is colored, transparent or nowhere white; it names the path and the
            reason.
        NotFoundError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"the mask of a region of interest {path} is a folder; give a file")
    file, page = split_page(path)
    if not file.exists():
        raise NotFoundError(f"there is no mask of a region of interest at {path}")
    with naming_file(path):
        decoded = decode(file.read_bytes(), MAX_PIXELS, page)
        if _has_alpha(decoded):
            raise InputError("a mask of a region of interest is black and white, and it is transparent; save it without alpha")
        pixels = np.asarray(to_rgb(decoded))
        if np.ptp(pixels, axis=2).max() >= _HALF:
            raise InputError("a mask of a region of interest is black and white, and it is colored; save it as grayscale")
        brightness = pixels.max(axis=2)
        if brightness.max() < _HALF:
            raise InputError(
                f"it is nowhere white, its brightest pixel has {brightness.max()} of 255; a mask of a region of interest is "
                "white where pictures are inspected"
            )
        return Roi.of(brightness >= _HALF)


def _has_alpha(decoded: Decoded) -> bool:
    pixels = decoded.pixels
    if isinstance(pixels, np.ndarray):
        return pixels.ndim == 3 and pixels.shape[2] in (2, 4)
    return "transparency" in pixels.info or pixels.getbands()[-1] in ("A", "a")


def place_roi(preprocess: Preprocess) -> Roi | None:
    """The region of the backbone's input that shows the region of interest of pictures; None where all is inspected.

    Raises:
        InputError: if the input shows nothing of it.
    """
    roi = preprocess.roi
    if roi is None:
        return None
    placement = place(roi.width, roi.height, preprocess)
    left, top, right, bottom = placement.visible
    visible = resized(roi, *reversed(placement.resized))[top:bottom, left:right]
    if not visible.any():
        raise InputError(
            f"resize mode {preprocess.resize_mode} shows nothing of the region of interest in an input of "
            f"{' x '.join(map(str, preprocess.input_size))} pixels; use --resize-mode letterbox, or a larger --size"
        )
    return Roi.of(np.pad(visible, placement.padding))


def fill_outside(image: Image.Image, placement: Placement, preprocess: Preprocess) -> Image.Image:
    """Fill what lies outside of the region of interest with the mean color, so that nothing there changes any feature.

    Args:
        image: RGB; it is not changed.
        placement: how it lies in the input.
        preprocess: has the region; without one, the image is returned as it is.

    Raises:
        InputError: if the input shows another part of the image than of the mask of the region.
    """
    if (roi := preprocess.roi) is None:
        return image
    expected = place(roi.width, roi.height, preprocess)
    sides = zip((*placement.resized, *placement.offset), (*expected.resized, *expected.offset), strict=True)
    if any(abs(own - wanted) > _ROUNDING for own, wanted in sides):
        raise InputError(
            f"it is {image.width} x {image.height} pixels, the region of interest of another aspect ratio, "
            f"{roi.width} x {roi.height}: it does not say where this picture is to be inspected; leave the picture out"
        )
    color = tuple(round(255 * mean) for mean in preprocess.mean)
    filled = Image.new("RGB", image.size, color)
    filled.paste(image, mask=_inside(roi, image.height, image.width))
    return filled


@lru_cache(maxsize=2)
def _inside(roi: Roi, height: int, width: int) -> Image.Image:
    """A region at the size of pictures, as Pillow takes it."""
    return Image.fromarray(resized(roi, height, width).astype(np.uint8) * np.uint8(255))
