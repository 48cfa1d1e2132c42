"""Every search method and engine of the package passes the public conformance suite; the suite refuses what is wrong."""

from __future__ import annotations

import inspect
import textwrap
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from spade_faiss import testing
from spade_faiss.core.types import Bools, FloatArray, IntArray
from spade_faiss.search import location
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.protocol import GallerySearch, Hits, NoSettings, SearchMethod, resolve_recipe
from spade_faiss.search.recipe import Recipe, gallery_names
from spade_faiss.search.workers import Workers
from spade_faiss.testing import GallerySearchTests, SearchCase, open_method
from tests.support.recipes import CLUSTERS, COMPACT, EXACT, FAISS, GLOBAL, HISTORY, IVF, LOCATION, built, queried


class RecipeTests(GallerySearchTests):
    """The suite for a recipe."""

    recipe: Recipe

    def open_search(self, blocks: Blocks, workers: Workers) -> GallerySearch:
        chosen = resolve_recipe(self.recipe)
        return open_method(chosen.method, blocks, workers, chosen.build, chosen.query)


class TestExact(RecipeTests):
    recipe = EXACT
    exact = True


class TestFaiss(RecipeTests):
    recipe = FAISS
    exact = True


@pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")
class TestNative(RecipeTests):
    recipe = queried(EXACT, engine="native")
    exact = True
    rtol = 2e-6
    orders_locations = True


class TestTorch(RecipeTests):
    recipe = queried(EXACT, engine="torch")
    exact = True
    rtol = 2e-6
    orders_locations = True


class TestTorchBfloat16(RecipeTests):
    recipe = queried(EXACT, engine="torch", product="bfloat16")
    exact = True
    rtol = 2e-6
    orders_locations = True


class WindowTests(RecipeTests):
    """The suite for a search in a window around each location."""

    radius: int
    exact = True
    rtol = 1e-5
    orders_locations = True

    def compared(self, case: SearchCase, image: int, location: int) -> Bools:
        _, height, width, _ = case.maps.shape
        y, x = np.divmod(np.arange(height * width), width)
        inside = (np.abs(y - y[location]) <= self.radius) & (np.abs(x - x[location]) <= self.radius)
        mask: Bools = super().compared(case, image, location) & inside
        return mask


class TestLocation(WindowTests):
    recipe = LOCATION
    radius = 2


class TestLocationItself(WindowTests):
    recipe = queried(LOCATION, radius=0)
    radius = 0


class TestLocationWithoutTheKernel(TestLocation):
    @pytest.fixture(autouse=True)
    def _no_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(location, "usable_simd_level", lambda channels: None)


class TestIvf(RecipeTests):
    recipe = IVF


class TestIvfWithAllLists(RecipeTests):
    recipe = queried(IVF, nprobe=8)
    exact = True


class TestCompact(RecipeTests):
    recipe = COMPACT


class TestCompactOnNarrowLevels(RecipeTests):
    """They are searched exactly."""

    recipe = built(COMPACT, dims=32)
    exact = True


class TestClusters(RecipeTests):
    recipe = CLUSTERS
    exact = True
    rtol = 2e-6
    orders_locations = usable_simd_level() is not None


class TestFewClusters(TestClusters):
    recipe = built(CLUSTERS, clusters=3)


class TestHistory(RecipeTests):
    recipe = HISTORY
    orders_locations = True

    def compared(self, case: SearchCase, image: int, location: int) -> Bools:
        rows, locations, _ = case.vectors.shape
        mask: Bools = super().compared(case, image, location) & np.tile(np.arange(locations) == location, (rows, 1))
        return mask


class TestHistoryOfOneList(TestHistory):
    recipe = built(HISTORY, lists=1)
    exact = True
    rtol = 1e-5


class TestGlobal(RecipeTests):
    """It searches the whole bank; the rows that are no neighbors are left out."""

    recipe = GLOBAL


@pytest.mark.slow
class TestGlobalWithAllLists(RecipeTests):
    """Whose candidates are all vectors."""

    recipe = queried(GLOBAL, nprobe=6, rerank=10_000)
    exact = True
    rtol = 2e-6
    orders_locations = True


def test_every_method_of_the_package_is_here() -> None:
    tested = {case.recipe.build.gallery for case in vars(inspect.getmodule(RecipeTests)).values() if hasattr(case, "recipe")}
    assert tested == set(gallery_names())


def test_the_example_of_the_documentation_passes() -> None:
    """A new search method in some 25 lines, and its tests."""
    documentation = inspect.getdoc(testing) or ""
    example = textwrap.dedent(documentation.partition("with its tests:")[2])
    assert sum(bool(line) for line in example.splitlines()) <= 35
    names: dict[str, Any] = {}
    exec(compile(example, "the example", "exec"), names)
    run(names["TestDirectSearch"]())


# The suite itself


def run(suite: GallerySearchTests) -> None:
    for name in dir(suite):
        if name.startswith("test_"):
            getattr(suite, name)()


@dataclass
class Direct:
    """Every vector, directly; plain, right, and easy to break."""

    blocks: Blocks

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        locations = self.blocks.level.height * self.blocks.level.width
        every = np.tile(np.arange(locations), (xq.shape[1], 1))
        sq_dist, row, location = [], [], []
        for x, rows in zip(xq, np.sort(neighbors, axis=1).tolist(), strict=True):
            D = np.concatenate([direct_sq_dist(x, self.blocks(bank_row), every) for bank_row in rows], axis=1)
            order = self.order(D)[:, :kappa]
            sq_dist.append(np.take_along_axis(D, order, axis=1))
            row.append(np.array(rows)[order[:, 0] // locations])
            location.append(order[:, 0] % locations)
        return self.changed(Hits(np.stack(sq_dist), np.stack(row), np.stack(location)))

    def order(self, D: FloatArray) -> IntArray:
        return D.argsort(axis=1, kind="stable")

    def changed(self, hits: Hits) -> Hits:
        return hits

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        locations = self.blocks.level.height * self.blocks.level.width
        return locations * (images * (8 * kappa + 40) + 40 * (k_gallery + 1) * locations) + 2 * self.blocks.block_bytes


class DirectTests(GallerySearchTests):
    exact = True
    orders_locations = True
    search: type[Direct] = Direct

    def open_search(self, blocks: Blocks, workers: Workers) -> GallerySearch:
        return self.search(blocks)


class Rounded(Direct):
    def changed(self, hits: Hits) -> Hits:
        return Hits(hits.sq_dist.astype(np.float16).astype(np.float32), hits.row, hits.location)


class Second(Direct):
    def order(self, D: FloatArray) -> IntArray:
        return D.argsort(axis=1, kind="stable")[:, 1:]


class Descending(Direct):
    def changed(self, hits: Hits) -> Hits:
        return Hits(hits.sq_dist[..., ::-1], hits.row, hits.location)


class LastOfEqual(Direct):
    def order(self, D: FloatArray) -> IntArray:
        order: IntArray = D.shape[1] - 1 - D[:, ::-1].argsort(axis=1, kind="stable")
        return order


class OneImageToo(Direct):
    """An image meets the galleries of the others."""

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        return super().__call__(xq, np.tile(np.unique(neighbors), (len(xq), 1)), kappa)


class FirstNeighbors(Direct):
    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        return super().__call__(xq, neighbors[:, : max(1, neighbors.shape[1] - 1)], kappa)


class Normalizing(Direct):
    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        neighbors.sort(axis=1)
        return super().__call__(xq, neighbors, kappa)


class Stateful(Direct):
    """The second of two calls at the same time changes what the first one returns."""

    latest: IntArray

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        self.latest = neighbors
        time.sleep(0.002)
        return super().__call__(xq, self.latest, kappa)


class AsStored(Direct):
    """Blocks of float16 are searched by rounded queries."""

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        return super().__call__(xq.astype(self.blocks.stored(0).dtype).astype(np.float32), neighbors, kappa)


class Modest(Direct):
    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        return 30 * images * self.blocks.level.height * self.blocks.level.width * kappa


class Shrinking(Direct):
    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        return super().working_bytes(images, k_gallery, kappa) // k_gallery**2


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (Rounded, "test_distances_are_those_of_brute_force"),
        (Second, "test_distances_are_those_of_brute_force"),
        (Descending, "test_distances_are_those_of_brute_force"),
        (FirstNeighbors, "test_distances_are_those_of_brute_force"),
        (FirstNeighbors, "test_every_vector_can_be_asked_for"),
        (FirstNeighbors, "test_the_order_of_neighbors_does_not_matter"),
        (LastOfEqual, "test_ties_go_to_the_smaller_row"),
        (OneImageToo, "test_an_image_does_not_depend_on_its_batch"),
        (Stateful, "test_threads_share_a_search"),
        (Normalizing, "test_arguments_are_left_alone"),
        (AsStored, "test_blocks_may_be_stored_as_float16_or_float32_or_codes"),
        (Modest, "test_working_bytes_are_an_upper_bound"),
        (Shrinking, "test_working_bytes_grow_with_the_call"),
    ],
)
def test_the_suite_refuses_what_is_wrong(wrong: type[Direct], test: str) -> None:
    suite = DirectTests()
    getattr(suite, test)()  # what is right passes
    suite.search = wrong
    with pytest.raises((AssertionError, ValueError)):
        getattr(suite, test)()


class Threaded(Direct):
    def changed(self, hits: Hits) -> Hits:
        return Hits(hits.sq_dist * np.float32(1 + 1e-6 * self.threads), hits.row, hits.location)

    threads = 0


def test_the_suite_refuses_results_that_depend_on_threads() -> None:
    class Suite(DirectTests):
        def open_search(self, blocks: Blocks, workers: Workers) -> GallerySearch:
            search = Threaded(blocks)
            search.threads = workers.threads
            return search

    with pytest.raises(AssertionError):
        Suite().test_the_number_of_threads_does_not_matter()


def test_what_is_encoded_has_one_shape() -> None:
    method = SearchMethod(
        definition="Wrong.",
        build=NoSettings,
        query=NoSettings,
        open=lambda blocks, workers, build, query, encoded: Direct(blocks),
        train=lambda blocks, build: {},
        encode=lambda block, trained, build: {"nonzero": np.flatnonzero(block > 3)},
    )
    with pytest.raises(ValueError, match="arrays of different shapes or types"):
        open_method(method, testing.structured_case(1).blocks, Workers(1))
