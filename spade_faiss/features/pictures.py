"""Puts images into their places: the picture that the backbone sees, its normalized input, and the mask that lies on it.

No function here touches global state, so that all of them may run in many threads at once.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.types import FloatArray
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import MAX_PIXELS, decode, naming_file, read_header
from spade_faiss.features.frames import Frame
from spade_faiss.features.masks import find_defective
from spade_faiss.features.memory import tiled_bytes
from spade_faiss.features.pages import part_digest, split_page
from spade_faiss.features.pixels import FULL_DEPTH, to_rgb
from spade_faiss.features.placement import Placement, place
from spade_faiss.features.roi_files import fill_outside
from spade_faiss.features.video_frames import frame_of
from spade_faiss.features.views import View, make_views

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """A decoded image.

    Args:
        picture: (H, W, 3), the image as the backbone sees it: outside of a region of interest, in one color; whole, if it is
            scored in tiles.
        placement: how the image lies in the picture.
        sha256: the hex digest of the file, or of the page, see `hash_image`; empty for a frame from memory.
    """

    picture: Picture
    placement: Placement
    sha256: str


def load_image(record: ImageRecord, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Read a record's file once: hash it, decode it as `read_image` does, and put it into its place as `to_picture` does.

    What lies outside of a region of interest is filled before anything is resized.

    Raises:
        InputError: as `read_image`, `place` and `fill_outside`; it names the path and the reason.
    """
    return load_views(record, preprocess, None, max_pixels=max_pixels)[0]


def load_views(
    record: ImageRecord, preprocess: Preprocess, augmentation: Augmentation | None, *, max_pixels: int = MAX_PIXELS
) -> tuple[LoadedImage, list[View]]:
    """Do what `load_image` does, and make the views of the picture, see `make_views`; none without an augmentation."""
    with naming_file(record.path):
        if isinstance(record, Frame):
            decoded, digest = record.decode(max_pixels), ""
        elif (frame := frame_of(record)) is not None:
            decoded, digest = frame.decode(max_pixels), frame.sha256
        else:
            file, page = split_page(record.path)
            data = file.read_bytes()
            decoded = decode(data, max_pixels, page, cut=preprocess.bit_depth == FULL_DEPTH)
            digest = part_digest(hashlib.sha256(data).hexdigest(), record.path)
        image = to_rgb(decoded, preprocess.bit_depth)
        placement = place(*image.size, preprocess)
        loaded = LoadedImage(to_picture(fill_outside(image, placement, preprocess), placement), placement, digest)
        if augmentation is None:
            return loaded, []
        whole = np.asarray(image.resize(placement.resized, Image.Resampling.LANCZOS))
        return loaded, make_views(whole, placement, augmentation)


def load_bytes(
    record: ImageRecord, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS, augmentation: Augmentation | None = None
) -> int:
    """About how many bytes of memory `load_image` takes while it runs, or `load_views` with an augmentation; with what scoring
    takes later, if it is in tiles.

    Raises:
        InputError: as `load_image`, for what is wrong with the header of the file.
    """
    with naming_file(record.path):
        if isinstance(record, Frame):
            size, count = record.size, record.decode_bytes
        elif (frame := frame_of(record)) is not None:
            size, count = frame.video.size, frame.decode_bytes
        else:
            file, page = split_page(record.path)
            with file.open("rb") as stream:
                cut = preprocess.bit_depth == FULL_DEPTH
                header = read_header(stream, page, max_pixels=max_pixels, cut=cut)
                size, count = header.size, header.decode_bytes + stream.seek(0, os.SEEK_END)
        placement = place(*size, preprocess)
        if preprocess.roi is not None or preprocess.own_rois:
            count += 4 * size[0] * size[1]  # the filled picture, and its mask
        # Resizing goes over the width first; four bytes a pixel.
        count += 4 * placement.resized[0] * (size[1] + 2 * placement.resized[1])
        if augmentation is not None:  # the resized image, the views, and the coordinates of one
            count += 3 * math.prod(placement.resized) + (4 * augmentation.views + 64) * math.prod(placement.size)
        if preprocess.tile is not None:
            count += tiled_bytes(math.prod(placement.size))
        return count


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

    `find_defective` says which pixels are. Margins never are.

    Raises:
        InputError: as `read_image`, for a mask whose size is not the image's, and for one whose color and alpha disagree; it
            names the path and the reason.
    """
    path = Path(path)
    with naming_file(path):
        file, page = split_page(path)
        decoded = decode(file.read_bytes(), max(MAX_PIXELS, math.prod(placement.original)), page)
        if decoded.size != placement.original:
            (width, height), (own_width, own_height) = placement.original, decoded.size
            raise InputError(
                f"the mask is {own_width} x {own_height} pixels, its image {width} x {height}; they must be of one size"
            )
        small = _resize(Image.fromarray(find_defective(decoded).astype(np.uint8)), placement, Image.Resampling.NEAREST)
        return np.pad(small > 0, placement.padding)


def _resize(image: Image.Image, placement: Placement, resampling: Image.Resampling) -> npt.NDArray[Any]:
    return np.asarray(image.resize(placement.resized, resampling).crop(placement.visible))
