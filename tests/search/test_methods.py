"""Ways of searching the neighbors' maps, each by itself and behind the detector, against brute force in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spade_faiss import Detector
from spade_faiss.core.arrays import Arrays
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.batch import Level
from spade_faiss.index.build import build_index
from spade_faiss.search import compact, location
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.compact import CompactSearch, project
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.location import window_of
from spade_faiss.search.protocol import GallerySearch, Hits, ResolvedRecipe, resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe
from spade_faiss.search.workers import Workers
from tests.support.oracle import Features, bank_of, batch_of, names, product, sq_distances
from tests.support.searches import CountingSource

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Shape = tuple[int, int, int]

EXACT = Recipe(name="exact")
FAISS = Recipe(name="exact-by-faiss", query=Query(settings={"engine": "faiss"}))
LOCATION = Recipe(name="location", build=Build(gallery="location"), query=Query(settings={"radius": 2}))
IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 8}), query=Query(settings={"nprobe": 2}))
COMPACT = Recipe(name="compact", build=Build(gallery="compact", settings={"dims": 4}), query=Query(settings={"rerank": 3}))
HISTORY = Recipe(name="history", build=Build(gallery="history", settings={"lists": 3}), query=Query(settings={"nprobe": 1}))
# Those that search each test image's own neighbors, and all.
RECIPES = [EXACT, FAISS, LOCATION, IVF, COMPACT]
ALL = [*RECIPES, HISTORY]
KEEPING = [IVF, COMPACT, HISTORY]


def by_name(recipes: Sequence[Recipe]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recipe", recipes, ids=lambda recipe: recipe.name)


def built(recipe: Recipe, **changes: int) -> Recipe:
    return replace(recipe, build=replace(recipe.build, settings={**recipe.build.settings, **changes}))


def queried(recipe: Recipe, **changes: int) -> Recipe:
    return replace(recipe, query=replace(recipe.query, settings={**recipe.query.settings, **changes}))


@dataclass(frozen=True, eq=False)
class Case:
    """Maps (rows, H, W, C), test vectors (n, HW, C) and each test image's neighbors (n, K)."""

    maps: Floats
    xq: Floats
    neighbors: Ints

    @property
    def blocks(self) -> Floats:
        """(rows, HW, C)."""
        rows, height, width, channels = self.maps.shape
        return self.maps.reshape(rows, height * width, channels)

    @property
    def level(self) -> Level:
        _, height, width, channels = self.maps.shape
        return Level("level", channels, stride=1, height=height, width=width)


def case_of(seed: int = 1, n: int = 4, rows: int = 7, k: int = 5, shape: Shape = (5, 7, 16)) -> Case:
    """Images of one product, two of them equal, with near duplicates inside and between them."""
    shapes, rng = {"level": shape}, np.random.default_rng(seed)
    xq = product(seed + 1, n, shapes, 4, defect=True).levels["level"].reshape(n, -1, shape[2])
    return Case(product(seed, rows, shapes, 4).levels["level"], xq, np.stack([rng.permutation(rows)[:k] for _ in range(n)]))


@st.composite
def whole_cases(draw: st.DrawFn, channels: int = 4) -> Case:
    """Small whole numbers: squared distances are exact, so that equal means equal, and ties are everywhere."""
    n, rows, height, width = (draw(st.integers(1, most)) for most in (4, 6, 4, 4))
    k = draw(st.integers(1, rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = rng.integers(-3, 4, (rows, height, width, channels)).astype(np.float32)
    xq = rng.integers(-3, 4, (n, height * width, channels)).astype(np.float32)
    return Case(maps, xq, np.stack([rng.permutation(rows)[:k] for _ in range(n)]))


class Here:
    """What a method keeps, in memory."""

    def __init__(self, blocks: Blocks, chosen: ResolvedRecipe) -> None:
        train, encode = chosen.method.train, chosen.method.encode
        assert train is not None
        assert encode is not None
        self.trained: Arrays = train(blocks, chosen.build)
        self.rows = [encode(blocks.read(row), self.trained, chosen.build) for row in range(len(blocks))]
        self.asked: set[int] = set()
        for array in [array for arrays in (self.trained, *self.rows) for array in arrays.values()]:
            array.flags.writeable = False  # as views of a file are

    def __call__(self, row: int) -> Arrays:
        self.asked.add(row)
        return self.rows[row]


def search_of(recipe: Recipe, blocks: Blocks, threads: int = 2) -> GallerySearch:
    chosen = resolve_recipe(recipe)
    kept = Here(blocks, chosen) if chosen.method.train else None
    return chosen.method.open(blocks, Workers(threads), chosen.build, chosen.query, kept)


def search_in(case: Case, recipe: Recipe, threads: int = 2) -> GallerySearch:
    return search_of(recipe, Blocks(case.level, ArraySource(case.blocks)), threads)


def run(case: Case, recipe: Recipe, kappa: int = 1) -> Hits:
    return search_in(case, recipe)(case.xq, case.neighbors, kappa)


def brute(case: Case, kappa: int, radius: int | None = None) -> Doubles:
    """(n, HW, kappa) squared distances, ascending; within a window if there is one."""
    _, height, width, _ = case.maps.shape
    dist = np.empty((*case.xq.shape[:2], kappa))
    for image, rows in enumerate(case.neighbors):
        for at, (y, x) in enumerate(np.ndindex(height, width)):
            near = [radius is None or (abs(v - y) <= radius and abs(u - x) <= radius) for v, u in np.ndindex(height, width)]
            gallery = case.blocks[rows][:, near].reshape(-1, case.xq.shape[2])
            dist[image, at] = np.sort(sq_distances(gallery, case.xq[image, at]))[:kappa]
    return dist


def named(case: Case, hits: Hits) -> Doubles:
    """(n, HW) squared distances to the vectors that hits name."""
    found: Doubles = ((case.xq.astype(np.float64) - case.blocks[hits.row, hits.location]) ** 2).sum(axis=2)
    return found


def check(case: Case, hits: Hits, kappa: int) -> None:
    """What every search promises: true distances in order, to vectors of one's own neighbors."""
    n, queries, _ = case.xq.shape
    assert [values.dtype.name for values in (hits.sq_dist, hits.row, hits.location)] == ["float32", "int64", "int64"]
    assert (hits.sq_dist.shape, hits.row.shape, hits.location.shape) == ((n, queries, kappa), (n, queries), (n, queries))
    assert np.isfinite(hits.sq_dist).all()
    assert (np.diff(hits.sq_dist, axis=2) >= 0).all()
    assert hits.location.min() >= 0
    assert hits.location.max() < queries
    assert all(set(np.unique(rows)) <= set(line.tolist()) for rows, line in zip(hits.row, case.neighbors, strict=True))
    np.testing.assert_allclose(hits.sq_dist[..., 0], named(case, hits), rtol=1e-5, atol=1e-12)
    # Nothing is nearer than the nearest.
    assert (hits.sq_dist >= brute(case, kappa) * (1 - 1e-5)).all()


def equal(a: Hits, b: Hits) -> None:
    for name in ("sq_dist", "row", "location"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.fixture
def faiss_threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads FAISS may use; the number before is put back."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    yield faiss.omp_set_num_threads
    faiss.omp_set_num_threads(before)


# Every way of searching


@by_name(RECIPES)
@pytest.mark.parametrize("shape", [(5, 7, 16), (7, 3, 40), (1, 9, 16)])
@pytest.mark.parametrize("kappa", [1, 3, 20])
def test_distances_are_true(recipe: Recipe, shape: Shape, kappa: int) -> None:
    case = case_of(shape=shape)
    recipe = queried(recipe, radius=4) if recipe is LOCATION else recipe  # wide enough for the largest kappa
    check(case, run(case, recipe, kappa), kappa)


@by_name([EXACT, IVF, COMPACT])
def test_every_vector_of_the_gallery_can_be_asked_for(recipe: Recipe) -> None:
    """Past those of one block, and past those of the lists that are searched."""
    case = case_of(n=2, shape=(2, 3, 16))
    for kappa in (6, 7, 29, 30):
        hits = run(case, recipe, kappa)
        check(case, hits, kappa)
    np.testing.assert_allclose(hits.sq_dist, brute(case, 30), rtol=2e-4)


@by_name(ALL)
@pytest.mark.parametrize("kappa", [1, 3])
def test_an_image_does_not_depend_on_its_batch(recipe: Recipe, kappa: int) -> None:
    case = case_of(seed=3, n=6, rows=9, k=6)
    search = search_in(case, recipe)
    together = search(case.xq, case.neighbors, kappa)
    for start, end in [(image, image + 1) for image in range(6)] + [(0, 4), (4, 6)]:
        part = slice(start, end)
        alone = search(case.xq[part], case.neighbors[part], kappa)
        equal(alone, Hits(together.sq_dist[part], together.row[part], together.location[part]))


@by_name(ALL)
@pytest.mark.parametrize("kappa", [1, 3])
def test_the_order_of_neighbors_does_not_matter(recipe: Recipe, kappa: int) -> None:
    case = case_of(seed=5, n=3, rows=13, k=12)
    shuffled = np.random.default_rng(0).permuted(case.neighbors, axis=1)
    search = search_in(case, recipe)
    expected = search(case.xq, case.neighbors, kappa)
    for other in (shuffled, case.neighbors[:, ::-1]):
        equal(search(case.xq, other, kappa), expected)


@by_name(ALL)
def test_the_number_of_threads_does_not_matter(recipe: Recipe, faiss_threads: Callable[[int], None]) -> None:
    """Neither that of the workers nor that which FAISS would use by itself."""
    case = case_of(seed=6, n=5, rows=9, k=7, shape=(19, 20, 40))
    blocks, chosen = Blocks(case.level, ArraySource(case.blocks)), resolve_recipe(recipe)
    kept = Here(blocks, chosen) if chosen.method.train else None
    found = []
    for threads in (1, 2, 5):
        faiss_threads(threads)
        search = chosen.method.open(blocks, Workers(threads), chosen.build, chosen.query, kept)
        found.append(search(case.xq, case.neighbors, 3))
    for other in found[1:]:
        equal(other, found[0])


@by_name(RECIPES)
@given(case=whole_cases(), data=st.data())
@settings(max_examples=40)
def test_ties_between_images_go_to_the_smaller_row(recipe: Recipe, case: Case, data: st.DataObject) -> None:
    """Vectors that are equal to the bit, in several images: of those, the one with the smallest row is named."""
    assume(case.maps.size > case.maps.shape[3])  # a single vector in all is not enough to learn from
    maps = case.maps.copy()
    for copy in range(1, len(maps)):
        maps[copy] = maps[data.draw(st.integers(0, copy))]
    case = Case(maps, case.xq, case.neighbors)
    recipe = built(recipe, lists=1) if recipe is IVF else built(recipe, dims=2) if recipe is COMPACT else recipe
    kappa = data.draw(st.integers(1, min(3, case.neighbors.shape[1])))
    hits = run(case, queried(recipe, rerank=kappa) if recipe.build.gallery == "compact" else recipe, kappa)
    for image, query in np.ndindex(hits.row.shape):
        found = case.blocks[hits.row[image, query], hits.location[image, query]]
        holding = [row for row in case.neighbors[image] if (case.blocks[row, hits.location[image, query]] == found).all()]
        assert hits.row[image, query] == min(holding)


def smooth(seed: int, rows: int, shape: Shape) -> Floats:
    """Maps that change slowly from place to place and from image to image, without near duplicates."""
    rng = np.random.default_rng(seed)
    height, width, channels = shape
    y, x = np.mgrid[:height, :width][..., None] / 3
    phase, mix = rng.uniform(0, 6, (rows, 1, 1, 4)), np.random.default_rng(0).normal(size=(8, channels))
    waves = [np.sin(y * [1, 2, 1.5, 0.5] + phase), np.cos(x * [2, 1, 0.7, 1.2] + phase[..., ::-1])]
    noise = 0.1 * rng.normal(size=(rows, *shape))
    return (np.concatenate(waves, axis=-1) @ mix + 3 + noise).astype(np.float32)


@by_name([EXACT, LOCATION, queried(IVF, nprobe=1), queried(COMPACT, rerank=1), HISTORY])
@pytest.mark.parametrize("shape", [(6, 9, 16), (14, 14, 40)])
def test_an_image_of_the_gallery_is_found_at_distance_zero(recipe: Recipe, shape: Shape) -> None:
    maps = smooth(1, 8, shape)
    neighbors = np.array([[5, 1, 0], [7, 6, 2]])
    case = Case(maps, maps[[1, 2]].reshape(2, -1, shape[2]), neighbors)
    hits = run(case, recipe, 2)
    assert not hits.sq_dist[..., 0].any()
    assert (hits.row == np.array([[1], [2]])).all()
    np.testing.assert_array_equal(hits.location, np.tile(np.arange(shape[0] * shape[1]), (2, 1)))
    assert hits.sq_dist[..., 1].all()


@by_name(ALL)
def test_arguments_are_left_alone(recipe: Recipe) -> None:
    case = case_of(seed=7)
    given: list[npt.NDArray[Any]] = [case.maps, case.xq, case.neighbors]
    before = [array.copy() for array in given]
    for array in given:
        array.flags.writeable = False
    hits = run(case, recipe, 2)
    for array, copy in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, copy)
    returned: list[npt.NDArray[Any]] = [hits.sq_dist, hits.row, hits.location]
    for array in returned:
        assert array.flags.writeable
        assert not any(np.shares_memory(array, other) for other in given)


@by_name(ALL)
@pytest.mark.parametrize(("n", "threads", "shape"), [(3, 1, (5, 7, 16)), (3, 3, (5, 7, 16)), (6, 3, (30, 29, 40))])
def test_blocks_in_memory_that_is_used_again(recipe: Recipe, n: int, threads: int, shape: Shape) -> None:
    """Nothing of a block is looked at after the next one was decoded to its place: small visits, and ones that are spread."""
    case = case_of(seed=9, n=n, rows=12, k=12, shape=shape)
    halves = case.blocks.astype(np.float16)
    search = search_of(recipe, Blocks(case.level, ArraySource(halves), BlockCache()), threads)
    decoded = ArraySource(halves.astype(np.float32))
    expected = search_of(recipe, Blocks(case.level, decoded), threads)(case.xq, case.neighbors, 2)
    for _ in range(2):
        equal(search(case.xq, case.neighbors, 2), expected)


@by_name(RECIPES)
@pytest.mark.parametrize("stored", [False, True])
def test_only_what_was_asked_for_is_read(recipe: Recipe, stored: bool) -> None:
    case = case_of(seed=8, n=3, rows=9, k=3)
    neighbors = np.array([[0, 3, 5], [5, 3, 7], [3, 7, 0]])
    source = CountingSource(case.blocks, stored=stored)
    blocks, chosen = Blocks(case.level, source), resolve_recipe(recipe)
    kept = Here(blocks, chosen) if chosen.method.train else None
    search = chosen.method.open(blocks, Workers(2), chosen.build, chosen.query, kept)
    search(case.xq, neighbors, 1)  # what it learns of the bank, from whatever blocks, it learns once
    source.forget()
    search(case.xq, neighbors, 1)
    assert set(source.read_rows) | set(source.stored_rows) == {0, 3, 5, 7}
    assert set(source.released) == {0, 3, 5, 7}
    if kept is not None:
        assert kept.asked == {0, 3, 5, 7}
    if recipe is COMPACT and stored:
        assert source.read_rows == []  # a few vectors of a block are worth no more than their own reading


@by_name(ALL)
def test_memory_is_planned_for(recipe: Recipe) -> None:
    """What a call is said to need grows with what is asked of it, and covers at least what it returns."""
    search = search_in(case_of(), recipe)
    least = search.working_bytes(1, 1, 1)
    assert least > 0
    for more in ((2, 1, 1), (1, 1, 9)):
        assert search.working_bytes(*more) > least
    assert search.working_bytes(1, 12, 1) >= least
    assert search.working_bytes(3, 5, 2) > 3 * 35 * (2 * 4 + 8 + 8)


# Location


def test_a_window_by_hand() -> None:
    level = Level("level", 1, stride=1, height=2, width=3)
    assert window_of(level, 0).tolist() == [[0], [1], [2], [3], [4], [5]]
    # 0 1 2
    # 3 4 5
    assert [sorted(line) for line in window_of(level, 1).tolist()] == [
        [-1, -1, -1, -1, -1, 0, 1, 3, 4],
        [-1, -1, -1, 0, 1, 2, 3, 4, 5],
        [-1, -1, -1, -1, -1, 1, 2, 4, 5],
        [-1, -1, -1, -1, -1, 0, 1, 3, 4],
        [-1, -1, -1, 0, 1, 2, 3, 4, 5],
        [-1, -1, -1, -1, -1, 1, 2, 4, 5],
    ]
    for radius in (2, 3, 1000):
        assert [sorted(cell for cell in line if cell >= 0) for line in window_of(level, radius).tolist()] == [[*range(6)]] * 6
    # A window never has more cells than reach from one end of the map to the other.
    assert window_of(level, 10**9).shape == (6, 3 * 5)


@pytest.mark.parametrize("shape", [(5, 7, 6), (7, 4, 6), (1, 9, 6), (6, 1, 6)])
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("kappa", [1, 3])
def test_location_by_brute_force(shape: Shape, radius: int, kappa: int) -> None:
    case = case_of(seed=11, n=3, shape=shape)
    hits = run(case, queried(LOCATION, radius=radius), kappa)
    np.testing.assert_allclose(hits.sq_dist, brute(case, kappa, radius), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(hits.sq_dist[..., 0], named(case, hits), rtol=1e-5, atol=1e-12)
    (y, x), (v, u) = (np.divmod(places, shape[1]) for places in (np.arange(shape[0] * shape[1]), hits.location))
    assert np.abs(v - y).max() <= radius
    assert np.abs(u - x).max() <= radius


@given(whole_cases(), st.integers(0, 4), st.data())
def test_location_on_whole_numbers(case: Case, radius: int, data: st.DataObject) -> None:
    """Exactly the smallest, and of equal distances between images the smaller row's."""
    height, width = case.maps.shape[1:3]
    corner = min(radius + 1, height) * min(radius + 1, width)
    kappa = data.draw(st.integers(1, corner * case.neighbors.shape[1]))
    hits = run(case, queried(LOCATION, radius=radius), kappa)
    dist = brute(case, kappa, radius)
    np.testing.assert_array_equal(hits.sq_dist, dist)
    for row in np.unique(case.neighbors):
        # No row below the one that is named is as near.
        images, queries = np.nonzero(hits.row > row)
        for image, query in zip(images, queries, strict=True):
            if row in case.neighbors[image]:
                one = Case(case.maps, case.xq[image][None], np.array([[row]]))
                assert brute(one, 1, radius)[0, query, 0] > dist[image, query, 0]


@pytest.mark.parametrize("kappa", [1, 4])
def test_a_window_of_everything_finds_what_exact_finds(kappa: int) -> None:
    case = case_of(seed=12)
    everywhere = run(case, queried(LOCATION, radius=6), kappa)
    exact = run(case, EXACT, kappa)
    np.testing.assert_allclose(everywhere.sq_dist, exact.sq_dist, rtol=2e-4)
    assert (everywhere.sq_dist <= exact.sq_dist).all()  # to the bit: both are direct distances
    equal(run(case, queried(LOCATION, radius=10_000), kappa), everywhere)


def test_a_wider_window_never_raises_a_distance() -> None:
    case = case_of(seed=13)
    before = np.full((4, 35, 2), np.inf, np.float32)
    for radius in range(8):
        dist = run(case, queried(LOCATION, radius=radius), 2).sq_dist
        assert (dist <= before).all()
        before = dist


def test_parts_of_a_window_search_are_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(seed=14)
    expected = run(case, LOCATION, 3)
    for distances in (1, 60, 26 * 25):  # a query at a time, a few, not quite all
        monkeypatch.setattr(location, "_CALL_DISTANCES", distances)
        equal(run(case, LOCATION, 3), expected)


@pytest.mark.parametrize(("radius", "shape", "least"), [(0, (5, 7, 4), 5), (2, (5, 7, 4), 45), (3, (2, 7, 4), 40)])
def test_a_corner_that_holds_too_few(radius: int, shape: Shape, least: int) -> None:
    case = case_of(shape=shape)
    recipe = queried(LOCATION, radius=radius)
    assert np.isfinite(run(case, recipe, least).sq_dist).all()
    with pytest.raises(
        InputError, match=rf"kappa={least + 1} is larger .* corner, {least} vectors at level 'level'; raise radius"
    ):
        run(case, recipe, least + 1)


# Inverted lists


@pytest.mark.parametrize("k", [1, 4, 5, 6, 11, 12])
@pytest.mark.parametrize("kappa", [1, 3])
def test_all_lists_find_what_exact_finds(k: int, kappa: int) -> None:
    """Whatever number of blocks is put together: fewer than fit, as many, one more."""
    case = case_of(seed=21, n=3, rows=13, k=k)
    for nprobe in (8, 1000):
        hits = run(case, queried(IVF, nprobe=nprobe), kappa)
        np.testing.assert_allclose(np.sqrt(hits.sq_dist), np.sqrt(run(case, EXACT, kappa).sq_dist), rtol=1e-4)
        np.testing.assert_allclose(np.sqrt(hits.sq_dist), np.sqrt(brute(case, kappa)), rtol=1e-4)
        check(case, hits, kappa)


@given(whole_cases(), st.integers(1, 6), st.data())
@settings(max_examples=50)
def test_all_lists_on_whole_numbers(case: Case, lists: int, data: st.DataObject) -> None:
    queries, k = case.xq.shape[1], case.neighbors.shape[1]
    lists = min(lists, len(case.maps) * queries)
    kappa = data.draw(st.integers(1, k * queries))
    hits = run(case, queried(built(IVF, lists=lists), nprobe=lists), kappa)
    np.testing.assert_array_equal(hits.sq_dist, brute(case, kappa))


@given(whole_cases(), st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=50)
def test_few_lists_on_whole_numbers(case: Case, lists: int, nprobe: int, data: st.DataObject) -> None:
    """However few of the neighbors' vectors lie in them, each query gets as many as it asks for, with right distances."""
    queries, k = case.xq.shape[1], case.neighbors.shape[1]
    lists = min(lists, len(case.maps) * queries)
    kappa = data.draw(st.integers(1, k * queries))
    hits = run(case, queried(built(IVF, lists=lists), nprobe=nprobe), kappa)
    check(case, hits, kappa)
    every = brute(case, k * queries)
    for image, query in np.ndindex(hits.row.shape):
        # Each is the distance of another vector of the gallery.
        ours, counts = np.unique(hits.sq_dist[image, query], return_counts=True)
        assert all((every[image, query] == value).sum() >= count for value, count in zip(ours, counts, strict=True))


def test_lists_that_hold_nothing_of_the_neighbors_are_passed_over() -> None:
    """Every other list lies around the other images; a query next to those still finds all of its own gallery."""
    rng = np.random.default_rng(1)
    maps = rng.normal(0, 0.1, (6, 3, 4, 8)).astype(np.float32)
    maps[1:] += np.float32(10) * np.arange(1, 6, dtype=np.float32)[:, None, None, None]
    case = Case(maps, maps[4:6].reshape(2, 12, 8).copy(), np.array([[0], [1]]))
    for kappa in (1, 5, 12):
        hits = run(case, queried(built(IVF, lists=24), nprobe=1), kappa)
        check(case, hits, kappa)
    np.testing.assert_allclose(hits.sq_dist, brute(case, 12), rtol=1e-4)


def test_more_lists_find_nearer_vectors() -> None:
    case = case_of(seed=22, n=6, rows=9, k=6, shape=(9, 11, 16))
    exact = run(case, EXACT)
    dist = [run(case, queried(built(IVF, lists=16), nprobe=nprobe)).sq_dist for nprobe in (1, 2, 4, 8, 16)]
    for few, more in pairwise(dist):
        assert (more <= few * (1 + 1e-4)).all()
    means = [float(np.sqrt(values).mean()) for values in dist]
    assert means == sorted(means, reverse=True)
    # One list misses some, or this shows nothing; but not much.
    assert (dist[0] > exact.sq_dist * 1.01).mean() > 0.05
    assert means[0] < 1.5 * means[-1]


@given(whole_cases())
@settings(max_examples=30)
def test_what_is_kept_of_a_block_is_an_order_by_list(case: Case) -> None:
    blocks = Blocks(case.level, ArraySource(case.blocks))
    kept = Here(blocks, resolve_recipe(built(IVF, lists=1 + len(case.maps) // 2)))
    centroids = kept.trained["centroids"].astype(np.float64)
    for row, item in enumerate(kept.rows):
        assert sorted(item["order"].tolist()) == list(range(case.xq.shape[1]))
        assert (item["starts"][0], item["starts"][-1]) == (0, case.xq.shape[1])
        for number, (start, end) in enumerate(zip(item["starts"][:-1], item["starts"][1:], strict=True)):
            for place in item["order"][start:end]:
                dist = sq_distances(centroids, case.blocks[row, place])
                assert dist[number] <= dist.min() + 1e-4


def test_more_lists_than_vectors() -> None:
    case = case_of(rows=5, shape=(2, 3, 8))
    run(case, built(IVF, lists=30))
    with pytest.raises(InputError, match="lists=31 is more than the 30 vectors of level 'level'; lower it or add images"):
        run(case, built(IVF, lists=31))


# Compact codes


def trained_on(x: Floats, dims: int) -> Arrays:
    """What compact search learns from vectors (n, C)."""
    level = Level("level", x.shape[1], stride=1, height=1, width=len(x))
    found: Arrays = compact._train(Blocks(level, ArraySource(x[None])), compact.Build(dims=dims))
    return found


def distances(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Doubles:
    return np.asarray(np.linalg.norm(x[:, None].astype(np.float64) - y[None].astype(np.float64), axis=2))


@given(st.integers(0, 2**32 - 1), st.integers(2, 24), st.integers(0, 40), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=60)
def test_a_code_distance_is_a_lower_bound(seed: int, dims: int, more: int, scale: float) -> None:
    """Of vectors that were learned from, of others, of far away ones; but for float32's rounding."""
    rng, channels = np.random.default_rng(seed), 2 * dims + more
    mix = rng.normal(size=(5, channels))
    x, y, far = (
        scale * (rng.normal(size=(40, 5)) @ mix + rng.normal(0, spread, (40, channels)) + 3) for spread in (0.3, 0.3, 5)
    )
    trained = trained_on(x.astype(np.float32), dims)
    for one, other in ((x, x), (x, y), (y, far), (far, far)):
        a, b = one.astype(np.float32), other.astype(np.float32)
        true, bound = distances(a, b), distances(project(a, trained), project(b, trained))
        norms = distances(np.concatenate([a, b]), trained["mean"][None]).max()
        assert (bound <= true + 1e-4 * norms).all()


def test_the_rest_makes_a_bound_closer() -> None:
    case = case_of(seed=31, n=1, rows=3, shape=(6, 7, 32))
    blocks = case.blocks.reshape(-1, 32)
    trained = trained_on(blocks, 5)
    a, b = project(case.xq[0], trained), project(blocks, trained)
    assert (a.shape, b.shape, a.dtype.name) == ((42, 5), (126, 5), "float32")
    true = distances(case.xq[0], blocks)
    with_rest, without = distances(a, b), distances(a[:, :4], b[:, :4])
    assert (with_rest >= without).all()
    assert np.median(with_rest[true > 0] / true[true > 0]) > np.median(without[true > 0] / true[true > 0]) + 0.02
    # The components are those that hold most: any other four hold less.
    rng = np.random.default_rng(0)
    centered = blocks - trained["mean"]
    for _ in range(5):
        other = np.linalg.qr(rng.normal(size=(32, 4)))[0]
        assert (centered @ trained["components"]).var(axis=0).sum() > (centered @ other).var(axis=0).sum()


@pytest.mark.parametrize("kappa", [1, 3])
def test_generous_codes_find_what_exact_finds(kappa: int) -> None:
    case = case_of(seed=32, n=5, rows=9, k=6, shape=(6, 7, 32))
    hits = run(case, queried(built(COMPACT, dims=16), rerank=6), kappa)
    exact = run(case, EXACT, kappa)
    check(case, hits, kappa)
    assert np.isclose(hits.sq_dist, exact.sq_dist, rtol=2e-4).mean() > 0.9
    np.testing.assert_allclose(np.sqrt(hits.sq_dist).mean(), np.sqrt(exact.sq_dist).mean(), rtol=1e-2)


@pytest.mark.parametrize("kappa", [1, 2])
def test_more_candidates_never_raise_a_distance(kappa: int) -> None:
    case = case_of(seed=33, n=5, rows=9, k=6, shape=(6, 7, 32))
    poor = built(COMPACT, dims=2)
    dist = [run(case, queried(poor, rerank=rerank), kappa).sq_dist for rerank in (kappa, kappa + 1, 3, 6, 6 * kappa)]
    for few, more in pairwise(dist):
        assert (more <= few).all()
    assert (dist[-1] < dist[0]).any()


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kappa", [1, 2])
def test_there_may_be_fewer_candidates_than_are_asked_for(k: int, kappa: int) -> None:
    """Each neighbor gives as many as kappa: then all of them are evaluated."""
    case = case_of(seed=34, k=k)
    expected = run(case, queried(COMPACT, rerank=k * kappa), kappa)
    for rerank in (k * kappa + 1, 8, 1000):
        equal(run(case, queried(COMPACT, rerank=max(rerank, k * kappa)), kappa), expected)


def test_narrow_levels_are_searched_exactly() -> None:
    case = case_of(seed=35, shape=(5, 7, 7))
    assert isinstance(search_in(case, COMPACT), type(search_in(case, EXACT)))
    equal(run(case, COMPACT, 2), run(case, EXACT, 2))
    assert isinstance(search_in(case_of(shape=(5, 7, 8)), COMPACT), CompactSearch)


@pytest.mark.parametrize("exponent", [-20, -8, 8, 17])
def test_codes_do_not_depend_on_the_unit_of_features(exponent: int) -> None:
    """Any extractor's features, as small or large as a bank takes them: codes have a range of their own."""
    case = case_of(seed=36, shape=(6, 7, 32))
    usual = run(case, COMPACT)
    scale = np.float32(2.0**exponent)
    scaled = Case(case.maps * scale, case.xq * scale, case.neighbors)
    hits = run(scaled, COMPACT)
    assert hits.location.min() >= 0
    assert np.sqrt(hits.sq_dist).mean() <= np.sqrt(usual.sq_dist).mean() * scale * 1.01


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8), (3, 3, 8)])
@by_name([built(IVF, lists=1), queried(COMPACT, rerank=1), built(HISTORY, lists=1)])
def test_little_is_enough_to_learn_from(recipe: Recipe, shape: Shape) -> None:
    """One image of one location, or of the same vector everywhere."""
    maps = np.ones((1, *shape), np.float32)
    xq = np.concatenate([maps, maps + 1]).reshape(2, -1, shape[2])
    hits = run(Case(maps, xq, np.zeros((2, 1), np.int64)), recipe)
    np.testing.assert_allclose(hits.sq_dist[..., 0], np.repeat([[0], [8]], shape[0] * shape[1], axis=1), rtol=1e-6)


# A location's history


def brute_history(case: Case, kappa: int) -> Doubles:
    """(n, HW, kappa) squared distances to the same place in all images of the bank, ascending."""
    dist = [[sq_distances(case.blocks[:, at], q) for at, q in enumerate(x)] for x in case.xq]
    return np.sort(np.array(dist), axis=2)[..., :kappa]


@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("lists", [1, 3])
def test_history_by_brute_force(rows: int, kappa: int, lists: int) -> None:
    """With one list, or all of them: also where there are more images than one task looks through, or fewer than lists."""
    case = case_of(seed=41, n=2, rows=rows, k=1, shape=(4, 5, 6))
    lists, kappa = min(lists, rows), min(kappa, rows)
    hits = run(case, queried(built(HISTORY, lists=lists), nprobe=lists), kappa)
    np.testing.assert_allclose(hits.sq_dist, brute_history(case, kappa), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(hits.sq_dist[..., 0], named(case, hits), rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(hits.location, np.tile(np.arange(20), (2, 1)))


@given(whole_cases(), st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=50)
def test_history_on_whole_numbers(case: Case, lists: int, nprobe: int, data: st.DataObject) -> None:
    """Right distances however few of them lie in the lists; with all lists the smallest, and of equal ones the smallest row."""
    rows = len(case.maps)
    lists, kappa = min(lists, rows), data.draw(st.integers(1, rows))
    hits = run(case, queried(built(HISTORY, lists=lists), nprobe=nprobe), kappa)
    np.testing.assert_array_equal(hits.sq_dist[..., 0], named(case, hits))
    every = brute_history(case, rows)
    if nprobe >= lists:
        np.testing.assert_array_equal(hits.sq_dist, every[..., :kappa])
    for image, query in np.ndindex(hits.row.shape):
        ours, counts = np.unique(hits.sq_dist[image, query], return_counts=True)
        assert all((every[image, query] == value).sum() >= count for value, count in zip(ours, counts, strict=True))
        if nprobe >= lists:
            dist = sq_distances(case.blocks[:, query], case.xq[image, query])
            assert hits.row[image, query] == dist.argmin()  # the first of equal ones


def test_history_does_not_ask_for_neighbors() -> None:
    case = case_of(seed=42, n=3, rows=9, k=2)
    equal(run(case, HISTORY), run(Case(case.maps, case.xq, case.neighbors[::-1]), HISTORY))


def test_history_of_too_few_images() -> None:
    case = case_of(rows=4, k=2)
    run(case, HISTORY, 4)
    with pytest.raises(InputError, match="kappa=5 is larger than a location's history, 4 normal images; lower it"):
        run(case, HISTORY, 5)
    with pytest.raises(InputError, match="lists=5 is more than the 4 images of the bank; lower it or add images"):
        run(case, built(HISTORY, lists=5))


# Settings


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (queried(LOCATION, radius=-1), r"recipe 'location': query: settings: radius=-1 must be an integer of at least 0"),
        (built(LOCATION, radius=1), "recipe 'location': build: settings: unknown key 'radius'"),
        (built(IVF, lists=0), "lists=0 must be an integer of at least 1"),
        (built(IVF, train_vectors=7), "train_vectors=7 must be an integer of at least 8"),
        (queried(IVF, nprobe=0), "nprobe=0 must be an integer of at least 1"),
        (built(IVF, nprobe=1), "recipe 'ivf': build: settings: unknown key 'nprobe'"),
        (built(COMPACT, dims=1), "dims=1 must be an integer of at least 2"),
        (built(COMPACT, train_vectors=999), "train_vectors=999 must be an integer of at least 1000"),
        (queried(COMPACT, rerank=0), "rerank=0 must be an integer of at least 1"),
        (built(HISTORY, lists=257), "lists=257 must be at most 256"),
        (built(HISTORY, train_images=2), "train_images=2 must be an integer of at least 3"),
        (replace(IVF, query=Query(settings={"nprobe": 1.5})), "nprobe=1.5 is of type float, expected int"),
    ],
)
def test_settings_out_of_range(recipe: Recipe, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_recipe(recipe)


@by_name(ALL)
def test_a_method_says_what_it_finds(recipe: Recipe) -> None:
    method = resolve_recipe(recipe).method
    assert method.definition.endswith(".")
    assert (method.train is None) == (method.encode is None) == (recipe not in KEEPING)


# Behind the detector

SHAPES = {"fine": (9, 11, 16), "coarse": (5, 6, 12)}
INPUT = (40, 43)
DIM = 16
NORMALS = 12


def normals() -> Features:
    return product(1, NORMALS, SHAPES, DIM)


def queries(n: int = 3) -> Features:
    return product(2, n, SHAPES, DIM, defect=True)


@pytest.fixture(scope="module", params=["float32", "float16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 12 normals with everything built. Do not change it."""
    path: Path = tmp_path_factory.mktemp("methods") / "bank"
    bank = bank_of(path, normals(), input_size=INPUT, shards=[5, 3], dtype=request.param)
    for recipe in KEEPING:
        build_index(bank, recipe)
    return path


@by_name(ALL)
def test_a_detector_with_each_recipe(folder: Path, recipe: Recipe) -> None:
    """Its distances are those to the patches that it names, no nearer than the nearest, and near them."""
    detector, exact = Detector.open(folder, recipe=recipe), Detector.open(folder)
    scores, reference = detector.score_features(batch_of(queries())), exact.score_features(batch_of(queries()))
    # The image search is the same.
    np.testing.assert_array_equal(scores.image_score, reference.image_score)
    np.testing.assert_array_equal(scores.neighbor_ids, reference.neighbor_ids)
    stored = np.dtype(detector.bank.layout.dtype)
    for name, dist in scores.level_dist.items():
        ours, theirs = normals().levels[name].astype(stored), queries().levels[name].astype(stored)
        for image, y, x in np.ndindex(dist.shape):
            nearest = scores.nearest[name][image, y, x]
            row = nearest["row"]
            shown = scores.neighbor_ids[image].tolist()
            # The image is named by its column where it is one of those shown.
            column = shown.index(names(NORMALS)[row]) if names(NORMALS)[row] in shown else -1
            assert nearest["neighbor"] == column
            patch = ours[row, nearest["y"], nearest["x"]]
            np.testing.assert_allclose(dist[image, y, x] ** 2, sq_distances(patch[None], theirs[image, y, x]), rtol=1e-4)
        if recipe is not HISTORY:
            assert (dist >= reference.level_dist[name] * (1 - 1e-4)).all()
        assert dist.mean() <= 1.5 * reference.level_dist[name].mean()
    assert np.isfinite(scores.maps).all()
    assert scores.maps.std() > 0


@by_name([queried(LOCATION, radius=10), queried(IVF, nprobe=8)])
@pytest.mark.parametrize("kappa", [1, 3])
def test_a_detector_that_looks_everywhere_scores_as_exact(folder: Path, recipe: Recipe, kappa: int) -> None:
    scores = Detector.open(folder, recipe=recipe, method=Method(kappa=kappa)).score_features(batch_of(queries()))
    reference = Detector.open(folder, method=Method(kappa=kappa)).score_features(batch_of(queries()))
    for name, dist in reference.level_dist.items():
        # Vectors within rounding of each other are told apart by exact search alone: at a norm of 12, a distance of 1e-3.
        np.testing.assert_allclose(
            scores.level_dist[name], dist, rtol=1e-4, atol=0 if recipe.build.gallery == "location" else 3e-4
        )


@by_name(ALL)
def test_a_detector_does_not_depend_on_batch_nor_memory(folder: Path, recipe: Recipe) -> None:
    detector = Detector.open(folder, recipe=recipe, method=Method(kappa=2))
    together = detector.score_features(batch_of(queries(5)))
    small = Detector.open(folder, recipe=recipe, method=Method(kappa=2), run=Run(memory=detector._working_bytes(1)))
    assert (small.plan.batch, small.plan.cache_bytes) == (1, 0)
    assert detector.plan.batch > 1
    # A cache that holds some of the blocks.
    some = Detector.open(folder, recipe=recipe, method=Method(kappa=2), run=Run(memory=detector._working_bytes(16) + 20_000))
    for other in (small, some):
        alone = other.score_features(batch_of(queries(5)))
        np.testing.assert_array_equal(alone.maps, together.maps)
        for name, dist in together.level_dist.items():
            np.testing.assert_array_equal(alone.level_dist[name], dist)
            np.testing.assert_array_equal(alone.nearest[name], together.nearest[name])
    one = detector.score_features(batch_of(queries(5)[3:4]))
    np.testing.assert_array_equal(one.maps[0], together.maps[3])


@by_name(ALL)
def test_a_detector_is_shared_by_threads(folder: Path, recipe: Recipe) -> None:
    batches = [batch_of(product(seed, 1 + seed % 3, SHAPES, DIM, defect=True)) for seed in range(5, 9)]
    expected = [Detector.open(folder, recipe=recipe).score_features(batch) for batch in batches]
    shared = Detector.open(folder, recipe=recipe)  # nothing read yet: the threads race for the first look at everything
    with ThreadPoolExecutor(4) as pool:
        for found, scores in zip(pool.map(shared.score_features, batches * 3), expected * 3, strict=True):
            for name, dist in scores.level_dist.items():
                np.testing.assert_array_equal(found.level_dist[name], dist)
                np.testing.assert_array_equal(found.nearest[name], scores.nearest[name])


@by_name([LOCATION, *KEEPING])
def test_a_normal_image_scores_near_zero(folder: Path, recipe: Recipe) -> None:
    """All but near duplicates of the same vector are told apart by any method."""
    scores = Detector.open(folder, recipe=recipe).score_features(batch_of(normals()[:3]))
    reference = Detector.open(folder, recipe=recipe).score_features(batch_of(queries()))
    assert not scores.neighbor_dist[:, 0].any()
    for name, dist in scores.level_dist.items():
        assert (dist == 0).mean() > 0.9
        assert dist.max() < 0.05 * reference.level_dist[name].mean()


@by_name(ALL)
def test_concatenated_levels(folder: Path, recipe: Recipe) -> None:
    """What is kept is kept of each level by itself."""
    if recipe in KEEPING:
        with pytest.raises(InputError, match=f"recipe '{recipe.name}' encodes each level by itself; fusion=concat needs"):
            Detector.open(folder, recipe=recipe, method=Method(fusion="concat"))
    else:
        scores = Detector.open(folder, recipe=recipe, method=Method(fusion="concat")).score_features(batch_of(queries()))
        assert list(scores.level_dist) == ["concat"]
        reference = Detector.open(folder, method=Method(fusion="concat")).score_features(batch_of(queries()))
        assert (scores.level_dist["concat"] >= reference.level_dist["concat"] * (1 - 1e-4)).all()


def test_a_query_setting_needs_no_building(folder: Path) -> None:
    means = []
    for nprobe in ("1", "8"):
        detector = Detector.open(folder, recipe=IVF.with_query({"nprobe": nprobe}))
        means.append(float(detector.score_features(batch_of(queries())).level_dist["fine"].mean()))
    assert means[0] > means[1]
    with pytest.raises(InputError, match="recipe 'ivf': query: settings: unknown key 'radius'"):
        Detector.open(folder, recipe=IVF.with_query({"radius": "8"}))


def test_kappa_of_a_corner_behind_the_detector(folder: Path) -> None:
    detector = Detector.open(folder, recipe=queried(LOCATION, radius=0), method=Method(kappa=6))
    with pytest.raises(InputError, match="kappa=6 is larger than the window of a corner, 5 vectors at level 'fine'"):
        detector.score_features(batch_of(queries()))


@by_name(ALL)
def test_defects_stand_out_whatever_the_method(folder: Path, recipe: Recipe) -> None:
    """The patch that was changed is further from the gallery than its surroundings."""
    scores = Detector.open(folder, recipe=recipe).score_features(batch_of(queries()))
    dist = scores.level_dist["fine"]
    changed = np.zeros(dist.shape[1:], np.bool_)
    changed[9 // 2 : 9 // 2 + 3, 11 // 3 : 11 // 2 + 1] = True
    assert dist[:, changed].mean() > 2 * dist[:, ~changed].mean()
