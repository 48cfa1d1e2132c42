"""Exact search by FAISS, block by block: products find candidates, direct distances decide, a scan settles what is left."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import NamedTuple

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import BlockJob, Task, block_jobs, in_flight, query_parts, run_block_jobs, slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import SCAN_BYTES, direct_sq_dist, product_bytes, product_knn, rounding_of, scan, sq_norms
from spade_faiss.search.protocol import Hits
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

# A block is searched again where rounding could hide a squared distance that is smaller by more than this share: distances
# are then right to 1e-4.
TOLERANCE = 1.9e-4
# Candidates beyond kappa that are listed when a strip is searched again: rivals within rounding of each other are few.
_SPARE = 7
_STRIP_ROWS = 784
# Up to this many channels, FAISS has a kernel of its own that is fastest on whole blocks.
_FUSED_CHANNELS = 32


class _Block(NamedTuple):
    """A block as it is and less the center; `memory` is what both were made in, unless the cache holds the block."""

    xb: FloatArray
    centered: FloatArray
    memory: tuple[FloatArray, FloatArray]


class _BlockPool:
    """Makes blocks in memory that is used again: to ask the system for more takes as long as to decode."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._shape = (blocks.level.locations, blocks.level.channels)
        self._free: deque[_Block] = deque()

    def make(self, row: int) -> _Block:
        try:
            memory = self._free.pop().memory
        except IndexError:
            memory = np.empty(self._shape, np.float32), np.empty(self._shape, np.float32)
        xb = self._blocks(row, memory[0])
        return _Block(xb, np.subtract(xb, self._blocks.center, out=memory[1][: len(xb)]), memory)

    def free(self, block: _Block) -> None:
        self._free.append(block)


class FaissSearch:
    """Exact nearest gallery vectors, see `GallerySearch`.

    What is returned is a true distance, at most `TOLERANCE` above the smallest (squared), and exactly 0 where vectors are
    equal. A product's distances are off by up to a known rounding: they choose the vectors that are evaluated directly, and
    say where another vector could be nearer still. A strip of a block where that is so is searched again for more candidates,
    and scanned by direct distances where those do not settle it. Each part of an image meets each strip in a call of its own,
    so that the numbers depend neither on the batch nor on the order nor on the number of threads.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
    """

    def __init__(self, blocks: Blocks, workers: Workers) -> None:
        self._blocks = blocks
        self._workers = workers

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, channels = self._blocks.level.locations, self._blocks.level.channels
        value = np.dtype(np.float32).itemsize
        strips = strips_of(queries, channels)
        centered = images * queries * (channels + 1) * value
        found = RunningBest.nbytes(images, queries, kappa)
        last = 3 * images * k_gallery * len(strips) * queries * value
        blocks = in_flight(self._workers.threads) * 2 * self._blocks.block_bytes
        # A strip may be searched again for all queries of an image, and scanned for all of its rows.
        product = product_bytes(queries, strips[0].stop, channels, kappa + _SPARE) + queries * channels * value + SCAN_BYTES
        product += RunningBest.merge_bytes(queries, len(strips) * min(kappa, queries) + _SPARE, kappa)
        return centered + found + last + blocks + self._workers.threads * product

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        (n, queries, channels), k_gallery = xq.shape, neighbors.shape[1]
        rows = self._blocks.level.locations
        center = self._blocks.center
        centered = xq - center
        best = RunningBest(n, queries, kappa, rows)
        # The product's distance of the last vector that a query listed in a strip; infinite where all vectors were listed.
        last = np.full((n, k_gallery, len(strips_of(rows, channels)), queries), np.inf, np.float32)

        def search(job: BlockJob, image: int, column: int, part: slice, block: _Block) -> None:
            locations, sq_dist = [], []
            for index, strip in enumerate(strips_of(len(block.xb), channels)):
                listed = min(kappa, strip.stop - strip.start)
                product, I = product_knn(centered[image, part], block.centered[strip], listed)
                sq_dist.append(direct_sq_dist(xq[image, part], block.xb[strip], I))
                locations.append(_in_block(I, strip))
                if listed < strip.stop - strip.start:
                    last[image, column, index, part] = product[:, -1]
            found = self._blocks.located(job.row, np.concatenate(locations, axis=1))
            best.merge(image, part, job.row, found, np.concatenate(sq_dist, axis=1))

        def searches(job: BlockJob) -> list[Task[_Block]]:
            return [
                Task(partial(search, job, image, column, part), (part.stop - part.start) * rows * channels)
                for image, column in job.requests
                for part in parts
            ]

        parts = query_parts(queries, rows, channels)
        jobs = block_jobs(neighbors)
        pool = _BlockPool(self._blocks)
        run_block_jobs(self._blocks, self._workers, jobs, pool.make, searches, pool.free)

        furthest = best.furthest()
        # A vector that was not listed is at least as far as the last one that was, rounding apart.
        with np.errstate(invalid="ignore"):  # infinite less infinite: nothing is left there
            last -= rounding_of(sq_norms(centered)[:, None, None], last, channels)
        doubtful = (last < (1 - TOLERANCE) * furthest[:, None, None]) & (furthest[:, None, None] > 0)
        doubts = doubtful.sum(axis=(2, 3))

        def refine(job: BlockJob, image: int, column: int, block: _Block) -> None:
            for index, strip in enumerate(strips_of(len(block.xb), channels)):
                (which,) = np.nonzero(doubtful[image, column, index])
                if len(which):
                    pair = block.xb[strip], block.centered[strip]
                    D, I = _settle(xq[image, which], centered[image, which], pair, kappa, furthest[image, which])
                    best.merge(image, which, job.row, self._blocks.located(job.row, _in_block(I, strip)), D)

        def refinements(job: BlockJob) -> list[Task[_Block]]:
            return [
                Task(partial(refine, job, image, column), int(doubts[image, column]) * rows // last.shape[2] * channels)
                for image, column in job.requests
                if doubts[image, column]
            ]

        doubted = [job for job in jobs if doubts[job.images, job.columns].any()]
        run_block_jobs(self._blocks, self._workers, doubted, pool.make, refinements, pool.free)
        return best.hits()


def strips_of(rows: int, channels: int) -> list[slice]:
    """The strips of a block of so many rows: the smaller they are, the less there is to search again."""
    count = 1 if channels <= _FUSED_CHANNELS else max(1, round(rows / _STRIP_ROWS))
    return slices(rows, count)


def _in_block(I: IntArray, strip: slice) -> IntArray:
    """Locations in a block, of rows of one of its strips; -1 stays what it is."""
    return np.where(I < 0, I, I + strip.start)


def _settle(
    xq: FloatArray, centered: FloatArray, strip: tuple[FloatArray, FloatArray], k: int, furthest: FloatArray
) -> tuple[FloatArray, IntArray]:
    """Search a strip again, for queries that a list of k candidates did not settle.

    Args:
        xq: (nq, d) float32, the queries.
        centered: (nq, d), the queries less the center.
        strip: (nb, d) rows, and the rows less the center.
        k: number of vectors to find.
        furthest: (nq,), the squared distance beyond which nothing is asked for.

    Returns:
        Direct squared distances and rows of the strip, (nq, listed) each, in no order; infinity and -1 stand for nothing. The
        k nearest rows are among them, or all rows of a smaller strip.
    """
    xb, xb_centered = strip
    k, listed = min(k, len(xb)), min(k + _SPARE, len(xb))
    product, I = product_knn(centered, xb_centered, listed)
    D = direct_sq_dist(xq, xb, I)
    if listed < len(xb):
        least = product[:, -1] - rounding_of(sq_norms(centered), product[:, -1], xq.shape[1])
        # What was found in all blocks before, and what is found in this strip now: either bounds the result.
        limit = np.minimum(furthest, np.partition(D, k - 1, axis=1)[:, k - 1])
        (left,) = np.nonzero((least < (1 - TOLERANCE) * limit) & (limit > 0))
        if len(left):
            D[left], I[left] = np.inf, -1
            D[left, :k], I[left, :k] = scan(xq[left], xb, k)
    return D, I
