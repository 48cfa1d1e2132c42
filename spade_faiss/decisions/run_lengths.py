"""Masks as COCO's run-length encoding, for instance for `pycocotools.mask.decode`.

The run lengths count the pixels that are alternately outside and inside of the mask, column by column, outside first; they are
numbers, or text. Source: `rleEncode` and `rleToString` in
https://github.com/cocodataset/cocoapi/blob/8c9bcc3/common/maskApi.c. A compiled dependency is not simpler than thirty lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.features.pictures import Mask


def encode(
    mask: Mask,
    corner: tuple[int, int] = (0, 0),
    size: tuple[int, ...] | None = None,
    columns: npt.NDArray[np.int64] | None = None,
) -> tuple[int, ...]:
    """Encode a picture that is False outside of a part of it.

    Args:
        mask: (h, w), the columns of the part that differ.
        corner: (y, x) of the part in the picture.
        size: (height, width) of the picture; the part's own by default.
        columns: (w2,), for each column of the part the one of `mask` that it equals; by default each is itself. A part that is
            as large as a photo is never held pixel by pixel.

    Returns:
        The run lengths.
    """
    columns = np.arange(mask.shape[1]) if columns is None else columns
    height, width = (mask.shape[0], len(columns)) if size is None else size
    change = np.diff(np.pad(mask.T, ((0, 0), (1, 1))).view(np.int8), axis=1)
    origin = corner[1] * height + corner[0]
    first, last = (origin + _places(change == sign, columns, height) for sign in (1, -1))
    apart = first[1:] != last[:-1]  # a run may go on at the top of the next column
    first, last = first[np.append(True, apart)[: len(first)]], last[np.append(apart, True)[: len(last)]]
    edges = np.stack([first, last], axis=1).ravel()
    runs = np.diff(edges, prepend=0, append=height * width)
    return tuple(runs.tolist() if runs[-1] or len(runs) == 1 else runs[:-1].tolist())


def _places(edges: Mask, columns: npt.NDArray[np.int64], height: int) -> npt.NDArray[np.int64]:
    """The places `x * height + y` of edges, ascending; column x of the picture has those of line `columns[x]` of `edges`."""
    line, y = np.nonzero(edges)
    starts = np.searchsorted(line, np.arange(len(edges) + 1))
    counts = np.diff(starts)[columns]
    x = np.repeat(np.arange(len(columns)), counts)
    of_column = np.arange(len(x)) - np.repeat(counts.cumsum() - counts, counts)
    places: npt.NDArray[np.int64] = x * height + y[starts[columns][x] + of_column]
    return places


def to_text(counts: Sequence[int]) -> str:
    """Write run lengths as COCO's text: in groups of 5 bits, from the fourth on as the difference from the last but one."""
    text = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            group, rest = rest & 0x1F, rest >> 5
            more = rest != (-1 if group & 0x10 else 0)
            text.append(chr(48 + (group | 0x20 if more else group)))
    return "".join(text)


def from_text(text: str) -> tuple[int, ...]:
    """Read the run lengths from COCO's text.

    Raises:
        InputError: if the text is not an encoded mask.
    """
    counts: list[int] = []
    value = shift = 0
    for char in text:
        group = ord(char) - 48
        if not 0 <= group < 64:
            raise InputError(f"{char!r} is not a character of an encoded mask")
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            value -= (1 << shift) if group & 0x10 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise InputError("the encoded mask ends in the middle of a number")
    return tuple(counts)


def decode(counts: Sequence[int], size: tuple[int, int]) -> Mask:
    """Decode run lengths to the (height, width) mask of a picture of `size`.

    Raises:
        InputError: if the runs do not add up to the picture.
    """
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise InputError(f"runs of {sum(counts)} pixels do not make a mask of {size[0]} x {size[1]}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(size[1], size[0]).T
