"""Images from memory: NumPy arrays and Pillow images stand where files do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from spade_faiss.core.errors import InputError
from spade_faiss.features.datasets import ImageRecord, Images
from spade_faiss.features.pixels import Decoded, decoded_of

# An image that is in memory: (H, W, 3) RGB or (H, W) gray, uint8 or uint16; or one of Pillow's.
Pixels = npt.NDArray[Any] | Image.Image

_EXPECTED = "expected (H, W, 3) RGB or (H, W) gray of dtype uint8 or uint16, or a Pillow image"


@dataclass(frozen=True, slots=True, eq=False)
class Frame(ImageRecord):
    """An image from memory. It gives the pixels that a file without loss would give."""

    pixels: Pixels = field(default_factory=lambda: np.zeros((1, 1), np.uint8))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        if isinstance(self.pixels, np.ndarray):
            return self.pixels.shape[1], self.pixels.shape[0]
        width, height = self.pixels.size
        return (height, width) if self.pixels.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)

    @property
    def decode_bytes(self) -> int:
        """About how many bytes of memory `decode` and the conversion to RGB take."""
        return 16 * self.size[0] * self.size[1]

    def decode(self, max_pixels: int) -> Decoded:
        """The upright pixels; those of the caller are left as they are.

        Raises:
            InputError: for more than `max_pixels` pixels, and values that no image file of 16 bits can hold.
        """
        width, height = self.size
        if width * height > max_pixels:
            raise InputError(f"{width} x {height} pixels are more than the {max_pixels} allowed; scale it down or cut it up")
        if isinstance(self.pixels, np.ndarray):
            values = np.ascontiguousarray(self.pixels)
            return Decoded(values) if values.dtype == np.uint16 else Decoded(Image.fromarray(values))
        return decoded_of(ImageOps.exif_transpose(self.pixels))


def find_frames(images: Images | Pixels | Sequence[Pixels], ids: Sequence[str] | None) -> list[Frame] | None:
    """Make records of images from memory, one or a sequence (or an array of several); None if they are paths.

    Args:
        images: what the caller gave.
        ids: their names; `frame-0`, `frame-1` ... unless given.

    Raises:
        InputError: for arrays of another shape or dtype, paths and frames in one list, ids of paths, or too few or many ids.
    """
    if isinstance(images, str | Path):
        found: list[Any] = []
    elif isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and not _is_stack(images)):
        found = [images]
    else:
        found = list(images)
    is_path = [isinstance(item, str | Path) for item in found]
    if all(is_path):
        if ids is not None:
            raise InputError("ids name images from memory; images from files have their paths as ids: leave ids out")
        return None
    if any(is_path):
        raise InputError("paths and images from memory are mixed in one list; score them in two calls")
    names = [f"frame-{number}" for number in range(len(found))] if ids is None else [ids] if isinstance(ids, str) else list(ids)
    if len(names) != len(found):
        raise InputError(f"{len(names)} ids were given for {len(found)} images; give as many")
    for name, item in zip(names, found, strict=True):
        _check(name, item)
    return [Frame(name, Path(name), pixels=item) for name, item in zip(names, found, strict=True)]


def _is_stack(images: npt.NDArray[Any]) -> bool:
    """Whether an array holds several images: (n, H, W, 3)."""
    return images.ndim == 4


def _check(name: object, item: object) -> None:
    if not isinstance(name, str):
        raise InputError(f"the id {name!r} is a {type(name).__name__}; ids are strings")
    if isinstance(item, TiffImageFile) and max(item.tag_v2.get(258, (1,))) > 8:
        raise InputError(f"image {name!r} is a TIFF of more than 8 bits that Pillow opened, not always right; give its path")
    if isinstance(item, Image.Image):
        if 0 in item.size:
            raise InputError(f"image {name!r} is empty: {item.size[0]} x {item.size[1]} pixels")
        return
    if not isinstance(item, np.ndarray):
        raise InputError(f"image {name!r} is a {type(item).__name__}; {_EXPECTED}")
    if item.dtype not in (np.uint8, np.uint16):
        hint = ": scale it to 0 to 255 and convert it with .astype(np.uint8)" if item.dtype.kind in "fib" else ""
        raise InputError(f"image {name!r} is of dtype {item.dtype}; {_EXPECTED}{hint}")
    if item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] != 3) or 0 in item.shape:
        raise InputError(f"image {name!r} has shape {item.shape}; {_EXPECTED}")
