"""Exact search of all normal images: their vectors in clusters, most of which are passed over."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spade_faiss.core.memory import format_bytes
from spade_faiss.core.once import Once
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.native.extension import import_native, pack_bytes
from spade_faiss.search.native.gallery import map_gallery
from spade_faiss.search.protocol import Encoded, Hits
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Clusters, Gallery

# The names of what is stored of each map: the cluster of each vector, and how far it is from the center, rounded up.
CLUSTER, DISTANCE = "cluster", "distance"
# Up to so many images, and no more than half of the bank, may be missing from a gallery that is searched in clusters. Smaller
# galleries are searched block by block: most of what a cluster holds would be for nothing.
_MOST_EXCLUDED = 16
# Ranges of clusters for each thread: clusters differ in size, and a thread that is done takes another range.
_RANGES = 4
# Ranges begin at a multiple of this, see `Clusters.search`.
_ALIGN = 16
# What a cluster takes beside its vectors, and a vector beside its codes.
_CLUSTER_BYTES, _VECTOR_BYTES = 2048, 24

_log = logging.getLogger(__name__)


class _Opened(NamedTuple):
    """A level's vectors in clusters, and the gallery that they are read from."""

    clusters: Clusters
    gallery: Gallery


class ClusterSearch:
    """Exact nearest vectors of all normal images, see `GallerySearch`.

    What it finds is, to the bit, what `NativeSearch` finds, which also searches galleries that are a part of the bank: the
    smallest direct distance; of equal ones the one in the first bank row, and there the first location.

    Args:
        blocks: the blocks of one level.
        workers: where the search runs.
        simd_level: one of `SIMD_LEVELS` that this machine runs.
        encoded: the centers, and the cluster and distance of each normal image's vectors.
    """

    def __init__(self, blocks: Blocks, workers: Workers, simd_level: str, encoded: Encoded) -> None:
        self._blocks = blocks
        self._workers = workers
        self._by_block = NativeSearch(blocks, workers, simd_level)
        self._count = len(encoded.trained["centers"])
        # Read and packed at the first search, once for all threads.
        self._opened = Once(partial(_open_clusters, blocks, workers, simd_level, encoded))

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        by_block = self._by_block.working_bytes(images, k_gallery, kappa)
        if not self._is_nearly_all(k_gallery):
            return by_block
        locations, channels = self._blocks.level.locations, self._blocks.level.channels
        queries, rows = images * locations, len(self._blocks) * locations
        # Each task packs the queries, holds them padded, and returns what it found; clusters may hold all vectors at worst, but
        # hold about as many each.
        packed = pack_bytes(queries, channels) + queries * (4 * channels + 64 + 12 * kappa)
        cluster = 4 * -(-rows // self._count) * (8 * channels + 64)
        found = RunningBest.nbytes(images, locations, kappa) + RunningBest.merge_bytes(locations, kappa, kappa)
        opened = rows * 2 * np.dtype(np.float32).itemsize
        # What is no number is searched block by block.
        return max(by_block, (self._workers.threads + 1) * (packed + cluster) + found + opened)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        if not self._is_nearly_all(neighbors.shape[1]) or not np.isfinite(xq).all():
            return self._by_block(xq, neighbors, kappa)
        n, queries, channels = xq.shape
        locations = self._blocks.level.locations
        clusters = self._opened().clusters
        self._blocks.check()  # the kernel keeps the addresses of all maps
        excluded = _others(neighbors, len(self._blocks))
        best = RunningBest(n, queries, kappa, locations)
        seed = np.empty((n, queries), np.int32)
        looked_at = np.zeros(n, np.int64)

        def merge(images: slice, part: slice, D: FloatArray, ids: IntArray) -> None:
            row, location = np.divmod(ids, locations)
            location[ids < 0] = -1  # nothing was found
            shape = (images.stop - images.start, part.stop - part.start, kappa)
            for image, *found in zip(range(n)[images], *(x.reshape(shape) for x in (row, location, D)), strict=True):
                best.merge(image, part, *found)

        def search_nearest(image: int, part: slice) -> int:
            D, ids, seed[image, part], looked, _ = clusters.search_nearest(
                np.ascontiguousarray(xq[image, part]), excluded[image : image + 1], kappa
            )
            merge(slice(image, image + 1), part, D, ids)
            return int(looked[0])

        def search(part: slice) -> IntArray:
            bound = best.furthest().ravel()
            D, ids, looked, _ = clusters.search((part.start, part.stop), flat, excluded, bound, seed.ravel(), kappa)
            merge(slice(0, n), slice(0, queries), D, ids)
            return looked

        flat = np.ascontiguousarray(xq).reshape(-1, channels)
        # What the nearest cluster holds bounds what is searched for in all others.
        parts = slices(queries, min(queries, max(1, -(-self._workers.threads // n))))
        first = [(image, self._workers.submit(search_nearest, image, part)) for image in range(n) for part in parts]
        for image, task in first:
            looked_at[image] += task.result()
        for searched in [self._workers.submit(search, part) for part in self._ranges()]:
            looked_at += searched.result()
        hits = best.hits()
        return Hits(hits.sq_dist, hits.row, hits.location, 1 - looked_at / (queries * locations * neighbors.shape[1]))

    def _is_nearly_all(self, k_gallery: int) -> bool:
        excluded = len(self._blocks) - k_gallery
        return excluded <= min(_MOST_EXCLUDED, k_gallery)

    def _ranges(self) -> list[slice]:
        """The ranges of clusters that are searched one by one, larger ones for no more threads than there are."""
        units = -(-self._count // _ALIGN)
        parts = slices(units, min(units, _RANGES * self._workers.threads))
        return [slice(part.start * _ALIGN, min(part.stop * _ALIGN, self._count)) for part in parts]


def _others(neighbors: IntArray, rows: int) -> IntArray:
    """(n, rows - K), the bank rows that are not in each line of `neighbors` (n, K)."""
    is_other = np.ones((len(neighbors), rows), np.bool_)
    np.put_along_axis(is_other, neighbors, False, axis=1)
    return np.ascontiguousarray(np.nonzero(is_other)[1].reshape(len(neighbors), -1))


def _open_clusters(blocks: Blocks, workers: Workers, simd_level: str, encoded: Encoded) -> _Opened:
    """Read which cluster each vector is in, and pack as many clusters as the cache has room for."""
    gallery = map_gallery(blocks)
    assert gallery is not None
    locations = gallery.count // len(blocks)
    cluster, distance = np.empty(gallery.count, np.int32), np.empty(gallery.count, np.float32)
    for row in range(len(blocks)):
        arrays, part = encoded(row), slice(row * locations, (row + 1) * locations)
        cluster[part], distance[part] = arrays[CLUSTER], arrays[DISTANCE]
    centers = np.ascontiguousarray(encoded.trained["centers"])
    clusters: Clusters = import_native().Clusters(simd_level, gallery, centers, cluster, distance)
    channels = blocks.level.channels
    codes = import_native().padded_length(simd_level, channels)
    needed = gallery.count * (codes + _VECTOR_BYTES + 8) + len(centers) * (_CLUSTER_BYTES + 8 * channels)
    granted = blocks.reserve(needed)
    kept = len(centers) * granted // max(1, needed)
    if kept < len(centers):
        _log.warning(
            "the clusters of level %s take %s, the memory budget leaves %s: what is beyond it is read again at every search; "
            "raise --memory",
            blocks.level.name,
            format_bytes(needed),
            format_bytes(granted),
        )
    for task in [workers.submit(clusters.pack, part.start, part.stop) for part in slices(kept, max(1, min(kept, 16)))]:
        task.result()
    return _Opened(clusters, gallery)
