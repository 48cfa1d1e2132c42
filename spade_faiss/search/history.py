"""History search: each location is compared with the same place in all normal images, through inverted lists of its own."""

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
from spade_faiss.search.distances import direct_sq_dist, import_faiss
from spade_faiss.search.protocol import Encoded, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

_SEED = 1234
_ITERATIONS = 10
# Normal images that one task looks through, and locations that are trained at a time.
_ROWS_AT_A_TIME = 128
_LOCATIONS_AT_A_TIME = 64
_LARGEST_LISTS = 256


@dataclass(frozen=True, kw_only=True)
class Build:
    """The codebook of each location.

    `lists` is the number of its lists; with 1 everything is searched. `train_images` is the size of the sample that it is
    learned from.
    """

    lists: int = 8
    train_images: int = 500

    def __post_init__(self) -> None:
        check_at_least("lists", self.lists, 1)
        if self.lists > _LARGEST_LISTS:
            raise InputError(f"lists={self.lists} must be at most {_LARGEST_LISTS}: the number of a list is stored in one byte")
        check_at_least("train_images", self.train_images, self.lists)


@dataclass(frozen=True, kw_only=True)
class Query:
    """`nprobe` is the number of its lists that a location searches."""

    nprobe: int = 2

    def __post_init__(self) -> None:
        check_at_least("nprobe", self.nprobe, 1)


class HistorySearch:
    """The nearest vectors at the same place in all normal images that may be found, see `GallerySearch`.

    Distances are true. With one list the search is exact for its definition; with more, nearer vectors in other lists are
    missed. A normal image is encoded as one byte for each location, the number of its list there; its vectors are read one by
    one.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        nprobe: see `Query`.
        encoded: the codebooks, and the lists of each normal image's locations.
    """

    def __init__(self, blocks: Blocks, workers: Workers, nprobe: int, encoded: Encoded) -> None:
        self._blocks = blocks
        self._workers = workers
        self._encoded = encoded
        self._centroids: FloatArray = encoded.trained["centroids"]  # (H * W, lists, C)
        self._nprobe = min(nprobe, self._centroids.shape[1])

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        locations, lists, channels = self._centroids.shape
        probed = locations * lists * (2 * channels * 4 + 18)
        each = 3 * self._blocks.block_bytes + 40 * locations + RunningBest.merge_bytes(locations, 1, kappa)
        return int(RunningBest.nbytes(images, locations, kappa) + probed + self._workers.threads * each)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        if kappa > (most := neighbors.shape[1]):
            raise InputError(f"kappa={kappa} is larger than a location's history, {most} normal images; lower it")
        return self.partial(xq, neighbors, kappa)

    def partial(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `PartialSearch`."""
        n, locations, _ = xq.shape
        best = RunningBest(n, locations, kappa, locations)
        for image, x in enumerate(xq):
            probed, rows = self._probed(x), np.sort(neighbors[image]).tolist()
            self._search(xq, image, rows, probed, best)
            # Where the lists hold fewer vectors than are asked for, the other lists are searched as well.
            short = np.isinf(best.furthest()[image])
            if short.any():
                self._search(xq, image, rows, ~probed & short[:, None], best)
        return best.hits()

    def _probed(self, x: FloatArray) -> npt.NDArray[np.bool_]:
        """(H * W, lists), whether a list is among those that a location searches."""
        D = np.square(self._centroids - x[:, None]).sum(axis=2)
        probed = np.zeros(D.shape, np.bool_)
        np.put_along_axis(probed, np.argsort(D, axis=1)[:, : self._nprobe], True, axis=1)
        return probed

    def _search(self, xq: FloatArray, image: int, rows: list[int], probed: npt.NDArray[np.bool_], best: RunningBest) -> None:
        """Compare the locations of an image with the vectors of their probed lists in some bank rows."""
        locations = np.arange(xq.shape[1])

        def search(part: slice) -> None:
            for row in rows[part]:
                where: IntArray = np.flatnonzero(probed[locations, self._encoded(row)["list"]])
                if len(where):
                    near = self._blocks.take(row, where)
                    D = direct_sq_dist(xq[image, where], near, np.arange(len(where))[:, None])
                    best.merge(image, where, row, where[:, None], D)
                    self._blocks.release(row)

        parts = slices(len(rows), -(-len(rows) // _ROWS_AT_A_TIME))
        for task in [self._workers.submit(search, part) for part in parts]:
            task.result()


def _train(blocks: Blocks, build: Build) -> Arrays:
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(blocks))[: build.train_images]).tolist()
    if len(rows) < build.lists:
        raise InputError(f"lists={build.lists} is more than the {len(rows)} images of the bank; lower it or add images")
    faiss = import_faiss()
    count, channels = blocks.level.locations, blocks.level.channels
    centroids = np.empty((count, build.lists, channels), np.float32)
    kmeans = faiss.Kmeans(
        channels, build.lists, niter=_ITERATIONS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=len(rows)
    )
    for start in range(0, count, _LOCATIONS_AT_A_TIME):
        locations = np.arange(start, min(start + _LOCATIONS_AT_A_TIME, count))
        xt = np.stack([blocks.take(row, locations) for row in rows], axis=1)
        for location, history in zip(locations, xt, strict=True):
            kmeans.train(np.ascontiguousarray(history))
            centroids[location] = kmeans.centroids
    return {"centroids": centroids}


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    """The number of the nearest list of each location."""
    return {"list": np.square(trained["centroids"] - block[:, None]).sum(axis=2).argmin(axis=1).astype(np.uint8)}


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    check_arrays(trained, {"centroids": ((level.locations, build.lists, level.channels), "float32")})


def _check_encoded(level: Level, encoded: Arrays, trained: Arrays, build: Build) -> None:
    check_arrays(encoded, {"list": ((level.locations,), "uint8")})
    if (largest := int(encoded["list"].max())) >= build.lists:
        raise InputError(f"a location is in list {largest} of {build.lists}")


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, encoded: Encoded | None) -> HistorySearch:
    assert encoded is not None
    return HistorySearch(blocks, workers, query.nprobe, encoded)


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
