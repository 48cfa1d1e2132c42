"""History search compares a location with the same place in all normal images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.testing import SearchCase
from tests.support.methods import Doubles, case_of, named, run, whole_cases
from tests.support.oracle import sq_distances
from tests.support.recipes import HISTORY, built, queried


def brute_history(case: SearchCase, kappa: int) -> Doubles:
    """(n, HW, kappa) squared distances to the same place in all images of the bank, ascending."""
    dist = [[sq_distances(case.vectors[:, at], q) for at, q in enumerate(x)] for x in case.xq]
    return np.sort(np.array(dist), axis=2)[..., :kappa]


@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("lists", [1, 3])
def test_history_by_brute_force(rows: int, kappa: int, lists: int) -> None:
    """With one list, or all of them: also where there are more images than one task looks through, or fewer than lists."""
    case = case_of(seed=41, n=2, rows=rows, k=rows, shape=(4, 5, 6))
    lists, kappa = min(lists, rows), min(kappa, rows)
    hits = run(case, queried(built(HISTORY, lists=lists), nprobe=lists), kappa)
    np.testing.assert_allclose(hits.sq_dist, brute_history(case, kappa), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(hits.sq_dist[..., 0], named(case, hits), rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(hits.location, np.tile(np.arange(20), (2, 1)))


@given(whole_cases(), st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=50)
def test_history_on_whole_numbers(case: SearchCase, lists: int, nprobe: int, data: st.DataObject) -> None:
    """Right distances however few of them lie in the lists; with all lists the smallest, and of equal ones the smallest row."""
    rows = len(case.maps)
    case = SearchCase(case.maps, case.xq, np.tile(np.arange(rows), (len(case.xq), 1)))
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
            dist = sq_distances(case.vectors[:, query], case.xq[image, query])
            assert hits.row[image, query] == dist.argmin()  # the first of equal ones


def test_images_are_left_out_of_the_history() -> None:
    """Those that are no neighbors, as if they were not in the bank."""
    case = case_of(seed=42, n=1, rows=9, k=8)
    hits = run(case, queried(HISTORY, nprobe=3), 8)
    rows = np.sort(case.neighbors[0])
    part = SearchCase(case.maps[rows], case.xq, np.arange(8)[None])
    np.testing.assert_allclose(hits.sq_dist, brute_history(part, 8), rtol=1e-5, atol=1e-12)
    assert set(np.unique(hits.row)) <= set(rows.tolist())


def test_history_of_too_few_images() -> None:
    case = case_of(rows=4, k=4)
    run(case, HISTORY, 4)
    with pytest.raises(InputError, match="kappa=5 is larger than a location's history, 4 normal images; lower it"):
        run(case, HISTORY, 5)
    with pytest.raises(InputError, match="lists=5 is more than the 4 images of the bank; lower it or add images"):
        run(case, built(HISTORY, lists=5))
