"""Compact search: a few principal components and what they leave over choose candidates, direct distances rank the best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import BlockJob, Task, block_jobs, in_flight, query_parts, run_block_jobs
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist, product_bytes, product_knn, sq_norms
from spade_faiss.search.exact import open_on_cpu
from spade_faiss.search.protocol import Encoded, GallerySearch, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

_SEED = 1234
_CODES = "codes"
_LARGEST_CODE = 4096


@dataclass(frozen=True, kw_only=True)
class Build:
    """The codes of vectors.

    `dims` is the number of values that a vector is encoded as; up to 32, FAISS searches them fastest. `train_vectors` is the
    size of the sample that the components are learned from.
    """

    dims: int = 32
    train_vectors: int = 50_000

    def __post_init__(self) -> None:
        check_at_least("dims", self.dims, 2)
        check_at_least("train_vectors", self.train_vectors, 1000)


@dataclass(frozen=True, kw_only=True)
class Query:
    """`rerank` is the number of candidates of each location whose true distances are evaluated."""

    rerank: int = 8

    def __post_init__(self) -> None:
        check_at_least("rerank", self.rerank, 1)


class CompactSearch:
    """Approximate nearest gallery vectors, see `GallerySearch`: their distances are true, but nearer ones may be missed.

    A vector is encoded as its first `dims - 1` principal components and the length of the rest. The distance of two codes is a
    lower bound of the true one (the triangle inequality between the rests), and far closer to it than the distance of the
    components alone. The `kappa` best vectors of each neighbor by that bound are candidates; the best few candidates of all
    neighbors are evaluated.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        rerank: see `Query`.
        encoded: the components, and the codes of each normal image's vectors.
    """

    def __init__(self, blocks: Blocks, workers: Workers, rerank: int, encoded: Encoded) -> None:
        def codes(row: int) -> FloatArray:
            return encoded(row)[_CODES].astype(np.float32)

        self._blocks = blocks
        self._codes = blocks.derived(_CODES, codes, encoded.trained["components"].shape[1] + 1)
        self._workers = workers
        self._rerank = rerank
        self._trained = encoded.trained

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, dims, value = self._codes.level.locations, self._codes.level.channels, np.dtype(np.float32).itemsize
        listed = min(kappa, queries)
        candidates = self._candidates(k_gallery, listed, kappa)
        found = RunningBest.nbytes(images, queries, candidates) + RunningBest.nbytes(images, queries, kappa)
        chosen = images * queries * candidates * 28  # rows, locations, distances, and what tells where they are missing
        projected = images * queries * (dims + 2 * self._blocks.level.channels) * value
        blocks = in_flight(self._workers.threads) * self._codes.block_bytes
        # All of a block's vectors may have to be evaluated for all of an image's queries.
        each = product_bytes(queries, queries, dims, kappa) + 2 * self._blocks.block_bytes
        each += RunningBest.merge_bytes(queries, listed, candidates)
        last = RunningBest.merge_bytes(queries, candidates, kappa)
        return found + chosen + projected + blocks + self._workers.threads * each + last

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        (n, queries, _), locations = xq.shape, self._codes.level.locations
        jobs = block_jobs(neighbors)
        row, location = self._choose(xq, jobs, self._candidates(neighbors.shape[1], min(kappa, locations), kappa), kappa)
        sq_dist = self._evaluate(xq, jobs, row, location)
        best = RunningBest(n, queries, kappa, locations)
        for image in range(n):
            best.merge(image, slice(queries), row[image], location[image], sq_dist[image])
        return best.hits()

    def _candidates(self, k_gallery: int, listed: int, kappa: int) -> int:
        """The number of candidates of a query, where each neighbor lists so many."""
        return min(max(kappa, self._rerank), k_gallery * listed)

    def _choose(self, xq: FloatArray, jobs: list[BlockJob], candidates: int, kappa: int) -> tuple[IntArray, IntArray]:
        """Bank rows and locations of the candidates, (n, HW, candidates) each."""
        projected = np.stack([project(x, self._trained) for x in xq])
        n, queries, dims = projected.shape
        locations = self._codes.level.locations
        best = RunningBest(n, queries, candidates, locations)

        def search(image: int, row: int, part: slice, codes: FloatArray) -> None:
            D, I = product_knn(projected[image, part], codes, min(kappa, locations))
            best.merge(image, part, row, I, D)

        def searches(job: BlockJob) -> list[Task[FloatArray]]:
            return [
                Task(partial(search, image, job.row, part), (part.stop - part.start) * locations * dims)
                for image, _ in job.requests
                for part in parts
            ]

        parts = query_parts(queries, locations, dims)
        run_block_jobs(self._codes, self._workers, jobs, self._codes, searches)
        return best.vectors()

    def _evaluate(self, xq: FloatArray, jobs: list[BlockJob], row: IntArray, location: IntArray) -> FloatArray:
        """The true squared distances of candidates, (n, HW, candidates)."""
        sq_dist = np.full(row.shape, np.inf, np.float32)

        def evaluate(job: BlockJob) -> None:
            for image in job.images.tolist():
                query, place = np.nonzero(row[image] == job.row)
                if len(query):
                    near = self._blocks.take(job.row, location[image, query, place])
                    D = direct_sq_dist(xq[image, query], near, np.arange(len(query))[:, None])
                    sq_dist[image, query, place] = D[:, 0]
            self._blocks.release(job.row)

        for task in [self._workers.submit(evaluate, job) for job in jobs]:
            task.result()
        return sq_dist


def project(x: FloatArray, trained: Arrays) -> FloatArray:
    """Encode vectors (n, C).

    Returns:
        (n, dims) float32: the components, and the length of what they leave over, in units of `scale`.
    """
    centered = x - trained["mean"]
    components = centered @ trained["components"]
    rest = np.sqrt(np.maximum(sq_norms(centered) - sq_norms(components), 0))
    return (np.concatenate([components, rest[:, None]], axis=1) / trained["scale"]).astype(np.float32, copy=False)


def _train(blocks: Blocks, build: Build) -> Arrays:
    if blocks.level.channels < 2 * build.dims:
        return {}  # there is little to leave out: such a level is searched as it is
    xt = blocks.sample(build.train_vectors, _SEED).astype(np.float64)
    mean = xt.mean(axis=0)
    centered = xt - mean
    _, vectors = np.linalg.eigh(centered.T @ centered)
    components = vectors[:, ::-1][:, : min(build.dims - 1, xt.shape[1])]
    # Codes of large features are scaled down to the range of float16.
    largest = np.sqrt(np.square(centered).sum(axis=1).max())
    scale = 2.0 ** max(0, np.ceil(np.log2(max(largest, 1) / _LARGEST_CODE)))
    return {
        "mean": mean.astype(np.float32),
        "components": np.ascontiguousarray(components, np.float32),
        "scale": np.array([scale], np.float32),
    }


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    if not trained:
        return {}
    largest = np.finfo(np.float16).max
    return {_CODES: project(block, trained).clip(-largest, largest).astype(np.float16)}


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    channels = level.channels
    components = min(build.dims - 1, channels)
    shapes = {
        "mean": ((channels,), "float32"),
        "components": ((channels, components), "float32"),
        "scale": ((1,), "float32"),
    }
    check_arrays(trained, {} if channels < 2 * build.dims else shapes)
    if trained and not trained["scale"][0] > 0:
        raise InputError(f"scale is {trained['scale'][0]}, expected more than 0")


def _check_encoded(level: Level, encoded: Arrays, trained: Arrays, build: Build) -> None:
    shape = (level.locations, trained["components"].shape[1] + 1) if trained else ()
    check_arrays(encoded, {_CODES: (shape, "float16")} if trained else {})


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, encoded: Encoded | None) -> GallerySearch:
    assert encoded is not None
    return CompactSearch(blocks, workers, query.rerank, encoded) if encoded.trained else open_on_cpu(blocks, workers)


METHOD = SearchMethod(
    definition="Locations of the nearest normal images are compared by a few principal components, the best of them exactly: "
    "distances are true, but a nearer vector may have been missed.",
    build=Build,
    query=Query,
    open=_open,
    train=_train,
    encode=_encode,
    check_trained=_check_trained,
    check_encoded=_check_encoded,
)
