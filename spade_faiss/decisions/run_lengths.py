"""Masks as COCO's run-length encoding, for instance for `pycocotools.mask.decode`.

The run lengths count the pixels that are alternately outside and inside of the mask, column by column, outside first; they are
numbers, or text. Source: `rleEncode` and `rleToString` in
https://github.com/cocodataset/cocoapi/blob/8c9bcc3/common/maskApi.c. A compiled dependency is not simpler than thirty lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.features.pictures import Mask

# Masks are as large as images, and the places of their pixels would take 24 times as much.
_PIXELS_AT_ONCE = 1 << 20


def encode(mask: Mask, corner: tuple[int, int] = (0, 0), size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Encode a picture that is False outside of `mask`.

    Args:
        mask: (h, w), a part of the picture.
        corner: (y, x) of the part in the picture.
        size: (height, width) of the picture; the mask's own by default.

    Returns:
        The run lengths.
    """
    height, width = mask.shape if size is None else size
    firsts, ends = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    step = max(1, _PIXELS_AT_ONCE // max(1, mask.shape[0]))
    for left in range(0, mask.shape[1], step):
        columns = np.pad(mask[:, left : left + step].T, ((0, 0), (1, 1))).view(np.int8)
        change = np.diff(columns, axis=1)
        for found, sign in ((firsts, 1), (ends, -1)):
            x, y = np.nonzero(change == sign)
            found.append((x + left + corner[1]) * height + y + corner[0])
    first, last = np.concatenate(firsts), np.concatenate(ends)
    apart = first[1:] != last[:-1]  # a run may go on at the top of the next column
    first, last = first[np.append(True, apart)[: len(first)]], last[np.append(apart, True)[: len(last)]]
    edges = np.stack([first, last], axis=1).ravel()
    runs = np.diff(edges, prepend=0, append=height * width)
    return tuple(runs.tolist() if runs[-1] or len(runs) == 1 else runs[:-1].tolist())


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
