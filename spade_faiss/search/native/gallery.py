"""The vectors of all normal images at one level, for the kernel: it reads them one by one, where the bank stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spade_faiss.features.resampling import taps
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.native.extension import import_native

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Gallery


def map_gallery(blocks: Blocks) -> Gallery | None:
    """Let the kernel read a level's vectors; the vector of a bank row at a location has the id `row * H * W + location`.

    A vector is, to the bit, the one in the block of its row.

    Returns:
        The gallery; None where blocks are not put together from stored maps, or in a way that the kernel does not know.
    """
    parts = blocks.parts()
    if parts is None or not len(blocks):
        return None
    level = blocks.level
    # Of a region of interest, each map has its inspected locations in one row.
    height, width = (level.height, level.width) if level.roi is None else (1, level.locations)
    made: list[tuple[object, ...]] = []
    for part in parts:
        maps = [part.stored(row) for row in range(len(blocks))]
        if part.size is None:
            made.append((maps, None))
            continue
        rows, columns = taps(part.size[0], height), taps(part.size[1], width)
        if rows is None or columns is None:
            return None
        made.append((maps, part.size, rows, columns))
    gallery: Gallery = import_native().Gallery(height, width, made)
    return gallery
