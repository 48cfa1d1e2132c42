"""Location search finds the nearest vectors of each window, and no others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.features.batch import Level
from spade_faiss.search import location
from spade_faiss.search.location import window_of
from spade_faiss.testing import SearchCase, assert_same_hits
from tests.support.methods import Shape, brute, case_of, named, run, whole_cases
from tests.support.recipes import EXACT, LOCATION, queried


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
def test_location_on_whole_numbers(case: SearchCase, radius: int, data: st.DataObject) -> None:
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
                one = SearchCase(case.maps, case.xq[image][None], np.array([[row]]))
                assert brute(one, 1, radius)[0, query, 0] > dist[image, query, 0]


@pytest.mark.parametrize("kappa", [1, 4])
def test_a_window_of_everything_finds_what_exact_finds(kappa: int) -> None:
    case = case_of(seed=12)
    everywhere = run(case, queried(LOCATION, radius=6), kappa)
    exact = run(case, EXACT, kappa)
    np.testing.assert_allclose(everywhere.sq_dist, exact.sq_dist, rtol=2e-4)  # to the bit by the kernel, see test_windows.py
    assert_same_hits(run(case, queried(LOCATION, radius=10_000), kappa), everywhere)


def test_a_wider_window_never_raises_a_distance() -> None:
    case = case_of(seed=13)
    before = np.full((4, 35, 2), np.inf, np.float32)
    for radius in range(8):
        dist = run(case, queried(LOCATION, radius=radius), 2).sq_dist
        assert (dist <= before).all()
        before = dist


def test_parts_of_a_window_search_are_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel does not run."""
    case = case_of(seed=14)
    expected = run(case, LOCATION, 3)
    monkeypatch.setattr(location, "usable_simd_level", lambda channels: None)
    for distances in (1, 60, 26 * 25):  # a query at a time, a few, not quite all
        monkeypatch.setattr(location, "_CALL_DISTANCES", distances)
        assert_same_hits(run(case, LOCATION, 3), expected)


@pytest.mark.parametrize(("radius", "shape", "least"), [(0, (5, 7, 4), 5), (2, (5, 7, 4), 45), (3, (2, 7, 4), 40)])
def test_a_corner_that_holds_too_few(radius: int, shape: Shape, least: int) -> None:
    case = case_of(shape=shape)
    recipe = queried(LOCATION, radius=radius)
    assert np.isfinite(run(case, recipe, least).sq_dist).all()
    with pytest.raises(
        InputError,
        match=rf"kappa={least + 1} is larger than the smallest window, {least} vectors at level 'level'; raise radius",
    ):
        run(case, recipe, least + 1)
