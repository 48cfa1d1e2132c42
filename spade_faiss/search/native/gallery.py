"""The vectors of normal images at one level, for the kernel: it reads them one by one, where the bank stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spade_faiss.features.batch import Level
from spade_faiss.features.codes import Decoder
from spade_faiss.features.resampling import taps
from spade_faiss.search.blocks import Blocks, MapPart
from spade_faiss.search.native.extension import import_native

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Gallery, StoredCodes


def stored_codes(decoder: Decoder | None) -> StoredCodes | None:
    """What the kernel makes numbers of codes with; None where numbers are stored as they are."""
    if decoder is None:
        return None
    codes: StoredCodes = import_native().StoredCodes(decoder.scale, decoder.bits)
    return codes


def can_be_mapped(blocks: Blocks) -> bool:
    """Whether blocks are put together from stored maps, in a way that the kernel knows."""
    return _how_resized(blocks) is not None


def map_gallery(blocks: Blocks, rows: Sequence[int] | None = None) -> Gallery | None:
    """Let the kernel read a level's vectors; that of the i-th image at a location has the id `i * H * W + location`.

    A vector is, to the bit, the one in the block of its row.

    Args:
        blocks: the blocks of the level.
        rows: the bank rows of the images; all of them, if None.

    Returns:
        The gallery; None where the kernel cannot read the blocks, see `can_be_mapped`, or there is no image.
    """
    resized, rows = _how_resized(blocks), range(len(blocks)) if rows is None else rows
    if resized is None or not len(rows):
        return None
    made = [([part.stored(row) for row in rows], stored_codes(part.decoder), *how) for part, how in resized]
    gallery: Gallery = import_native().Gallery(*_grid(blocks.level), made)
    return gallery


def _how_resized(blocks: Blocks) -> list[tuple[MapPart, tuple[object, ...]]] | None:
    """Each of the stored maps, with what `Gallery` takes to resize it; None where it cannot."""
    parts = blocks.parts()
    resized = [] if parts is None else [(part, _how(part, blocks.level)) for part in parts]
    known = [(part, how) for part, how in resized if how is not None]
    return known if known and len(known) == len(resized) else None


def _how(part: MapPart, level: Level) -> tuple[object, ...] | None:
    if part.size is None:
        return (None,)
    height, width = _grid(level)
    rows, columns = taps(part.size[0], height), taps(part.size[1], width)
    return None if rows is None or columns is None else (part.size, rows, columns)


def _grid(level: Level) -> tuple[int, int]:
    """Height and width of the maps as they are stored: of a region of interest, the inspected locations are in one row."""
    return (level.height, level.width) if level.roi is None else (1, level.locations)
