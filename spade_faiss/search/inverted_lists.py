"""Inverted lists of one-byte codes in a group of images: how vectors are encoded, and how the codes are laid out in a file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Arrays, FloatArray, IntArray

CODES, STEP, HALF, ID, SIZES = "codes", "step", "half_sq_norm", "id", "sizes"
# A list is padded to a multiple of so many rows, a code to a multiple of so many bytes: what the kernel multiplies at a time.
ALIGN = 16
# What the kernel may read beyond the last code.
_BEYOND = 64
_LARGEST_CODE, _OFFSET = 127, 128
# The inverse of a smaller step could overflow.
_SMALLEST_VALUE = np.float32(1e-30)


class Codes(NamedTuple):
    """Vectors relative to a centroid as codes.

    Attributes:
        code: (n, padded d) uint8: `step * (code - 128)` is about the vector.
        step: (n,) float32.
        half_sq_norm: (n,) float32, half of the squared length of what the code stands for, and half of what is beside it.
    """

    code: npt.NDArray[np.uint8]
    step: FloatArray
    half_sq_norm: FloatArray


def padded(length: int) -> int:
    """A number of rows or bytes, padded."""
    return -(-length // ALIGN) * ALIGN


def quantize(x: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Vectors (n, d) float32 as integers of up to 127 each, (n, d), and the step (n,) that they count, as by the kernel."""
    largest = np.abs(x).max(axis=1)
    step = np.where(largest < _SMALLEST_VALUE, np.float32(0), largest / np.float32(_LARGEST_CODE)).astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    return np.rint(x * inverse[:, None]).astype(np.int8), step


def encode(residual: FloatArray, beside: FloatArray) -> Codes:
    """Encode vectors relative to their centroids, (n, d) float32; `beside`, (n,), is added to their squared lengths."""
    integers, step = quantize(residual)
    sq_norm = np.einsum("ij,ij->i", integers, integers, dtype=np.float64) * np.square(step.astype(np.float64))
    code = np.full((len(residual), padded(residual.shape[1])), _OFFSET, np.uint8)
    code[:, : residual.shape[1]] = integers.astype(np.int16) + _OFFSET
    return Codes(code, step, ((sq_norm + beside) / 2).astype(np.float32))


def pack_lists(lists: npt.NDArray[np.uint32], codes: Codes, count: int) -> Arrays:
    """Lay out the codes of a group of images list by list; those of a list ascend by `half_sq_norm`, as the kernel needs it.

    Args:
        lists: (images, HW), the list of each vector; `count` for one that is left out.
        codes: of each vector, (images, HW) or (images, HW, d).
        count: the number of lists.

    Returns:
        `codes`, (bytes,) uint8; `step` and `half_sq_norm`, (rows,) float32; `id`, (rows,) uint32, `image * HW + location`; and
        `sizes`, (count,) uint32, the number of vectors of each list. Each list has a multiple of 16 rows; those beyond its
        vectors are infinitely far.
    """
    of_vector, half = lists.ravel(), codes.half_sq_norm.ravel()
    order = np.lexsort((half, of_vector))
    sizes = np.bincount(of_vector, minlength=count + 1)[:count]
    order = order[: sizes.sum()]
    rows = -(-sizes // ALIGN) * ALIGN
    place = np.arange(len(order)) + np.repeat(rows.cumsum() - rows - (sizes.cumsum() - sizes), sizes)
    total, width = int(rows.sum()), codes.code.shape[-1]
    packed = np.zeros(total * width + _BEYOND, np.uint8)
    packed[: total * width].reshape(total, width)[place] = codes.code.reshape(-1, width)[order]
    step, half_sq_norm, ids = np.zeros(total, np.float32), np.full(total, np.inf, np.float32), np.zeros(total, np.uint32)
    step[place], half_sq_norm[place], ids[place] = codes.step.ravel()[order], half[order], order
    return {CODES: packed, STEP: step, HALF: half_sq_norm, ID: ids, SIZES: sizes.astype(np.uint32)}


def check_lists(packed: Arrays, d: int, lists: int, vectors: int) -> None:
    """Raise InputError if arrays are not what `pack_lists` can have made of so many vectors, in so many lists of d values each.

    The kernel would read beyond the end of lists that are shorter than they say. Ids are checked where they are found.
    """
    sizes = packed.get(SIZES, np.empty(0))
    if (sizes.shape, sizes.dtype.name) != ((lists,), "uint32"):
        raise InputError(f"{SIZES} is {sizes.dtype.name} of shape {sizes.shape}, expected uint32 of shape {(lists,)}")
    if (total := int(sizes.sum(dtype=np.int64))) > vectors:
        raise InputError(f"{SIZES} counts {total} of {vectors} vectors")
    rows = int(starts_of(sizes)[-1])
    expected = {
        CODES: (rows * padded(d) + _BEYOND, "uint8"),
        STEP: (rows, "float32"),
        HALF: (rows, "float32"),
        ID: (rows, "uint32"),
    }
    for name in (*expected, *packed):
        if name == SIZES:
            continue
        found = (*packed[name].shape, packed[name].dtype.name) if name in packed else "missing"
        if found != (wanted := expected.get(name, "no such array")):
            raise InputError(f"{name} is {found}, expected {wanted} for lists of {total} vectors")


def starts_of(sizes: npt.NDArray[np.uint32]) -> IntArray:
    """(lists + 1,), the row at which each list of these sizes begins, and where the last one ends."""
    return np.concatenate([[0], (-(-sizes.astype(np.int64) // ALIGN) * ALIGN).cumsum()])
