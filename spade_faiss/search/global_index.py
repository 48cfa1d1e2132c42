"""Global search: one index over the locations of all normal images; short codes choose candidates, true distances rank them."""

from __future__ import annotations

import math
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
from spade_faiss.search.distances import direct_sq_dist, import_faiss, product_knn
from spade_faiss.search.engines.lists import open_lists
from spade_faiss.search.inverted_lists import Codes, check_lists, encode, pack_lists
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
# Queries that are projected at a time. It is part of what is computed: products of another size round otherwise.
_QUERIES_AT_A_TIME = 128
# Pairs of near vectors of different images that say how alike they are in what the components leave over.
_PAIRS = 2000


@dataclass(frozen=True, kw_only=True)
class Build:
    """The codes of vectors, and the lists that they lie in.

    `dims` is the number of values that a vector is encoded as, a byte each: principal components and, where these are not all,
    the length of what they leave over. `lists` is the number of lists of each level; with 0 it follows from the number of
    vectors. `train_vectors` is the size of the sample that components and lists are learned from.

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
        check_at_least("dims", self.dims, 2)
        check_at_least("lists", self.lists, 0)
        check_at_least("train_vectors", self.train_vectors, max(1000, self.lists))


@dataclass(frozen=True, kw_only=True)
class Query:
    """`nprobe` is the most lists that a location searches, `rerank` that of the candidates whose true distances are evaluated.

    A location searches its four nearest lists, and more only if their centroids are not much further away than the nearest.
    Locations that are near to what is normal search few, unusual ones search up to `nprobe`: their distances are what decides.
    """

    nprobe: int = 32
    rerank: int = 16

    def __post_init__(self) -> None:
        check_at_least("nprobe", self.nprobe, 1)
        check_at_least("rerank", self.rerank, 1)


class GlobalSearch:
    """Approximate nearest vectors of all normal images that may be found, see `GallerySearch`: distances are true.

    A vector is projected to its first principal components, lies in the inverted list of the nearest centroid, and is encoded
    relative to that, a byte for each value. The codes are read where they are in the files of the index, and estimate
    distances; those of the best candidates are evaluated on the vectors in the bank.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        query: see `Query`.
        encoded: the components and centroids, and the lists of each group of images.
    """

    def __init__(self, blocks: Blocks, workers: Workers, query: Query, encoded: Encoded) -> None:
        self._blocks = blocks
        self._workers = workers
        self._project = Projection(encoded.trained)
        self._count = len(encoded.trained["centroids"])
        self._nprobe = min(query.nprobe, self._count)
        self._rerank = query.rerank
        packs = encoded.packs()
        self._rows = [pack.rows for pack in packs]
        self._search = open_lists(blocks, encoded.trained["centroids"], packs)

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, channels = self._blocks.level.locations, self._blocks.level.channels
        candidates = max(self._rerank, kappa)
        together = images * queries
        part = -(-together // self._workers.threads)
        # Each task compares some queries with all centroids, and lists hold about as many vectors each.
        codes = 16 * self._count + 64 * -(-len(self._blocks) * queries // self._count)
        each = part * (12 * self._nprobe + 16 * candidates + 12 * kappa + 12 * channels + 64) + codes
        each += RunningBest.merge_bytes(queries, kappa, kappa) + 2 * self._blocks.block_bytes
        allowed = len(self._blocks) * 12 + 10 * k_gallery  # masks, and the neighbors themselves
        return RunningBest.nbytes(images, queries, kappa) + images * allowed + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, channels = xq.shape
        self._blocks.check()  # the kernel keeps the addresses of all maps
        best = RunningBest(n, queries, kappa, self._blocks.level.locations)
        running = []
        # Images that search the whole bank do so together: what is read of a list serves all of them. Each is projected by
        # itself, as a larger product rounds otherwise.
        groups = 1 if neighbors.shape[1] == len(self._blocks) else n
        for images in np.array_split(np.arange(n), groups) if n else ():
            allowed = self._allowed(neighbors[images[0]])
            x = xq[images].reshape(-1, channels)
            projected = np.concatenate([self._project(xq[image])[0] for image in images])
            running += [
                self._workers.submit(
                    self._search_part, x[part], projected[part], _of_images(images, queries, part), allowed, best
                )
                for part in slices(len(x), min(len(x), -(-self._workers.threads // groups)))
            ]
        for task in running:
            task.result()
        if np.isinf(best.furthest()).any() and np.isfinite(xq).all():
            raise InputError(f"kappa={kappa} is larger than the number of vectors that are indexed; lower it")
        return best.hits()

    def _allowed(self, neighbors: IntArray) -> list[npt.NDArray[np.bool_]]:
        """Of each group of images, which may be found."""
        if len(neighbors) == len(self._blocks):
            return [rows >= 0 for rows in self._rows]
        may = np.zeros(len(self._blocks), np.bool_)
        may[neighbors] = True
        return [(rows >= 0) & may[rows] for rows in self._rows]

    def _search_part(
        self,
        x: FloatArray,
        projected: FloatArray,
        of_images: list[tuple[int, slice, slice]],
        allowed: list[npt.NDArray[np.bool_]],
        best: RunningBest,
    ) -> None:
        """Search for some queries, which `of_images` says the images of."""
        rerank = max(self._rerank, best.kappa)
        D, ids = self._search(x, projected, allowed, self._nprobe, rerank, best.kappa)
        # Where the nearest lists hold fewer vectors than are asked for, all of them are searched.
        short = np.flatnonzero(ids[:, -1] < 0)
        if len(short) and self._nprobe < self._count:
            D[short], ids[short] = self._search(x[short], projected[short], allowed, self._count, rerank, best.kappa)
        row, location = np.divmod(ids, self._blocks.level.locations)
        location[ids < 0] = -1
        for image, queries, found in of_images:
            best.merge(image, queries, row[found], location[found], D[found])


def _of_images(images: IntArray, queries: int, part: slice) -> list[tuple[int, slice, slice]]:
    """The images of a part of all their queries, which stand one image's after the other's.

    Args:
        images: the numbers of the images.
        queries: how many queries each has.
        part: the part.

    Returns:
        Each image that has queries in the part: its number, these among its queries, and these among those of the part.
    """
    found = []
    for place in range(part.start // queries, -(-part.stop // queries)):
        begin = place * queries
        first, last = max(part.start, begin), min(part.stop, begin + queries)
        found.append((int(images[place]), slice(first - begin, last - begin), slice(first - part.start, last - part.start)))
    return found


class Projection:
    """What projects vectors to their codes' values: principal components and, where they are not all, the length of the rest.

    Of two near vectors, the rests are neither the same nor at right angles. With `alike`, the mean cosine of the angle between
    them, a squared distance is about

        |difference of the components|^2 + |r|^2 + |s|^2 - 2 alike |r| |s|

    for rests r and s. The root of `alike` times the length of the rest, as one more value, makes it a distance between what is
    projected, but for (1 - alike) (|r|^2 + |s|^2), of which the share of the query is the same for all vectors.

    FAISS multiplies in the calling thread alone. NumPy would wake its own threads for each product, which costs more than it.
    """

    def __init__(self, trained: Arrays) -> None:
        faiss, (channels, width) = import_faiss(), trained["components"].shape
        self._mean = trained["mean"]
        self._alike = np.float32(trained["alike"][0])
        self._has_rest = width < channels
        self._transform = faiss.LinearTransform(channels, width, True)
        faiss.copy_array_to_vector(np.ascontiguousarray(trained["components"].T).ravel(), self._transform.A)
        faiss.copy_array_to_vector(-trained["mean"] @ trained["components"], self._transform.b)
        self._transform.is_trained = True

    def __call__(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The values (n, d) of vectors (n, C), and what their rests add to squared distances, (n,)."""
        starts = range(0, len(x), _QUERIES_AT_A_TIME)
        parts = [self._transform.apply(np.ascontiguousarray(x[start : start + _QUERIES_AT_A_TIME])) for start in starts]
        y = np.concatenate(parts)
        if not self._has_rest:
            return y, np.zeros(len(x), np.float32)
        centered = x - self._mean
        rest = np.maximum(np.einsum("ij,ij->i", centered, centered) - np.einsum("ij,ij->i", y, y), 0)
        return np.concatenate([y, np.sqrt(self._alike * rest)[:, None]], axis=1), (1 - self._alike) * rest


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
    width = _width(build, xt.shape[1])
    components = np.ascontiguousarray(vectors[:, ::-1][:, :width], np.float32)
    trained = {"mean": mean.astype(np.float32), "components": components, "alike": np.ones(1, np.float32)}
    trained["alike"] = _alike(xt, trained)
    trained["centroids"] = _k_means(Projection(trained)(xt)[0], lists)
    if build.thin == "kcenter":
        xb = blocks.sample(_MOST_THINNED, _SEED)
        picks, sq_radius = k_center(xb, max(1, round(build.share * len(xb))))
        trained |= {"coreset": xb[picks], "sq_radius": np.array([sq_radius], np.float32)}
    return trained


def _width(build: Build, channels: int) -> int:
    """The number of components."""
    return channels if channels <= build.dims else build.dims - 1


def _alike(xt: FloatArray, trained: Arrays) -> FloatArray:
    """(1,), the mean cosine of the angle between the rests of near vectors, see `Projection`; `xt` is sorted by images."""
    components, centered = trained["components"], xt - trained["mean"]
    rest = centered - (centered @ components) @ components.T
    half = len(xt) // 2
    if components.shape[1] == xt.shape[1] or half == 0:
        return np.ones(1, np.float32)
    some = np.arange(0, half, -(-half // _PAIRS))
    _, nearest = product_knn(np.ascontiguousarray(centered[some]), np.ascontiguousarray(centered[half:]), 1)
    a, b = rest[some], rest[half:][nearest[:, 0]]
    lengths = np.linalg.norm(a, axis=1) @ np.linalg.norm(b, axis=1)
    return np.array([np.clip(np.einsum("ij,ij->", a, b) / max(lengths, np.finfo(np.float32).tiny), 0, 1)], np.float32)


def _k_means(xt: FloatArray, count: int) -> FloatArray:
    kmeans = import_faiss().Kmeans(
        xt.shape[1], count, niter=_ITERATIONS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=len(xt)
    )
    kmeans.train(xt)
    centroids: FloatArray = np.asarray(kmeans.centroids, np.float32)
    return centroids


def _lists_for(vectors: int, sampled: int) -> int:
    """The number of lists for so many vectors, of which so many are in the sample: a power of two."""
    most = min(sampled / _VECTORS_PER_LIST, _MOST_LISTS)
    return 1 << max(0, min(int(math.log2(max(most, 1))), math.ceil(math.log2(_LISTS_PER_ROOT * math.sqrt(vectors)))))


def _encode(block: FloatArray, trained: Arrays, build: Build) -> Arrays:
    """The list and the code of each location."""
    projected, beside = Projection(trained)(block)
    centroids = np.ascontiguousarray(trained["centroids"])
    _, lists = product_knn(projected, centroids, 1)
    codes = encode(projected - centroids[np.maximum(lists[:, 0], 0)], beside)
    chosen = np.where(_is_chosen(block, trained, build), lists[:, 0], len(centroids))  # in no list
    return {"list": chosen.astype(np.uint32), **codes._asdict()}


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
    codes = Codes(encoded["code"], encoded["step"], encoded["half_sq_norm"])
    return pack_lists(encoded["list"], codes, len(trained["centroids"]))


def _check_trained(level: Level, trained: Arrays, build: Build) -> None:
    width = _width(build, level.channels)
    lists, kept = (len(trained.get(name, ())) for name in ("centroids", "coreset"))
    expected = {
        "mean": ((level.channels,), "float32"),
        "components": ((level.channels, width), "float32"),
        "alike": ((1,), "float32"),
        "centroids": ((build.lists or max(1, lists), width + (width < level.channels)), "float32"),
    }
    if build.thin == "kcenter":
        expected |= {"coreset": ((max(1, kept), level.channels), "float32"), "sq_radius": ((1,), "float32")}
    check_arrays(trained, expected)


def _check_packed(level: Level, packed: Arrays, trained: Arrays, images: int) -> None:
    lists, width = trained["centroids"].shape
    check_lists(packed, width, lists, images * level.locations)


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
