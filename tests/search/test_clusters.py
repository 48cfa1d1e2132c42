"""All normal images in clusters: to the bit what a scan finds, whatever the clusters are; with less margin it would not be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector
from spade_faiss.core.declaring import ALL
from spade_faiss.core.settings import Method, Run
from spade_faiss.features.batch import Level
from spade_faiss.index.build import build_index
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.clusters import METHOD, Build
from spade_faiss.search.engines.native import NativeSearch
from spade_faiss.search.exact import ExactQuery
from spade_faiss.search.native.extension import SIMD_LEVELS, import_native, usable_simd_level, why_not
from spade_faiss.search.protocol import Hits
from spade_faiss.search.recipe import load_recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import EncodedInMemory, open_method
from tests.support.hostile_vectors import KINDS, hostile
from tests.support.oracle import bank_of, batch_of, product

pytestmark = pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

HERE = [*(level for level in SIMD_LEVELS if not why_not()[level]), "reference"]


def grouped(kind: str, rng: np.random.Generator, xb: Floats) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Centers, and the cluster of each vector: near ones, or such as no sane build makes. A search must not depend on it."""
    count = {"one": 1, "many": len(xb), "random": 13, "near": 13, "empty": 40}[kind]
    centers = xb[rng.permutation(len(xb))[:count]].copy()
    if kind == "random":
        return centers, rng.integers(0, count, len(xb)).astype(np.int32)
    if kind == "empty":
        centers[::2] = xb.mean(axis=0)
        return centers, (rng.integers(0, count // 2, len(xb)) * 2).astype(np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        D = np.square(xb[:, None].astype(np.float64) - centers).sum(axis=2)
    return centers, D.argmin(axis=1).astype(np.int32)


def search(
    simd_level: str,
    xq: Floats,
    xb: Floats,
    kind: str,
    k: int = 1,
    *,
    excluded: Ints | None = None,
    margin: float = 1.0,
    packed: bool = True,
) -> tuple[Floats, Ints, int]:
    """The k nearest of all rows, by clusters: squared distances, rows, and how many distances were computed."""
    native, rng = import_native(), np.random.default_rng(len(kind))
    gallery = native.Gallery(1, 1, [([row[None] for row in xb], None, None)])
    centers, cluster = grouped(kind, rng, xb)
    distance = np.sqrt(np.square(xb.astype(np.float64) - centers[cluster]).sum(axis=1)).astype(np.float32)
    clusters = native.Clusters(simd_level, gallery, centers, cluster, np.nextafter(distance, np.float32(np.inf)))
    if packed:
        clusters.pack(0, clusters.count)
    excluded = np.empty((1, 0), np.int64) if excluded is None else excluded
    D, I, seed, _, evaluated = clusters.search_nearest(xq, excluded, k, margin)
    for start in range(0, clusters.count, 16):
        stop = min(start + 16, clusters.count)
        near, ids, _, more = clusters.search((start, stop), xq, excluded, D[:, -1].copy(), seed, k, margin)
        both, which = np.concatenate([D, near], axis=1), np.concatenate([I, ids], axis=1)
        order = np.lexsort((np.where(which < 0, len(xb), which), both))[:, :k]
        D, I = np.take_along_axis(both, order, axis=1), np.take_along_axis(which, order, axis=1)
        evaluated += more
    return D, I, evaluated


def scan(simd_level: str, xq: Floats, xb: Floats, k: int) -> tuple[Floats, Ints]:
    """The same by the kernel's search of one block."""
    native = import_native()
    packing = native.Packing(simd_level, xb.mean(axis=0, dtype=np.float64).astype(np.float32))
    D, I, _, _ = native.search(
        native.QueryPack(packing, xq), xq, native.RowPack(packing, xb), xb, np.full(len(xq), np.inf, np.float32), k
    )
    return D, I


@pytest.mark.parametrize("simd_level", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clusters", ["one", "many", "random", "near", "empty"])
def test_any_clusters_find_what_a_scan_finds(simd_level: str, kind: str, clusters: str) -> None:
    for d in (3, 40):
        xq, xb = hostile(kind, d)
        xb[50:60] = xb[20]  # ties
        for k in (1, 4):
            expected = scan(simd_level, xq, xb, k)
            D, I, _ = search(simd_level, xq, xb, clusters, k)
            np.testing.assert_array_equal(D, expected[0])
            np.testing.assert_array_equal(I, expected[1])


@pytest.mark.parametrize("k", [1, 3, 30])
def test_excluded_images_are_not_met(k: int) -> None:
    """Not even where others equal them; and where all but a few are excluded, fewer are found."""
    simd_level = HERE[0]
    xq, xb = hostile("white", 12)
    xb[100:] = xb[:103]
    left_out = np.arange(40, 57)[None]
    D, I, _ = search(simd_level, xq, xb, "near", k, excluded=left_out)
    kept = np.delete(np.arange(len(xb)), left_out[0])
    expected = scan(simd_level, xq, xb[kept], k)
    np.testing.assert_array_equal(D, expected[0])
    np.testing.assert_array_equal(I, kept[expected[1]])


def test_each_image_has_its_own_exclusions() -> None:
    _, xb = hostile("sparse", 12)
    queries = xb[:6].copy()  # three images of two queries each
    left_out = np.array([[0, 1], [2, 3], [4, 5]])
    D, I, _ = search(HERE[0], queries, xb, "near", excluded=left_out)
    for i in range(6):
        kept = np.delete(np.arange(len(xb)), left_out[i // 2])
        expected = scan(HERE[0], queries[i : i + 1], xb[kept], 1)
        assert (D[i, 0], I[i, 0]) == (expected[0][0, 0], kept[expected[1][0, 0]])


def test_clusters_that_are_not_kept_are_read_when_they_are_searched() -> None:
    xq, xb = hostile("white", 20)
    for k in (1, 2):
        kept, read = (search(HERE[0], xq, xb, "near", k, packed=packed) for packed in (True, False))
        for kept_array, read_array in zip(kept, read, strict=True):
            np.testing.assert_array_equal(kept_array, read_array)


@pytest.mark.parametrize("simd_level", HERE)
def test_half_the_margin_misses_the_nearest(simd_level: str) -> None:
    """The radius is what makes passing over exact, and it is not too wide: with half of it the nearest vector is missed.

    It is nearer to the query than what the nearest cluster holds, and lies at the border of a cluster whose center is far.
    """
    xb = np.array([[0, 0], [10, 0], [20.5, 0]], np.float32)
    centers, cluster = np.array([[0, 0], [15.25, 0]], np.float32), np.array([0, 1, 1], np.int32)
    native = import_native()
    gallery = native.Gallery(1, 1, [([row[None] for row in xb], None, None)])
    distance = np.array([0, 5.25, 5.25], np.float32)
    clusters = native.Clusters(simd_level, gallery, centers, cluster, np.nextafter(distance, np.float32(np.inf)))
    clusters.pack(0, 2)
    xq, none = np.array([[5.5, 0]], np.float32), np.empty((1, 0), np.int64)
    D, I, seed, _, _ = clusters.search_nearest(xq, none, 1)
    assert (D[0, 0], I[0, 0], seed[0]) == (5.5**2, 0, 0)
    found = clusters.search((0, 2), xq, none, D[:, 0].copy(), seed, 1)
    assert (found[0][0, 0], found[1][0, 0]) == (4.5**2, 1)
    missed = clusters.search((0, 2), xq, none, D[:, 0].copy(), seed, 1, 0.5)
    assert missed[1][0, 0] == -1


def test_vectors_that_cannot_be_nearest_are_not_looked_at() -> None:
    rng = np.random.default_rng(3)
    centers = 20 * rng.normal(size=(16, 24)).astype(np.float32)
    xb = np.repeat(centers, 50, axis=0) + rng.normal(size=(800, 24)).astype(np.float32)
    xq = centers[3] + rng.normal(size=(10, 24)).astype(np.float32)
    D, I, evaluated = search(HERE[0], xq, xb, "near")
    expected = scan(HERE[0], xq, xb, 1)
    np.testing.assert_array_equal(D, expected[0])
    np.testing.assert_array_equal(I, expected[1])
    assert evaluated < len(xq) * 50


def test_bad_arguments_are_refused() -> None:
    native, xb = import_native(), np.zeros((4, 3), np.float32)
    gallery = native.Gallery(1, 1, [([row[None] for row in xb], None, None)])
    numbers, distance = np.zeros(4, np.int32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="those of the centers"):
        native.Clusters(HERE[0], gallery, xb[:2], numbers + 2, distance)
    with pytest.raises(ValueError, match="those of the centers"):
        native.Clusters(HERE[0], gallery, xb[:2], numbers - 1, distance)
    with pytest.raises(ValueError, match="a cluster for each vector"):
        native.Clusters(HERE[0], gallery, xb[:2], numbers[:3], distance)
    with pytest.raises(ValueError, match="no SIMD level"):
        native.Clusters("mmx", gallery, xb[:2], numbers, distance)
    clusters = native.Clusters(HERE[0], gallery, xb[:2], numbers, distance)
    none = np.empty((1, 0), np.int64)
    with pytest.raises(ValueError, match="channels of the centers"):
        clusters.search_nearest(np.zeros((2, 4), np.float32), none, 1)
    with pytest.raises(ValueError, match="range"):
        clusters.search((0, 3), xb, none, distance, numbers, 1)
    with pytest.raises(ValueError, match="for each image"):
        clusters.search_nearest(xb, np.empty((3, 0), np.int64), 1)
    with pytest.raises(ValueError, match="range"):
        clusters.pack(1, 3)


# The search method


def blocks_of(maps: Floats, cache: BlockCache[Any] | None = None) -> Blocks:
    rows, height, width, channels = maps.shape
    level = Level("level", channels, stride=1, height=height, width=width)
    return Blocks(level, ArraySource(maps.reshape(rows, -1, channels)), cache)


def maps_of(seed: int, rows: int, *, defect: bool = False) -> Floats:
    return product(seed, rows, {"level": (9, 8, 20)}, 4, defect=defect).levels["level"]


def assert_same(found: Hits, expected: Hits) -> None:
    np.testing.assert_array_equal(found.sq_dist, expected.sq_dist)
    np.testing.assert_array_equal(found.row, expected.row)
    np.testing.assert_array_equal(found.location, expected.location)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("left_out", [0, 1, 3])
@pytest.mark.parametrize("kappa", [1, 4])
def test_a_search_finds_what_the_kernel_finds_block_by_block(dtype: type[np.floating[Any]], left_out: int, kappa: int) -> None:
    """Whatever the order of the neighbors is, the threads, the batch, and how much is kept in memory."""
    maps, xq = maps_of(1, 12).astype(dtype), maps_of(2, 5, defect=True).reshape(5, 72, 20)
    rng = np.random.default_rng(0)
    neighbors = np.stack([rng.permutation(12)[: 12 - left_out] for _ in range(5)])
    expected = NativeSearch(blocks_of(maps), Workers(1), HERE[0])(xq, neighbors, kappa)
    for threads in (1, 3):
        for capacity in (0, 10_000, 1 << 30):
            blocks = blocks_of(maps, BlockCache(capacity))
            searched = open_method(METHOD, blocks, Workers(threads), Build())
            found = searched(xq, neighbors, kappa)
            assert_same(found, expected)
            assert found.passed_over is not None
            assert found.passed_over.shape == (5,)
            for image in range(5):
                alone = searched(xq[image : image + 1], neighbors[image : image + 1], kappa)
                np.testing.assert_array_equal(alone.sq_dist[0], expected.sq_dist[image])
                np.testing.assert_array_equal(alone.row[0], expected.row[image])


def test_smaller_galleries_are_searched_block_by_block() -> None:
    maps, xq = maps_of(1, 12), maps_of(2, 2).reshape(2, 72, 20)
    blocks = blocks_of(maps)
    encoded = EncodedInMemory(METHOD, blocks, Build())
    searched = METHOD.open(blocks, Workers(2), Build(), ExactQuery(), encoded)
    neighbors = np.array([[3, 1], [0, 11]])
    found = searched(xq, neighbors, 1)
    assert_same(found, NativeSearch(blocks, Workers(2), HERE[0])(xq, neighbors, 1))
    assert found.passed_over is None
    assert not encoded.requested


def test_numbers_that_are_none_are_passed_on_to_the_scan() -> None:
    maps, xq = maps_of(1, 6), maps_of(2, 2).reshape(2, 72, 20)
    maps[4, 2, 3, 5], xq[1, 7, 2], xq[1, 8, 2] = np.nan, np.nan, np.inf
    every = np.tile(np.arange(6), (2, 1))
    for images in (slice(0, 1), slice(0, 2)):
        found = open_method(METHOD, blocks_of(maps), Workers(2), Build())(xq[images], every[images], 1)
        assert_same(found, NativeSearch(blocks_of(maps), Workers(2), HERE[0])(xq[images], every[images], 1))


def test_a_budget_that_is_too_small_is_said(caplog: pytest.LogCaptureFixture) -> None:
    maps, xq = maps_of(1, 6), maps_of(2, 1).reshape(1, 72, 20)
    with caplog.at_level(logging.WARNING):
        open_method(METHOD, blocks_of(maps, BlockCache(0)), Workers(1), Build())(xq, np.arange(6)[None], 1)
    assert "raise --memory" in caplog.text


# In a detector


@pytest.mark.parametrize("levels", [(), ("mid+coarse",), ("fine", "mid+coarse")])
def test_scores_are_those_of_the_exact_recipe(tmp_path: Path, levels: tuple[str, ...]) -> None:
    """Of queries, and of the bank's own images, each against all others; for images that were added after the build, too."""
    shapes = {"fine": (9, 8, 16), "mid": (5, 6, 8), "coarse": (3, 2, 12)}
    normals = product(1, 14, shapes, 6)
    bank_of(tmp_path / "bank", normals, input_size=(36, 32), shards=[6, 4])
    bank = Bank.open(tmp_path / "bank")
    recipe = load_recipe("clusters").with_levels(levels) if levels else load_recipe("clusters")
    build_index(bank, recipe)
    bank.remove([bank.ids[3]])
    bank.append(batch_of(product(5, 2, shapes, 6), ["late 1", "late 2"]))
    method = Method(k_image=2, k_gallery=ALL, levels=levels, kappa=2)
    queries = batch_of(product(2, 3, shapes, 6, defect=True), ["a", "b", "c"])
    detectors = [Detector.open(bank.path, recipe=each, method=method, run=Run(device="cpu")) for each in ("exact", recipe)]
    for expected, found in (
        tuple(detector.score_features(queries) for detector in detectors),
        tuple(detector.score_rows(range(len(bank))) for detector in detectors),
    ):
        np.testing.assert_array_equal(found.maps, expected.maps)
        for name in expected.level_dist:
            np.testing.assert_array_equal(found.level_dist[name], expected.level_dist[name])
            np.testing.assert_array_equal(found.nearest[name], expected.nearest[name])
        assert not expected.passed_over
        assert set(found.passed_over) == set(found.level_dist)
