"""Measures the compiled kernel: its speed beside FAISS's, where its time goes, and whether it finds what float64 finds.

Run as `python -m benchmarks.kernel --out benchmarks/results [--data FOLDER]`, FOLDER holding `mvtec_bottle`. A ratio is
of runs that alternate in one process, with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import main_job
from benchmarks.features import SHAPES, Product, write_bank
from benchmarks.gallery import AMPLE, engine_of, galleries, in_turn, pair, peers, ratio_of
from benchmarks.process import machine, spread
from spade_faiss import Bank, Detector, FeatureBatch
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import open_blocks
from spade_faiss.search.native.basis import choose_basis, choose_center, longest_query
from spade_faiss.search.native.extension import find_simd_level, import_native, why_not
from spade_faiss.search.recipe import load_recipe

Row = dict[str, Any]

NORMALS, TESTS = 60, 16
# (K, images at a time, repeats); the slowest runs are repeated least.
SPEED = ((5, 1, 9), (10, 1, 7), (50, 1, 5), (5, 16, 5), (10, 16, 3), (50, 16, 2))
TOLERANCE = 1e-5
# The size of each set of generated vectors.
QUERIES, ROWS = 440_000, 200
STEP = 20_000
_RUNS = 7


def main() -> None:
    """Measure all sections, or those that --only names, and write them to kernel.json; the others stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder that holds mvtec_bottle: equality on real features, too")
    parser.add_argument("--scratch", type=Path, help="where banks are written; 400 MB")
    parser.add_argument("--only", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    arguments = parser.parse_args()
    target = arguments.out / "kernel.json"
    figures = json.loads(target.read_bytes()) if target.exists() else {}
    figures["machine"], figures["simd_level"], figures["why_not"] = machine(), find_simd_level("auto", 1), why_not()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name in arguments.only:
            figures[name] = []
            for row in SECTIONS[name](Path(scratch), arguments.data):
                print(f"{name}: {json.dumps(row)[:400]}", flush=True)
                figures[name].append(row)
            target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def speed(scratch: Path, data: Path | None) -> Iterator[Row]:
    """Seconds an image of the pixel search by the kernel, by FAISS's engine, and by plain calls of FAISS."""
    for name, bank, tests in _sets(scratch, data):
        # A batch that shares its nearest normals: the best case of one call of FAISS for all of it.
        tests = replace(tests, embedding=np.repeat(tests.embedding[:1], TESTS, axis=0))
        for k, size, repeats in SPEED:
            detectors = {engine: _open(bank, engine, k) for engine in ("native", "faiss")}
            rows = galleries(bank, detectors["faiss"].score_features(tests[:1]), k)[0]
            engines = {engine: engine_of(detector) for engine, detector in detectors.items()}
            engines |= {name: run for name, run in peers(bank, rows, published=False).items() if name != "rebuilt"}
            batches = [tests[start : start + size] for start in range(0, TESTS, size)]
            seconds = in_turn(engines, batches, repeats)
            over = {name: ratio_of(seconds[name], seconds["native"]) for name in engines if name != "native"}
            spreads = {name: spread(runs) for name, runs in seconds.items()}
            yield {"set": name, "k": k, "batch": size, "s_per_image": spreads, "times_that_of": over}


def parts(scratch: Path, data: Path | None) -> Iterator[Row]:
    """Milliseconds of each part of a search, level by level, on one thread; with the basis that is chosen, and without one."""
    native, simd_level = import_native(), find_simd_level("auto", 1)
    for shape in SHAPES:
        product, bank = _bank(scratch, shape)
        tests = product.tests(1)
        for level in bank.layout.levels:
            blocks = open_blocks(bank, level)
            chosen = choose_basis(blocks, simd_level, choose_center(blocks))
            choosing = _least(lambda blocks=blocks: choose_basis(blocks, simd_level, choose_center(blocks)), 3)  # type: ignore[misc]
            for k in (5, 50):
                xq, _ = pair(bank, level, tests, np.arange(1))
                for basis in (chosen, None) if chosen is not None else (None,):
                    yield {
                        "set": shape,
                        "level": level.name,
                        "k": k,
                        "components": None if basis is None else len(basis),
                        "choosing_s": choosing,
                        **_parts(native, simd_level, blocks, xq, k, basis),
                    }


def equality(scratch: Path, data: Path | None) -> Iterator[Row]:
    """Compare distances with float64's, of vectors that are hard to tell apart or to compute with, and of features."""
    for kind, make in HOSTILE.items():
        for d in (24, 96):
            rng = np.random.default_rng([d, len(kind)])
            checked = Checked()
            # Results must not depend on the basis: half of the vectors are shortened in a random one.
            random = np.ascontiguousarray(np.linalg.qr(rng.standard_normal((d, 15)))[0].T, np.float32)
            for start in range(0, QUERIES, STEP):
                xb, xq = make(rng, ROWS, d), make(rng, STEP, d)
                near = rng.integers(0, ROWS, STEP // 2)
                xq[: len(near)] = xb[near] * (1 + np.float32(1e-3) * rng.standard_normal((len(near), d), np.float32))
                level = Level("level", d, stride=1, height=1, width=ROWS)
                blocks = Blocks(level, ArraySource(xb[None]))
                checked.search(blocks, xq, np.arange(1), random if start // STEP % 2 else None)
            yield {"set": kind, "channels": d, **checked.row()}
    for shape in SHAPES:
        product, bank = _bank(scratch, shape)
        yield {"set": f"generated {shape}", **_equal_features(bank, product.tests(8))}
    if data is not None:
        yield {"set": "mvtec_bottle, efficientnet_lite0", **_equal_features(*_bottle(scratch, data / "mvtec_bottle"))}


@dataclass
class Checked:
    """Counts of what was compared so far, and the largest relative error of a distance."""

    queries: int = 0
    rows: int = 0
    dense: int = 0
    evaluated: int = 0
    worst: float = 0.0
    missed: int = 0

    def search(self, blocks: Blocks, xq: FloatArray, gallery: IntArray, basis: FloatArray | None = None) -> None:
        """Search the blocks of these rows one after the other; compare each query's distance with float64's."""
        native, simd_level = import_native(), find_simd_level("auto", xq.shape[1])
        center = choose_center(blocks)
        basis = choose_basis(blocks, simd_level, center) if basis is None else basis
        packing = native.Packing(simd_level, center, basis, longest_query(blocks, center, basis))
        pack = native.QueryPack(packing, xq)
        best, at = np.full(len(xq), np.inf, np.float32), np.zeros((2, len(xq)), np.int64)
        for row in gallery.tolist():
            xb = blocks.stored(row)
            D, I, evaluated, dense = native.search(pack, xq, native.RowPack(packing, xb), xb, best, 1)
            nearer = (I[:, 0] >= 0) & (D[:, 0] < best)
            best[nearer], at[0, nearer], at[1, nearer] = D[nearer, 0], row, I[nearer, 0]
            self.evaluated, self.dense, self.rows = self.evaluated + evaluated, self.dense + dense, self.rows + len(xb)
        self.queries += len(xq)
        self.compare(blocks, xq.astype(np.float64), gallery, best.astype(np.float64), at)

    def compare(
        self, blocks: Blocks, q: npt.NDArray[np.float64], gallery: IntArray, best: npt.NDArray[np.float64], at: IntArray
    ) -> None:
        """Compare what was found with float64: `best` (n,) squared distances of the vectors `at` (2, n), rows and locations."""
        for row in gallery.tolist():
            x = blocks.stored(row).astype(np.float64)
            center = x.mean(axis=0)
            xc = x - center
            norms = np.square(xc).sum(axis=1)
            named = at[0] == row
            true = np.square(q[named] - x[at[1, named]]).sum(axis=1)
            # float32 cannot tell squares apart that are below its smallest number.
            off = np.abs(best[named] - true) / np.maximum(true, 1e-30)
            self.worst = max(self.worst, float(off.max(initial=0)))
            for first in range(0, len(q), STEP):
                qc, found = q[first : first + STEP] - center, best[first : first + STEP]
                sq_norm = np.square(qc).sum(axis=1)
                least = (norms - 2 * qc @ xc.T).min(axis=1) + sq_norm
                # float64 rounds that sum, too.
                rounding = 1e-14 * (sq_norm + norms.max())
                self.missed += int((least + rounding < found * (1 - TOLERANCE)).sum())

    def row(self) -> Row:
        """The counts as a row of results.

        Raises:
            RuntimeError: if a distance was off, or a nearer vector was missed.
        """
        if self.missed or self.worst > TOLERANCE:
            raise RuntimeError(f"the kernel is not exact: {self}")
        return {**vars(self), "evaluated_per_query": self.evaluated / self.queries, "dense_share": self.dense / self.queries}


def _equal_features(bank: Snapshot, tests: FeatureBatch, k: int = 5) -> Row:
    checked = Checked()
    _, rows = import_faiss().knn(tests.embedding.astype(np.float32), bank.embedding(np.arange(len(bank))), k)
    for level in bank.layout.levels:
        blocks = open_blocks(bank, level)
        xq = np.asarray(tests.levels[level.name], np.float32).reshape(len(tests), -1, level.channels)
        for image, gallery in zip(xq, rows, strict=True):
            checked.search(blocks, image, np.sort(gallery))
    return checked.row()


def _sets(scratch: Path, data: Path | None) -> Iterator[tuple[str, Bank, FeatureBatch]]:
    """Generated banks and a real one, each with its name and some test images."""
    for shape in SHAPES:
        product, bank = _bank(scratch, shape)
        yield shape, bank, product.tests(TESTS)
    if data is not None:
        bank, tests = _bottle(scratch, data / "mvtec_bottle")
        yield "mvtec_bottle", bank, tests[:: len(tests) // TESTS][:TESTS]


def _bottle(scratch: Path, dataset: Path) -> tuple[Bank, FeatureBatch]:
    """A bank of the dataset's normal images, and the features of its test images."""
    for name, folders in (("bottle", [dataset / "train/good"]), ("tests", sorted((dataset / "test").iterdir()))):
        main_job.cli("extract", *folders, "--bank", scratch / f"{name}.bank", *main_job.LITE0)
    tests = Bank.open(scratch / "tests.bank")
    return Bank.open(scratch / "bottle.bank"), tests.read(np.arange(len(tests)))


def _parts(native: Any, simd_level: str, blocks: Blocks, xq: FloatArray, k: int, basis: FloatArray | None) -> Row:
    center, stored = choose_center(blocks), [blocks.stored(row) for row in range(k)]
    packing = native.Packing(simd_level, center, basis, longest_query(blocks, center, basis))
    pack, packs = native.QueryPack(packing, xq), [native.RowPack(packing, xb) for xb in stored]
    evaluated = dense = 0

    def search() -> None:
        nonlocal evaluated, dense
        best = np.full(len(xq), np.inf, np.float32)
        evaluated = dense = 0
        for xb, row_pack in zip(stored, packs, strict=True):
            D, _, found, hard = native.search(pack, xq, row_pack, xb, best, 1)
            np.minimum(best, D[:, 0], out=best)
            evaluated, dense = evaluated + found, dense + hard

    runs = _RUNS if k == 5 else 2
    filtered = _least(lambda: [native.filter(pack, row_pack) for row_pack in packs], runs)
    searched = _least(search, runs)
    padded = len(xq) * sum(len(xb) for xb in stored)
    return {
        "pack_queries_ms": 1000 * _least(lambda: native.QueryPack(packing, xq), runs),
        "pack_rows_ms": 1000 * _least(lambda: [native.RowPack(packing, xb) for xb in stored], runs),
        "filter_ms": 1000 * filtered,
        "refine_ms": 1000 * (searched - filtered),
        "filter_multiply_adds_per_s": padded * (xq.shape[1] if basis is None else len(basis) + 1) / filtered,
        "float32_flops_that_it_stands_for": 2 * padded * xq.shape[1] / filtered,
        "evaluated_per_query": evaluated / len(xq),
        "dense_share": dense / len(xq),
    }


def _least(task: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest run, after one to warm up."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _bank(scratch: Path, shape: str) -> tuple[Product, Bank]:
    product = Product(SHAPES[shape])
    return product, write_bank(scratch / f"{shape}.bank", product, NORMALS)


def _open(bank: Snapshot, engine: str, k: int) -> Detector:
    return Detector.open(
        bank.path, recipe=load_recipe("exact").with_query({"engine": engine}), method=Method(k_gallery=k), run=Run(memory=AMPLE)
    )


def _normal(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    return rng.standard_normal((n, d), np.float32)


def _alike(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    return 1 + np.float32(1e-5) * _normal(rng, n, d)


def _zeros(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    return np.where(rng.random((n, 1)) < 0.3, np.float32(0), np.maximum(_normal(rng, n, d), 0))


def _outlier(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    x = _normal(rng, n, d)
    x[rng.integers(n), rng.integers(d)] = 1e6
    return x


def _scales(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    return _normal(rng, n, d) * np.float32(10) ** rng.integers(-6, 7, (n, 1)).astype(np.float32)


def _factors(rng: np.random.Generator, n: int, d: int) -> FloatArray:
    return _normal(rng, n, 6) @ np.random.default_rng(d).standard_normal((6, d), np.float32) + np.float32(0.1) * _normal(
        rng, n, d
    )


HOSTILE: dict[str, Callable[[np.random.Generator, int, int], FloatArray]] = {
    "white noise": _normal,
    "few factors": _factors,
    "near duplicates": _alike,
    "an offset of 1e4": lambda rng, n, d: _normal(rng, n, d) + np.float32(1e4),
    "norms of 1e15": lambda rng, n, d: _normal(rng, n, d) * np.float32(1e15),
    "numbers of 1e-12": lambda rng, n, d: _normal(rng, n, d) * np.float32(1e-12),
    "denormals": lambda rng, n, d: _normal(rng, n, d) * np.float32(1e-40),
    "zeros": _zeros,
    "constant maps": lambda rng, n, d: np.full((n, d), rng.integers(1, 4), np.float32),
    "one outlier of 1e6": _outlier,
    "scales from 1e-6 to 1e6": _scales,
}

SECTIONS: dict[str, Callable[[Path, Path | None], Iterator[Row]]] = {"speed": speed, "parts": parts, "equality": equality}

if __name__ == "__main__":
    main()
