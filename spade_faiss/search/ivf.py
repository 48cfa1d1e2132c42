"""Inverted lists: a query is compared only with those vectors of its neighbors that lie in the lists nearest to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist, import_faiss, product_bytes, product_knn
from spade_faiss.search.protocol import Encoded, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

_SEED = 1234
_ITERATIONS = 15
# Blocks whose lists are joined for one search: more of them make longer lists, and take more memory.
_BLOCKS_AT_A_TIME = 5


@dataclass(frozen=True, kw_only=True)
class Build:
    """`lists` is the number of lists of each level's codebook, `train_vectors` the size of the sample it is learned from."""

    lists: int = 64
    train_vectors: int = 50_000

    def __post_init__(self) -> None:
        check_at_least("lists", self.lists, 1)
        check_at_least("train_vectors", self.train_vectors, self.lists)


@dataclass(frozen=True, kw_only=True)
class Query:
    """`nprobe` is the number of lists that are searched for a query."""

    nprobe: int = 4

    def __post_init__(self) -> None:
        check_at_least("nprobe", self.nprobe, 1)


class IvfSearch:
    """Approximate nearest gallery vectors, see `GallerySearch`: their distances are true, but nearer ones may be missed.

    A normal image is encoded as the order of its locations by list; its vectors come from the bank. Lists that hold none of the
    neighbors' vectors are passed over, so that every query finds as many vectors as are asked for.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        nprobe: see `Query`.
        encoded: the codebook, and the order of each normal image's locations.
    """

    def __init__(self, blocks: Blocks, workers: Workers, nprobe: int, encoded: Encoded) -> None:
        def by_list(row: int) -> FloatArray:
            return blocks.read(row)[encoded(row)["order"]]

        self._blocks = blocks.derived("by list", by_list, blocks.level.channels)
        self._workers = workers
        self._encoded = encoded
        self._centroids: FloatArray = np.ascontiguousarray(encoded.trained["centroids"])
        self._nprobe = min(nprobe, len(self._centroids))

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, channels = self._blocks.level.locations, self._blocks.level.channels
        value = np.dtype(np.float32).itemsize
        rows = _BLOCKS_AT_A_TIME * queries
        # At worst everything lies in one list: all blocks of a task, as they are and centered, and all queries.
        vectors = (3 * rows + 2 * queries) * channels * value
        lists = queries * (self._nprobe + kappa) * 24 + RunningBest.merge_bytes(queries, min(kappa, rows), kappa)
        probed = (images + 16) * queries * len(self._centroids)
        each = vectors + product_bytes(queries, rows, channels, kappa) + lists
        return RunningBest.nbytes(images, queries, kappa) + probed + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, _ = xq.shape
        best = RunningBest(n, queries, kappa, self._locations)
        parts = slices(neighbors.shape[1], -(-neighbors.shape[1] // _BLOCKS_AT_A_TIME))
        running = []
        for image, rows in enumerate(np.sort(neighbors, axis=1)):
            probed = self._probed(xq[image], rows, kappa)
            running += [self._workers.submit(self._search, xq, image, rows[part], probed, best) for part in parts]
        for task in running:
            task.result()
        return best.hits()

    @property
    def _locations(self) -> int:
        return self._blocks.level.locations

    def _probed(self, x: FloatArray, rows: IntArray, kappa: int) -> npt.NDArray[np.bool_]:
        """(lists, HW), whether a list is among those that a query searches."""
        sizes = np.sum([np.diff(self._encoded(int(row))["starts"].astype(np.int64)) for row in rows], axis=0)
        (filled,) = np.nonzero(sizes)
        _, I = product_knn(x, self._centroids[filled], min(self._nprobe, len(filled)))
        query = np.repeat(np.arange(len(x)), I.shape[1])
        # Where the nearest lists hold fewer vectors than are asked for, all of them are searched.
        short = np.flatnonzero(sizes[filled][I].sum(axis=1) < kappa)
        probed = np.zeros((len(sizes), len(x)), np.bool_)
        probed[filled[I.ravel()], query] = True
        probed[:, short] = True
        return probed

    def _search(self, xq: FloatArray, image: int, rows: IntArray, probed: npt.NDArray[np.bool_], best: RunningBest) -> None:
        """Search the lists of some of an image's neighbors."""
        blocks = [self._blocks(row) for row in rows.tolist()]
        encoded = [self._encoded(row) for row in rows.tolist()]
        for number, centroid in enumerate(self._centroids):
            queries = np.flatnonzero(probed[number])
            parts = [slice(*item["starts"][number : number + 2].tolist()) for item in encoded]
            sizes = [part.stop - part.start for part in parts]
            if not len(queries) or not sum(sizes):
                continue
            xb = np.concatenate([block[part] for block, part in zip(blocks, parts, strict=True)])
            row = np.repeat(rows, sizes)
            location = np.concatenate([item["order"][part] for item, part in zip(encoded, parts, strict=True)])
            x = xq[image, queries]
            _, I = product_knn(x - centroid, xb - centroid, min(best.kappa, len(xb)))
            best.merge(image, queries, row[I], location[I].astype(np.int64), direct_sq_dist(x, xb, I))
        for row in rows.tolist():
            self._blocks.release(row)


def _train(blocks: Blocks, build: Build) -> Arrays:
    xt = blocks.sample(build.train_vectors, _SEED)
    if len(xt) < build.lists:
        raise InputError(
            f"lists={build.lists} is more than the {len(xt)} vectors of level {blocks.level.name!r}; lower it or add images"
        )
    faiss = import_faiss()
    kmeans = faiss.Kmeans(
        xt.shape[1], build.lists, niter=_ITERATIONS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=len(xt)
    )
    kmeans.train(xt)
    return {"centroids": np.asarray(kmeans.centroids, np.float32)}


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    """The locations in the order of their lists, and where each list starts."""
    _, lists = product_knn(block, np.ascontiguousarray(trained["centroids"]), 1)
    order = np.argsort(lists[:, 0], kind="stable")
    starts = np.searchsorted(lists[order, 0], np.arange(build.lists + 1))
    return {"order": order.astype(np.uint32), "starts": starts.astype(np.uint32)}


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    check_arrays(trained, {"centroids": ((build.lists, level.channels), "float32")})


def _check_encoded(level: Level, encoded: Arrays, trained: Arrays, build: Build) -> None:
    cells = level.locations
    check_arrays(encoded, {"order": ((cells,), "uint32"), "starts": ((build.lists + 1,), "uint32")})
    order, starts = encoded["order"], encoded["starts"].astype(np.int64)
    if order.max() >= cells or np.bincount(order, minlength=cells).max() > 1:
        raise InputError(f"order does not hold each of {cells} locations once")
    if starts[0] != 0 or starts[-1] != cells or (np.diff(starts) < 0).any():
        raise InputError(f"starts do not lead from 0 to {cells}")


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, encoded: Encoded | None) -> IvfSearch:
    assert encoded is not None
    return IvfSearch(blocks, workers, query.nprobe, encoded)


METHOD = SearchMethod(
    definition="Every location is compared with those of the nearest normal images that lie in the same few inverted lists: "
    "distances are true, but a nearer vector may have been missed.",
    build=Build,
    query=Query,
    open=_open,
    train=_train,
    encode=_encode,
    check_trained=_check_trained,
    check_encoded=_check_encoded,
)
