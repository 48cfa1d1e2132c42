"""Coresets: a few vectors that stand for all of a level, picked by greedy k-center as PatchCore does, or by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.native.extension import import_native, usable_simd_level

_SEED = 1234
# Shadows are further apart than their vectors by rounding alone; see `k_center`.
_EPSILON = float(np.finfo(np.float32).eps)


def k_center(xb: FloatArray, count: int) -> tuple[IntArray, float]:
    """Pick vectors one by one, each the one that is furthest from all picks before it (Gonzalez 1985; PatchCore's coreset).

    The picks are those of the plain algorithm in float32 on the whole vectors; nothing is projected at random. The first is
    drawn with a fixed seed; of vectors that are equally far, the first one is picked. The kernel passes over what cannot be
    nearer to a pick than to those before it.

    Args:
        xb: (n, d) float32, finite.
        count: the number of picks, 1 to n.

    Returns:
        (count,) int64, the picks in their order, fewer where all that is left equals a pick; and the squared distance that no
        vector is further from the nearest pick than.
    """
    first = int(np.random.default_rng(_SEED).integers(len(xb)))
    if usable_simd_level() is None:
        return _plain_k_center(xb, count, first)
    native = import_native()
    shadows, slack = _shadows(xb, native.SHADOW)
    threads = import_faiss().omp_get_max_threads()
    picks, sq_radius = native.k_center(np.ascontiguousarray(xb, np.float32), count, first, shadows, slack, threads)
    return picks, float(sq_radius)


def is_chosen_by_chance(x: FloatArray, share: float) -> npt.NDArray[np.bool_]:
    """(n,), whether each vector (n, C) float32 is among a random share of all; that depends on its numbers alone."""
    odd = np.random.default_rng(_SEED).integers(0, 2**63, x.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = (np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64) * odd).sum(axis=1, dtype=np.uint64)
    for shift in (33, 29):  # the high bits of a sum of products depend on all of its low ones, and those on few
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * odd[0]
    chosen: npt.NDArray[np.bool_] = (mixed >> np.uint64(32)).astype(np.float64) < share * 2.0**32
    return chosen


def _plain_k_center(xb: FloatArray, count: int, first: int) -> tuple[IntArray, float]:
    picks = [first]
    sq_dist = np.square(xb - xb[first]).sum(axis=1)
    while len(picks) < count and sq_dist.max() > 0:
        picks.append(int(sq_dist.argmax()))
        np.minimum(sq_dist, np.square(xb - xb[picks[-1]]).sum(axis=1), out=sq_dist)
    return np.array(picks, np.int64), float(sq_dist.max())


def _shadows(xb: FloatArray, dims: int) -> tuple[FloatArray, float]:
    """The vectors' first principal components (n, dims), and how much further apart than the vectors rounding may put them."""
    sample = xb[:: max(1, len(xb) // 20_000)].astype(np.float64)
    mean = sample.mean(axis=0)
    _, vectors = np.linalg.eigh((sample - mean).T @ (sample - mean))
    basis = vectors[:, ::-1][:, :dims].astype(np.float32)
    centered = xb - mean.astype(np.float32)
    shadows = np.zeros((len(xb), dims), np.float32)
    shadows[:, : basis.shape[1]] = centered @ basis
    # Each of the sums of d products of both shadows is off by d times the rounding of its largest part, at most.
    largest = np.sqrt(np.einsum("ij,ij->i", centered, centered).max(initial=0))
    return shadows, float(2 * np.sqrt(dims) * xb.shape[1] * _EPSILON * largest)
