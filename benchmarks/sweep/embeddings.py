"""Provides what is searched at image level: real embeddings and any number of generated ones, queries, and true distances.

A generated embedding is drawn in two steps (a Manifold Parzen window, Vincent & Bengio, NIPS 2002): one of the real normal
images, and from it a step that is a random mix of the directions in which its nearest real neighbors lie. So the generated
cloud has the spectrum of the real one, and each of its neighborhoods has the directions of a real neighborhood; `looks_of`
measures both. Queries are real test images from which no embedding was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.sweep.measures import Doubles, intrinsic_dimension
from benchmarks.sweep.sets import RESIZE_MODES, Places, embeddings_of
from spade_faiss.core.errors import InputError
from spade_faiss.core.files import atomic_path
from spade_faiss.core.types import Bools, FloatArray
from spade_faiss.search.distances import import_faiss

GROWN = "-grown"
# So many true distances are computed for each query; no point asks for more neighbors.
TRUE_NEIGHBORS = 50
DIMENSION_NEIGHBORS = 20
COMPONENTS = (1, 4, 16, 64, 256)
# A step mixes the directions of so many neighbors, and its length is this share of their spread; `looks_of` chose both.
_NEIGHBORS, _STEP = 64, 0.7
_BLOCK = 4096
_SPARE = 32
_SEED = 1234

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Base:
    """The embeddings that are searched, and the queries.

    Args:
        path: a file that holds the embeddings, (n, d) float16, and nothing else; every engine gets these values.
        n: the number of embeddings.
        xq: the queries, (nq, d); none is a row of the base.
        defective: which queries are defective, (nq,).
        truth: the distances to the nearest rows, (nq, `TRUE_NEIGHBORS`), ascending, evaluated in float64.
    """

    path: Path
    n: int
    xq: FloatArray
    defective: Bools
    truth: Doubles

    @property
    def rows(self) -> Halves:
        """The embeddings, (n, d), mapped from their file."""
        return np.memmap(self.path, np.float16, "r", shape=(self.n, self.xq.shape[1]))

    def true_dist(self, ids: npt.NDArray[np.int64]) -> Doubles:
        """Return the distances (nq, k) to the rows that `ids` (nq, k) name, evaluated in float64; infinite for -1."""
        rows, found = self.rows, np.full(ids.shape, np.inf)
        for query, line in enumerate(ids):
            xb = rows[np.maximum(line, 0)].astype(np.float64)
            found[query] = np.linalg.norm(xb - self.xq[query].astype(np.float64), axis=1)
        found[ids < 0] = np.inf
        return found


def open_base(name: str, n: int, queries: int, places: Places) -> Base:
    """Return the first n embeddings of a set.

    They are made once, in the scratch folder.

    Args:
        name: the name of a real set; with `-grown` after it, embeddings are generated from it, as many as wanted.
        n: the number of embeddings.
        queries: the most queries.
        places: where real sets and scratch files are.

    Raises:
        InputError: for an unknown set, or for more embeddings than a real set has.
    """
    real = name.removesuffix(GROWN)
    if real not in RESIZE_MODES:
        raise InputError(f"set {name!r} is not one of {', '.join(RESIZE_MODES)}, nor one of them with {GROWN!r} after it")
    folder = places.scratch / "bases"
    path, truth_path = folder / f"{name}-{n}.f16", folder / f"{name}-{n}-{queries}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or not truth_path.is_file():
        normal, tests, defective = embeddings_of(real, places)
        if name == real and n > len(normal):
            raise InputError(f"the set {name!r} has {len(normal)} normal images, asked for n={n}; use {name + GROWN!r}")
        if not path.is_file():
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                if name == real:
                    np.asarray(normal[:n], np.float16).tofile(file)
                else:
                    grower = Grower(normal)
                    for start in range(0, n, _BLOCK):
                        grower.block(start // _BLOCK)[: n - start].tofile(file)
        chosen = np.linspace(0, len(tests) - 1, min(queries, len(tests))).round().astype(int)
        xq, defective = np.ascontiguousarray(tests[chosen]), defective[chosen]
        rows = np.memmap(path, np.float16, "r", shape=(n, xq.shape[1]))
        truth = true_nearest(rows, xq, min(TRUE_NEIGHBORS, n))
        with atomic_path(truth_path) as temporary, temporary.open("wb") as file:
            np.savez(file, xq=xq, defective=defective, truth=truth)
    with np.load(truth_path) as found:
        return Base(path, n, found["xq"], found["defective"], found["truth"])


class Grower:
    """Draws embeddings like the given ones.

    Block `number` is the same whenever it is asked for, so that a larger base begins with the smaller ones.
    """

    def __init__(self, real: FloatArray, neighbors: int = _NEIGHBORS, step: float = _STEP) -> None:
        self._real = real
        self._neighbors = min(neighbors, len(real) - 1)
        self._step = step
        _, self._near = import_faiss().knn(real, real, self._neighbors + 1)

    def block(self, number: int) -> Halves:
        """Draw a block of embeddings, (`_BLOCK`, d)."""
        rng = np.random.default_rng([_SEED, number])
        out = np.empty((_BLOCK, self._real.shape[1]), np.float16)
        for place, seed in enumerate(rng.integers(len(self._real), size=_BLOCK)):
            near = self._real[self._near[seed]]
            mix = rng.standard_normal(len(near), np.float32) * np.float32(self._step / len(near) ** 0.5)
            out[place] = np.maximum(self._real[seed] + mix @ near - mix.sum() * near.mean(axis=0), 0)
        return out


def true_nearest(rows: Halves, xq: FloatArray, k: int) -> Doubles:
    """Return the true distances to the nearest rows, (nq, k): more than k are found in float32, and evaluated in float64."""
    faiss = import_faiss()
    center = np.asarray(rows[: min(len(rows), _BLOCK)], np.float32).mean(axis=0)
    best = np.full((len(xq), k), np.inf)
    for start in range(0, len(rows), 16 * _BLOCK):
        xb = np.asarray(rows[start : start + 16 * _BLOCK], np.float32)
        _, I = faiss.knn(xq - center, xb - center, min(k + _SPARE, len(xb)))
        dist = np.empty(I.shape)
        for query, line in enumerate(I):
            dist[query] = np.linalg.norm(xb[line].astype(np.float64) - xq[query].astype(np.float64), axis=1)
        best = np.sort(np.concatenate([best, dist], axis=1), axis=1)[:, :k]
    return best


def looks_of(xb: npt.NDArray[np.floating], xq: FloatArray) -> dict[str, list[float]]:
    """Compute the statistics that generated embeddings must share with real ones.

    Returns:
        `spectrum`, the shares of the variance in the first `COMPONENTS` principal components; `dimension`, the quartiles of
        the local intrinsic dimension at up to 1000 rows of the base; `query_dimension`, the same at the queries; `apart`, the
        quartiles of the queries' distances to the nearest row, over the root of the base's variance.
    """
    base = np.asarray(xb, np.float32)
    variance = np.linalg.eigvalsh(np.cov(base.T.astype(np.float64)))[::-1]
    explained = np.cumsum(variance) / variance.sum()
    some = base[np.linspace(0, len(base) - 1, min(len(base), 1000)).round().astype(int)]
    k = DIMENSION_NEIGHBORS
    own = np.sqrt(np.maximum(import_faiss().knn(some, base, k + 1)[0][:, 1:].astype(np.float64), 1e-12))
    of_queries = np.sqrt(np.maximum(import_faiss().knn(xq, base, k)[0].astype(np.float64), 1e-12))
    quartiles = (0.25, 0.5, 0.75)
    return {
        "spectrum": [float(explained[min(count, len(explained)) - 1]) for count in COMPONENTS],
        "dimension": np.quantile(intrinsic_dimension(own), quartiles).tolist(),
        "query_dimension": np.quantile(intrinsic_dimension(of_queries), quartiles).tolist(),
        "apart": np.quantile(of_queries[:, 0] / variance.sum() ** 0.5, quartiles).tolist(),
    }
