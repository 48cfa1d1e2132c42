"""Puts images into their places: the picture that the backbone sees, its normalized input, and the mask that lies on it.

No function here touches global state, so that all of them may run in many threads at once.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Preprocess
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file, to_rgb
from spade_faiss.features.placement import Placement, place

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A decoded image.

    Args:
        picture: (H, W, 3), the image as the backbone sees it.
        placement: how the image lies in the picture.
        sha256: the hex digest of the file.
    """

    picture: Picture
    placement: Placement
    sha256: str


def load_image(record: ImageRecord, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Read a record's file once: hash it, decode it as `read_image` does, and put it into its place as `to_picture` does.

    Raises:
        InputError: as `read_image` and `place`; it names the path and the reason.
    """
    with naming_file(record.path):
        data = record.path.read_bytes()
        image = to_rgb(decode(data, max_pixels))
        placement = place(*image.size, preprocess)
        return LoadedImage(to_picture(image, placement), placement, hashlib.sha256(data).hexdigest())


def to_picture(image: Image.Image, placement: Placement) -> Picture:
    """Resize an RGB image into its place: (H, W, 3) uint8, as the backbone sees it; margins repeat its border.

    Raises:
        InputError: for an image of another mode.
    """
    if image.mode != "RGB":
        raise InputError(f"expected an RGB image, got mode {image.mode}; read_image gives RGB")
    return np.pad(_resize(image, placement, Image.Resampling.LANCZOS), (*placement.padding, (0, 0)), mode="edge")


def to_input(picture: Picture, preprocess: Preprocess) -> FloatArray:
    """Normalize a picture (H, W, 3) to the backbone's input: (3, H, W) float32, contiguous, (value / 255 - mean) / std."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    values = picture.transpose(2, 0, 1).astype(np.float32, order="C")
    values *= (1 / (255 * std)).astype(np.float32)
    values -= (mean / std).astype(np.float32)
    return values


def to_mask(path: str | Path, placement: Placement) -> Mask:
    """Read the mask of an image and resize it into the image's own place: (H, W), True where the image is defective.

    A pixel is as bright as its brightest channel, and defective in the upper half of the range (above 127 of 255). If nothing
    reaches that half, the values are labels (0 and 1, class numbers, dark palette colors): all but 0 are defective. Margins
    never are.

    Raises:
        InputError: as `read_image`, and for a mask whose size is not the image's; it names the path and the reason.
    """
    path = Path(path)
    with naming_file(path):
        image = decode(path.read_bytes(), max(MAX_PIXELS, math.prod(placement.original)))
        if image.size != placement.original:
            width, height = placement.original
            raise InputError(
                f"the mask is {image.size[0]} x {image.size[1]} pixels, its image {width} x {height}; they must be of one size"
            )
        # Deep masks do not go through to_rgb: the lower byte that it drops is all there is in a 16-bit file of labels.
        is_deep = image.mode.startswith("I")
        brightness = np.asarray(image) if is_deep else np.asarray(to_rgb(image)).max(axis=2)
        half = 32767 if is_deep else 127
        defective = brightness > (half if brightness.max() > half else 0)
        small = _resize(Image.fromarray(defective.astype(np.uint8)), placement, Image.Resampling.NEAREST)
        return np.pad(small > 0, placement.padding)


def _resize(image: Image.Image, placement: Placement, resampling: Image.Resampling) -> npt.NDArray[Any]:
    return np.asarray(image.resize(placement.resized, resampling).crop(placement.visible))
