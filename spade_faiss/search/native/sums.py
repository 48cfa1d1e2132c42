"""The kernel's direct distances by NumPy, the same to the bit, for machines that do not run it."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray

# A distance is a sum in so many lanes, each over every 32nd channel, which are then added up pairwise: see src/distance.hpp.
_LANES = 32
# Channels that are computed with at a time, and about how many bytes each takes meanwhile.
_STEP_VALUES, _VALUE_BYTES = 1 << 17, 64
STEP_BYTES = _STEP_VALUES * _VALUE_BYTES


def kernel_sq_dist(xq: FloatArray, xb: FloatArray, query: IntArray, row: IntArray) -> FloatArray:
    """Evaluate the squared distances of pairs of vectors, as the kernel does on every SIMD level.

    Args:
        xq: (nq, d) float32, the queries.
        xb: (nb, d) float32, the base.
        query: (m,), the query of each pair.
        row: (m,), the base row of each pair.

    Returns:
        (m,) float32.
    """
    found = np.empty(len(query), np.float32)
    step = max(1, _STEP_VALUES // max(_LANES, xq.shape[1]))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        found[part] = _sums_of_squares(xq, xb, query[part], row[part])
    return found


def _sums_of_squares(xq: FloatArray, xb: FloatArray, query: IntArray, row: IntArray) -> FloatArray:
    d = xq.shape[1]
    # Distances beyond float32 are infinite, and those to what is no number are none.
    with np.errstate(over="ignore", invalid="ignore"):
        differences = np.zeros((len(query), -(-d // _LANES) * _LANES), np.float32)
        np.subtract(xq[query], xb[row], out=differences[:, :d])
        lanes = np.zeros((len(query), _LANES), np.float32)
        for start in range(0, d, _LANES):
            lanes = _add_squares(lanes, differences[:, start : start + _LANES])
        eight = (lanes[:, :8] + lanes[:, 16:24]) + (lanes[:, 8:16] + lanes[:, 24:])
        four = eight[:, :4] + eight[:, 4:]
        two = four[:, :2] + four[:, 2:]
        total: FloatArray = two[:, 0] + two[:, 1]
    return total


def _add_squares(sums: FloatArray, x: FloatArray) -> FloatArray:
    """`sums + x * x` of non-negative `sums`, rounded once, as a fused multiply-add is.

    In float64 the square is exact, and the sum is off by what `lost` is. Rounding that sum to float32 would round twice: so it
    is first made odd, which float64's digits beyond those of float32 allow, to remember to which side it was rounded.
    """
    squares = np.square(x, dtype=np.float64)
    wide = squares + sums
    added = wide - squares
    lost = (squares - (wide - added)) + (sums - added)
    bits = wide.view(np.int64)
    bits += (bits & 1 == 0) * ((lost > 0).astype(np.int64) - (lost < 0))
    return wide.astype(np.float32)
