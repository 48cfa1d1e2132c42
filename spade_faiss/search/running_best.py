"""What was found in each block of each gallery, and the nearest of it."""

from __future__ import annotations

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.protocol import Hits


class Found:
    """The candidates of each test image, block of its gallery and query: what workers fill in, each its own places.

    Args:
        neighbors: (n, K) bank rows.
        queries: locations of a test image.
        kappa: candidates from each block.

    Attributes:
        rows: (n, K), `neighbors` ascending, so that the smaller row wins a tie. Columns count in this order.
        sq_dist: (n, K, queries, kappa), infinite where there is no candidate.
        location: (n, K, queries, kappa), -1 where there is none.
    """

    def __init__(self, neighbors: IntArray, queries: int, kappa: int) -> None:
        self.rows = np.sort(neighbors, axis=1)
        shape = (*neighbors.shape, queries, kappa)
        self.sq_dist = np.full(shape, np.inf, np.float32)
        self.location = np.full(shape, -1, np.int64)

    @staticmethod
    def nbytes(images: int, k_gallery: int, queries: int, kappa: int) -> int:
        """Bytes of such an object, with what `hits` needs."""
        each = 4 + 8 if kappa == 1 else 4 + 8 + 4 + 8 + 4  # sorting many takes copies and an order
        return images * k_gallery * queries * kappa * each

    def furthest(self, kappa: int) -> FloatArray:
        """(n, queries), the kappa-th smallest distance of each query, over all blocks."""
        if kappa == 1:
            nearest: FloatArray = self.sq_dist.min(axis=(1, 3))
            return nearest
        return np.partition(self._by_query(), kappa - 1, axis=-1)[..., kappa - 1]

    def hits(self, kappa: int) -> Hits:
        """The kappa nearest of each query; equal distances by ascending row."""
        n, _, queries, places = self.sq_dist.shape
        by_query = self._by_query()
        best = by_query.argmin(axis=-1)[..., None] if kappa == 1 else by_query.argsort(axis=-1, kind="stable")[..., :kappa]
        column, place = np.divmod(best[..., 0], places)
        image, query = np.ogrid[:n, :queries]
        sq_dist = np.take_along_axis(by_query, best, axis=-1)
        return Hits(sq_dist, self.rows[image, column], self.location[image, column, query, place])

    def _by_query(self) -> FloatArray:
        n, _, queries, _ = self.sq_dist.shape
        return np.moveaxis(self.sq_dist, 1, 2).reshape(n, queries, -1)


def smallest_of(candidates: list[tuple[FloatArray, IntArray]], k: int) -> tuple[FloatArray, IntArray]:
    """The k smallest distances (nq, k) of several lists (nq, some), with their locations; in no order."""
    if k == 1 and all(D.shape[1] == 1 for D, _ in candidates):
        D, I = candidates[0]
        for other, location in candidates[1:]:
            nearer = (other < D) | ((other == D) & (location < I))
            D, I = np.where(nearer, other, D), np.where(nearer, location, I)
        return D, I
    D = np.concatenate([D for D, _ in candidates], axis=1)
    I = np.concatenate([I for _, I in candidates], axis=1)
    if D.shape[1] == k:
        return D, I
    order = D.argpartition(k - 1, axis=1)[:, :k]
    return np.take_along_axis(D, order, axis=1), np.take_along_axis(I, order, axis=1)
