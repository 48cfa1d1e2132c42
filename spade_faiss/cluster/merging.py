"""Merging what owners of different shards found: a search is a minimum over vectors, so that parts of it merge exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import sort_by_distance
from spade_faiss.search.protocol import Hits


class PartHits(NamedTuple):
    """What an owner found for some of n images.

    Attributes:
        images: (m,) which of them.
        hits: see `Hits`; rows are those of the whole bank.
        vectors: (m,) how many gallery vectors of each image it has.
    """

    images: IntArray
    hits: Hits
    vectors: IntArray


def merge_neighbors(parts: Sequence[tuple[FloatArray, IntArray]], k: int) -> tuple[FloatArray, IntArray]:
    """The k nearest rows of those that owners found.

    Args:
        parts: of each owner, the squared distances (n, m) and rows (n, m) of its k nearest rows, or of all that it has.
        k: the number of neighbors.

    Returns:
        Squared distances (n, k), ascending, and rows (n, k); of equal distances, the smaller row comes first.
    """
    D, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    D, rows = sort_by_distance(D, rows)
    return D[:, :k], rows[:, :k]


def merge_hits(parts: Sequence[PartHits], images: int, locations: int, kappa: int) -> Hits:
    """The nearest vectors of those that owners found: the kappa smallest distances, and the nearest vector of all.

    Of equal distances the vector of the smaller row is the nearest, and in a row the one at the smaller location, as in
    `RunningBest`. No vector is in two parts.

    Args:
        parts: what each owner found.
        images: number of images.
        locations: number of locations of each.
        kappa: number of vectors for each location.
    """
    sq_dist = np.full((images, locations, kappa), np.inf, np.float32)
    row, location = np.full((images, locations), -1, np.int64), np.zeros((images, locations), np.int64)
    passed_over, vectors, is_counted = np.zeros(images), np.zeros(images), bool(parts)
    for at, hits, count in parts:
        before, found = sq_dist[at, :, 0], hits.sq_dist[..., 0]
        known = hits.row >= 0
        earlier = (hits.row < row[at]) | ((hits.row == row[at]) & (hits.location < location[at]))
        nearer = known & ((found < before) | ((found == before) & ((row[at] < 0) | earlier)))
        row[at], location[at] = np.where(nearer, hits.row, row[at]), np.where(nearer, hits.location, location[at])
        sq_dist[at] = np.sort(np.concatenate([sq_dist[at], hits.sq_dist], axis=2), axis=2)[..., :kappa]
        is_counted &= hits.passed_over is not None
        if hits.passed_over is not None:
            passed_over[at] += hits.passed_over * count
            vectors[at] += count
    shares = (passed_over / np.maximum(vectors, 1)).astype(np.float32)
    return Hits(sq_dist, row, location, shares if is_counted else None)
