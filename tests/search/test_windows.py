"""Windows by the kernel and by NumPy find the same: the kernel's own distances, the smallest of each window, to the bit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.settings import ALL, Method, Run
from spade_faiss.features.batch import Level
from spade_faiss.search import location
from spade_faiss.search.blocks import ArraySource, Blocks
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
by_each_engine = pytest.mark.parametrize("engine", [pytest.param(WindowSearch, marks=needs_kernel), BlockWindowSearch])


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
    """Windows know no SIMD level: there is one order of adding up, which all levels share."""
    xq, maps = maps_of("near duplicates", 130, np.float16)
    neighbors = np.array([[3, 0, 4, 1], [2, 3, 1, 0]])
    found = WindowSearch(blocks_of(maps), Workers(2), WIDTH)(xq, neighbors, 3)
    for simd_level in [level for level in SIMD_LEVELS if not why_not()[level]]:
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
    expected = WindowSearch(blocks_of(maps), Workers(2), 2)(xq, neighbors, 2)
    monkeypatch.setattr(windows, "_GROUP_BYTES", size * blocks_of(maps).block_bytes)
    assert_same_hits(WindowSearch(blocks_of(maps), Workers(2), 2)(xq, neighbors, 2), expected)


@needs_kernel
def test_bad_arguments_are_refused() -> None:
    native = import_native()
    gallery = native.Gallery(2, 3, [([np.zeros((6, 4), np.float32)] * 2, None, None)])

    def search(**changes: object) -> None:
        arguments: dict[str, object] = {
            "rows": np.array([5, 7]),
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
        ({"rows": np.array([5])}, "a row for each image"),
        ({"rows": np.array([5, -1])}, "rows must be those of a bank"),
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
