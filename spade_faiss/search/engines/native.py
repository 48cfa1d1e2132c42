"""Exact search by the compiled kernel, block by block: each block is packed, filtered, and settled by direct distances."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import Piece, Visit, in_flight, slices, sweep, visits_of
from spade_faiss.search.blocks import Blocks, StoredArray
from spade_faiss.search.native.basis import choose_basis, choose_center, choosing_bytes
from spade_faiss.search.native.extension import import_native, pack_bytes
from spade_faiss.search.protocol import Hits
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Packing, QueryPack, RowPack

# Queries that are searched in a block at a time: enough that Python's share is small, and so few that all cores have some.
_PART_QUERIES = 784
# A multiply-add takes a fraction of what it does in float32: tasks hold so many times as many.
_SPEED = 4
# Of linear algebra, of threads.
_FIXED_BYTES = 4 << 20
_NO_ROW = np.iinfo(np.int64).max


class _Block(NamedTuple):
    """A block as it is stored, and packed."""

    rows: StoredArray
    pack: RowPack


class NativeSearch:
    """Exact nearest gallery vectors, see `GallerySearch`.

    What is returned is the smallest direct distance, of equal ones that in the first bank row, and there of the first location.
    The kernel evaluates every vector that could have it, whatever it knew before of other blocks: so the numbers depend neither
    on the batch nor on the order nor on the number of threads nor on the unit.

    Args:
        blocks: one level's.
        workers: where it runs.
        unit: one of `kernel.UNITS` that this machine runs.
    """

    def __init__(self, blocks: Blocks, workers: Workers, unit: str) -> None:
        self._blocks = blocks
        self._workers = workers
        self._unit = unit
        self._native = import_native()
        self._choosing = threading.Lock()
        self._chosen: Packing | None = None

    @property
    def _packing(self) -> Packing:
        """ResolvedRecipe at the first search, once for all threads: what was packed by another does not fit."""
        with self._choosing:
            if self._chosen is None:
                center = choose_center(self._blocks)
                basis = choose_basis(self._blocks, self._unit, center)
                made: Packing = self._native.Packing(self._unit, center, basis)
                self._chosen = made
            return self._chosen

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, channels = self._blocks.level.shape
        queries = height * width
        packed = images * pack_bytes(queries, channels)
        found = _Nearest.nbytes(images, queries, kappa)
        # Packed, and decoded where the bank does not store the vectors as they are searched.
        blocks = in_flight(self._workers.threads) * (pack_bytes(queries, channels) + self._blocks.block_bytes)
        part, listed = min(queries, 2 * _PART_QUERIES), min(kappa, queries)
        # What the filter says of a part's queries, who is done with a group; their bounds, what they find, and its merging.
        each = part * (queries * 9 // 16 + 64 + 12 * listed + 16 * (kappa + listed))
        return _FIXED_BYTES + choosing_bytes(self._blocks) + packed + found + blocks + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, channels = xq.shape
        rows = self._blocks.level.height * self._blocks.level.width
        xq = np.ascontiguousarray(xq)
        parts = slices(queries, max(1, round(queries / _PART_QUERIES)))
        packing = [[self._workers.submit(self._native.QueryPack, self._packing, image[part]) for part in parts] for image in xq]
        packs: list[list[QueryPack]] = [[task.result() for task in of_image] for of_image in packing]
        nearest = _Nearest(n, queries, kappa)

        def look(image: int, number: int, row: int, block: _Block) -> None:
            part = parts[number]
            bound = nearest.bound(image, part, row)
            D, I, _, _ = self._native.search(
                packs[image][number], xq[image, part], block.pack, block.rows, bound, min(kappa, rows)
            )
            nearest.merge(image, part, row, D, I)

        def looks(visit: Visit) -> list[Piece[_Block]]:
            return [
                Piece(partial(look, image, number, visit.row), (part.stop - part.start) * rows * channels // _SPEED)
                for image, _ in visit.asked
                for number, part in enumerate(parts)
            ]

        sweep(self._blocks, self._workers, visits_of(neighbors), self._prepare, looks)
        return nearest.hits()

    def _prepare(self, row: int) -> _Block:
        rows = self._blocks.stored(row)

        def pack() -> RowPack:
            made: RowPack = self._native.RowPack(self._packing, rows)
            return made

        return _Block(rows, self._blocks.kept(self._unit, row, pack))


class _Nearest:
    """The nearest that each query has found so far, in whatever order blocks are searched.

    Blocks of one image may be searched at the same time: a bound that another thread is about to lower only costs evaluations.
    """

    def __init__(self, images: int, queries: int, kappa: int) -> None:
        self._sq_dist = np.full((images, queries, kappa), np.inf, np.float32)
        self._row = np.full((images, queries), _NO_ROW, np.int64)
        self._location = np.zeros((images, queries), np.int64)
        self._locks = [threading.Lock() for _ in range(images)]

    @staticmethod
    def nbytes(images: int, queries: int, kappa: int) -> int:
        """Bytes of such an object."""
        return images * queries * (4 * kappa + 16)

    def bound(self, image: int, part: slice, row: int) -> FloatArray:
        """Beyond which squared distance a block's vectors change nothing: -inf where none of that row can."""
        with self._locks[image]:
            bound = self._sq_dist[image, part, -1].copy()
            bound[(bound == 0) & (self._row[image, part] < row)] = -np.inf
        return bound

    def merge(self, image: int, part: slice, row: int, D: FloatArray, I: IntArray) -> None:
        """Take in what was found in a row's block: distances (m, k) and locations, ascending; -1 for none."""
        with self._locks[image]:
            sq_dist, of_row = self._sq_dist[image, part], self._row[image, part]
            found = D[:, 0]
            nearer = (I[:, 0] >= 0) & ((found < sq_dist[:, 0]) | ((found == sq_dist[:, 0]) & (row < of_row)))
            of_row[nearer] = row
            self._location[image, part][nearer] = I[nearer, 0]
            if sq_dist.shape[1] == 1:
                sq_dist[nearer, 0] = found[nearer]
            else:
                sq_dist[:] = np.sort(np.concatenate([sq_dist, D], axis=1), axis=1)[:, : sq_dist.shape[1]]

    def hits(self) -> Hits:
        """All of it; -1 where there is nothing, as for vectors that are no numbers."""
        self._row[self._row == _NO_ROW] = -1
        return Hits(self._sq_dist, self._row, self._location)
