"""Inverted lists: a query is compared only with those vectors of its neighbors that lie in the lists nearest to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist, import_faiss, product_bytes, product_knn, sort_by_distance
from spade_faiss.search.protocol import Encoded, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import smallest_of
from spade_faiss.search.workers import Workers

_SEED = 1234
_ITERATIONS = 15
# Blocks whose lists are put together for one search: more of them make longer lists, and take more memory.
_TOGETHER = 5


@dataclass(frozen=True, kw_only=True)
class Build:
    """`lists`: of each level's codebook. `train_vectors`: the sample that it is learned from."""

    lists: int = 64
    train_vectors: int = 50_000

    def __post_init__(self) -> None:
        check_at_least("lists", self.lists, 1)
        check_at_least("train_vectors", self.train_vectors, self.lists)


@dataclass(frozen=True, kw_only=True)
class Query:
    """`nprobe`: how many of the lists are searched for a query."""

    nprobe: int = 4

    def __post_init__(self) -> None:
        check_at_least("nprobe", self.nprobe, 1)


class IvfSearch:
    """Approximate nearest gallery vectors, see `GallerySearch`: their distances are true, but nearer ones may be missed.

    What is kept of a normal image is the order of its locations by list; its vectors come from the bank. Lists that hold none
    of the neighbors' vectors are passed over, so that every query finds as many as are asked for.
    """

    def __init__(self, blocks: Blocks, workers: Workers, nprobe: int, kept: Encoded) -> None:
        def by_list(row: int) -> FloatArray:
            return blocks.read(row)[kept(row)["order"]]

        self._blocks = blocks.derived("by list", by_list, blocks.level.channels)
        self._workers = workers
        self._kept = kept
        self._centroids: FloatArray = np.ascontiguousarray(kept.trained["centroids"])
        self._nprobe = min(nprobe, len(self._centroids))

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, channels = self._blocks.level.shape
        queries, value = height * width, np.dtype(np.float32).itemsize
        found = images * -(-k_gallery // _TOGETHER) * queries * kappa * 3 * (value + 8)
        # At worst everything lies in one list: all blocks of a task, as they are and centered, and all queries.
        vectors = (3 * _TOGETHER + 2) * queries * channels * value
        each = vectors + product_bytes(queries, _TOGETHER * queries, channels, kappa) + queries * (self._nprobe + kappa) * 24
        return found + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, _ = xq.shape
        rows = np.sort(neighbors, axis=1)
        columns = [np.arange(rows.shape[1])[part] for part in slices(rows.shape[1], -(-rows.shape[1] // _TOGETHER))]
        running = []
        for x, line in zip(xq, rows, strict=True):
            probes = self._probes(x, line, kappa)
            running.append([self._workers.submit(self._search, x, line, some, probes, kappa) for some in columns])
        sq_dist, at = np.empty((n, queries, kappa), np.float32), np.empty((n, queries, kappa), np.int64)
        for image, tasks in enumerate(running):
            found = [task.result() for task in tasks]
            D, I = np.concatenate([D for D, _ in found], axis=1), np.concatenate([I for _, I in found], axis=1)
            D, I = sort_by_distance(D, I)
            sq_dist[image], at[image] = D[:, :kappa], I[:, :kappa]
        column, location = np.divmod(at[..., 0], self._cells)
        return Hits(sq_dist, np.take_along_axis(rows, column, axis=1), location)

    @property
    def _cells(self) -> int:
        return self._blocks.level.height * self._blocks.level.width

    def _probes(self, x: FloatArray, rows: IntArray, kappa: int) -> list[IntArray]:
        """For each list, the queries that it is searched for."""
        sizes = np.sum([np.diff(self._kept(int(row))["starts"].astype(np.int64)) for row in rows], axis=0)
        (filled,) = np.nonzero(sizes)
        _, I = product_knn(x, self._centroids[filled], min(self._nprobe, len(filled)))
        query = np.repeat(np.arange(len(x)), I.shape[1])
        # Where the nearest lists hold less than is asked for, all of them are searched.
        short = np.flatnonzero(sizes[filled][I].sum(axis=1) < kappa)
        probed = np.zeros((len(sizes), len(x)), np.bool_)
        probed[filled[I.ravel()], query] = True
        probed[:, short] = True
        return [np.flatnonzero(line) for line in probed]

    def _search(
        self, x: FloatArray, rows: IntArray, columns: IntArray, probes: list[IntArray], kappa: int
    ) -> tuple[FloatArray, IntArray]:
        """The nearest in some of the neighbors: squared distances (nq, kappa), and column * H * W + location."""
        blocks = [self._blocks(int(rows[column])) for column in columns]
        kept = [self._kept(int(rows[column])) for column in columns]
        D, at = np.full((len(x), kappa), np.inf, np.float32), np.full((len(x), kappa), np.iinfo(np.int64).max)
        for number, (queries, centroid) in enumerate(zip(probes, self._centroids, strict=True)):
            parts = [slice(*item["starts"][number : number + 2].tolist()) for item in kept]
            if not len(queries) or not (size := sum(part.stop - part.start for part in parts)):
                continue
            xb = np.concatenate([block[part] for block, part in zip(blocks, parts, strict=True)])
            places = np.concatenate(
                [column * self._cells + item["order"][part] for column, item, part in zip(columns, kept, parts, strict=True)]
            )
            xq = x[queries]
            _, I = product_knn(xq - centroid, xb - centroid, min(kappa, size))
            found = direct_sq_dist(xq, xb, I), places[I]
            D[queries], at[queries] = smallest_of([(D[queries], at[queries]), found], kappa)
        for column in columns:
            self._blocks.release(int(rows[column]))
        return D, at


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
    """Locations by list, and where each list starts."""
    _, lists = product_knn(block, np.ascontiguousarray(trained["centroids"]), 1)
    order = np.argsort(lists[:, 0], kind="stable")
    starts = np.searchsorted(lists[order, 0], np.arange(build.lists + 1))
    return {"order": order.astype(np.uint32), "starts": starts.astype(np.uint32)}


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    check_arrays(trained, {"centroids": ((build.lists, level.channels), "float32")})


def _check_encoded(level: Level, encoded: Arrays, trained: Arrays, build: Build) -> None:
    cells = level.height * level.width
    check_arrays(encoded, {"order": ((cells,), "uint32"), "starts": ((build.lists + 1,), "uint32")})
    order, starts = encoded["order"], encoded["starts"].astype(np.int64)
    if order.max() >= cells or np.bincount(order, minlength=cells).max() > 1:
        raise InputError(f"order does not hold each of {cells} locations once")
    if starts[0] != 0 or starts[-1] != cells or (np.diff(starts) < 0).any():
        raise InputError(f"starts do not lead from 0 to {cells}")


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, kept: Encoded | None) -> IvfSearch:
    assert kept is not None
    return IvfSearch(blocks, workers, query.nprobe, kept)


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
