"""Reads PNM files (PGM, PPM) of more than 8 bits: of those with color, Pillow keeps 8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL.PpmImagePlugin import PpmImageFile

from spade_faiss.core.errors import InputError

# The binary ones. Of those written as text (P1 to P3), Pillow reads a file of comments in quadratic time.
STARTS = (b"P4", b"P5", b"P6")
_FULL = 65535


def is_deep(image: PpmImageFile) -> bool:
    """Whether values go beyond 255."""
    return _largest(image) > 255


def depth_of(image: PpmImageFile) -> int | None:
    """The bits that values have; None where the header says 65535, which is what all writers of 16 bits say."""
    largest = _largest(image)
    if largest == _FULL:
        return None
    return largest.bit_length() if largest & (largest + 1) == 0 else 16


def decode_deep(data: bytes, image: PpmImageFile) -> tuple[npt.NDArray[np.uint16], int | None]:
    """The values of a file for which `is_deep` holds, (H, W) or (H, W, 3), and their depth.

    Values whose largest is not 1023, 4095 or the like are scaled to 16 bits.

    Raises:
        InputError: for a file that is cut off, or values beyond the largest that its header names.
    """
    offset = image.tile[0][2]
    values: npt.NDArray[np.integer]
    shape = (image.height, image.width, 3) if image.mode == "RGB" else (image.height, image.width)
    count, largest, depth = int(np.prod(shape)), _largest(image), depth_of(image)
    values = np.frombuffer(data, ">u2", min(count, (len(data) - offset) // 2), offset)
    if len(values) < count:
        raise InputError(f"this PNM is truncated: it has {len(values)} of {count} values")
    if values.max() > largest or values.min() < 0:
        raise InputError(f"this PNM has values up to {values.max()}, its header says up to {largest}")
    if depth == 16:
        values = values.astype(np.int64) * _FULL // largest
    return values.astype(np.uint16).reshape(shape), depth


def _largest(image: PpmImageFile) -> int:
    """The largest value that the header names."""
    arguments = image.tile[0][3]
    if image.mode in ("1", "F"):
        return 1
    if isinstance(arguments, tuple):
        return int(arguments[-1])
    return _FULL if arguments == "I;16B" else 255
