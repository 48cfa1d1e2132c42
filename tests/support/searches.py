"""Cases for searches of the maps, what brute force finds in them, and how results are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from spade_faiss.features.batch import Level
from spade_faiss.search.blocks import ArraySource, Blocks, BlockSource, MapPart, StoredArray
from spade_faiss.search.protocol import GallerySearch, resolve_recipe
from spade_faiss.search.recipe import Query, Recipe
from spade_faiss.search.workers import Workers
from tests.support.oracle import product, sq_distances

Floats = npt.NDArray[np.float32]


Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Case:
    """Blocks (rows, HW, C), test vectors (n, HW, C) and each test image's neighbors (n, K)."""

    blocks: Floats
    xq: Floats
    neighbors: Ints


def structured(seed: int, n: int, rows: int, k: int) -> Case:
    shapes = {"level": (6, 7, 5)}
    rng = np.random.default_rng(seed)
    return Case(
        product(seed, rows, shapes, 4).levels["level"].reshape(rows, 42, 5),
        product(seed + 1, n, shapes, 4, defect=True).levels["level"].reshape(n, 42, 5),
        np.stack([rng.permutation(rows)[:k] for _ in range(n)]),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small whole numbers: squared distances are exact, so that equal means equal, and ties are everywhere."""
    n, rows, locations, channels = (draw(st.integers(1, most)) for most in (5, 6, 9, 4))
    k = draw(st.integers(1, rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks, xq = (rng.integers(-3, 4, (count, locations, channels)).astype(np.float32) for count in (rows, n))
    return Case(blocks, xq, np.stack([rng.permutation(rows)[:k] for _ in range(n)]))


def brute(case: Case, kappa: int) -> tuple[npt.NDArray[np.float64], list[list[set[tuple[int, int]]]]]:
    """(n, HW, kappa) squared distances, and for each query all (row, location) that are at the smallest."""
    n, locations, _ = case.xq.shape
    dist = np.empty((n, locations, kappa))
    nearest: list[list[set[tuple[int, int]]]] = [[] for _ in range(n)]
    for image, rows in enumerate(case.neighbors):
        for location, q in enumerate(case.xq[image]):
            every = np.stack([sq_distances(case.blocks[row], q) for row in rows])
            dist[image, location] = np.sort(every, axis=None)[:kappa]
            nearest[image].append({(int(rows[i]), int(x)) for i, x in np.argwhere(every == every.min())})
    return dist, nearest


class CountingSource(BlockSource):
    """Maps (rows, HW, C) that note which rows are asked for.

    Args:
        maps: the maps.
        stored: whether they pass for maps that are stored as one array, of which some locations can be read by themselves.
    """

    def __init__(self, maps: Floats, *, stored: bool = False) -> None:
        self._maps = maps
        self._is_stored = stored
        self.read_rows: list[int] = []
        self.stored_rows: list[int] = []
        self.prefetched: list[int] = []
        self.released: list[int] = []

    def __len__(self) -> int:
        return len(self._maps)

    def read(self, row: int, out: Floats | None = None) -> Floats:
        self.read_rows.append(row)
        block: Floats = self._maps[row].copy()
        return block

    def stored(self, row: int) -> StoredArray | None:
        if not self._is_stored:
            return None
        self.stored_rows.append(row)
        block: Floats = self._maps[row]
        return block

    def parts(self) -> tuple[MapPart, ...] | None:
        return (MapPart(self.stored),) if self._is_stored else None  # type: ignore[arg-type]  # it returns no None then

    def prefetch(self, row: int) -> None:
        self.prefetched.append(row)

    def release(self, rows: Iterable[int]) -> None:
        self.released += rows

    def forget(self) -> None:
        for rows in (self.read_rows, self.stored_rows, self.prefetched, self.released):
            rows.clear()


def exact_search(blocks: Floats, threads: int = 2, engine: str = "faiss") -> GallerySearch:
    """Of blocks (rows, HW, C)."""
    _, locations, channels = blocks.shape
    level = Level("level", channels, stride=1, height=1, width=locations)
    return open_by(engine, Blocks(level, ArraySource(blocks)), threads)


def open_by(engine: str, blocks: Blocks, threads: int = 2, **settings: str) -> GallerySearch:
    chosen = resolve_recipe(Recipe(name="r", query=Query(settings={"engine": engine, **settings})))
    return chosen.method.open(blocks, Workers(threads), chosen.build, chosen.query, None)
