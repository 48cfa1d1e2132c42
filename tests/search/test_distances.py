"""The product's distances are off by no more than it says; direct distances and scans are right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Detector
from spade_faiss.core.errors import DependencyError
from spade_faiss.search import distances as knn
from spade_faiss.search.distances import direct_sq_dist, product_knn, rounding_of, scan, sort_by_distance, sq_norms
from tests.support.vectors import Floats, brute, near_duplicates

USERS_THRESHOLD = 54_321


@pytest.fixture(autouse=True)
def threshold() -> Iterator[None]:
    """FAISS's process-wide setting has a value of the user's; every test must leave it so."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = USERS_THRESHOLD
    yield
    assert faiss.cvar.distance_compute_blas_threshold == USERS_THRESHOLD
    faiss.cvar.distance_compute_blas_threshold = before


def vectors(seed: int, n: int, d: int) -> Floats:
    """Like features: positive, correlated, offset, in tight clusters, each third one a near or exact copy of the one before."""
    rng = np.random.default_rng(seed)
    mix, centers = np.random.default_rng(0).normal(size=(3, d)), np.random.default_rng(1).normal(size=(4, 3))
    x = (centers[rng.integers(0, 4, n)] + 0.1 * rng.normal(size=(n, 3))) @ mix + 5 + 0.01 * rng.normal(size=(n, d))
    x[2::3] = x[1 : len(x) - 1 : 3] * np.where(rng.random((len(x[2::3]), 1)) < 0.5, 1, 1 + 1e-4)
    return np.maximum(x, 0).astype(np.float32)


def check(D: Floats, I: npt.NDArray[np.int64], xq: Floats, xb: Floats, k: int) -> None:
    """Right distances, to the rows that are named, in order; rows of one distance ascending."""
    truth = brute(xq, xb)
    assert D.shape == I.shape == (len(xq), k)
    assert (D.dtype.name, I.dtype.name) == ("float32", "int64")
    np.testing.assert_allclose(D, np.sort(truth, axis=1)[:, :k], rtol=2e-4, atol=1e-12)
    np.testing.assert_allclose(D, np.take_along_axis(truth, I, axis=1), rtol=1e-5, atol=1e-12)
    assert all(len(set(line)) == k for line in I.tolist())
    assert (np.diff(D, axis=1) >= 0).all()
    assert (np.diff(I, axis=1)[np.diff(D, axis=1) == 0] > 0).all()


# nq * d from far below the threshold of the matrix product, 1000, over its neighbors to far above.
@pytest.mark.parametrize(
    ("nq", "d"), [(1, 1), (3, 24), (27, 37), (10, 100), (91, 11), (7, 143), (1, 1000), (29, 64), (130, 33)]
)
@pytest.mark.parametrize("nb", [1, 2, 31, 333])
def test_brute_force(nq: int, d: int, nb: int) -> None:
    xq, xb = vectors(2, nq, d), vectors(3, nb, d)
    for k in {1, min(3, nb), nb}:
        check_bound(xq, xb, k)
        D, I = scan(xq, xb, k)
        check(D, I, xq, xb, k)


def check_bound(xq: Floats, xb: Floats, k: int) -> None:
    """What the exact search relies on: no listed distance is further off, and no unlisted row nearer, than the bound allows."""
    D, I = product_knn(xq, xb, k)
    rounding = rounding_of(sq_norms(xq), D[:, -1], xq.shape[1])
    truth = brute(xq, xb)
    assert (D.shape, I.shape, rounding.shape) == ((len(xq), k), (len(xq), k), (len(xq),))
    assert (np.abs(D - np.take_along_axis(truth, I, axis=1)) <= rounding[:, None]).all()
    np.put_along_axis(truth, I, np.inf, axis=1)
    assert (truth >= (D[:, -1] - rounding)[:, None]).all()


@pytest.mark.parametrize("d", [24, 256, 1792])
def test_the_bound_holds_on_near_duplicates(d: int) -> None:
    xq, xb = near_duplicates(d)
    for k in (1, 3):
        check_bound(xq, xb, k)
    # The bound is needed: the product puts other rows before a query's own.
    assert (direct_sq_dist(xq, xb, product_knn(xq, xb, 1)[1]) > 0).any()


def test_equal_rows_come_in_ascending_order() -> None:
    xb = np.repeat(vectors(4, 40, 16), 3, axis=0)[np.random.default_rng(5).permutation(120)]
    xq = np.concatenate([vectors(6, 50, 16), xb[:50]])
    truth = brute(xq, xb)
    D, I = scan(xq, xb, len(xb))
    check(D, I, xq, xb, len(xb))
    np.testing.assert_array_equal(np.sort(I, axis=1), np.tile(np.arange(120), (100, 1)))
    _, I = scan(xq, xb, 1)
    np.testing.assert_array_equal(I[50:, 0], (truth[50:] == 0).argmax(axis=1))


@pytest.mark.parametrize("k", [1, 4])
def test_scan_in_parts_that_do_not_divide_the_queries(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    xq, xb = vectors(11, 23, 9), vectors(12, 50, 9)
    whole = scan(xq, xb, k)
    monkeypatch.setattr(knn, "SCAN_BYTES", 5 * 50 * 12)
    for a, b in zip(scan(xq, xb, k), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    check(*whole, xq, xb, k)


def test_direct_distances_and_order() -> None:
    xq, xb = vectors(13, 6, 10), vectors(14, 8, 10)
    I = np.random.default_rng(15).integers(0, 8, (6, 4))
    D = direct_sq_dist(xq, xb, I)
    np.testing.assert_allclose(D, np.take_along_axis(brute(xq, xb), I, axis=1), rtol=1e-5, atol=1e-12)
    D, I = sort_by_distance(np.array([[2, 1, 2, 1]], np.float32), np.array([[3, 9, 2, 4]]))
    assert (D.tolist(), I.tolist()) == ([[1, 1, 2, 2]], [[4, 9, 2, 3]])


def test_inputs_may_be_read_only_and_are_left_alone() -> None:
    for xq, xb in ((vectors(16, 40, 30), vectors(17, 60, 30)), near_duplicates()):
        before = xq.copy(), xb.copy()
        xq.flags.writeable = xb.flags.writeable = False
        for k in (1, 3):
            product_knn(xq, xb, k)
            scan(xq, xb, k)
        np.testing.assert_array_equal(xq, before[0])
        np.testing.assert_array_equal(xb, before[1])


def spy_on_faiss(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threshold that each search finds."""
    seen, search = [], faiss.knn_L2sqr

    def knn_and_tell(*arguments: Any) -> Any:
        seen.append(faiss.cvar.distance_compute_blas_threshold)
        return search(*arguments)

    monkeypatch.setattr(faiss, "knn_L2sqr", knn_and_tell)
    return seen


def test_the_threshold_is_low_during_a_search_and_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_faiss(monkeypatch)
    product_knn(vectors(18, 5, 4), vectors(19, 6, 4), 1)
    assert seen == [1000]
    assert faiss.cvar.distance_compute_blas_threshold == USERS_THRESHOLD

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(faiss, "knn_L2sqr", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        product_knn(vectors(18, 5, 4), vectors(19, 6, 4), 1)
    assert faiss.cvar.distance_compute_blas_threshold == USERS_THRESHOLD


def test_threads_that_search_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_faiss(monkeypatch)
    xq, xb = vectors(20, 50, 30), vectors(21, 200, 30)
    D, I = product_knn(xq, xb, 3)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: product_knn(xq, xb, 3), range(60)))
    for result in results:
        np.testing.assert_array_equal(result[0], D)
        np.testing.assert_array_equal(result[1], I)
    assert set(seen) == {1000}
    assert faiss.cvar.distance_compute_blas_threshold == USERS_THRESHOLD


def test_without_faiss_the_error_names_both_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from tests.support.oracle import bank_of, product

    bank_of(tmp_path / "b", product(1, 6, {"a": (2, 2, 3)}, 4), input_size=(8, 8))
    monkeypatch.setitem(sys.modules, "faiss", None)
    for search in (lambda: product_knn(vectors(1, 2, 3), vectors(2, 3, 3), 1), lambda: Detector.open(tmp_path / "b")):
        with pytest.raises(DependencyError, match=r"spade-faiss\[cpu\]'.*spade-faiss\[gpu\]'.*never both"):
            search()
