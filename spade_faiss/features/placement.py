"""Computes how an image lies in the backbone's input: where it is resized to, cut off or padded. No pixel is touched here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.schema import check_at_least
from spade_faiss.features.decoding import MAX_PIXELS

# What is hidden beyond this share is said.
_NEARLY_ALL = 0.995


@dataclass(frozen=True)
class Placement:
    """How an image lies in the backbone's input, of `size` (width, height) pixels; in what is cut into tiles, if there are any.

    The upright image, of `original` (width, height) pixels, is resized to `resized` (width, height), and its top left corner
    is put at `offset` (x, y): where that is negative, the image is cut off; where it is positive, a margin is left.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    @property
    def visible(self) -> tuple[int, int, int, int]:
        """The part of the resized image that the input shows: (left, top, right, bottom)."""
        (width, height), (x, y) = self.resized, self.offset
        return max(0, -x), max(0, -y), min(width, self.size[0] - x), min(height, self.size[1] - y)

    @property
    def visible_share(self) -> float:
        """The share of the image that the input shows, from 0 to 1."""
        left, top, right, bottom = self.visible
        return (right - left) * (bottom - top) / (self.resized[0] * self.resized[1])

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The rows and columns of the input around that part: ((above, below), (left, right)), for `numpy.pad`."""
        left, top, right, bottom = self.visible
        x, y = max(0, self.offset[0]), max(0, self.offset[1])
        return (y, self.size[1] - y - (bottom - top)), (x, self.size[0] - x - (right - left))

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(H, W): True where the input shows the image, False in the margins of a letterbox."""
        left, top, right, bottom = self.visible
        return np.pad(np.ones((bottom - top, right - left), dtype=np.bool_), self.padding)


@dataclass(frozen=True)
class Visible:
    """How much of the pictures the resize mode shows.

    Args:
        resize_mode: see `Preprocess.input_mode`.
        share: the mean share of a picture's area that is shown, from 0 to 1; None if there was no picture.
    """

    resize_mode: str
    share: float | None

    @staticmethod
    def of(placements: Sequence[Placement], resize_mode: str) -> Visible:
        """The mean over pictures."""
        shares = [placement.visible_share for placement in placements]
        return Visible(resize_mode, sum(shares) / len(shares) if shares else None)

    def notices(self) -> list[str]:
        """What is hidden, as a sentence without its period; empty if that is next to nothing."""
        if self.share is None or self.share >= _NEARLY_ALL:
            return []
        return [
            f"the resize mode {self.resize_mode} shows {100 * self.share:.0f} % of the pictures on average; "
            "a bank made with --resize-mode letterbox shows all"
        ]


def place(width: int, height: int, preprocess: Preprocess) -> Placement:
    """Compute how an image of `width` x `height` pixels lies in the input.

    For a square, `crop` computes what torchvision does for PIL images: `Resize(resize)`, then `CenterCrop`, rounding included
    (https://github.com/pytorch/vision/blob/v0.21.0/torchvision/transforms/functional.py).

    With tiles, the whole image is shown at its own size, or at that which `resize` gives it.

    Raises:
        InputError: for an image that would take more than `MAX_PIXELS` once it is resized: for `crop`, one that is so long and
            thin that covering the input takes as many.
    """
    check_at_least("width", width, 1)
    check_at_least("height", height, 1)
    if preprocess.tile is not None:
        return _place_for_tiles(width, height, preprocess.resize)
    original, (input_height, input_width) = (width, height), preprocess.input_size
    size = input_width, input_height
    if preprocess.resize_mode == "stretch":
        return Placement(original, size, (0, 0), size)
    # Whether the image is longer, for its height, than the input.
    is_longer = width * input_height >= height * input_width
    if preprocess.resize_mode == "letterbox":
        if is_longer:
            resized = input_width, max(1, round(input_width * height / width))
        else:
            resized = max(1, round(input_height * width / height)), input_height
        return Placement(original, resized, ((size[0] - resized[0]) // 2, (size[1] - resized[1]) // 2), size)
    # The side that just covers the input, and how many of its pixels become how many: both are multiplied by the input's
    # shorter side, so that all of it is computed in whole numbers.
    side, covered = (height, input_height) if is_longer else (width, input_width)
    to, by = preprocess.shorter_side * covered, side * min(size)
    resized = to * width // by, to * height // by
    if resized[0] * resized[1] > MAX_PIXELS:
        raise InputError(
            f"{width} x {height} pixels are too thin for resize mode crop: resized to {resized[0]} x {resized[1]}, more than "
            f"{MAX_PIXELS} pixels; use --resize-mode letterbox or stretch, or cut it up"
        )
    return Placement(original, resized, (-round((resized[0] - size[0]) / 2), -round((resized[1] - size[1]) / 2)), size)


def _place_for_tiles(width: int, height: int, resize: int | None) -> Placement:
    """The placement of an image whose tiles are inputs: what it shows is as large as the resized image."""
    shorter = min(width, height)
    resized = (width, height) if resize is None else (resize * width // shorter, resize * height // shorter)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise InputError(
            f"{width} x {height} pixels resized to {resized[0]} x {resized[1]} are more than the {MAX_PIXELS} allowed; lower "
            f"resize, or cut it up"
        )
    return Placement((width, height), resized, (0, 0), resized)
