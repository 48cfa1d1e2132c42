"""Compares codes of vectors by how well they choose candidates; the recipe `compact` was chosen by this.

    python -m benchmarks.codes --out benchmarks/results

At the finest level of wide_resnet50_2's shapes, each neighbor's best vector by its code is a candidate, and the eight that
look nearest are evaluated directly, as `compact` does. Times are those of FAISS's search alone, on one thread, with the codes
computed beforehand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.features import SHAPES, Product
from benchmarks.main_job import machine
from spade_faiss.core.types import FloatArray
from spade_faiss.search.distances import direct_sq_dist

RERANK = 8
REPEATS = 3
# The first is the code of `compact`, which FAISS does not have; the others are FAISS's factory strings.
CODES = (
    "31 components and the rest",
    "Flat",
    "PCA32,Flat",
    "SQ8",
    "SQ4",
    "PQ32",
    "PQ32x4fs",
    "PQ64x4fs",
    "RaBitQ",
)

Search = Callable[[FloatArray], tuple[FloatArray, Any]]


def compare(k: int) -> list[dict[str, Any]]:
    """Measure each code.

    Returns:
        A row for each: milliseconds a test image, the share of the locations found exactly, and the excess of the distances.
    """
    product = Product(SHAPES["wrn50"])
    level = next(iter(product.shape.levels)).name
    blocks = [np.float32(maps).reshape(-1, maps.shape[-1]) for maps in product.normals(0, k).levels[level]]
    xt = np.concatenate([np.float32(maps).reshape(-1, maps.shape[-1])[::4] for maps in product.normals(k, 24).levels[level]])
    xq = np.float32(product.tests(1).levels[level][0]).reshape(-1, xt.shape[1])
    true = np.min([faiss.knn(xq, xb, 1)[0][:, 0] for xb in blocks], axis=0)
    searches = {name: list(map(_coder(name, xt), blocks)) for name in CODES}
    seconds: dict[str, list[float]] = {name: [] for name in CODES}
    rows = []
    for repeat in range(REPEATS):
        for name, of_blocks in searches.items():
            start = time.perf_counter()
            found = [search(xq) for search in of_blocks]
            seconds[name].append(time.perf_counter() - start)
            if repeat == 0:
                rows.append({"code": name, "k": k, **_quality(xq, blocks, found, true)})
    for row in rows:
        row["ms"] = [1000 * value for value in seconds[str(row["code"])]]
    return rows


def _coder(name: str, xt: FloatArray) -> Callable[[FloatArray], Search]:
    """Learn a code from `xt`.

    Returns:
        A function that takes a block and returns its search: that gives, for each query, the distance (nq,) to the nearest
        code, and its location (nq,).
    """
    if name == CODES[0]:
        center = xt.mean(axis=0)
        _, _, axes = np.linalg.svd((xt - center)[::8], full_matrices=False)

        def code(x: FloatArray) -> FloatArray:
            parts = (x - center) @ axes[:31].T
            rest = np.sqrt(np.maximum(np.square(x - center).sum(axis=1) - np.square(parts).sum(axis=1), 0))
            return np.ascontiguousarray(np.column_stack([parts, rest]), np.float32)

        coded_once: dict[int, FloatArray] = {}  # the code of a query is the same for all blocks

        def components(xb: FloatArray) -> Search:
            coded = code(xb)

            def search(xq: FloatArray) -> tuple[FloatArray, Any]:
                if id(xq) not in coded_once:
                    coded_once[id(xq)] = code(xq)
                D, I = faiss.knn(coded_once[id(xq)], coded, 1)
                return np.asarray(D[:, 0], np.float32), I[:, 0]

            return search

        return components
    trained = faiss.index_factory(xt.shape[1], name)
    trained.train(xt)

    def indexed(xb: FloatArray) -> Search:
        index = faiss.clone_index(trained)
        index.add(xb)

        def search(xq: FloatArray) -> tuple[FloatArray, Any]:
            D, I = index.search(xq, 1)
            return D[:, 0], I[:, 0]

        return search

    return indexed


def _quality(
    xq: FloatArray, blocks: list[FloatArray], found: list[tuple[FloatArray, Any]], true: FloatArray
) -> dict[str, float]:
    """Evaluate the candidates that look nearest, and compare the best of them with the true nearest."""
    coded, places = np.stack([D for D, _ in found]), np.stack([I for _, I in found])
    chosen = np.argsort(coded, axis=0, kind="stable")[:RERANK]
    best = np.full(len(xq), np.inf, np.float32)
    for of_block, xb in enumerate(blocks):
        (asked,) = np.nonzero((chosen == of_block).any(axis=0))
        sq_dist = direct_sq_dist(xq[asked], xb, np.maximum(places[of_block, asked], 0)[:, None])[:, 0]
        best[asked] = np.minimum(best[asked], sq_dist)
    excess = np.sqrt(best / np.maximum(true, 1e-12)) - 1
    return {"found": float((excess < 1e-3).mean()), "excess_99": float(np.quantile(excess, 0.99))}


def main() -> None:
    """Write codes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write codes.json to")
    parser.add_argument("--k", type=int, default=10)
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rows = compare(arguments.k)
    for row in rows:
        print(row)
    (arguments.out / "codes.json").write_text(json.dumps({"machine": machine(), "codes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
