"""Search a location's own history: the same place in all normal images, through inverted lists of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist, import_faiss, sort_by_distance
from spade_faiss.search.protocol import Encoded, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import smallest_of
from spade_faiss.search.workers import Workers

_SEED = 1234
_ITERATIONS = 10
# Normal images that one task looks through, and locations that are trained at a time.
_ROWS_AT_A_TIME = 128
_LOCATIONS_AT_A_TIME = 64
_LARGEST_LISTS = 256


@dataclass(frozen=True, kw_only=True)
class Build:
    """`lists`: of each location's own codebook; 1 searches everything. `train_images`: the sample they are learned from."""

    lists: int = 8
    train_images: int = 500

    def __post_init__(self) -> None:
        check_at_least("lists", self.lists, 1)
        if self.lists > _LARGEST_LISTS:
            raise InputError(f"lists={self.lists} must be at most {_LARGEST_LISTS}: the number of a list is kept in one byte")
        check_at_least("train_images", self.train_images, self.lists)


@dataclass(frozen=True, kw_only=True)
class Query:
    """`nprobe`: how many of its lists a location searches."""

    nprobe: int = 2

    def __post_init__(self) -> None:
        check_at_least("nprobe", self.nprobe, 1)


class HistorySearch:
    """The nearest vectors at the same place in all normal images, see `GallerySearch`; the neighbors are not asked for.

    Distances are true. With one list it is exact for its definition; with more, nearer vectors in other lists are missed. What
    is kept of a normal image is one byte a location, the number of its list there; its vectors are read one by one.
    """

    def __init__(self, blocks: Blocks, workers: Workers, nprobe: int, kept: Encoded) -> None:
        self._blocks = blocks
        self._workers = workers
        self._kept = kept
        self._centroids: FloatArray = kept.trained["centroids"]  # (H * W, lists, C)
        self._nprobe = min(nprobe, self._centroids.shape[1])

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        locations, lists, channels = self._centroids.shape
        parts = -(-len(self._blocks) // _ROWS_AT_A_TIME)
        probed = locations * lists * (2 * channels * 4 + 16)
        return int(
            images * locations * kappa * 12 * (parts + 4) + probed + self._workers.threads * 3 * self._blocks.block_bytes
        )

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, locations, _ = xq.shape
        if kappa > (most := len(self._blocks)):
            raise InputError(f"kappa={kappa} is larger than a location's history, {most} normal images; lower it")
        parts = slices(most, -(-most // _ROWS_AT_A_TIME))
        every = np.ones((locations, self._centroids.shape[1]), np.bool_)
        sq_dist, rows = np.empty((n, locations, kappa), np.float32), np.empty((n, locations, kappa), np.int64)
        for image, x in enumerate(xq):
            sq_dist[image], rows[image] = self._search(x, self._probed(x), parts, kappa)
            # Where the lists hold less than is asked for, all of them are searched.
            short = np.isinf(sq_dist[image, :, -1])
            if short.any():
                D, I = self._search(x, every & short[:, None], parts, kappa)
                sq_dist[image, short], rows[image, short] = D[short], I[short]
        return Hits(sq_dist, rows[..., 0], np.tile(np.arange(locations), (n, 1)))

    def _probed(self, x: FloatArray) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        """(H * W, lists), whether a list is among the nearest of its location."""
        D = np.square(self._centroids - x[:, None]).sum(axis=2)
        probed = np.zeros(D.shape, np.bool_)
        np.put_along_axis(probed, np.argsort(D, axis=1)[:, : self._nprobe], True, axis=1)
        return probed

    def _search(
        self, x: FloatArray, probed: np.ndarray[tuple[int, int], np.dtype[np.bool_]], parts: list[slice], kappa: int
    ) -> tuple[FloatArray, IntArray]:
        """(H * W, kappa) squared distances and rows, ascending; infinite where the probed lists hold too few."""

        def search(part: slice) -> tuple[FloatArray, IntArray]:
            D, I = np.full((len(x), kappa), np.inf, np.float32), np.full((len(x), kappa), np.iinfo(np.int64).max)
            everywhere = np.arange(len(x))
            for row in range(part.start, part.stop):
                where = np.flatnonzero(probed[everywhere, self._kept(row)["list"]])
                if len(where):
                    near = self._blocks.take(row, where)
                    found = direct_sq_dist(x[where], near, np.arange(len(where))[:, None])
                    D[where], I[where] = smallest_of([(D[where], I[where]), (found, np.full(found.shape, row))], kappa)
                    self._blocks.release(row)
            return D, I

        found = [task.result() for task in [self._workers.submit(search, part) for part in parts]]
        D, I = sort_by_distance(np.concatenate([D for D, _ in found], axis=1), np.concatenate([I for _, I in found], axis=1))
        return D[:, :kappa], I[:, :kappa]


def _train(blocks: Blocks, build: Build) -> Arrays:
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(blocks))[: build.train_images]).tolist()
    if len(rows) < build.lists:
        raise InputError(f"lists={build.lists} is more than the {len(rows)} images of the bank; lower it or add images")
    faiss = import_faiss()
    height, width, channels = blocks.level.shape
    centroids = np.empty((height * width, build.lists, channels), np.float32)
    kmeans = faiss.Kmeans(
        channels, build.lists, niter=_ITERATIONS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=len(rows)
    )
    for start in range(0, height * width, _LOCATIONS_AT_A_TIME):
        locations = np.arange(start, min(start + _LOCATIONS_AT_A_TIME, height * width))
        xt = np.stack([blocks.take(row, locations) for row in rows], axis=1)
        for location, history in zip(locations, xt, strict=True):
            kmeans.train(np.ascontiguousarray(history))
            centroids[location] = kmeans.centroids
    return {"centroids": centroids}


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    """The nearest list of each location."""
    return {"list": np.square(trained["centroids"] - block[:, None]).sum(axis=2).argmin(axis=1).astype(np.uint8)}


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    check_arrays(trained, {"centroids": ((level.height * level.width, build.lists, level.channels), "float32")})


def _check_encoded(level: Level, encoded: Arrays, trained: Arrays, build: Build) -> None:
    check_arrays(encoded, {"list": ((level.height * level.width,), "uint8")})
    if (largest := int(encoded["list"].max())) >= build.lists:
        raise InputError(f"a location is in list {largest} of {build.lists}")


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, kept: Encoded | None) -> HistorySearch:
    assert kept is not None
    return HistorySearch(blocks, workers, query.nprobe, kept)


METHOD = SearchMethod(
    definition="Every location is compared with the same place in all normal images, in the inverted lists nearest to it: "
    "a narrower definition than that of SPADE in place, a wider one in images.",
    build=Build,
    query=Query,
    open=_open,
    train=_train,
    encode=_encode,
    check_trained=_check_trained,
    check_encoded=_check_encoded,
    whole_bank=True,
)
