"""How the kernel encodes the vectors of a level: around which center, shortened in which basis, by which steps.

A shorter vector is cheaper to filter, but the filter then rules out fewer rows, and more distances are computed directly. Any
center, any orthonormal basis and any steps give the same results; these are chosen on a sample of the bank's own images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spade_faiss.core.directions import OVERSAMPLED, principal_directions
from spade_faiss.core.types import FloatArray
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.native.extension import import_native, refine_cost

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Packing

# Together with the length of what the basis leaves over, these are multiples of what the SIMD levels pad vectors to.
COMPONENTS = (15, 31, 63)
_SEED = 1234
_TRAIN_VECTORS = 2048
_TRIAL_QUERIES = 256
# The center leaves out the smallest sixteenth of each channel's values, and the largest.
_TRIMMED = 16
# Queries with numbers up to this many times those of nearly all sampled vectors have digits.
_LONGEST, _NEARLY_ALL = 2, 0.99
# A multiply-add of float32 numbers takes as long as four of bytes. Shortening needs one for each channel and component.
_FLOAT_COST = 4


def choose_center(blocks: Blocks) -> FloatArray:
    """(C,) float32, the trimmed mean of a level's vectors: a plain mean would follow a few outliers away from all others."""
    sample = np.sort(blocks.typical(_TRAIN_VECTORS), axis=0)
    cut = len(sample) // _TRIMMED
    center: FloatArray = sample[cut : len(sample) - cut].mean(axis=0, dtype=np.float64).astype(np.float32)
    return center


def choose_basis(blocks: Blocks, simd_level: str, center: FloatArray) -> FloatArray | None:
    """(components, C) float32 orthonormal rows, or None where filtering whole vectors costs least.

    Images of the bank search each other with each number of components that may pay. The cheapest one is taken, by the work of
    the filter and of the direct distances that it leaves to compute. It depends on the bank and the SIMD level alone.
    """
    native = import_native()
    channels, padded_length = blocks.level.channels, native.padded_length
    worth = [count for count in COMPONENTS if 2 * padded_length(simd_level, count + 1) <= padded_length(simd_level, channels)]
    if not worth or len(blocks) < 3:
        return None
    rows = [int(row) for row in np.linspace(0, len(blocks) - 1, 3)]
    sample = blocks.typical(_TRAIN_VECTORS)
    sample -= center
    largest = np.abs(sample).max()
    if not 0 < largest < np.inf:
        return None
    sample /= largest  # squares of large features exceed float32
    directions = principal_directions(sample, worth[-1])
    bases = [None, *(_rotated(directions[:count]) for count in worth)]
    vectors = [np.ascontiguousarray(blocks.read(row)) for row in rows]
    queries = vectors[0][:: -(-len(vectors[0]) // _TRIAL_QUERIES)].copy()
    packings = [native.Packing(simd_level, center, basis, longest_query(blocks, center, basis)) for basis in bases]
    work = [_work(simd_level, packing, queries, vectors[1:], basis) for packing, basis in zip(packings, bases, strict=True)]
    return bases[int(np.argmin(work))]


def longest_query(blocks: Blocks, center: FloatArray, basis: FloatArray | None) -> float:
    """The largest number that a query may have to be filtered by digits, see src/packs.hpp; 0 for none.

    The larger it is, the coarser are the steps of other queries; queries beyond it are filtered by looser bounds. Vectors that
    are shortened have many channels: what digits save there is less than what coarser steps cost.
    """
    if basis is not None:
        return 0.0
    sample = blocks.typical(_TRAIN_VECTORS)
    sample -= center
    longest = _LONGEST * float(np.quantile(np.abs(sample).max(axis=1), _NEARLY_ALL))
    return longest if longest <= np.finfo(np.float32).max else 0.0


def choosing_bytes(blocks: Blocks) -> int:
    """An upper bound of the bytes that choosing a center and a basis takes."""
    channels = blocks.level.channels
    iterating = 6 * channels * (COMPONENTS[-1] + OVERSAMPLED) * np.dtype(np.float64).itemsize
    return 4 * _TRAIN_VECTORS * channels * np.dtype(np.float32).itemsize + iterating + 4 * blocks.block_bytes


def _rotated(directions: FloatArray) -> FloatArray:
    """Other directions of the same span, of about equal strength, so that codes with one step fit all of them."""
    count = len(directions)
    rotation, _ = np.linalg.qr(np.random.default_rng(_SEED).standard_normal((count, count)))
    # The second decomposition makes them orthonormal to the last digit of float32.
    rotated, _ = np.linalg.qr((rotation @ directions.astype(np.float64)).T)
    return np.ascontiguousarray(rotated.T, np.float32)


def _work(
    simd_level: str, packing: Packing, queries: FloatArray, galleries: list[FloatArray], basis: FloatArray | None
) -> float:
    """What the search of a query in a block costs, in multiply-adds of the filter."""
    native = import_native()
    pack = native.QueryPack(packing, queries)
    bound = np.full(len(queries), np.inf, np.float32)
    evaluated = 0
    for gallery in galleries:
        D, _, found, _ = native.search(pack, queries, native.RowPack(packing, gallery), gallery, bound, 1)
        np.minimum(bound, D[:, 0], out=bound)
        evaluated += found
    channels, length = queries.shape[1], queries.shape[1] if basis is None else len(basis) + 1
    rows = sum(len(gallery) for gallery in galleries)
    filtering = rows * native.padded_length(simd_level, length, digits=basis is None)
    refining = refine_cost(simd_level) * evaluated / len(queries) * channels
    shortening = 0 if basis is None else _FLOAT_COST * len(galleries) * len(basis) * channels
    return float(filtering + refining + shortening) / len(galleries)
