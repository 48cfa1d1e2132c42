"""What the kernel packs vectors by: a center, and a basis to shorten them in, for less to multiply and more to look at.

Any center and any orthonormal basis give the same results; these are chosen on a sample of the bank's own images.
"""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import FloatArray
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.native.extension import import_native, look_cost

# With the length of what is left over, whole steps of the units.
COMPONENTS = (15, 31, 63)
_SEED = 1234
_TRAIN_VECTORS = 2048
_TRIAL_QUERIES = 256
_ITERATIONS, _OVERSAMPLED = 4, 8
# A center leaves out this share of the smallest numbers of each channel, and as many of the largest.
_TRIMMED = 16
# A multiply-add of float32 takes as long as so many of bytes; one is made for each channel of a vector and each component.
_FLOAT_COST = 4


def choose_center(blocks: Blocks) -> FloatArray:
    """(C,) float32, about where the vectors of a level are: a trimmed mean, so that outliers do not move it off all others."""
    sample = np.sort(blocks.typical(_TRAIN_VECTORS), axis=0)
    cut = len(sample) // _TRIMMED
    center: FloatArray = sample[cut : len(sample) - cut].mean(axis=0, dtype=np.float64).astype(np.float32)
    return center


def choose_basis(blocks: Blocks, unit: str, center: FloatArray) -> FloatArray | None:
    """(components, C) float32 orthonormal rows, or None where vectors are best filtered as they are.

    Images of the bank search each other, with each number of components that may be worth it; what counts is the filter's work,
    and how many vectors it leaves to be looked at. It depends on the bank and the unit alone.
    """
    channels, padded_length = blocks.level.channels, import_native().padded_length
    worth = [count for count in COMPONENTS if 2 * padded_length(unit, count + 1) <= padded_length(unit, channels)]
    if not worth or len(blocks) < 3:
        return None
    rows = [int(row) for row in np.linspace(0, len(blocks) - 1, 3)]
    sample = blocks.typical(_TRAIN_VECTORS)
    sample -= center
    largest = np.abs(sample).max()
    if not 0 < largest < np.inf:
        return None
    sample /= largest  # squares of large features leave float32
    directions = principal_directions(sample, worth[-1])
    tried = [None, *(_mixed(directions[:count]) for count in worth)]
    vectors = [np.ascontiguousarray(blocks.read(row)) for row in rows]
    queries = vectors[0][:: -(-len(vectors[0]) // _TRIAL_QUERIES)].copy()
    work = [_work(unit, center, queries, vectors[1:], basis) for basis in tried]
    return tried[int(np.argmin(work))]


def choosing_bytes(blocks: Blocks) -> int:
    """The most bytes that choosing takes."""
    channels = blocks.level.channels
    iterating = 6 * channels * (COMPONENTS[-1] + _OVERSAMPLED) * np.dtype(np.float64).itemsize
    return 2 * _TRAIN_VECTORS * channels * np.dtype(np.float32).itemsize + iterating + 4 * blocks.block_bytes


def principal_directions(x: FloatArray, count: int) -> FloatArray:
    """(count, d) orthonormal rows that span most of what varies in vectors (n, d), the strongest first: subspace iteration."""
    rng = np.random.default_rng(_SEED)
    d = x.shape[1]
    span = rng.standard_normal((d, min(d, count + _OVERSAMPLED)))
    for _ in range(_ITERATIONS):
        span, _ = np.linalg.qr(x.T @ (x @ span.astype(np.float32)))
    seen = (x @ span.astype(np.float32)).astype(np.float64)
    _, turn = np.linalg.eigh(seen.T @ seen)
    directions, _ = np.linalg.qr(span @ turn[:, ::-1])
    return np.ascontiguousarray(directions.T[:count], np.float32)


def _mixed(directions: FloatArray) -> FloatArray:
    """The same span by directions of about the same strength: codes of one step fit them all."""
    count = len(directions)
    turn, _ = np.linalg.qr(np.random.default_rng(_SEED).standard_normal((count, count)))
    # Orthonormal to float32's last digit, whatever was rounded on the way.
    mixed, _ = np.linalg.qr((turn @ directions.astype(np.float64)).T)
    return np.ascontiguousarray(mixed.T, np.float32)


def _work(unit: str, center: FloatArray, queries: FloatArray, galleries: list[FloatArray], basis: FloatArray | None) -> float:
    """What a query's search in a block takes, in multiply-adds of the unit."""
    native = import_native()
    packing = native.Packing(unit, center, basis)
    pack = native.QueryPack(packing, queries)
    bound = np.full(len(queries), np.inf, np.float32)
    evaluated = 0
    for gallery in galleries:
        D, _, found, _ = native.search(pack, queries, native.RowPack(packing, gallery), gallery, bound, 1)
        np.minimum(bound, D[:, 0], out=bound)
        evaluated += found
    channels, length = queries.shape[1], queries.shape[1] if basis is None else len(basis) + 1
    rows = sum(len(gallery) for gallery in galleries)
    filtered = rows * native.padded_length(unit, length)
    looked = look_cost(unit) * evaluated / len(queries) * channels
    shortened = 0 if basis is None else _FLOAT_COST * len(galleries) * len(basis) * channels
    return float(filtered + looked + shortened) / len(galleries)
