"""Searches by each method in memory, cases for them, and what brute force finds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from spade_faiss.search.blocks import Blocks
from spade_faiss.search.protocol import GallerySearch, Hits, resolve_recipe
from spade_faiss.search.recipe import Recipe
from spade_faiss.search.workers import Workers
from spade_faiss.testing import SearchCase, open_method
from tests.support.oracle import product, sq_distances

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Shape = tuple[int, int, int]


def case_of(seed: int = 1, n: int = 4, rows: int = 7, k: int = 5, shape: Shape = (5, 7, 16)) -> SearchCase:
    """Images of one product, two of them equal, with near duplicates inside and between them."""
    shapes, rng = {"level": shape}, np.random.default_rng(seed)
    xq = product(seed + 1, n, shapes, 4, defect=True).levels["level"].reshape(n, -1, shape[2])
    return SearchCase(
        product(seed, rows, shapes, 4).levels["level"], xq, np.stack([rng.permutation(rows)[:k] for _ in range(n)])
    )


@st.composite
def whole_cases(draw: st.DrawFn, channels: int = 4) -> SearchCase:
    """Small whole numbers: squared distances are exact, so that equal means equal, and ties are everywhere."""
    n, rows, height, width = (draw(st.integers(1, most)) for most in (4, 6, 4, 4))
    k = draw(st.integers(1, rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = rng.integers(-3, 4, (rows, height, width, channels)).astype(np.float32)
    xq = rng.integers(-3, 4, (n, height * width, channels)).astype(np.float32)
    return SearchCase(maps, xq, np.stack([rng.permutation(rows)[:k] for _ in range(n)]))


def search_of(recipe: Recipe, blocks: Blocks, threads: int = 2) -> GallerySearch:
    chosen = resolve_recipe(recipe)
    return open_method(chosen.method, blocks, Workers(threads), chosen.build, chosen.query)


def search_in(case: SearchCase, recipe: Recipe, threads: int = 2) -> GallerySearch:
    return search_of(recipe, case.blocks, threads)


def run(case: SearchCase, recipe: Recipe, kappa: int = 1) -> Hits:
    return search_in(case, recipe)(case.xq, case.neighbors, kappa)


def brute(case: SearchCase, kappa: int, radius: int | None = None) -> Doubles:
    """(n, HW, kappa) squared distances, ascending; within a window if there is one."""
    _, height, width, _ = case.maps.shape
    dist = np.empty((*case.xq.shape[:2], kappa))
    for image, rows in enumerate(case.neighbors):
        for at, (y, x) in enumerate(np.ndindex(height, width)):
            near = [radius is None or (abs(v - y) <= radius and abs(u - x) <= radius) for v, u in np.ndindex(height, width)]
            gallery = case.vectors[rows][:, near].reshape(-1, case.xq.shape[2])
            dist[image, at] = np.sort(sq_distances(gallery, case.xq[image, at]))[:kappa]
    return dist


def named(case: SearchCase, hits: Hits) -> Doubles:
    """(n, HW) squared distances to the vectors that hits name."""
    found: Doubles = ((case.xq.astype(np.float64) - case.vectors[hits.row, hits.location]) ** 2).sum(axis=2)
    return found


def check(case: SearchCase, hits: Hits, kappa: int) -> None:
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
