"""Exact search by the compiled kernel, block by block: each is packed, filtered, and refined by direct distances."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spade_faiss.core.once import Once
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import BlockJob, Task, block_jobs, in_flight, run_block_jobs, slices
from spade_faiss.search.blocks import Blocks, StoredArray
from spade_faiss.search.native.basis import choose_basis, choose_center, choosing_bytes, longest_query
from spade_faiss.search.native.extension import import_native, pack_bytes
from spade_faiss.search.native.gallery import stored_codes
from spade_faiss.search.protocol import Hits
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Packing, QueryPack, RowPack

# Queries that are searched in a block at a time: enough that Python's share is small, and so few that all cores have some.
_PART_QUERIES = 784
# A multiply-add of the kernel takes a quarter of the time of one in float32, so that a task may hold four times as many.
_SPEED = 4
# What linear algebra and threads take.
_FIXED_BYTES = 4 << 20


class _Block(NamedTuple):
    """A block as it is stored, and its pack."""

    rows: StoredArray
    pack: RowPack


class NativeSearch:
    """Exact nearest gallery vectors, see `GallerySearch`.

    The result is the smallest direct distance; of equal ones the one in the first bank row, and there the first location.
    The kernel evaluates every vector that could have it, whatever it knew before from other blocks. So the numbers do not
    depend on the batch, the order of the blocks, the number of threads, or the SIMD level.

    Args:
        blocks: the blocks of one level.
        workers: where the search runs.
        simd_level: one of `SIMD_LEVELS` that this machine runs.
    """

    def __init__(self, blocks: Blocks, workers: Workers, simd_level: str) -> None:
        self._blocks = blocks
        self._workers = workers
        self._simd_level = simd_level
        self._native = import_native()
        self._codes = stored_codes(blocks.decoder)
        # Chosen at the first search, once for all threads: packs of different packings cannot be searched in each other.
        self._packing = Once(partial(_choose_packing, blocks, simd_level))

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, channels = self._blocks.level.locations, self._blocks.level.channels
        packed = images * pack_bytes(queries, channels)
        found = RunningBest.nbytes(images, queries, kappa)
        # Each block is packed, and decoded where the bank does not store vectors in the form that is searched.
        blocks = in_flight(self._workers.threads) * (pack_bytes(queries, channels) + self._blocks.block_bytes)
        part, listed = min(queries, 2 * _PART_QUERIES), min(kappa, queries)
        # The filter's minima of a part's queries and which of them have refined a group; their bounds and hits.
        each = part * (queries * 9 // 16 + 64 + 12 * listed) + RunningBest.merge_bytes(part, listed, kappa)
        return _FIXED_BYTES + choosing_bytes(self._blocks) + packed + found + blocks + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, channels = xq.shape
        rows = self._blocks.level.locations
        xq = np.ascontiguousarray(xq)
        parts = slices(queries, max(1, round(queries / _PART_QUERIES)))
        packing = self._packing()
        packing_tasks = [[self._workers.submit(self._native.QueryPack, packing, image[part]) for part in parts] for image in xq]
        packs: list[list[QueryPack]] = [[task.result() for task in tasks] for tasks in packing_tasks]
        best = RunningBest(n, queries, kappa, rows)

        def search(image: int, number: int, row: int, block: _Block) -> None:
            part = parts[number]
            bound = best.bound(image, part, row)
            listed = min(kappa, len(block.rows))
            pack = packs[image][number]
            D, I, _, _ = self._native.search(pack, xq[image, part], block.pack, block.rows, bound, listed, codes=self._codes)
            best.merge(image, part, row, self._blocks.located(row, I), D)

        def searches(job: BlockJob) -> list[Task[_Block]]:
            return [
                Task(partial(search, image, number, job.row), (part.stop - part.start) * rows * channels // _SPEED)
                for image, _ in job.requests
                for number, part in enumerate(parts)
            ]

        # The nearest images first: what is found in them leaves less to refine in the others.
        jobs = sorted(block_jobs(neighbors), key=lambda job: int(job.columns.min()))
        run_block_jobs(self._blocks, self._workers, jobs, self._prepare, searches)
        return best.hits()

    def _prepare(self, row: int) -> _Block:
        rows = self._blocks.stored(row)

        def pack() -> RowPack:
            made: RowPack = self._native.RowPack(self._packing(), rows, self._codes)
            return made

        return _Block(rows, self._blocks.cached(self._simd_level, row, pack))


def _choose_packing(blocks: Blocks, simd_level: str) -> Packing:
    center = choose_center(blocks)
    basis = choose_basis(blocks, simd_level, center)
    packing: Packing = import_native().Packing(simd_level, center, basis, longest_query(blocks, center, basis))
    return packing
