"""How many of its 16 bits a camera uses: found on the normal images of a bank, and applied to every image by one fixed scale.

Cameras write 10, 12 or 14 bits into files of 16 bits. Taken for 16 bits, such an image is nearly black. Nothing in the file
says how many bits there are, so the largest value of all normal images decides, and only where no doubt is left: see `settle`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.features.decoding import MAX_PIXELS, decode, may_be_deep, naming_file, read_header
from spade_faiss.features.memory import MemoryGate
from spade_faiss.features.pages import split_page
from spade_faiss.features.pixels import Decoded, colors_of

CANDIDATES = (10, 12, 14, 16)
_SAY_IT = "say how many bits the camera gives: --bit-depth 10, 12, 14 or 16 (8 if the values are those of 8 bits)"


def find_bit_depth(paths: Sequence[Path], memory: int) -> int | None:
    """Find how many bits the images use of 16, by a look over the pixels of those that have 16.

    Args:
        paths: the normal images. Those that cannot be read are left out.
        memory: the bytes that decoding may take.

    Returns:
        None if no image has 16 bits, or all of them say in their files how many they use.

    Raises:
        InputError: if it cannot be told, see `settle`.
    """
    gate = MemoryGate(memory)
    with ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="depth") as pool:
        found = list(pool.map(lambda path: _largest_value(path, gate), paths))
    return settle([value for value in found if value is not None])


def settle(largest: Sequence[int]) -> int | None:
    """The depth that follows from the largest value of each image; None without images.

    It is the smallest of 10, 12, 14 and 16 bits that holds all values, if they reach its upper half: values up to 4095 are of
    12 bits. It is not guessed
    - between two depths: values up to 1500 may be dark ones of 12 bits or of 14. Above 16383, they can only be of 16;
    - from black pictures: below 512, there is too little to tell;
    - from a mixture: half of the images stay below a quarter of the range, so one of another camera may have decided.

    Raises:
        InputError: if it cannot be told; it says so, and what to give.
    """
    if not largest:
        return None
    top = max(largest)
    depth = next(bits for bits in CANDIDATES if top < 1 << bits)
    has = f"{len(largest)} normal images have 16 bits a channel, and their values reach {top} of 65535"
    if top < 512 or (depth < 16 and top < 1 << (depth - 1)):
        raise InputError(f"{has}: that may be dark images of more bits than {top.bit_length()}; {_SAY_IT}")
    if (middle := median(largest)) < 1 << (depth - 2):
        raise InputError(
            f"{has}, but half of them stay below {int(middle) + 1}: images of two cameras may be mixed; "
            f"keep those of one, or {_SAY_IT}"
        )
    return depth


def largest_color(decoded: Decoded) -> int | None:
    """The largest value of the colors, where the image has 16 bits of which it may use fewer; else None."""
    if decoded.depth is not None or not isinstance(decoded.pixels, np.ndarray):
        return None
    return int(colors_of(decoded.pixels).max())


def _largest_value(path: Path, gate: MemoryGate) -> int | None:
    file, page = split_page(path)
    try:
        with naming_file(path):
            with file.open("rb") as stream:
                if not may_be_deep(stream):
                    return None
                header = read_header(stream, page)
            if not header.is_deep:
                return None
            with gate.hold(header.decode_bytes):
                return largest_color(decode(file.read_bytes(), MAX_PIXELS, page))
    except InputError:
        return None  # it will be skipped, with its reason, when its features are computed
