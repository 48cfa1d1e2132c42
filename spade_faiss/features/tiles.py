"""Computes how an image is cut into overlapping tiles: where they lie, and which of them is the most central at a pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.once import once

# The columns that say where a tile lies: its top left corner in the image that it was cut out of, and the size of that.
TILE_COLUMNS = ("left", "top", "width", "height")
# Those of an image: as many as are decoded, see `decoding.MAX_PIXELS`, and no side is as long.
_MOST_PIXELS = 100_000_000
_MOST_SIDE = 1 << 20
Places = npt.NDArray[np.int32]


class Tile(NamedTuple):
    """A tile of an image.

    Attributes:
        left, top: its top left corner, in pixels of the image; negative where the image is smaller than a tile.
        rows, columns: the pixels of the image at which it is the most central of all tiles.
    """

    left: int
    top: int
    rows: slice
    columns: slice


@dataclass(frozen=True)
class TileGrid:
    """The tiles of an image, row by row.

    As few tiles as share `overlap` pixels with their neighbors are spread evenly: the first and the last are flush with the
    borders. An image that is smaller than a tile lies in the middle of it, as in a letterbox; the margins repeat its border.

    Args:
        width, height: of the image, in pixels.
        tile: the side of a tile.
        overlap: the pixels that neighbors share at least.
    """

    width: int
    height: int
    tile: int
    overlap: int

    @staticmethod
    def of(size: tuple[int, int], preprocess: Preprocess) -> TileGrid:
        """The grid of an image of `size` (width, height), as it is after it was resized."""
        assert preprocess.tile is not None
        assert preprocess.overlap is not None
        return TileGrid(*size, preprocess.tile, preprocess.overlap)

    @once
    def lefts(self) -> tuple[int, ...]:
        """Where the columns of tiles begin."""
        return _starts(self.width, self.tile, self.overlap)

    @once
    def tops(self) -> tuple[int, ...]:
        """Where the rows of tiles begin."""
        return _starts(self.height, self.tile, self.overlap)

    def __len__(self) -> int:
        return len(self.lefts) * len(self.tops)

    def __iter__(self) -> Iterator[Tile]:
        columns = list(zip(self.lefts, _shares(self.lefts, self.width, self.tile), strict=True))
        for top, rows in zip(self.tops, _shares(self.tops, self.height, self.tile), strict=True):
            for left, share in columns:
                yield Tile(left, top, rows, share)

    @property
    def places(self) -> Places:
        """(n, 4) the places of the tiles, see `TILE_COLUMNS`."""
        return np.array([(tile.left, tile.top, self.width, self.height) for tile in self], np.int32).reshape(-1, 4)


def grid_of(places: Places, preprocess: Preprocess) -> TileGrid:
    """The grid of the image that some tiles were cut out of.

    Raises:
        InputError: if they are of images of several sizes.
    """
    sizes = np.unique(places[:, 2:], axis=0)
    if len(sizes) != 1:
        raise InputError(f"the tiles of one image say that it has sizes {sizes.tolist()}; an image has one (width, height)")
    return TileGrid.of((int(sizes[0, 0]), int(sizes[0, 1])), preprocess)


def check_places(places: Places, preprocess: Preprocess | None) -> None:
    """Raise InputError unless (n, 4) places are of tiles that images are cut into."""
    sizes, number = np.unique(places[:, 2:], axis=0, return_inverse=True)
    order = np.argsort(number.ravel(), kind="stable")
    starts = np.searchsorted(number.ravel()[order], np.arange(1, len(sizes)))
    for (width, height), rows in zip(sizes.tolist(), np.split(order, starts) if len(sizes) else (), strict=True):
        if preprocess is None or preprocess.tile is None:
            raise InputError(f"tiles of an image of {width} x {height} pixels are given, and the bank has whole images")
        if not (0 < width <= _MOST_SIDE and 0 < height <= _MOST_SIDE and width * height <= _MOST_PIXELS):
            raise InputError(f"tiles are said to be of an image of {width} x {height} pixels, which none can have")
        grid, corners = TileGrid.of((width, height), preprocess), places[rows, :2]
        known = np.isin(corners[:, 0], grid.lefts) & np.isin(corners[:, 1], grid.tops)
        if not known.all():
            raise InputError(
                f"an image of {width} x {height} pixels has no tile at {tuple(corners[~known][0].tolist())} (left, top)"
            )


def largest_image(places: Places) -> int:
    """The most pixels of an image that tiles are of; 0 without tiles."""
    return int((places[:, 2].astype(np.int64) * places[:, 3]).max(initial=0))


def tile_id(picture: str, place: Sequence[int]) -> str:
    """The id of a tile: that of its picture, and its top left corner."""
    return f"{picture}@{place[0]},{place[1]}"


def cut_out(picture: npt.NDArray[np.uint8], left: int, top: int, tile: int) -> npt.NDArray[np.uint8]:
    """(tile, tile, 3): a tile of a picture (H, W, 3); beyond the border, the border is repeated."""
    rows, columns = (np.arange(start, start + tile) for start in (top, left))
    found: npt.NDArray[np.uint8] = picture[rows.clip(0, len(picture) - 1)[:, None], columns.clip(0, picture.shape[1] - 1)]
    return found


def _starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    if length <= tile:
        return (-((tile - length) // 2),)
    steps = -(-(length - tile) // (tile - overlap))
    return tuple(step * (length - tile) // steps for step in range(steps + 1))


def _shares(starts: tuple[int, ...], length: int, tile: int) -> list[slice]:
    """Along one axis, the pixels whose centers are nearest to the center of each tile; ties are of the first."""
    # Pixel x is no farther from the first of two centers if (x + 0.5) <= (first + second + tile) / 2.
    ends = [(first + second + tile - 1) // 2 + 1 for first, second in pairwise(starts)]
    return [slice(start, end) for start, end in zip([0, *ends], [*ends, length], strict=True)]
