"""Measures an image point: builds an index over embeddings once, and searches it query by query and all queries at once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import drop_from_cache, peak_bytes, read_bytes, resident_bytes, seconds
from benchmarks.sweep.embeddings import Base, open_base
from benchmarks.sweep.points import ImagePoint
from benchmarks.sweep.sets import Places
from benchmarks.sweep.store import Raw
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path, write_bytes
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import direct_sq_dist, import_faiss, sort_by_distance

# Single queries are timed for so many seconds, but at least so many of them; batches are timed so often.
LATENCY_S, LEAST, BATCHES = 8.0, 20, 3
_COLD_QUERIES = 10
_TRAIN_ROWS, _TRAIN_SEED = 100_000, 1234
_BLOCK = 16_384


def index_path(point: ImagePoint, places: Places) -> Path:
    """Return the path of the index of a point."""
    return places.scratch / "image_indexes" / f"{point.build_key}.faiss"


def build(point: ImagePoint, places: Places) -> None:
    """Train and fill the index of a point; it needs a process of its own, for its peak memory is measured."""
    faiss = import_faiss()
    faiss.omp_set_num_threads(point.threads)
    base = open_base(point.set, point.n, point.queries, places)
    rows, d = base.rows, base.xq.shape[1]
    before = resident_bytes()
    index = faiss.index_factory(d, point.factory, faiss.METRIC_L2)
    train_s = 0.0
    if not index.is_trained:
        chosen = np.sort(np.random.default_rng(_TRAIN_SEED).permutation(point.n)[:_TRAIN_ROWS])
        xt = rows[chosen].astype(np.float32)
        train_s = seconds(lambda: index.train(xt))
        del xt
    start = time.perf_counter()
    for first in range(0, point.n, _BLOCK):
        index.add(rows[first : first + _BLOCK].astype(np.float32))
    add_s = time.perf_counter() - start
    path = index_path(point, places)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))
    facts = {"train_s": train_s, "add_s": add_s, "build_peak_bytes": peak_bytes(), "build_start_bytes": before}
    write_bytes(path.with_suffix(".json"), json.dumps({**facts, "bytes": path.stat().st_size}).encode())


def measure(point: ImagePoint, places: Places) -> Raw:
    """Search with the settings of a point, and build its index first if it was not built.

    Raises:
        InputError: for settings that do not go together.
    """
    faiss = import_faiss()
    faiss.omp_set_num_threads(point.threads)
    base = open_base(point.set, point.n, point.queries, places)
    if point.k > base.truth.shape[1] or 0 < point.rerank < point.k:
        raise InputError(
            f"k={point.k} must be at most {base.truth.shape[1]} and at most rerank={point.rerank}, if that is not 0"
        )
    path = index_path(point, places)
    if not path.is_file():
        build(point, places)
    before, read_before = resident_bytes(), read_bytes()
    drop_from_cache([path])
    cold_load_s = seconds(lambda: faiss.read_index(str(path)))
    dropped = read_bytes() - read_before > path.stat().st_size // 2
    start = time.perf_counter()
    index = faiss.read_index(str(path))
    warm_load_s = time.perf_counter() - start
    if point.query:
        faiss.ParameterSpace().set_index_parameters(index, point.query)
    held = resident_bytes() - before
    search = _Search(index, base, point)
    facts: dict[str, Any] = {
        **json.loads(path.with_suffix(".json").read_text()),
        "memory_bytes": held,
        "load_cold_s": cold_load_s,
        "load_warm_s": warm_load_s,
        "load_dropped": dropped,
    }
    ids, dist = search(base.xq)
    latency = _single_times(search, base.xq)
    batches = [seconds(lambda: search(base.xq)) for _ in range(BATCHES)]
    arrays: dict[str, Any] = {
        "ids": ids,
        "dist": dist,
        "true_dist": base.true_dist(ids),
        "truth": base.truth[:, : point.k],
        "defective": base.defective,
        "latency_s": np.array(latency),
        "batch_s": np.array(batches),
    }
    if point.rerank:
        arrays["cold_latency_s"], facts["cold_dropped"] = _cold_times(search, base)
    facts["batch"], facts["peak_bytes"], facts["dim"] = len(base.xq), peak_bytes(), base.xq.shape[1]
    search.close()
    return Raw(point, arrays, facts)


class _Search:
    """Searches for the k nearest: as the index finds them, or the best of its candidates by true distances."""

    def __init__(self, index: Any, base: Base, point: ImagePoint) -> None:
        self._index = index
        self._k, self._rerank = point.k, point.rerank
        self._d = base.xq.shape[1]
        # The file is read, not mapped: the system cannot drop the cached contents of a mapped file.
        self._file = os.open(base.path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._file)

    def __call__(self, xq: FloatArray) -> tuple[IntArray, FloatArray]:
        """Return ids and distances (roots of FAISS's), (nq, k) each, ascending; the id is -1 where nothing was found."""
        D, I = self._index.search(xq, max(self._k, self._rerank))
        if self._rerank:
            rows, places = np.unique(I, return_inverse=True)
            D = direct_sq_dist(xq, self._read(rows), places.reshape(I.shape))
            D, I = sort_by_distance(np.where(I < 0, np.float32(np.inf), D), I)
        return I[:, : self._k], np.sqrt(np.maximum(D[:, : self._k], 0))

    def _read(self, rows: IntArray) -> FloatArray:
        each = 2 * self._d
        return np.stack(
            [np.frombuffer(os.pread(self._file, each, each * max(0, int(row))), np.float16).astype(np.float32) for row in rows]
        )


def _single_times(search: _Search, xq: FloatArray) -> list[float]:
    """Seconds of single queries, one after the other."""
    taken: list[float] = []
    start = time.perf_counter()
    for place in range(len(xq)):
        taken.append(seconds(lambda place=place: search(xq[place : place + 1])))  # type: ignore[misc]
        if time.perf_counter() - start > LATENCY_S and place + 1 >= LEAST:
            break
    return taken


def _cold_times(search: _Search, base: Base) -> tuple[np.ndarray[Any, Any], bool]:
    """Seconds of queries whose candidates the system has to read from the disk, and whether it did read them."""
    before, taken = read_bytes(), []
    for place in range(min(_COLD_QUERIES, len(base.xq))):
        drop_from_cache([base.path])
        taken.append(seconds(lambda place=place: search(base.xq[place : place + 1])))  # type: ignore[misc]
    return np.array(taken), read_bytes() > before
