"""The running best against a sort of everything: any order of blocks, ties, vectors that come again, nothing at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.search.running_best import RunningBest

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LOCATIONS = 7


def candidates(seed: int, rows: int, queries: int, kinds: int) -> list[Floats]:
    """Of each row, squared distances (queries, LOCATIONS), few different ones: ties are everywhere."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, kinds, (queries, LOCATIONS)).astype(np.float32) for _ in range(rows)]


def expected(dist: list[Floats], query: int, kappa: int) -> list[tuple[float, int, int]]:
    """The kappa smallest of one query, as (distance, row, location)."""
    every = [(float(d), row, location) for row, block in enumerate(dist) for location, d in enumerate(block[query])]
    return sorted(every)[:kappa]


def found(best: RunningBest, image: int, query: int) -> list[tuple[float, int, int]]:
    row, location = best.vectors()
    sq_dist = best.hits().sq_dist
    return list(zip(*(values[image, query].tolist() for values in (sq_dist, row, location)), strict=True))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 5, 1000]), st.data())
def test_it_is_the_start_of_everything_sorted(seed: int, rows: int, queries: int, kinds: int, data: st.DataObject) -> None:
    """Whatever the order of rows and of candidates, in one merge or in several, also of parts that overlap."""
    dist, rng = candidates(seed, rows, queries, kinds), np.random.default_rng(seed)
    kappa = data.draw(st.integers(1, rows * LOCATIONS))
    best = RunningBest(2, queries, kappa, LOCATIONS)
    for row in rng.permutation(rows).tolist():
        order = rng.permutation(LOCATIONS)
        cut = data.draw(st.integers(1, LOCATIONS))
        for part in (order[:cut], order[max(0, cut - data.draw(st.integers(0, 2))) :]):
            if len(part):
                at = np.tile(part, (queries, 1))
                best.merge(1, slice(queries), row, at, dist[row][:, part])
    for query in range(queries):
        assert found(best, 1, query) == expected(dist, query, kappa)
    hits, first = best.hits(), [expected(dist, query, 1)[0] for query in range(queries)]
    assert list(zip(hits.row[1].tolist(), hits.location[1].tolist(), strict=True)) == [(row, at) for _, row, at in first]
    # The other image met nothing.
    assert np.isinf(hits.sq_dist[0]).all()
    assert (hits.row[0] == -1).all()
    assert (hits.location[0] == 0).all()
    assert all((values[0] == -1).all() for values in best.vectors())


@pytest.mark.parametrize("kappa", [1, 3])
def test_candidates_of_several_rows_and_of_some_queries(kappa: int) -> None:
    dist = candidates(1, 4, 6, 1000)
    best = RunningBest(1, 6, kappa, LOCATIONS)
    row, location = np.divmod(np.arange(4 * LOCATIONS), LOCATIONS)
    for queries in (np.array([4, 1]), np.array([0, 2, 3, 5])):
        count = len(queries)
        every = np.concatenate([block[queries] for block in dist], axis=1)
        best.merge(0, queries, np.tile(row, (count, 1)), np.tile(location, (count, 1)), every)
    for query in range(6):
        assert found(best, 0, query) == expected(dist, query, kappa)


@pytest.mark.parametrize("kappa", [1, 2])
def test_what_is_not_there_or_no_number_changes_nothing(kappa: int) -> None:
    best = RunningBest(1, 2, kappa, LOCATIONS)
    nothing, inf, nan = -1, np.inf, np.nan
    best.merge(0, slice(2), 3, np.array([[nothing, nothing], [5, 6]]), np.array([[inf, inf], [nan, 2]], np.float32))
    assert np.isinf(best.furthest()[0, 0])
    hits = best.hits()
    assert (hits.row[0].tolist(), hits.location[0].tolist()) == ([-1, 3], [0, 6])
    assert hits.sq_dist[0, 1, 0] == 2
    # A vector so far that its distance left float32 is still a vector.
    best.merge(0, slice(1), 2, np.array([[4]]), np.array([[inf]], np.float32))
    assert (best.hits().row[0, 0], best.hits().location[0, 0]) == (2, 4)


def test_the_bound_of_a_row() -> None:
    best = RunningBest(1, 3, 2, LOCATIONS)
    at = np.array([[1, 2]] * 3)
    best.merge(0, slice(3), 5, at, np.array([[4, 9], [0, 0], [0, 1]], np.float32))
    assert best.furthest()[0].tolist() == [9, 0, 1]
    # At distance 0 twice: only a smaller row, or a smaller location of this one, takes a place.
    assert best.bound(0, slice(3), 6).tolist() == [9, -np.inf, 1]
    assert best.bound(0, slice(1, 3), 5).tolist() == [0, 1]
    assert best.bound(0, slice(3), 4).tolist() == [9, 0, 1]


@pytest.mark.parametrize("kappa", [1, 3])
def test_threads_merge_at_the_same_time(kappa: int) -> None:
    dist = candidates(2, 40, 50, 30)
    best, everywhere = RunningBest(1, 50, kappa, LOCATIONS), np.tile(np.arange(LOCATIONS), (50, 1))
    with ThreadPoolExecutor(4) as pool:
        for task in [pool.submit(best.merge, 0, slice(50), row, everywhere, dist[row]) for row in range(40)]:
            task.result()
    for query in range(50):
        assert found(best, 0, query) == expected(dist, query, kappa)


@pytest.mark.parametrize(("kappa", "some"), [(1, 1), (1, 49), (3, 3), (3, 49), (20, 5)])
def test_memory_is_planned_for(kappa: int, some: int) -> None:
    import tracemalloc

    queries, rng = 3000, np.random.default_rng(0)
    sq_dist = rng.integers(0, 5, (queries, some)).astype(np.float32)
    location = np.tile(np.arange(some), (queries, 1))
    tracemalloc.start()
    try:
        best = RunningBest(1, queries, kappa, some)
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for row in (2, 1):
            best.merge(0, slice(queries), row, location, sq_dist)
        merging = tracemalloc.get_traced_memory()[1] - held
        best.hits()
        together = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert merging <= RunningBest.merge_bytes(queries, some, kappa) + 10_000
    assert together <= RunningBest.nbytes(1, queries, kappa) + RunningBest.merge_bytes(queries, some, kappa) + 10_000
