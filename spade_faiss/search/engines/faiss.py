"""Exact search by FAISS, block by block: its product finds candidates, direct distances decide, a scan settles the rest."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import NamedTuple

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import Piece, Visit, in_flight, parts_of, slices, sweep, visits_of
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import SCAN_BYTES, direct_sq_dist, product_bytes, product_knn, rounding_of, scan, sq_norms
from spade_faiss.search.protocol import Hits
from spade_faiss.search.running_best import Found, smallest_of
from spade_faiss.search.workers import Workers

# A block is searched again where rounding could hide a squared distance that is smaller by more than this share: distances
# are then right to 1e-4.
TOLERANCE = 1.9e-4
# Candidates of a second look beyond kappa: rivals within rounding of each other are few.
_SPARE = 7
_STRIP_ROWS = 784
# Up to as many FAISS has a kernel of its own that is fastest on whole blocks.
_FUSED_CHANNELS = 32


class _Block(NamedTuple):
    """A block as it is and less the center; `memory` is what the first is decoded into, unless it is kept elsewhere."""

    xb: FloatArray
    centered: FloatArray
    memory: FloatArray


class _Blocks:
    """Makes blocks in memory that is used again and again: to ask the system for more takes as long as to decode."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._shape = (blocks.level.height * blocks.level.width, blocks.level.channels)
        self._free: deque[_Block] = deque()

    def make(self, row: int) -> _Block:
        try:
            _, centered, memory = self._free.pop()
        except IndexError:
            centered, memory = np.empty(self._shape, np.float32), np.empty(self._shape, np.float32)
        xb = self._blocks(row, memory)
        np.subtract(xb, self._blocks.center, out=centered)
        return _Block(xb, centered, memory)

    def done(self, block: _Block) -> None:
        self._free.append(block)


class FaissSearch:
    """Exact nearest gallery vectors, see `GallerySearch`.

    What is returned is a true distance, at most `TOLERANCE` above the smallest (squared), and exactly 0 where vectors are
    equal. A product's distances are off by up to a known rounding: they choose the vectors that are evaluated directly, and
    say where another vector could be nearer still. A strip of a block where that is so is searched again for more candidates,
    and scanned by direct distances where those do not settle it. Each part of an image meets each strip in a call of its own,
    so that the numbers depend neither on the batch nor on the order nor on the number of threads.
    """

    def __init__(self, blocks: Blocks, workers: Workers) -> None:
        self._blocks = blocks
        self._workers = workers

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, channels = self._blocks.level.shape
        queries, value = height * width, np.dtype(np.float32).itemsize
        strips = strips_of(queries, channels)
        centered = images * queries * (channels + 1) * value
        found = Found.nbytes(images, k_gallery, queries, min(kappa, queries))
        last = 2 * images * k_gallery * len(strips) * queries * value
        blocks = in_flight(self._workers.threads) * 2 * self._blocks.block_bytes
        # A second look may concern all queries of an image, and a scan all rows of a strip.
        product = product_bytes(queries, strips[0].stop, channels, kappa + _SPARE) + queries * channels * value + SCAN_BYTES
        return centered + found + last + blocks + self._workers.threads * product

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        (n, queries, channels), k_gallery = xq.shape, neighbors.shape[1]
        rows = self._blocks.level.height * self._blocks.level.width
        center = self._blocks.center
        centered = xq - center
        strips = strips_of(rows, channels)
        k = min(kappa, rows)
        found = Found(neighbors, queries, k)
        # Of each query and strip: the product's distance of the last vector that was evaluated; infinite where all were.
        last = np.full((n, k_gallery, len(strips), queries), np.inf, np.float32)

        def look(image: int, column: int, part: slice, block: _Block) -> None:
            xb, xb_centered, _ = block
            each = []
            for index, strip in enumerate(strips):
                listed = min(k, strip.stop - strip.start)
                product, I = product_knn(centered[image, part], xb_centered[strip], listed)
                each.append((direct_sq_dist(xq[image, part], xb[strip], I), I + strip.start))
                if listed < strip.stop - strip.start:
                    last[image, column, index, part] = product[:, -1]
            found.sq_dist[image, column, part], found.location[image, column, part] = smallest_of(each, k)

        def looks(visit: Visit) -> list[Piece[_Block]]:
            return [
                Piece(partial(look, image, column, part), (part.stop - part.start) * rows * channels)
                for image, column in visit.asked
                for part in parts
            ]

        parts = parts_of(queries, rows, channels)
        visits = visits_of(found.rows)
        made = _Blocks(self._blocks)
        sweep(self._blocks, self._workers, visits, made.make, looks, made.done)

        furthest = found.furthest(kappa)
        # A vector that was not listed is at least as far as the last one that was, rounding apart.
        with np.errstate(invalid="ignore"):  # infinite less infinite: nothing is left there
            last -= rounding_of(sq_norms(centered)[:, None, None], last, channels)
        doubtful = (last < (1 - TOLERANCE) * furthest[:, None, None]) & (furthest[:, None, None] > 0)
        doubts = doubtful.sum(axis=(2, 3))

        def look_again(image: int, column: int, block: _Block) -> None:
            xb, xb_centered, _ = block
            for index, strip in enumerate(strips):
                (which,) = np.nonzero(doubtful[image, column, index])
                if len(which):
                    pair = xb[strip], xb_centered[strip]
                    D, I = _settle(xq[image, which], centered[image, which], pair, k, furthest[image, which])
                    before = found.sq_dist[image, column, which], found.location[image, column, which]
                    outside = (before[1] < strip.start) | (before[1] >= strip.stop)
                    kept = np.where(outside, before[0], np.inf), before[1]
                    found.sq_dist[image, column, which], found.location[image, column, which] = smallest_of(
                        [kept, (D, I + strip.start)], k
                    )

        def second_looks(visit: Visit) -> list[Piece[_Block]]:
            return [
                Piece(partial(look_again, image, column), int(doubts[image, column]) * rows // len(strips) * channels)
                for image, column in visit.asked
                if doubts[image, column]
            ]

        again = [visit for visit in visits if doubts[visit.images, visit.columns].any()]
        sweep(self._blocks, self._workers, again, made.make, second_looks, made.done)
        return found.hits(kappa)


def strips_of(rows: int, channels: int) -> list[slice]:
    """A block's rows, part by part: the smaller they are, the less there is to search again."""
    count = 1 if channels <= _FUSED_CHANNELS else max(1, round(rows / _STRIP_ROWS))
    return slices(rows, count)


def _settle(
    xq: FloatArray, centered: FloatArray, strip: tuple[FloatArray, FloatArray], k: int, furthest: FloatArray
) -> tuple[FloatArray, IntArray]:
    """The nearest rows of a strip, k or all if it has less, by direct distances, in no order.

    Args:
        xq: (nq, d) queries that listing k candidates did not settle.
        centered: the same less the center.
        strip: (nb, d) rows, and less the center.
        k: how many are asked for.
        furthest: (nq,), a squared distance beyond which nothing is asked for.
    """
    xb, xb_centered = strip
    k, listed = min(k, len(xb)), min(k + _SPARE, len(xb))
    product, I = product_knn(centered, xb_centered, listed)
    D, I = smallest_of([(direct_sq_dist(xq, xb, I), I)], k)
    if listed < len(xb):
        least = product[:, -1] - rounding_of(sq_norms(centered), product[:, -1], xq.shape[1])
        # What was found in all blocks before, and what is found in this strip now: either bounds the result.
        limit = np.minimum(furthest, D.max(axis=1))
        (left,) = np.nonzero((least < (1 - TOLERANCE) * limit) & (limit > 0))
        if len(left):
            D[left], I[left] = scan(xq[left], xb, k)
    return D, I
