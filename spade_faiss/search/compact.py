"""Compact search: a few principal components and what they leave over choose candidates, direct distances rank the best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import Piece, Visit, in_flight, parts_of, sweep, visits_of
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist, product_bytes, product_knn, sq_norms
from spade_faiss.search.exact import open_on_cpu
from spade_faiss.search.protocol import Encoded, GallerySearch, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import Found
from spade_faiss.search.workers import Workers

_SEED = 1234
_CODES = "codes"
_LARGEST_CODE = 4096


@dataclass(frozen=True, kw_only=True)
class Build:
    """`dims`: numbers kept of each vector; up to 32, FAISS searches them fastest. `train_vectors`: the sample learned from."""

    dims: int = 32
    train_vectors: int = 50_000

    def __post_init__(self) -> None:
        check_at_least("dims", self.dims, 2)
        check_at_least("train_vectors", self.train_vectors, 1000)


@dataclass(frozen=True, kw_only=True)
class Query:
    """`rerank`: candidates of each location, one from each neighbor, whose true distances are evaluated."""

    rerank: int = 8

    def __post_init__(self) -> None:
        check_at_least("rerank", self.rerank, 1)


class CompactSearch:
    """Approximate nearest gallery vectors, see `GallerySearch`: their distances are true, but nearer ones may be missed.

    A vector is kept as its first `dims - 1` principal components and the length of the rest. The distance of two such is a
    lower bound of the true one (the triangle inequality between the rests), and far closer to it than that of the components
    alone. The best vector of each neighbor by that bound is a candidate; the best few candidates are evaluated.
    """

    def __init__(self, blocks: Blocks, workers: Workers, rerank: int, kept: Encoded) -> None:
        self._blocks = blocks

        def codes(row: int) -> FloatArray:
            return kept(row)[_CODES].astype(np.float32)

        self._codes = blocks.derived(_CODES, codes, kept.trained["components"].shape[1] + 1)
        self._workers = workers
        self._rerank = rerank
        self._trained = kept.trained

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, dims = self._codes.level.shape
        queries, value = height * width, np.dtype(np.float32).itemsize
        found = 2 * Found.nbytes(images, k_gallery, queries, min(kappa, queries))
        projected = images * queries * (dims + 2 * self._blocks.level.channels) * value
        blocks = in_flight(self._workers.threads) * self._codes.block_bytes
        # A re-ranking may look at all of a block's vectors for all of an image's queries.
        each = product_bytes(queries, queries, dims, kappa) + 2 * self._blocks.block_bytes
        return found + projected + blocks + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        queries = xq.shape[1]
        projected = np.stack([project(x, self._trained) for x in xq])
        rows = self._codes.level.height * self._codes.level.width
        dims = projected.shape[2]
        k = min(kappa, rows)
        found = Found(neighbors, queries, k)

        def look(image: int, column: int, part: slice, codes: FloatArray) -> None:
            D, I = product_knn(projected[image, part], codes, k)
            found.sq_dist[image, column, part], found.location[image, column, part] = D, I

        def looks(visit: Visit) -> list[Piece[FloatArray]]:
            return [
                Piece(partial(look, image, column, part), (part.stop - part.start) * rows * dims)
                for image, column in visit.asked
                for part in parts
            ]

        parts = parts_of(queries, rows, dims)
        visits = visits_of(found.rows)
        sweep(self._codes, self._workers, visits, self._codes, looks)

        candidates = min(max(kappa, self._rerank), neighbors.shape[1] * k)
        chosen = found.sq_dist <= found.furthest(candidates)[:, None, :, None]
        found.sq_dist[:] = np.inf

        def evaluate(visit: Visit) -> None:
            for image, column in visit.asked:
                query, place = np.nonzero(chosen[image, column])
                if len(query):
                    near = self._blocks.take(visit.row, found.location[image, column, query, place])
                    D = direct_sq_dist(xq[image, query], near, np.arange(len(query))[:, None])
                    found.sq_dist[image, column, query, place] = D[:, 0]
            self._blocks.release(visit.row)

        for task in [self._workers.submit(evaluate, visit) for visit in visits]:
            task.result()
        return found.hits(kappa)


def project(x: FloatArray, trained: Arrays) -> FloatArray:
    """(n, dims) of vectors (n, C): components, and the length of what they leave over, in units of `scale`."""
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
    # Of large features, in units that leave float16 room.
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
    shape = (level.height * level.width, trained["components"].shape[1] + 1) if trained else ()
    check_arrays(encoded, {_CODES: (shape, "float16")} if trained else {})


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, kept: Encoded | None) -> GallerySearch:
    assert kept is not None
    return CompactSearch(blocks, workers, query.rerank, kept) if kept.trained else open_on_cpu(blocks, workers)


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
