"""Exact search, block by block: a product finds candidates, direct distances decide, a scan settles what rounding hides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spade_faiss.features import FloatArray
from spade_faiss.gallery import Hits, ReadBlock
from spade_faiss.knn import IntArray, direct_sq_dist, product_knn, scan

# A block is scanned directly where rounding could hide a squared distance that is smaller by more than this share.
TOLERANCE = 1e-4


class _Visit(NamedTuple):
    """A normal image to search, and who asked: test images, and the column of it in each one's gallery."""

    row: int
    images: IntArray
    columns: IntArray


def search(read_block: ReadBlock, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
    """Exact nearest gallery vectors; see `GallerySearch` for the arguments.

    Every needed normal image is searched once for all test images that chose it. The product's distances are off by up to a
    known rounding, so that they settle only which vectors may be among the nearest: those few are evaluated directly. What
    is returned is a true distance, at most `TOLERANCE` above the smallest (squared), and exactly 0 where vectors are equal.
    """
    (n, nq, d), k_gallery = xq.shape, neighbors.shape[1]
    rows = np.sort(neighbors, axis=1)  # ascending, so that the smaller row wins a tie
    visits = list(_visits(rows))
    # For each image, column, query and place: the product's distance, its location, the direct distance.
    shape = (n, k_gallery, nq, kappa)
    D, I, exact = np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
    rounding = np.zeros((n, k_gallery, nq, 1), np.float32)
    for row, images, columns in visits:
        xb = read_block(row)
        k = min(kappa, len(xb))
        found, ids, off_by = product_knn(xq[images].reshape(-1, d), xb, k)
        D[images, columns, :, :k] = found.reshape(-1, nq, k)
        I[images, columns, :, :k] = ids.reshape(-1, nq, k)
        rounding[images, columns] = off_by.reshape(-1, nq, 1)

    candidates = D - rounding <= _smallest(D + rounding, kappa)
    for row, images, columns in visits:
        visit, query, place = np.nonzero(candidates[images, columns])
        if len(visit):
            at = images[visit], columns[visit], query, place
            exact[at] = direct_sq_dist(xq[at[0], query], read_block(row), I[at][:, None])[:, 0]

    largest = _smallest(exact, kappa)
    # A vector that a block did not list is at least as far as its last one that it did, rounding apart.
    doubtful = ((D[..., -1:] - rounding < (1 - TOLERANCE) * largest) & (largest > 0))[..., 0]
    for row, images, columns in visits:
        visit, query = np.nonzero(doubtful[images, columns])
        if len(visit):
            xb = read_block(row)
            k = min(kappa, len(xb))
            of = images[visit], columns[visit], query, slice(k)
            exact[of], I[of] = scan(xq[of[0], query], xb, k)

    return _nearest(exact, I, rows, kappa)


def _visits(rows: IntArray) -> Iterator[_Visit]:
    """Each bank row in `rows` (n, k), ascending."""
    order = np.argsort(rows, axis=None, kind="stable")
    found, starts = np.unique(rows.ravel()[order], return_index=True)
    for row, places in zip(found, np.split(order, starts[1:]), strict=True):
        yield _Visit(int(row), *np.divmod(places, rows.shape[1]))


def _smallest(values: FloatArray, kappa: int) -> FloatArray:
    """(n, 1, nq, 1): the kappa-th smallest of each query, over all columns and places."""
    if kappa == 1:
        nearest: FloatArray = values.min(axis=1, keepdims=True)
        return nearest
    by_query = np.moveaxis(values, 1, 2).reshape(values.shape[0], 1, values.shape[2], -1)
    return np.partition(by_query, kappa - 1, axis=-1)[..., kappa - 1 : kappa]


def _nearest(exact: FloatArray, locations: IntArray, rows: IntArray, kappa: int) -> Hits:
    n, _, nq, _ = exact.shape
    by_query = np.moveaxis(exact, 1, 2).reshape(n, nq, -1)
    best = by_query.argmin(axis=-1)[..., None] if kappa == 1 else by_query.argsort(axis=-1, kind="stable")[..., :kappa]
    column, place = np.divmod(best[..., 0], kappa)
    image, query = np.ogrid[:n, :nq]
    return Hits(np.take_along_axis(by_query, best, axis=-1), rows[image, column], locations[image, column, query, place])
