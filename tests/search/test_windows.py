"""Windows by the kernel and by NumPy find the same: the kernel's own distances, the smallest of each window, to the bit."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.declaring import ALL
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.batch import Level
from spade_faiss.search import location
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.engines import windows
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.engines.windows import WindowSearch
from spade_faiss.search.location import BlockWindowSearch
from spade_faiss.search.native.extension import SIMD_LEVELS, import_native, usable_simd_level, why_not
from spade_faiss.search.native.sums import kernel_sq_dist
from spade_faiss.search.protocol import GallerySearch, Hits
from spade_faiss.search.recipe import load_recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import assert_same_hits
from tests.support.hostile_vectors import KINDS, hostile
from tests.support.oracle import bank_of, batch_of, product

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Stored = npt.NDArray[np.floating[Any]]

HEIGHT, WIDTH = 7, 11
LOCATIONS = HEIGHT * WIDTH

needs_kernel = pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")
HERE = [level for level in SIMD_LEVELS if not why_not()[level]]
by_each_engine = pytest.mark.parametrize(
    "engine",
    [
        *(pytest.param(partial(WindowSearch, simd_level=level), id=level, marks=needs_kernel) for level in HERE),
        BlockWindowSearch,
    ],
)


def rounded(exact: Fraction) -> np.float32:
    """The float32 number that is nearest; of two, the one whose last bit is 0."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.int32)) & 1))


def by_hand(q: Floats, x: Floats) -> np.float32:
    """The kernel's squared distance, number by number: 32 lanes of sums that are rounded once a term, added up pairwise."""
    lanes = [np.float32(0)] * 32
    for c, difference in enumerate(q - x):
        lanes[c % 32] = rounded(Fraction(float(difference)) ** 2 + Fraction(float(lanes[c % 32])))
    eight = [(lanes[i] + lanes[i + 16]) + (lanes[i + 8] + lanes[i + 24]) for i in range(8)]
    four = [eight[i] + eight[i + 4] for i in range(4)]
    return np.float32((four[0] + four[2]) + (four[1] + four[3]))


@pytest.mark.parametrize("d", [1, 15, 32, 100])
def test_sums_are_those_of_the_definition(d: int) -> None:
    rng = np.random.default_rng(d)
    # Differences of a few bits, of very different sizes: many sums lie half way between two numbers, or next to that.
    x = (rng.integers(-(2**12), 2**12, (40, d)) * 2.0 ** rng.integers(-13, 3, (40, d))).astype(np.float32)
    q = np.zeros((1, d), np.float32)
    found = kernel_sq_dist(q, x, np.zeros(40, np.int64), np.arange(40))
    np.testing.assert_array_equal(found, [by_hand(q[0], row) for row in x])


def test_a_sum_is_rounded_once() -> None:
    """4097 squared lies half way between two float32 numbers. What is added is too little for float64, and still says: up."""
    x = np.zeros((1, 33), np.float32)
    x[0, 0], x[0, 32] = 2.0**-20, 4097
    assert 4097.0**2 + 2.0**-40 == 4097.0**2
    found = kernel_sq_dist(np.zeros_like(x), x, np.zeros(1, np.int64), np.zeros(1, np.int64))
    assert found[0] == 4097**2 + 1
    assert np.float32(4097.0**2) == 4097**2 - 1


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [3, 24, 40, 130])
def test_sums_are_those_of_the_kernel(kind: str, d: int) -> None:
    xq, xb = hostile(kind, d)
    gallery = import_native().Gallery(1, 1, [([row[None] for row in xb], None, None)])
    every = np.tile(np.arange(len(xb)), (len(xq), 1))
    found = kernel_sq_dist(xq, xb, np.repeat(np.arange(len(xq)), len(xb)), every.ravel())
    np.testing.assert_array_equal(found, gallery.sq_distances(xq, every).ravel())


def maps_of(kind: str, d: int, dtype: type[np.floating[Any]]) -> tuple[Floats, Stored]:
    """Two test images and five normal ones (n, HW, C) of hard vectors; a normal image stands twice, another in the tests."""
    xq, xb = hostile(kind, d)
    with np.errstate(over="ignore"):
        maps = np.stack([xb[:77], xb[77:154], xb[126:], xb[77:154], xq[::-1]]).astype(dtype)
    maps[~np.isfinite(maps)] = 0
    maps[0, 5:9] = maps[0, 4]  # ties within a map
    return np.stack([xq, maps[1].astype(np.float32)]), maps


def blocks_of(maps: Stored, height: int = HEIGHT, width: int = WIDTH) -> Blocks:
    return Blocks(Level("level", maps.shape[2], stride=1, height=height, width=width), ArraySource(maps))


def plain(xq: Floats, maps: Stored, neighbors: Ints, kappa: int, radius: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Hits:
    """The definition, location by location: all distances of a window, sorted; equal ones by row, then by location."""
    n, locations, _ = xq.shape
    xb = maps.astype(np.float32)
    hits = Hits(
        np.empty((n, locations, kappa), np.float32), np.empty((n, locations), np.int64), np.empty((n, locations), np.int64)
    )
    for image, (y, x) in ((image, at) for image in range(n) for at in np.ndindex(*size)):
        window = [v * size[1] + u for v, u in np.ndindex(*size) if abs(v - y) <= radius and abs(u - x) <= radius]
        places = [(row, at) for row in sorted(neighbors[image].tolist()) for at in window]
        query = y * size[1] + x
        x_of = np.stack([xb[place] for place in places])
        sq_dist = kernel_sq_dist(xq[image, query][None], x_of, np.zeros(len(places), np.int64), np.arange(len(places)))
        order = np.argsort(sq_dist, kind="stable")[:kappa]
        hits.sq_dist[image, query] = sq_dist[order]
        hits.row[image, query], hits.location[image, query] = places[order[0]]
    return hits


@by_each_engine
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_hard_vectors(engine: Any, kind: str, dtype: type[np.floating[Any]]) -> None:
    xq, maps = maps_of(kind, 24, dtype)
    neighbors = np.array([[3, 0, 4, 1], [2, 3, 1, 0]])
    for radius, kappa in ((1, 1), (3, 5)):
        expected = plain(xq, maps, neighbors, kappa, radius)
        for threads in (1, 3):
            search: GallerySearch = engine(blocks_of(maps), Workers(threads), radius)
            assert_same_hits(search(xq, neighbors, kappa), expected)


@by_each_engine
@pytest.mark.parametrize("size", [(7, 11), (11, 7), (1, 77), (77, 1)])
@pytest.mark.parametrize(("radius", "kappa"), [(0, 1), (0, 4), (2, 3), (6, 1), (50, 7), (10**9, 1)])
def test_windows_of_any_size(engine: Any, size: tuple[int, int], radius: int, kappa: int) -> None:
    """Also those that are wider than the map, and of vectors that fill no register."""
    for d in (1, 9, 130):
        xq, maps = maps_of("white", d, np.float16)
        xq[1, :9] = maps[0, :9].astype(np.float32)
        neighbors = np.array([[3, 0, 4, 1], [2, 3, 1, 0]])
        search: GallerySearch = engine(blocks_of(maps, *size), Workers(2), radius)
        assert_same_hits(search(xq, neighbors, kappa), plain(xq, maps, neighbors, kappa, radius, size))


@needs_kernel
def test_a_window_of_everything_is_exact_search_on_every_simd_level() -> None:
    """There is one order of adding up, which all levels share."""
    xq, maps = maps_of("near duplicates", 130, np.float16)
    neighbors = np.array([[3, 0, 4, 1], [2, 3, 1, 0]])
    for simd_level in HERE:
        found = WindowSearch(blocks_of(maps), Workers(2), WIDTH, simd_level)(xq, neighbors, 3)
        assert_same_hits(NativeSearch(blocks_of(maps), Workers(2), simd_level)(xq, neighbors, 3), found)


@by_each_engine
def test_what_is_no_number_is_not_found(engine: Any) -> None:
    xq, maps = maps_of("white", 40, np.float32)
    xq[0, 30, 7] = np.nan
    maps[1, 12, 39] = np.nan
    neighbors = np.array([[1, 0], [1, 4]])
    hits = engine(blocks_of(maps), Workers(2), 0)(xq, neighbors, 1)
    assert (hits.sq_dist[0, 30, 0], hits.row[0, 30], hits.location[0, 30]) == (np.inf, -1, 0)
    assert (hits.row[:, 12] == [0, 4]).all()
    assert np.isfinite(np.delete(hits.sq_dist, 30, axis=1)).all()


@by_each_engine
def test_distances_beyond_float32_are_infinite(engine: Any) -> None:
    """They are found where there is nothing nearer, and the first of them is named."""
    maps = np.full((3, 6, 24), 3e19, np.float32)
    maps[1, 4] = 1
    xq, neighbors = np.zeros((1, 6, 24), np.float32), np.array([[2, 1]])
    hits = engine(blocks_of(maps, 2, 3), Workers(1), 1)(xq, neighbors, 1)
    assert hits.sq_dist[0, :, 0].tolist() == [24.0] * 6
    hits = engine(blocks_of(maps, 2, 3), Workers(1), 0)(xq, neighbors, 1)
    assert hits.sq_dist[0, :, 0].tolist() == [np.inf] * 4 + [24.0, np.inf]
    assert hits.row[0].tolist() == [1] * 6
    assert hits.location[0].tolist() == [*range(6)]


@needs_kernel
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_groups_of_images_are_one_search(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    xq, maps = maps_of("white", 24, np.float16)
    neighbors = np.array([[3, 0, 4], [2, 3, 1]])
    search = partial(WindowSearch, radius=2, simd_level=HERE[0])
    expected = search(blocks_of(maps), Workers(2))(xq, neighbors, 2)
    monkeypatch.setattr(windows, "_GROUP_BYTES", size * blocks_of(maps).block_bytes)
    assert_same_hits(search(blocks_of(maps), Workers(2))(xq, neighbors, 2), expected)


@needs_kernel
@pytest.mark.parametrize("simd_level", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_rule_nothing_out_that_is_nearest(kind: str, simd_level: str) -> None:
    """Of many images, whose nearest vectors codes can hardly tell apart; a bound without what rounding loses misses some."""
    xq, xb = hostile(kind, 24)
    rng = np.random.default_rng(3)
    with np.errstate(over="ignore", invalid="ignore"):
        maps = np.stack([xb[rng.permutation(len(xb))[:LOCATIONS]] for _ in range(40)])
        maps += rng.normal(0, 1e-3, maps.shape).astype(np.float32) * np.abs(maps)
    maps = np.clip(np.nan_to_num(maps), -1e15, 1e15)
    neighbors = np.tile(rng.permutation(40), (2, 1))
    search = WindowSearch(blocks_of(maps), Workers(1), 2, simd_level)
    queries = np.stack([xq, xq[::-1]])
    assert_same_hits(search(queries, neighbors, 2), BlockWindowSearch(blocks_of(maps), Workers(2), 2)(queries, neighbors, 2))


@needs_kernel
@pytest.mark.parametrize("simd_level", HERE)
def test_a_bound_that_is_too_tight_misses_some(simd_level: str) -> None:
    """Half of what rounding loses is not enough: the bound is what the results depend on."""
    native, rng = import_native(), np.random.default_rng(4)
    # Of one channel, so that what rounding loses of a query and of a vector may add up. Most vectors are further away.
    maps = rng.uniform(39.5, 40.5, (200, LOCATIONS, 1)).astype(np.float32)
    maps[rng.random(maps.shape) < 0.9] += 20
    queries = rng.uniform(0, 1, (LOCATIONS, 1)).astype(np.float32)
    gallery = native.Gallery(HEIGHT, WIDTH, [(list(maps), None, None)])

    def found(margin: float) -> tuple[Floats, Ints]:
        coding = native.WindowCoding(simd_level, np.zeros(1, np.float32), 1.0, HEIGHT, WIDTH)
        codes = [native.WindowCodes(coding, gallery, image) for image in range(len(maps))]
        sq_dist, ids = np.full((1, LOCATIONS, 1), np.inf, np.float32), np.full((1, LOCATIONS, 1), -1, np.int64)
        rows, wanted = np.arange(len(maps)), np.ones((len(maps), 1), np.bool_)
        arguments = (gallery, rows, coding, codes, wanted, queries, (0, LOCATIONS), 2, sq_dist, ids)
        native.search_windows(*arguments, margin=margin)
        return sq_dist, ids

    sq_dist, ids = found(1)
    expected = BlockWindowSearch(blocks_of(maps), Workers(2), 2)(queries[None], np.arange(len(maps))[None], 1)
    np.testing.assert_array_equal(sq_dist, expected.sq_dist)
    np.testing.assert_array_equal(ids[..., 0], expected.row * LOCATIONS + expected.location)
    assert (found(0.5)[0] > sq_dist).any()


@needs_kernel
def test_codes_are_made_once_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = WindowSearch._make

    def counted(self: WindowSearch, row: int) -> Any:
        made.append(row)
        return make(self, row)

    monkeypatch.setattr(WindowSearch, "_make", counted)
    xq, maps = maps_of("white", 24, np.float16)
    neighbors = np.array([[3, 0, 4], [2, 3, 1]])
    level = Level("level", 24, stride=1, height=HEIGHT, width=WIDTH)

    def rows_made(capacity: int) -> list[int]:
        made.clear()
        search = WindowSearch(Blocks(level, ArraySource(maps), BlockCache(capacity)), Workers(2), 2, HERE[0])
        assert_same_hits(search(xq, neighbors, 2), search(xq, neighbors, 2))
        return sorted(made)

    assert rows_made(1 << 20) == [0, 1, 2, 3, 4]
    assert rows_made(0) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@needs_kernel
def test_searches_may_share_a_cache() -> None:
    """Each has codes of its own: those of another coding cannot be compared."""
    xq, maps = maps_of("white", 24, np.float16)
    neighbors = np.array([[3, 0, 4], [2, 3, 1]])
    blocks = Blocks(Level("level", 24, stride=1, height=HEIGHT, width=WIDTH), ArraySource(maps), BlockCache(1 << 20))
    for radius in (1, 2):
        found = WindowSearch(blocks, Workers(2), radius, HERE[0])(xq, neighbors, 2)
        assert_same_hits(found, BlockWindowSearch(blocks, Workers(2), radius)(xq, neighbors, 2))


@needs_kernel
def test_codes_that_the_cache_has_dropped_do_not_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of more images than there is room for holds what the cache does, and two groups: what --memory promises."""
    alive: set[int] = set()
    most = 0

    class Codes:
        nbytes = 100

        def __init__(self, row: int) -> None:
            nonlocal most
            self.row = row
            alive.add(row)
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(self.row)

    maps = np.zeros((40, LOCATIONS, 4), np.float32)
    monkeypatch.setattr(WindowSearch, "_make", lambda self, row: Codes(row))
    monkeypatch.setattr(windows, "_GROUP_BYTES", 2 * blocks_of(maps).block_bytes)
    level = Level("level", 4, stride=1, height=HEIGHT, width=WIDTH)
    search = WindowSearch(Blocks(level, ArraySource(maps), BlockCache(20 * Codes.nbytes)), Workers(1), 2, HERE[0])
    for rows in (np.arange(20), np.arange(40)):
        searched = [group.rows for group in search._groups(rows, np.ones((len(rows), 1), np.bool_))]
        np.testing.assert_array_equal(np.concatenate(searched), rows)
    assert most <= 20 + 2 * 2


@needs_kernel
def test_bad_arguments_are_refused() -> None:
    native = import_native()
    gallery = native.Gallery(2, 3, [([np.zeros((6, 4), np.float32)] * 2, None, None)])
    coding, other = (native.WindowCoding(HERE[0], np.zeros(4, np.float32), step, 2, 3) for step in (1.0, 2.0))
    codes = native.WindowCodes(coding, gallery, 0)

    def search(**changes: object) -> None:
        arguments: dict[str, object] = {
            "rows": np.array([1, 0]),
            "coding": coding,
            "codes": [codes, codes],
            "wanted": np.ones((2, 1), np.bool_),
            "queries": np.zeros((6, 4), np.float32),
            "range": (1, 4),
            "radius": 1,
            "sq_dist": np.full((1, 3, 2), np.inf, np.float32),
            "id": np.full((1, 3, 2), -1, np.int64),
        }
        native.search_windows(gallery, **(arguments | changes))

    search()
    read_only = np.full((1, 3, 2), -1, np.int64)
    read_only.flags.writeable = False
    for changes, message in (
        ({"rows": np.empty(0, np.int64)}, "rows must be"),
        ({"codes": [codes]}, "codes for each row"),
        ({"codes": [codes, native.WindowCodes(other, gallery, 1)]}, "by this coding"),
        ({"coding": other}, "by this coding"),
        ({"rows": np.array([0, -1])}, "rows must be images"),
        ({"rows": np.array([0, 2])}, "rows must be images"),
        ({"wanted": np.ones((1, 2), np.bool_)}, "wanted must be"),
        ({"queries": np.zeros((5, 4), np.float32)}, "queries must be"),
        ({"queries": np.zeros((6, 3), np.float32)}, "queries must be"),
        ({"queries": np.zeros((6, 4), np.float16)}, "queries must be"),
        ({"range": (2, 2)}, "the range"),
        ({"range": (0, 7)}, "the range"),
        ({"radius": -1}, "radius"),
        ({"sq_dist": np.zeros((1, 3, 2))}, "sq_dist must be"),
        ({"sq_dist": np.zeros((1, 2, 2), np.float32)}, "sq_dist must be"),
        ({"id": np.zeros((1, 3, 1), np.int64)}, "id must be"),
        ({"id": read_only}, "id must be"),
    ):
        with pytest.raises(ValueError, match=message):
            search(**changes)


# In a detector


@needs_kernel
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("k_gallery", [3, ALL])
def test_scores_are_the_same_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, k_gallery: int | str
) -> None:
    """Of queries, and of the bank's own images, each without itself; in levels of a bank, and in those that are joined."""
    shapes = {"fine": (9, 8, 16), "mid": (5, 6, 8), "coarse": (3, 2, 12)}
    bank_of(tmp_path / "bank", product(1, 12, shapes, 6), input_size=(36, 32), shards=[5, 4], dtype=dtype)
    bank = Bank.open(tmp_path / "bank")
    bank.remove([bank.ids[3]])
    method = Method(k_image=2, k_gallery=k_gallery, levels=("fine", "mid+coarse"), kappa=2)
    queries = batch_of(product(2, 3, shapes, 6, defect=True), ["a", "b", "c"])

    def scores() -> list[Any]:
        recipe = load_recipe("location").with_query({"radius": "1"})
        detector = Detector.open(bank.path, recipe=recipe, method=method, run=Run(device="cpu"))
        return [detector.score_features(queries), detector.score_rows(range(len(bank)))]

    by_kernel = scores()
    monkeypatch.setattr(location, "usable_simd_level", lambda channels: None)
    for found, expected in zip(scores(), by_kernel, strict=True):
        np.testing.assert_array_equal(found.maps, expected.maps)
        for name in expected.level_dist:
            np.testing.assert_array_equal(found.level_dist[name], expected.level_dist[name])
            np.testing.assert_array_equal(found.nearest[name], expected.nearest[name])
