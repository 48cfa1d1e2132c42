"""Exact search, block by block: each needed normal image is visited once for all test images that chose it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from spade_faiss.features import FloatArray
from spade_faiss.gallery import Hits, IntArray, ReadBlock
from spade_faiss.knn import exact_knn


def search(read_block: ReadBlock, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
    """Exact nearest gallery vectors; see `GallerySearch` for the arguments and for what is promised.

    The result is a minimum over blocks, so blocks may be visited in any order; ascending rows and a stable merge that prefers
    what it already has make ties deterministic.
    """
    n, nq, _ = xq.shape
    sq_dist = np.full((n, nq, kappa), np.inf, np.float32)
    row = np.full((n, nq), -1, np.int64)
    location = np.full((n, nq), -1, np.int64)
    for block_row, images in _invert(neighbors):
        xb = read_block(block_row)
        D, I = exact_knn(xq[images].reshape(len(images) * nq, -1), xb, min(kappa, len(xb)))
        D, I = D.reshape(len(images), nq, -1), I.reshape(len(images), nq, -1)
        closer = D[..., 0] < sq_dist[images, :, 0]
        row[images] = np.where(closer, block_row, row[images])
        location[images] = np.where(closer, I[..., 0], location[images])
        merged = np.concatenate([sq_dist[images], D], axis=2)
        sq_dist[images] = np.sort(merged, axis=2)[..., :kappa]
    return Hits(sq_dist, row, location)


def _invert(neighbors: IntArray) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Each bank row that any image chose, ascending, with the images that chose it."""
    order = np.argsort(neighbors, axis=None, kind="stable")
    rows, starts = np.unique(neighbors.ravel()[order], return_index=True)
    for block_row, images in zip(rows, np.split(order // neighbors.shape[1], starts[1:]), strict=True):
        yield int(block_row), images
