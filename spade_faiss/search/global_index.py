"""Global search: one index over the locations of all normal images; short codes choose candidates, true distances rank them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least, check_choice, is_finite
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.coreset import is_chosen_by_chance, k_center
from spade_faiss.search.distances import direct_sq_dist, import_faiss, product_bytes, product_knn
from spade_faiss.search.inverted_lists import Centroids, InvertedLists, check_lists, encode_values, pack_lists, value_ranges
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.native.gallery import map_gallery
from spade_faiss.search.protocol import Encoded, Hits, SearchMethod, check_arrays
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

THIN = ("none", "random", "kcenter")

_SEED = 1234
_ITERATIONS = 10
# Without a number in the recipe: this many lists for the root of the number of vectors, as a power of two, and at most so many,
# beyond which comparing a query with all centroids would cost more than it saves.
_LISTS_PER_ROOT = 8
_MOST_LISTS = 1 << 14
# Vectors of the sample that a list is learned from, at the least.
_VECTORS_PER_LIST = 8
# Greedy k-center picks from so many vectors at most, in memory; beyond, from a sample.
_MOST_THINNED = 1 << 21
# How much further than the radius of a coreset a vector must lie to be beyond it: distances are rounded in more than one way.
_BEYOND = 1.0001
# Codes are read eight bytes at a time.
_CODE_ALIGNMENT = 8
# Queries of one task. It is part of what is computed: products of another size round otherwise.
_QUERIES_AT_A_TIME = 128
# Of queries that search all lists, these many numbers of lists are in memory at a time.
_PROBES_AT_A_TIME = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Build:
    """The codes of vectors, and the lists that they lie in.

    `dims` is the number of principal components that a vector is encoded as, a byte each, in steps of eight. `lists` is the
    number of lists of each level; with 0 it follows from the number of vectors. `train_vectors` is the size of the sample that
    components and lists are learned from.

    `thin` says which vectors are indexed: all (`none`), a random `share` of them (`random`), or a share that is picked by
    greedy k-center (`kcenter`), PatchCore's coreset. Vectors of images that are added to a coreset are indexed if they are
    further from it than any vector that it was picked from.
    """

    dims: int = 48
    lists: int = 0
    train_vectors: int = 200_000
    thin: str = "none"
    share: float = 0.01

    def __post_init__(self) -> None:
        check_choice("thin", self.thin, THIN)
        if not is_finite(self.share) or not 0 < self.share <= 1:
            raise InputError(f"share={self.share!r} must be above 0 and at most 1")
        check_at_least("dims", self.dims, 1)
        check_at_least("lists", self.lists, 0)
        check_at_least("train_vectors", self.train_vectors, max(1000, self.lists))


@dataclass(frozen=True, kw_only=True)
class Query:
    """`nprobe` is the number of lists that a location searches, `rerank` that of the candidates whose true distances are
    evaluated.
    """

    nprobe: int = 4
    rerank: int = 16

    def __post_init__(self) -> None:
        check_at_least("nprobe", self.nprobe, 1)
        check_at_least("rerank", self.rerank, 1)


class GlobalSearch:
    """Approximate nearest vectors of all normal images that may be found, see `GallerySearch`: distances are true.

    A vector is encoded as its first principal components, a byte each, in the inverted list of the nearest centroid. The codes
    are mapped from the files of the index and searched by FAISS; the distances of the best candidates are evaluated on the
    vectors in the bank.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        query: see `Query`.
        encoded: the components and centroids, and the lists of each group of images.
    """

    def __init__(self, blocks: Blocks, workers: Workers, query: Query, encoded: Encoded) -> None:
        self._blocks = blocks
        self._workers = workers
        self._ranges = encoded.trained["ranges"]
        self._project = _projection(encoded.trained)
        self._centroids = Centroids(encoded.trained["centroids"], encoded.trained["groups"])
        self._nprobe = min(query.nprobe, self._centroids.count)
        self._rerank = query.rerank
        self._locations = blocks.level.locations
        self._lists = [InvertedLists(pack, self._locations, self._ranges) for pack in encoded.packs()]
        self._gallery = None if usable_simd_level() is None else map_gallery(blocks)

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        lists, width, channels = self._centroids.count, self._ranges.shape[1], self._blocks.level.channels
        queries, candidates = min(_QUERIES_AT_A_TIME, self._locations), self._candidates(kappa)
        found = queries * candidates * (len(self._lists) + 2) * 40
        probed = 16 * max(_PROBES_AT_A_TIME, lists) + product_bytes(queries, lists, width, self._nprobe)
        evaluated = queries * (2 * channels + 2 * width) * 4 + 2 * self._blocks.block_bytes
        each = found + probed + evaluated + RunningBest.merge_bytes(queries, candidates, kappa)
        allowed = sum(lists.count for lists in self._lists) * 2 + 10 * k_gallery  # masks, and the neighbors themselves
        return int(RunningBest.nbytes(images, self._locations, kappa) + images * allowed + self._workers.threads * each)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, _ = xq.shape
        self._blocks.check()  # the kernel keeps the addresses of all maps
        best = RunningBest(n, queries, kappa, self._locations)
        parts = slices(queries, -(-queries // _QUERIES_AT_A_TIME))
        running = []
        for image in range(n):
            allowed = [lists.allowed(self._excluded(neighbors[image])) for lists in self._lists]
            running += [self._workers.submit(self._search, xq, image, part, allowed, best) for part in parts]
        for task in running:
            task.result()
        if np.isinf(best.furthest()).any() and np.isfinite(xq).all():
            raise InputError(f"kappa={kappa} is larger than the number of vectors that are indexed; lower it")
        return best.hits()

    def _excluded(self, rows: IntArray) -> npt.NDArray[np.bool_] | None:
        """(rows of the bank,), which images may not be found; None where all may."""
        if len(rows) == len(self._blocks):
            return None
        excluded = np.ones(len(self._blocks), np.bool_)
        excluded[rows] = False
        return excluded

    def _candidates(self, kappa: int) -> int:
        return max(self._rerank, kappa)

    def _search(self, xq: FloatArray, image: int, part: slice, allowed: list[object], best: RunningBest) -> None:
        """Search for some queries of an image."""
        x = xq[image, part]
        projected, k = self._project(x), self._candidates(best.kappa)
        ids = self._choose(projected, self._centroids.nearest(projected, self._nprobe), allowed, k)
        # Where the nearest lists hold fewer vectors than are asked for, all of them are searched.
        short = np.flatnonzero((ids >= 0).sum(axis=1) < best.kappa)
        every = np.arange(self._centroids.count)
        for some in np.split(short, range(0, len(short), max(1, _PROBES_AT_A_TIME // len(every)))[1:]) if len(short) else []:
            ids[some] = self._choose(np.ascontiguousarray(projected[some]), np.tile(every, (len(some), 1)), allowed, k)
        row, location = np.divmod(ids, self._locations)
        location[ids < 0] = -1
        best.merge(image, part, row, location, self._evaluate(x, ids))

    def _choose(self, projected: FloatArray, probed: IntArray, allowed: list[object], k: int) -> IntArray:
        """(n, k), the ids of the candidates in probed lists, `row * H * W + location`; -1 where there are fewer."""
        found = [lists.search(projected, probed, k, may) for lists, may in zip(self._lists, allowed, strict=True)]
        if len(found) == 1:
            return found[0][1]
        D, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        # Stable: of equal codes, those of the smaller rows stay.
        best: IntArray = np.take_along_axis(ids, D.argsort(axis=1, kind="stable")[:, :k], axis=1)
        return best

    def _evaluate(self, x: FloatArray, ids: IntArray) -> FloatArray:
        """The true squared distances of candidates, (n, k); infinite where there is none."""
        if self._gallery is not None:
            found: FloatArray = self._gallery.sq_distances(np.ascontiguousarray(x), np.ascontiguousarray(ids))
            return found
        sq_dist = np.full(ids.shape, np.inf, np.float32)
        row, location = np.divmod(ids, self._locations)
        for one in np.unique(row[ids >= 0]).tolist():
            query, place = np.nonzero(row == one)
            near = self._blocks.take(one, location[query, place])
            sq_dist[query, place] = direct_sq_dist(x[query], near, np.arange(len(query))[:, None])[:, 0]
            self._blocks.release(one)
        return sq_dist


def _projection(trained: Arrays) -> Callable[[FloatArray], FloatArray]:
    """What computes the principal components (n, width) of vectors (n, C).

    FAISS multiplies in the calling thread alone. NumPy would wake its own threads for each product, which costs more than it.
    """
    faiss, (channels, width) = import_faiss(), trained["components"].shape
    transform = faiss.LinearTransform(channels, width, True)
    faiss.copy_array_to_vector(np.ascontiguousarray(trained["components"].T).ravel(), transform.A)
    faiss.copy_array_to_vector(-trained["mean"] @ trained["components"], transform.b)
    transform.is_trained = True
    return lambda x: transform.apply(np.ascontiguousarray(x))


def _train(blocks: Blocks, build: Build) -> Arrays:
    xt = blocks.sample(build.train_vectors, _SEED)
    share = 1.0 if build.thin == "none" else build.share
    lists = build.lists or _lists_for(int(share * len(blocks) * blocks.level.locations), len(xt))
    if len(xt) < lists:
        raise InputError(
            f"lists={lists} is more than the {len(xt)} vectors of level {blocks.level.name!r}; lower it or add images"
        )
    mean = xt.mean(axis=0, dtype=np.float64)
    centered = xt - mean
    _, vectors = np.linalg.eigh(centered.T @ centered)
    channels = xt.shape[1]
    width = -(-min(build.dims, channels) // _CODE_ALIGNMENT) * _CODE_ALIGNMENT
    components = np.zeros((channels, width), np.float32)
    components[:, : min(width, channels)] = vectors[:, ::-1][:, :width]
    trained = {"mean": mean.astype(np.float32), "components": components}
    projected = _projection(trained)(xt)
    centroids = _k_means(projected, lists)
    groups = _k_means(centroids, round(lists**0.5))
    trained |= {"centroids": centroids, "groups": groups, "ranges": value_ranges(projected)}
    if build.thin == "kcenter":
        xb = blocks.sample(_MOST_THINNED, _SEED)
        picks, sq_radius = k_center(xb, max(1, round(build.share * len(xb))))
        trained |= {"coreset": xb[picks], "sq_radius": np.array([sq_radius], np.float32)}
    return trained


def _k_means(xt: FloatArray, count: int) -> FloatArray:
    kmeans = import_faiss().Kmeans(
        xt.shape[1], count, niter=_ITERATIONS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=len(xt)
    )
    kmeans.train(xt)
    centroids: FloatArray = np.asarray(kmeans.centroids, np.float32)
    return centroids


def _lists_for(vectors: int, sampled: int) -> int:
    """The number of lists for so many vectors, of which so many are in the sample: a power of two."""
    most = min(_LISTS_PER_ROOT * vectors**0.5, sampled / _VECTORS_PER_LIST, _MOST_LISTS)
    return 1 << max(0, int(np.log2(max(most, 1))))


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    """The list and the code of each location."""
    projected = _projection(trained)(block)
    _, lists = product_knn(projected, np.ascontiguousarray(trained["centroids"]), 1)
    chosen = np.where(_is_chosen(block, trained, build), lists[:, 0], len(trained["centroids"]))  # in no list
    return {"list": chosen.astype(np.uint32), "code": encode_values(projected, trained["ranges"])}


def _is_chosen(block: FloatArray, trained: Arrays, build: Build) -> npt.NDArray[np.bool_] | bool:
    """(HW,), which vectors of a block are indexed; True if all are."""
    if build.thin == "random":
        return is_chosen_by_chance(block, build.share)
    if build.thin == "none":
        return True
    coreset = np.ascontiguousarray(trained["coreset"])
    center = coreset.mean(axis=0)
    _, I = product_knn(block - center, coreset - center, min(2, len(coreset)))
    sq_dist = direct_sq_dist(np.ascontiguousarray(block), coreset, I).min(axis=1)
    chosen: npt.NDArray[np.bool_] = (sq_dist == 0) | (sq_dist > _BEYOND * trained["sq_radius"])
    return chosen


def _pack(encoded: Arrays, trained: Arrays, build: Build) -> Arrays:
    return pack_lists(encoded["list"], encoded["code"], len(trained["centroids"]))


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    width = -(-min(build.dims, level.channels) // _CODE_ALIGNMENT) * _CODE_ALIGNMENT
    lists, groups, kept = (len(trained.get(name, ())) for name in ("centroids", "groups", "coreset"))
    expected = {
        "mean": ((level.channels,), "float32"),
        "components": ((level.channels, width), "float32"),
        "centroids": ((build.lists or max(1, lists), width), "float32"),
        "groups": ((max(1, groups), width), "float32"),
        "ranges": ((2, width), "float32"),
    }
    if build.thin == "kcenter":
        expected |= {"coreset": ((max(1, kept), level.channels), "float32"), "sq_radius": ((1,), "float32")}
    check_arrays(trained, expected)


def _check_packed(level: Level, packed: Arrays, trained: Arrays, images: int) -> None:
    check_lists(packed, trained["ranges"].shape[1], len(trained["centroids"]), images * level.locations)


def _open(blocks: Blocks, workers: Workers, build: Build, query: Query, encoded: Encoded | None) -> GlobalSearch:
    assert encoded is not None
    return GlobalSearch(blocks, workers, query, encoded)


METHOD = SearchMethod(
    definition="Every location is compared with those of all normal images that lie in the inverted lists nearest to it: "
    "distances are true, but a nearer vector may have been missed.",
    build=Build,
    query=Query,
    open=_open,
    train=_train,
    encode=_encode,
    pack=_pack,
    check_trained=_check_trained,
    check_packed=_check_packed,
    whole_bank=True,
)
