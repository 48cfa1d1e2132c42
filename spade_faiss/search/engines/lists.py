"""Searches of inverted lists: by the compiled kernel, and the same in NumPy where it does not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spade_faiss.core.errors import BankError
from spade_faiss.core.types import Bools, FloatArray, IntArray
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist, product_knn, sort_by_distance
from spade_faiss.search.inverted_lists import CODES, HALF, ID, SIZES, STEP, padded, quantize, starts_of
from spade_faiss.search.native.extension import import_native, usable_simd_level
from spade_faiss.search.native.gallery import map_gallery
from spade_faiss.search.protocol import Pack

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Gallery

# So many lists are searched in any case; others only if their centroids are not much further than the nearest: at so many times
# its squared distance, at most. The kernel has the same numbers.
_LEAST_PROBES, _FURTHER = 4, np.float32(1.5)
_OFFSET = 128


class ListEngine(Protocol):
    """Searches queries in the lists of the centroids that are nearest to them."""

    def __call__(
        self, xq: FloatArray, projected: FloatArray, allowed: Sequence[Bools], nprobe: int, rerank: int, kappa: int
    ) -> tuple[FloatArray, IntArray]:
        """Search.

        Args:
            xq: (n, C) float32.
            projected: (n, d) float32, what they are projected to.
            allowed: of each group of lists, which of its images may be found.
            nprobe: number of lists that a query searches.
            rerank: number of rows with the least estimates, whose distances are evaluated.
            kappa: number of vectors to find.

        Returns:
            Squared distances (n, kappa), ascending, and ids `row * HW + location`; infinity and -1 where fewer are found.
        """
        ...


def open_lists(blocks: Blocks, centroids: FloatArray, packs: Sequence[Pack]) -> ListEngine:
    """Open the fastest search of lists that this machine runs."""
    level = usable_simd_level(blocks.level.channels)
    gallery = None if level is None else map_gallery(blocks)
    if level is None or gallery is None:
        return NumpyLists(blocks, centroids, packs)
    return NativeLists(level, gallery, centroids, packs)


class NativeLists:
    """See `ListEngine`; by the kernel, which reads codes and vectors where they are stored.

    Args:
        simd_level: one of `SIMD_LEVELS` that this machine runs.
        gallery: the vectors of the level.
        centroids: (lists, d) float32.
        packs: the groups of lists.
    """

    def __init__(self, simd_level: str, gallery: Gallery, centroids: FloatArray, packs: Sequence[Pack]) -> None:
        groups = [(*(pack.arrays[name] for name in (CODES, STEP, HALF, ID, SIZES)), pack.rows) for pack in packs]
        self._lists = import_native().Lists(simd_level, gallery, np.ascontiguousarray(centroids), groups)

    def __call__(
        self, xq: FloatArray, projected: FloatArray, allowed: Sequence[Bools], nprobe: int, rerank: int, kappa: int
    ) -> tuple[FloatArray, IntArray]:
        """See `ListEngine`."""
        try:
            D, ids, _ = self._lists.search(
                np.ascontiguousarray(xq), np.ascontiguousarray(projected), list(allowed), nprobe, rerank, kappa
            )
        except ValueError as error:
            raise _damaged() from error
        return D, ids


class NumpyLists:
    """See `ListEngine`; what it estimates is, but for rounding, what the kernel does.

    Args:
        blocks: the blocks of the level.
        centroids: (lists, d) float32.
        packs: the groups of lists.
    """

    def __init__(self, blocks: Blocks, centroids: FloatArray, packs: Sequence[Pack]) -> None:
        self._blocks = blocks
        self._centroids = np.ascontiguousarray(centroids)
        self._packs = packs
        self._starts = [starts_of(pack.arrays[SIZES]) for pack in packs]

    def __call__(
        self, xq: FloatArray, projected: FloatArray, allowed: Sequence[Bools], nprobe: int, rerank: int, kappa: int
    ) -> tuple[FloatArray, IntArray]:
        """See `ListEngine`."""
        nprobe = min(nprobe, len(self._centroids))
        D_centroid, probed = product_knn(np.ascontiguousarray(projected), self._centroids, nprobe)
        if nprobe < len(self._centroids):
            further = D_centroid > _FURTHER * D_centroid[:, :1]
            further[:, :_LEAST_PROBES] = False
            probed[further] = -1
        probed[~np.isfinite(projected).all(axis=1)] = -1
        estimate, ids = np.full((len(xq), rerank), np.inf, np.float32), np.full((len(xq), rerank), -1, np.int64)
        for number in np.unique(probed[probed >= 0]).tolist():
            (which,) = np.nonzero((probed == number).any(axis=1))
            more, more_ids = self._estimates(projected[which], number, allowed)
            both = np.concatenate([estimate[which], more], axis=1), np.concatenate([ids[which], more_ids], axis=1)
            best, best_ids = sort_by_distance(*both)
            estimate[which], ids[which] = best[:, :rerank], best_ids[:, :rerank]
        ids[np.isinf(estimate)] = -1
        D, ids = sort_by_distance(self._sq_dist(xq, ids), ids)
        return D[:, :kappa], ids[:, :kappa]

    def _estimates(self, projected: FloatArray, number: int, allowed: Sequence[Bools]) -> tuple[FloatArray, IntArray]:
        """(n, rows), the estimates of the vectors of a list that may be found, and their ids."""
        residual = projected - self._centroids[number]
        integers, step = quantize(residual)
        sq_norm, width = np.square(residual).sum(axis=1), padded(projected.shape[1])
        found, found_ids = [], []
        for pack, starts, may in zip(self._packs, self._starts, allowed, strict=True):
            size = int(pack.arrays[SIZES][number])
            rows = slice(int(starts[number]), int(starts[number]) + size)
            code = pack.arrays[CODES][rows.start * width : rows.stop * width].reshape(size, width)[:, : projected.shape[1]]
            dot = integers.astype(np.int32) @ (code.astype(np.int32) - _OFFSET).T
            estimate = sq_norm[:, None] + 2 * (pack.arrays[HALF][rows] - dot * pack.arrays[STEP][rows] * step[:, None])
            image, location = np.divmod(pack.arrays[ID][rows].astype(np.int64), self._blocks.level.locations)
            if size and image.max() >= len(may):
                raise _damaged()
            found.append(estimate[:, may[image]])
            found_ids.append((pack.rows[image] * self._blocks.level.locations + location)[may[image]])
        ids = np.concatenate(found_ids)
        return np.concatenate(found, axis=1).astype(np.float32), np.broadcast_to(ids, (len(projected), len(ids)))

    def _sq_dist(self, xq: FloatArray, ids: IntArray) -> FloatArray:
        """The squared distances of candidates, (n, k); infinite where there is none."""
        sq_dist = np.full(ids.shape, np.inf, np.float32)
        row, location = np.divmod(ids, self._blocks.level.locations)
        for one in np.unique(row[ids >= 0]).tolist():
            query, place = np.nonzero((row == one) & (ids >= 0))
            near = np.ascontiguousarray(self._blocks.take(one, location[query, place]))
            at = np.arange(len(query))[:, None]
            sq_dist[query, place] = direct_sq_dist(np.ascontiguousarray(xq[query]), near, at)[:, 0]
            self._blocks.release(one)
        return sq_dist


def _damaged() -> BankError:
    return BankError("an index names vectors that the bank does not hold; rebuild it with: spade-faiss index --rebuild")
