"""Distances between vectors by FAISS: matrix products with a known rounding, direct evaluations, and scans by them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from spade_faiss.core.errors import DependencyError
from spade_faiss.core.memory import check_address_space
from spade_faiss.core.process import PerProcess
from spade_faiss.core.types import FloatArray, IntArray

# FAISS leaves its matrix-product path when nq * d is below this; its default, 128,000, makes small maps up to 12 times slower.
_BLAS_THRESHOLD = 1000
# |q|^2 + |x|^2 - 2qx in float32 is off by up to this share of |q|^2 + |x|^2, times the root of the number of channels. The
# second share is the most, as a product of many channels is made of sums of sums (measured on 24 to 1792 channels).
_ROUNDING = 1e-7
_MOST_ROUNDING = 1e-6
# FAISS holds the product of this many queries and rows at a time; BLAS has a workspace of this size for each thread.
_TILE_QUERIES, _TILE_ROWS = 4096, 1024
_BLAS_BYTES = 32 << 20
# Of the address space, to load FAISS.
_FAISS_BYTES = 512 << 20
# What `scan` takes at a time, about.
SCAN_BYTES = 16 << 20


def product_knn(xq: FloatArray, xb: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
    """Find the k nearest rows of `xb` for each row of `xq`, as far as FAISS's matrix product can tell.

    Rounding grows with the norms: subtract a center first, which L2 does not depend on.

    Args:
        xq: (nq, d) float32, C-contiguous.
        xb: (nb, d) float32, C-contiguous.
        k: number of rows to find, at most nb.

    Returns:
        Squared distances (nq, k), ascending, each off by up to `rounding_of`; row numbers (nq, k).
    """
    faiss = import_faiss()
    D, I = np.empty((len(xq), k), np.float32), np.empty((len(xq), k), np.int64)
    pointer = faiss.swig_ptr
    with _blas_always(faiss):
        faiss.knn_L2sqr(pointer(xq), pointer(xb), xq.shape[1], len(xq), len(xb), k, pointer(D), pointer(I))
    return D, I


def product_bytes(nq: int, nb: int, d: int, k: int) -> int:
    """Bytes that one call of `product_knn` with arguments of these shapes takes beside them."""
    tile = min(nq, _TILE_QUERIES) * min(nb, _TILE_ROWS)
    return np.dtype(np.float32).itemsize * (tile + nq + nb + 3 * nq * k) + _BLAS_BYTES


def sq_norms(x: FloatArray) -> FloatArray:
    """The squared norms (...) of vectors (..., d)."""
    found: FloatArray = np.einsum("...i,...i->...", x, x)
    return found


def rounding_of(sq_norm: FloatArray, sq_dist: FloatArray, d: int) -> FloatArray:
    """The most by which a product's squared distance may be off.

    Args:
        sq_norm: (...) the squared norms of the queries.
        sq_dist: (...) how near the rows are that it matters for, squared.
        d: number of channels of a vector.

    Returns:
        (...) float32.
    """
    share = np.float32(min(_ROUNDING * d**0.5, _MOST_ROUNDING))
    # A row at a distance has a norm of at most the query's plus that distance.
    bound: FloatArray = share * (sq_norm + (np.sqrt(sq_norm) + np.sqrt(np.maximum(sq_dist, 0))) ** 2)
    return bound


def direct_sq_dist(xq: FloatArray, xb: FloatArray, I: IntArray) -> FloatArray:
    """Evaluate squared distances as sum((q - x)^2).

    Args:
        xq: (nq, d) float32, C-contiguous, the queries.
        xb: (nb, d) float32, C-contiguous, the base.
        I: (nq, k), for each query the base rows that its distances are asked to; negative for none.

    Returns:
        (nq, k) float32, infinite for none.
    """
    faiss = import_faiss()
    D = np.empty(I.shape, np.float32)
    I = np.ascontiguousarray(I, np.int64)
    pointer = faiss.swig_ptr
    faiss.fvec_L2sqr_by_idx(pointer(D), pointer(xq), pointer(xb), pointer(I), xq.shape[1], *I.shape)
    return D


def sort_by_distance(D: FloatArray, I: IntArray) -> tuple[FloatArray, IntArray]:
    """Sort the lines of distances and ids (nq, k): ascending by distance, equal distances by ascending id."""
    order = np.lexsort((I, D), axis=1)
    return np.take_along_axis(D, order, axis=1), np.take_along_axis(I, order, axis=1)


def scan(xq: FloatArray, xb: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
    """Find the k nearest rows by direct distances alone, which is slow, but right whatever the data.

    Args:
        xq: (nq, d) float32, C-contiguous.
        xb: (nb, d) float32, C-contiguous.
        k: number of rows to find, at most nb.

    Returns:
        Squared distances (nq, k), ascending, and row numbers (nq, k); of equal distances the smaller row comes first.
    """
    nb = len(xb)
    step = max(1, SCAN_BYTES // (nb * (np.dtype(np.int64).itemsize + np.dtype(np.float32).itemsize)))
    rows = np.tile(np.arange(nb, dtype=np.int64), (min(step, len(xq)), 1))
    nearest = []
    for start in range(0, len(xq), step):
        part = xq[start : start + step]
        D = direct_sq_dist(part, xb, rows[: len(part)])
        # Both take the smaller row among equal distances.
        I = D.argmin(axis=1, keepdims=True) if k == 1 else D.argsort(axis=1, kind="stable")[:, :k]
        nearest.append((np.take_along_axis(D, I, axis=1), I))
    return np.concatenate([D for D, _ in nearest]), np.concatenate([I for _, I in nearest])


def import_faiss() -> ModuleType:
    """Import faiss, whichever build is installed.

    Raises:
        DependencyError: if there is none.
    """
    if "faiss" not in sys.modules:
        check_address_space(_FAISS_BYTES, "loading FAISS")
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise DependencyError(
            "faiss is not installed; run: pip install 'spade-faiss[cpu]' (or 'spade-faiss[gpu]' on a machine with CUDA), "
            "one of the two, never both"
        ) from error
    module: ModuleType = faiss
    return module


_threshold_lock = PerProcess(threading.Lock)
_threshold_users = 0
_threshold_before = 0


@contextmanager
def _blas_always(faiss: Any) -> Iterator[None]:
    """Lower FAISS's process-wide threshold while any thread searches; the last of them puts it back."""
    global _threshold_users, _threshold_before
    with _threshold_lock():
        if _threshold_users == 0:
            _threshold_before = faiss.cvar.distance_compute_blas_threshold
            faiss.cvar.distance_compute_blas_threshold = _BLAS_THRESHOLD
        _threshold_users += 1
    try:
        yield
    finally:
        with _threshold_lock():
            _threshold_users -= 1
            if _threshold_users == 0:
                faiss.cvar.distance_compute_blas_threshold = _threshold_before
