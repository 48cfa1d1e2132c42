"""The gallery search against brute force: the neighbors' blocks and no others, ties by row, rounding settled by scans."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.features.batch import Level
from spade_faiss.search import exact
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.engines import faiss as faiss_exact
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.protocol import Hits, resolve_recipe
from spade_faiss.search.recipe import Build, Query, Recipe
from spade_faiss.testing import assert_same_hits
from tests.support.searches import Case, CountingSource, Floats, brute, cases, exact_search, open_by, structured
from tests.support.vectors import brute as all_distances
from tests.support.vectors import near_duplicates


def run(case: Case, kappa: int = 1, engine: str = "faiss") -> Hits:
    return exact_search(case.blocks, engine=engine)(case.xq, case.neighbors, kappa)


by_engine = pytest.mark.parametrize(
    "engine",
    [
        "faiss",
        pytest.param(
            "native", marks=pytest.mark.skipif(usable_simd_level() is None, reason="no SIMD level of the kernel runs here")
        ),
    ],
)


@by_engine
@pytest.mark.parametrize("kappa", [1, 3, 42, 43, 100, 4 * 42])
def test_brute_force(kappa: int, engine: str) -> None:
    """Up to all vectors of the gallery, and past those of one block."""
    case = structured(1, 5, 6, 4)
    hits = run(case, kappa, engine)
    dist, nearest = brute(case, kappa)
    np.testing.assert_allclose(hits.sq_dist, dist, rtol=2e-4)
    assert [values.dtype.name for values in (hits.sq_dist, hits.row, hits.location)] == ["float32", "int64", "int64"]
    named = np.stack([case.blocks[row, location] for row, location in zip(hits.row, hits.location, strict=True)])
    np.testing.assert_allclose(((case.xq - named.astype(np.float64)) ** 2).sum(axis=2), hits.sq_dist[..., 0], rtol=1e-5)
    found = np.stack([hits.row, hits.location], axis=-1)
    assert np.mean([tuple(found[i, j]) in nearest[i][j] for i, j in np.ndindex(5, 42)]) > 0.99


@by_engine
@given(case=cases(), data=st.data())
def test_whole_numbers_are_exact_and_ties_go_to_the_smaller_row(engine: str, case: Case, data: st.DataObject) -> None:
    locations = case.xq.shape[1]
    kappa = data.draw(st.integers(1, case.neighbors.shape[1] * locations))
    hits = run(case, kappa, engine)
    dist, nearest = brute(case, kappa)
    np.testing.assert_array_equal(hits.sq_dist, dist)
    for image, location in np.ndindex(hits.row.shape):
        at = int(hits.row[image, location]), int(hits.location[image, location])
        assert at in nearest[image][location]
        assert at[0] == min(row for row, _ in nearest[image][location])


@by_engine
def test_each_block_is_read_once_and_only_where_it_was_chosen(engine: str) -> None:
    case = structured(2, 6, 9, 4)
    neighbors = np.array([[0, 3, 5, 7], [7, 5, 3, 0], [1, 2, 3, 4], [0, 1, 2, 3], [6, 4, 2, 0], [3, 7, 1, 2]])  # nobody's is 8
    source = CountingSource(case.blocks)
    search = open_by(engine, Blocks(Level("level", 5, stride=1, height=6, width=7), source))
    search(case.xq[:1], neighbors[:1], 1)  # what it learns of the bank, it learns once
    source.forget()
    hits = search(case.xq, neighbors, 1)
    read, released = source.read_rows, source.released
    # The second time for vectors that rounding makes doubtful.
    assert sorted(set(read)) == list(range(8))
    assert max(read.count(row) for row in range(8)) <= 2
    assert sorted(released) == sorted(read)
    # No image is measured against a block that only others chose.
    assert all(set(np.unique(rows)) <= set(line) for rows, line in zip(hits.row, neighbors, strict=True))


@by_engine
@given(case=cases())
def test_the_order_of_neighbors_does_not_matter(engine: str, case: Case) -> None:
    rng = np.random.default_rng(0)
    assert_same_hits(run(case, 1, engine), run(Case(case.blocks, case.xq, rng.permuted(case.neighbors, axis=1)), 1, engine))


@by_engine
@given(case=cases(), kappa=st.integers(1, 3))
def test_more_neighbors_never_raise_a_distance(engine: str, case: Case, kappa: int) -> None:
    kappa = min(kappa, case.xq.shape[1])
    before: npt.NDArray[Any] = np.full((*case.xq.shape[:2], kappa), np.inf)
    for k in range(1, case.neighbors.shape[1] + 1):
        dist = run(Case(case.blocks, case.xq, case.neighbors[:, :k]), kappa, engine).sq_dist
        assert (dist <= before).all()
        before = dist


@by_engine
@given(case=cases(), size=st.integers(1, 3))
def test_an_image_does_not_depend_on_its_batch(engine: str, case: Case, size: int) -> None:
    together = run(case, 1, engine)
    for start in range(0, len(case.xq), size):
        part = slice(start, start + size)
        alone = run(Case(case.blocks, case.xq[part], case.neighbors[part]), 1, engine)
        np.testing.assert_array_equal(alone.sq_dist, together.sq_dist[part])
        np.testing.assert_array_equal(alone.row, together.row[part])


def one_block(xq: Floats, xb: Floats, kappa: int, engine: str) -> Floats:
    """(nq, kappa) squared distances of queries to a single block."""
    blocks = Blocks(Level("level", xb.shape[1], stride=1, height=1, width=len(xb)), ArraySource(xb[None]))
    found: Floats = open_by(engine, blocks, 1)(xq[None], np.zeros((1, 1), np.int64), kappa).sq_dist[0]
    return found


@by_engine
@pytest.mark.parametrize("kappa", [1, 3])
def test_a_vector_of_the_gallery_is_found_at_zero(kappa: int, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    xq, xb = near_duplicates()
    truth = np.sort(all_distances(xq, xb), axis=1)[:, :kappa]
    found = one_block(xq, xb, kappa, engine)
    np.testing.assert_allclose(found, truth, rtol=2e-4, atol=1e-12)
    assert not found[:, 0].any()
    # The data does need the scan: the matrix product alone takes other vectors for the nearest.
    monkeypatch.setattr(faiss_exact, "TOLERANCE", 1e9)
    assert one_block(xq, xb, kappa, "faiss")[:, 0].any()


@by_engine
def test_a_block_is_scanned_where_another_seems_nearer(engine: str) -> None:
    """The product's error may put the block that holds a query's own vector behind one that does not."""
    xq, xb = near_duplicates()
    blocks = xb.reshape(8, 50, -1)
    hits = exact_search(blocks, engine=engine)(xq[None], np.arange(8)[None], 1)
    assert not hits.sq_dist.any()
    np.testing.assert_array_equal(blocks[hits.row[0], hits.location[0]], xq)


@by_engine
def test_rivals_within_rounding_of_each_other(engine: str) -> None:
    """At a distance of a few hundredths of the norm, a product's rounding must not cost 1e-4 of the distance."""
    rng = np.random.default_rng(8)
    xq = rng.normal(size=(30, 256)).astype(np.float32)
    direction = rng.normal(size=(30, 40, 256))
    direction /= np.linalg.norm(direction, axis=2, keepdims=True)
    for share in (1e-4, 2.2e-3, 1.9e-2, 2.2e-2):  # of |q|^2
        radius = np.sqrt(share * (xq.astype(np.float64) ** 2).sum(axis=1))[:, None] * np.linspace(1, 1 + 1e-3, 40)
        xb = (xq[:, None] + rng.permuted(radius, axis=1)[..., None] * direction).reshape(-1, 256).astype(np.float32)
        for kappa in (1, 3):
            truth = np.sort(all_distances(xq, xb), axis=1)[:, :kappa]
            np.testing.assert_allclose(one_block(xq, xb, kappa, engine), truth, rtol=1.01e-4 if engine == "faiss" else 1e-6)


def test_centering_is_worth_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset that all vectors share cancels before the product: nothing is left for the scan."""
    xb = (1000 + np.random.default_rng(9).normal(size=(300, 32))).astype(np.float32)
    xq = (1000 + np.random.default_rng(10).normal(size=(50, 32))).astype(np.float32)
    monkeypatch.setattr(faiss_exact, "scan", None)
    truth = np.sort(all_distances(xq, xb), axis=1)[:, :3]
    np.testing.assert_allclose(one_block(xq, xb, 3, "faiss"), truth, rtol=1e-5)


def test_a_method_and_its_settings() -> None:
    assert resolve_recipe(Recipe(name="r")).method is exact.METHOD
    with pytest.raises(InputError, match="gallery='exakt' is not one of clusters, compact, exact"):
        Build(gallery="exakt")
    for recipe in (Recipe(name="r", build=Build(settings={"lists": 3})), Recipe(name="r", query=Query(settings={"lists": 3}))):
        with pytest.raises(InputError, match=r"recipe 'r': (build|query): settings: unknown key 'lists'"):
            resolve_recipe(recipe)
