"""Windows of images that have regions of their own: the kernel and NumPy find what the definition says, to the bit."""

from __future__ import annotations

import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss.core.types import Bools
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.engines.windows import WindowSearch
from spade_faiss.search.location import BlockWindowSearch, LocationSearch
from spade_faiss.search.native.extension import SIMD_LEVELS, import_native, usable_simd_level, why_not
from spade_faiss.search.native.sums import kernel_sq_dist
from spade_faiss.search.protocol import Hits
from spade_faiss.search.reach import reach_of
from spade_faiss.search.workers import Workers
from spade_faiss.testing import assert_same_hits
from tests.support.hostile_vectors import KINDS, hostile

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Stored = npt.NDArray[np.floating[Any]]

HEIGHT, WIDTH = 7, 11
LOCATIONS = HEIGHT * WIDTH
IMAGES = 6

needs_kernel = pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")
HERE = [level for level in SIMD_LEVELS if not why_not()[level]]
by_each_engine = pytest.mark.parametrize(
    "engine",
    [
        *(pytest.param(partial(WindowSearch, simd_level=level), id=level, marks=needs_kernel) for level in HERE),
        BlockWindowSearch,
    ],
)


class OwnSource(ArraySource):
    """Maps that are stored whole, of which blocks hold what is inspected."""

    partial = True

    def __init__(self, maps: Stored, inspected: Bools) -> None:
        super().__init__(maps)
        self.decodes = True
        self._inspected = inspected

    def read(self, row: int, out: Floats | None = None) -> Floats:
        return self.stored(row).astype(np.float32)

    def stored(self, row: int) -> Stored:
        return super().stored(row)[self.cells(row)]

    def cells(self, row: int) -> Ints:
        return np.flatnonzero(self._inspected[row])

    def parts(self) -> Any:
        return ArraySource(self._maps).parts()


def blocks_of(maps: Stored, inspected: Bools, capacity: int = 1 << 20) -> Blocks:
    level = Level("level", maps.shape[2], stride=1, height=HEIGHT, width=WIDTH)
    return Blocks(level, OwnSource(maps, inspected), BlockCache(capacity))


def search_by(engine: Any, blocks: Blocks, radius: int, threads: int = 2) -> LocationSearch:
    """A search whose windows are compared by an engine."""
    search = LocationSearch(blocks, Workers(threads), radius)
    search._search = engine(blocks, Workers(threads), radius)
    return search


def regions(kind: str) -> Bools:
    """(images, HW), what is inspected of each image."""
    rng, (y, x) = np.random.default_rng(7), np.mgrid[:HEIGHT, :WIDTH]
    inside = np.zeros((IMAGES, HEIGHT, WIDTH), np.bool_)
    if kind == "discs":  # elsewhere in each
        for image in range(IMAGES):
            inside[image] = (y - rng.uniform(0, 7)) ** 2 + (x - rng.uniform(0, 11)) ** 2 < rng.uniform(2, 9)
            inside[image, rng.integers(7), rng.integers(11)] = True
    elif kind == "corner":  # all in the same one, so that windows elsewhere hold nothing
        inside[:, :2, :3] = rng.random((IMAGES, 2, 3)) < 0.6
        inside[:, 1, 1] = True
    elif kind == "halves":
        inside[:] = x < 5
        inside[::2] = x >= 4
    elif kind == "one cell":
        inside[:, 3, 10] = True
    else:
        assert kind == "some whole"
        inside[:] = rng.random(inside.shape) < 0.2
        inside[1::2] = True
    return inside.reshape(IMAGES, -1)


REGIONS = ("discs", "corner", "halves", "one cell", "some whole")


def maps_of(kind: str, d: int, dtype: type[np.floating[Any]], inspected: Bools) -> tuple[Floats, Stored]:
    """Two test images and the normal ones (n, HW, C); outside of the regions stands what would be nearest, if it were found."""
    xq, xb = hostile(kind, d)
    rng = np.random.default_rng(5)
    queries = np.stack([xq, xq[::-1]])
    with np.errstate(over="ignore"):
        maps = np.stack([xb[rng.permutation(len(xb))[:LOCATIONS]] for _ in range(IMAGES)])
        maps[3] = maps[2]  # ties between images
        maps = np.where(inspected[..., None], maps, queries[0]).astype(dtype)
    maps[~np.isfinite(maps)] = 0
    return queries, maps


def plain(xq: Floats, maps: Stored, inspected: Bools, searched: Bools, neighbors: Ints, kappa: int, radius: int) -> Hits:
    """The definition, location by location; what is not searched for has found nothing."""
    n, xb = len(xq), maps.astype(np.float32)
    hits = Hits(
        np.full((n, LOCATIONS, kappa), np.inf, np.float32), np.full((n, LOCATIONS), -1), np.zeros((n, LOCATIONS), np.int64)
    )
    for image, query in np.argwhere(searched).tolist():
        y, x = divmod(query, WIDTH)
        for reach in range(radius, WIDTH + 1):
            window = [v * WIDTH + u for v, u in np.ndindex(HEIGHT, WIDTH) if max(abs(v - y), abs(u - x)) <= reach]
            places = [(row, at) for row in sorted(neighbors[image].tolist()) for at in window if inspected[row, at]]
            if len(places) >= kappa:
                break
        if not places:
            continue
        x_of = np.stack([xb[place] for place in places])
        sq_dist = kernel_sq_dist(xq[image, query][None], x_of, np.zeros(len(places), np.int64), np.arange(len(places)))
        order = np.argsort(sq_dist, kind="stable")[:kappa]
        hits.sq_dist[image, query, : len(order)] = sq_dist[order]
        hits.row[image, query], hits.location[image, query] = places[order[0]]
    return hits


NEIGHBORS = np.array([[3, 0, 4, 1], [2, 5, 3, 0]])


@by_each_engine
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_what_is_inspected(engine: Any, kind: str, region: str) -> None:
    inspected = regions(region)
    searched = np.stack([inspected[5], np.ones(LOCATIONS, np.bool_)])
    for dtype, radius, kappa in ((np.float16, 1, 1), (np.float32, 3, 3), (np.float16, 0, 2)):
        xq, maps = maps_of(kind, 24, dtype, inspected)
        expected = plain(xq, maps, inspected, searched, NEIGHBORS, kappa, radius)
        for threads in (1, 3):
            search = search_by(engine, blocks_of(maps, inspected), radius, threads)
            reach = search.reach(search.held(NEIGHBORS), searched, kappa)
            assert_same_hits(search.within(xq, NEIGHBORS, kappa, reach), expected)
        everywhere = plain(xq, maps, inspected, np.ones_like(searched), NEIGHBORS, kappa, radius)
        assert_same_hits(search(xq, NEIGHBORS, kappa), everywhere)


@by_each_engine
def test_the_whole_map_is_no_region(engine: Any) -> None:
    """To the bit what is found where images have none."""
    every = np.ones((IMAGES, LOCATIONS), np.bool_)
    xq, maps = maps_of("white", 40, np.float16, every)
    level = Level("level", 40, stride=1, height=HEIGHT, width=WIDTH)
    expected = engine(Blocks(level, ArraySource(maps)), Workers(2), 2)(xq, NEIGHBORS, 3)
    assert_same_hits(search_by(engine, blocks_of(maps, every), 2)(xq, NEIGHBORS, 3), expected)


@by_each_engine
def test_many_images_rule_out_by_codes(engine: Any) -> None:
    """With and without room for codes, and with windows that are wider than what most need."""
    rng = np.random.default_rng(9)
    inspected = np.tile(regions("discs"), (5, 1))
    maps = rng.normal(0, 1, (len(inspected), LOCATIONS, 17)).astype(np.float32)
    xq = rng.normal(0, 1, (1, LOCATIONS, 17)).astype(np.float32)
    neighbors = rng.permutation(len(maps))[None]
    searched = np.ones((1, LOCATIONS), np.bool_)
    expected = plain(xq, maps, inspected, searched, neighbors, 2, 1)
    for capacity in (0, 1 << 20):
        assert_same_hits(search_by(engine, blocks_of(maps, inspected, capacity), 1)(xq, neighbors, 2), expected)


@by_each_engine
def test_fewer_vectors_than_kappa_are_not_made_up(engine: Any) -> None:
    """One cell in each of four images: the fifth distance is infinite, which who asks refuses."""
    inspected = regions("one cell")
    xq, maps = maps_of("white", 24, np.float32, inspected)
    hits = search_by(engine, blocks_of(maps, inspected), 1)(xq, NEIGHBORS, 5)
    assert np.isfinite(hits.sq_dist[..., :4]).all()
    assert np.isinf(hits.sq_dist[..., 4]).all()


@by_each_engine
def test_a_gallery_may_be_searched_in_parts(engine: Any) -> None:
    """As owners of shards do: what is held is a sum, and windows reach as far in each part."""
    inspected = regions("discs")
    xq, maps = maps_of("white", 24, np.float32, inspected)
    search = search_by(engine, blocks_of(maps, inspected), 0)
    left, right = NEIGHBORS[:, :2], NEIGHBORS[:, 2:]
    searched = np.ones((2, LOCATIONS), np.bool_)
    np.testing.assert_array_equal(search.held(NEIGHBORS), search.held(left) + search.held(right))
    reach = search.reach(search.held(NEIGHBORS), searched, 3)
    parts = [search.within(xq, part, 3, reach).sq_dist for part in (left, right)]
    together = np.sort(np.concatenate(parts, axis=2), axis=2)[..., :3]
    np.testing.assert_array_equal(together, search(xq, NEIGHBORS, 3).sq_dist)


def test_reach_by_hand() -> None:
    held = np.zeros((1, 3, 5), np.int64)
    held[0, 1, 0], held[0, 0, 4] = 1, 2
    inspected = np.ones((1, 3, 5), np.bool_)
    inspected[0, 2, 2] = False
    assert reach_of(held, inspected, 0, 1)[0].tolist() == [[1, 1, 2, 1, 0], [0, 1, 2, 1, 1], [1, 1, -1, 2, 2]]
    assert reach_of(held, inspected, 1, 3)[0].tolist() == [[4, 3, 2, 3, 4], [4, 3, 2, 3, 4], [4, 3, -1, 3, 4]]
    # Nowhere are there four.
    assert reach_of(held, inspected, 2, 4)[0, 0].tolist() == [4] * 5
    assert reach_of(held, inspected, 7, 4)[0, 0].tolist() == [7] * 5


def test_reach_is_the_least_that_holds_enough() -> None:
    rng = np.random.default_rng(2)
    held = (rng.random((3, HEIGHT, WIDTH)) < 0.06).astype(np.int64) * rng.integers(1, 4, (3, HEIGHT, WIDTH))
    inspected = rng.random(held.shape) < 0.7

    def count(image: int, y: int, x: int, reach: int) -> int:
        return int(held[image, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].sum())

    for radius, kappa in ((0, 1), (1, 2), (3, 5)):
        reach = reach_of(held, inspected, radius, kappa)
        assert (reach[~inspected] == -1).all()
        assert (reach > radius).any()
        for image, y, x in np.argwhere(inspected).tolist():
            least = next(far for far in range(radius, WIDTH) if count(image, y, x, far) >= kappa or far == WIDTH - 1)
            assert reach[image, y, x] == least


@needs_kernel
def test_bad_arguments_are_refused() -> None:
    native = import_native()
    gallery = native.Gallery(2, 3, [([np.zeros((6, 4), np.float32)], None, None)])
    coding, some = (native.WindowCoding(HERE[0], np.zeros(4, np.float32), 1.0, *size) for size in ((2, 3), (3, 4, [*range(6)])))
    with pytest.raises(ValueError, match="inside must be"):
        native.WindowCodes(coding, gallery, 0, np.ones(5, np.bool_))
    for of, reach, message in (
        (coding, np.zeros((1, 5), np.int32), "reach must be"),
        (coding, np.zeros(6, np.int32), "reach must be"),
        (some, np.zeros((1, 6), np.int32), "without cells"),
    ):
        codes = [native.WindowCodes(of, gallery, 0)]
        found = np.full((1, 6, 1), np.inf, np.float32), np.full((1, 6, 1), -1, np.int64)
        queries, wanted = np.zeros((6, 4), np.float32), np.ones((1, 1), np.bool_)
        with pytest.raises(ValueError, match=message):
            native.search_windows(gallery, np.array([0]), of, codes, wanted, queries, (0, 6), 1, *found, reach)


@by_each_engine
@pytest.mark.parametrize("kappa", [1, 4])
def test_working_bytes_are_an_upper_bound(engine: Any, kappa: int) -> None:
    """Also where most windows are widened to half of the map, as far as memory is allocated by Python and NumPy."""
    rng, (height, width) = np.random.default_rng(1), (29, 31)
    inspected = np.zeros((6, height, width), np.bool_)
    inspected[:, :3, :3] = True
    maps = rng.normal(0, 1, (6, height * width, 24)).astype(np.float32)
    level = Level("level", 24, stride=1, height=height, width=width)
    blocks = Blocks(level, OwnSource(maps, inspected.reshape(6, -1)), BlockCache(1 << 20))
    search = search_by(engine, blocks, 1)
    xq = rng.normal(0, 1, (2, height * width, 24)).astype(np.float32)
    search(xq, NEIGHBORS, kappa)  # makes what is made once
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        search(xq, NEIGHBORS, kappa)
        taken = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert taken <= search.working_bytes(2, 4, kappa)
