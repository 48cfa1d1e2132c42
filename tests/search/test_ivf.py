"""Inverted lists: with all of them the search is exact, with few it finds true distances, and as many as are asked for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss.core.errors import InputError
from spade_faiss.search.protocol import resolve_recipe
from spade_faiss.testing import EncodedInMemory, SearchCase
from tests.support.methods import brute, case_of, check, run, whole_cases
from tests.support.oracle import sq_distances
from tests.support.recipes import EXACT, IVF, built, queried


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
def test_all_lists_on_whole_numbers(case: SearchCase, lists: int, data: st.DataObject) -> None:
    queries, k = case.xq.shape[1], case.neighbors.shape[1]
    lists = min(lists, len(case.maps) * queries)
    kappa = data.draw(st.integers(1, k * queries))
    hits = run(case, queried(built(IVF, lists=lists), nprobe=lists), kappa)
    np.testing.assert_array_equal(hits.sq_dist, brute(case, kappa))


@given(whole_cases(), st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=50)
def test_few_lists_on_whole_numbers(case: SearchCase, lists: int, nprobe: int, data: st.DataObject) -> None:
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
    case = SearchCase(maps, maps[4:6].reshape(2, 12, 8).copy(), np.array([[0], [1]]))
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
def test_a_block_is_encoded_as_an_order_by_list(case: SearchCase) -> None:
    chosen = resolve_recipe(built(IVF, lists=1 + len(case.maps) // 2))
    encoded = EncodedInMemory(chosen.method, case.blocks, chosen.build)
    centroids = encoded.trained["centroids"].astype(np.float64)
    for row in range(len(case.maps)):
        item = encoded(row)
        assert sorted(item["order"].tolist()) == list(range(case.xq.shape[1]))
        assert (item["starts"][0], item["starts"][-1]) == (0, case.xq.shape[1])
        for number, (start, end) in enumerate(zip(item["starts"][:-1], item["starts"][1:], strict=True)):
            for place in item["order"][start:end]:
                dist = sq_distances(centroids, case.vectors[row, place])
                assert dist[number] <= dist.min() + 1e-4


def test_more_lists_than_vectors() -> None:
    case = case_of(rows=5, shape=(2, 3, 8))
    run(case, built(IVF, lists=30))
    with pytest.raises(InputError, match="lists=31 is more than the 30 vectors of level 'level'; lower it or add images"):
        run(case, built(IVF, lists=31))
