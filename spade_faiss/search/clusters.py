"""Clusters: exact search of all normal images at once, for which a bank's vectors are sorted into clusters beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Arrays, FloatArray
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import import_faiss, product_knn
from spade_faiss.search.engines.clusters import CLUSTER, DISTANCE, ClusterSearch
from spade_faiss.search.exact import METHOD as EXACT
from spade_faiss.search.exact import ExactQuery
from spade_faiss.search.native.extension import find_simd_level, usable_simd_level
from spade_faiss.search.protocol import Encoded, GallerySearch, SearchMethod, check_arrays
from spade_faiss.search.workers import Workers

_SEED = 1234
_ITERATIONS = 6
# Clusters for each root of the number of vectors: a query is compared with all centers, and with a few clusters' vectors, so
# that both grow as the root does.
_PER_ROOT = 2.5
# Vectors of the sample for each cluster, and the most of all.
_SAMPLE_EACH, _LARGEST_SAMPLE = 40, 600_000


@dataclass(frozen=True, kw_only=True)
class Build:
    """`clusters` is the number of clusters of each level; 0 takes it from the number of vectors."""

    clusters: int = 0

    def __post_init__(self) -> None:
        check_at_least("clusters", self.clusters, 0)


def _train(blocks: Blocks, build: Build) -> Arrays:
    vectors = len(blocks) * blocks.level.locations
    count = min(vectors, build.clusters or max(1, round(_PER_ROOT * math.sqrt(vectors))))
    if build.clusters > vectors:
        raise InputError(
            f"clusters={build.clusters} is more than the {vectors} vectors of level {blocks.level.name!r}; "
            f"lower it or add images"
        )
    xt = blocks.sample(min(_SAMPLE_EACH * count, _LARGEST_SAMPLE), _SEED)
    centers = _kmeans(xt, min(count, len(xt)))
    # Near centers stand side by side: a search rules out groups of them.
    coarse = _kmeans(centers, max(1, round(math.sqrt(len(centers)))))
    D, part = product_knn(centers, coarse, 1)
    return {"centers": np.ascontiguousarray(centers[np.lexsort((D[:, 0], part[:, 0]))])}


def _kmeans(x: FloatArray, count: int) -> FloatArray:
    """(count, C) float32 centers."""
    finite = np.ascontiguousarray(x[np.isfinite(x).all(axis=1)])
    if len(finite) < count:
        return np.ascontiguousarray(np.nan_to_num(x[:count]))
    kmeans = import_faiss().Kmeans(
        x.shape[1],
        count,
        niter=_ITERATIONS,
        seed=_SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=len(finite),
    )
    kmeans.train(finite)
    return np.asarray(kmeans.centroids, np.float32)


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    """The cluster of each vector, and its distance to the center, rounded up."""
    centers = np.ascontiguousarray(trained["centers"])
    _, nearest = product_knn(np.ascontiguousarray(block), centers, 1)
    cluster = np.maximum(nearest[:, 0], 0)  # -1 for a vector that is no number
    distance = np.sqrt(np.square(block.astype(np.float64) - centers[cluster]).sum(axis=1))
    return {CLUSTER: cluster.astype(np.int32), DISTANCE: np.nextafter(distance.astype(np.float32), np.float32(np.inf))}


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    count = build.clusters or len(trained.get("centers", ()))
    check_arrays(trained, {"centers": ((count, level.channels), "float32")})
    if count < 1:
        raise InputError("centers holds none")


def _check_encoded(level: Level, encoded: Arrays, trained: Arrays, build: Build) -> None:
    cells = level.locations
    check_arrays(encoded, {CLUSTER: ((cells,), "int32"), DISTANCE: ((cells,), "float32")})
    if encoded[CLUSTER].min() < 0 or encoded[CLUSTER].max() >= len(trained["centers"]):
        raise InputError(f"{CLUSTER} does not name one of {len(trained['centers'])} clusters")
    if encoded[DISTANCE].min() < 0:
        raise InputError(f"{DISTANCE} holds values below 0")


def _open(blocks: Blocks, workers: Workers, build: Build, query: ExactQuery, encoded: Encoded | None) -> GallerySearch:
    assert encoded is not None
    channels = blocks.level.channels
    auto = query.engine == "auto" and workers.device.kind == "cpu" and usable_simd_level(channels) is not None
    if not (auto or query.engine == "native") or blocks.parts() is None:
        return EXACT.open(blocks, workers, EXACT.build(), query, None)
    return ClusterSearch(blocks, workers, find_simd_level(query.simd_level, channels), encoded)


METHOD = SearchMethod(
    definition="Every location is compared with every location of the nearest normal images: exact. If these are all "
    "there are, clusters of vectors that cannot hold the nearest are passed over.",
    build=Build,
    query=ExactQuery,
    open=_open,
    train=_train,
    encode=_encode,
    check_trained=_check_trained,
    check_encoded=_check_encoded,
)
