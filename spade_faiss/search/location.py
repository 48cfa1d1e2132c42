"""Location search: each location is compared with a window around the same place in the neighbors' maps; nothing is built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import Bools, FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import BlockJob, Task, block_jobs, in_flight, run_block_jobs, slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist
from spade_faiss.search.engines.windows import WindowSearch
from spade_faiss.search.native.extension import usable_simd_level
from spade_faiss.search.native.gallery import can_be_mapped
from spade_faiss.search.native.sums import STEP_BYTES, kernel_sq_dist
from spade_faiss.search.protocol import Encoded, Hits, NoSettings, SearchMethod
from spade_faiss.search.reach import BYTES_A_LOCATION, Reach, reach_of
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

# The most distances that one call evaluates: with the places that they are for, they take a few megabytes.
_CALL_DISTANCES = 1 << 18
# The most that one float32 operation is off by, relative to its result, and the largest number that may count as 0.
_HALF_UNIT, _VANISHING = 2.0**-24, 2.0**-125


@dataclass(frozen=True, kw_only=True)
class Query:
    """`radius` is how many cells of a level's own grid the nearest vector may lie up, down, left and right of the location.

    Where images have regions of interest of their own, a window holds what lies inside of them. One that holds fewer than
    `kappa` vectors in all of the neighbors reaches as many cells further as it takes to hold so many.
    """

    radius: int = 3

    def __post_init__(self) -> None:
        check_at_least("radius", self.radius, 0)


class LocationSearch:
    """The nearest vectors within a window, see `GallerySearch`.

    It is exact for a definition of its own: what is normal at a place. Where images of a product are not aligned to within the
    window, distances are larger than those of exact search; they are never smaller.

    Where images have regions of interest of their own, windows may reach further, see `reach_of`.

    The kernel searches where it runs, and NumPy elsewhere; both find the same, to the bit.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        radius: see `Query`.
    """

    def __init__(self, blocks: Blocks, workers: Workers, radius: int) -> None:
        level = blocks.level
        self._blocks = blocks
        self._level = level
        self._radius = min(radius, max(level.height, level.width))
        self._least = min(radius + 1, level.height) * min(radius + 1, level.width)
        if level.roi is not None:
            self._least = int((window_of(level, radius) >= 0).sum(axis=1).min())
        simd_level = usable_simd_level(level.channels) if can_be_mapped(blocks) else None
        self._search: BlockWindowSearch | WindowSearch = (
            BlockWindowSearch(blocks, workers, radius)
            if simd_level is None
            else WindowSearch(blocks, workers, radius, simd_level)
        )

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        # What is counted and summed up of each query, where images have regions of their own.
        counted = BYTES_A_LOCATION * images * self._level.locations if self._blocks.partial else 0
        return counted + self._search.working_bytes(images, k_gallery, kappa)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        if self._blocks.partial:
            every = np.ones(xq.shape[:2], np.bool_)
            return self.within(xq, neighbors, kappa, self.reach(self.held(neighbors), every, kappa))
        if kappa > (least := neighbors.shape[1] * self._least):
            raise InputError(
                f"kappa={kappa} is larger than the smallest window, {least} vectors at level {self._level.name!r}; "
                f"raise radius or k_gallery, or lower kappa"
            )
        return self._search(xq, neighbors, kappa)

    def partial(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `PartialSearch`."""
        return self._search(xq, neighbors, kappa)

    def held(self, neighbors: IntArray) -> IntArray:
        """See `WindowedSearch`."""
        held = np.zeros((len(neighbors), self._level.locations), np.int64)
        for job in block_jobs(neighbors):
            held[job.images] += self._blocks.inspected(job.row)
        return held

    def reach(self, held: IntArray, inspected: Bools, kappa: int) -> Reach:
        """See `WindowedSearch`."""
        shape = (len(held), self._level.height, self._level.width)
        return reach_of(held.reshape(shape), inspected.reshape(shape), self._radius, kappa).reshape(held.shape)

    def within(self, xq: FloatArray, neighbors: IntArray, kappa: int, reach: Reach) -> Hits:
        """See `WindowedSearch`."""
        return self._search.within(xq, neighbors, kappa, reach)


class _Asked(NamedTuple):
    """Queries of a test image that are searched at a time, their locations, and how far their windows reach."""

    queries: slice | IntArray
    size: int
    reach: int


class _Block(NamedTuple):
    """A block, and where it holds vectors of a part of the map: (H*W + 1,) numbers in the block, -1 for none and at the end."""

    rows: FloatArray
    numbers: IntArray | None


class BlockWindowSearch:
    """The same as `WindowSearch`, block by block: FAISS says which vectors may be nearest, and NumPy evaluates those.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        radius: see `Query`.
    """

    def __init__(self, blocks: Blocks, workers: Workers, radius: int) -> None:
        self._blocks = blocks
        self._workers = workers
        self._radius = min(radius, max(blocks.level.height, blocks.level.width))
        self._window = window_of(blocks.level, radius)

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, cells = map(int, self._window.shape)
        blocks = in_flight(self._workers.threads) * self._blocks.block_bytes
        part = min(queries, 1 + _CALL_DISTANCES // cells)
        if self._blocks.partial:  # windows may be widened to the whole map
            cells = self._cells(max(self._blocks.level.height, self._blocks.level.width))
            part = 1 + _CALL_DISTANCES // cells
        each = (96 if self._blocks.partial else 48) * part * cells + STEP_BYTES + RunningBest.merge_bytes(part, cells, kappa)
        return RunningBest.nbytes(images, queries, kappa) + blocks + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        return self.within(xq, neighbors, kappa, None)

    def within(self, xq: FloatArray, neighbors: IntArray, kappa: int, reach: Reach | None) -> Hits:
        """Search windows that reach so far, see `WindowedSearch`, or, without `reach`, as far as the radius."""
        n, queries, channels = xq.shape
        best = RunningBest(n, queries, kappa, locations=queries)
        every = slices(queries, -(-self._window.size // _CALL_DISTANCES))
        usual = [_Asked(part, part.stop - part.start, self._radius) for part in every]
        asked = [usual] * n if reach is None else [self._asked(of_image) for of_image in reach]

        def search(image: int, row: int, part: _Asked, block: _Block) -> None:
            at, window = part.queries, self._window_of(part)
            places = window if block.numbers is None else block.numbers[window]
            found = _sq_dist_within(xq[image, at], block.rows, places, best.bound(image, at, row), kappa)
            best.merge(image, at, row, window if places is window else np.where(places < 0, -1, window), found)

        def searches(job: BlockJob) -> list[Task[_Block]]:
            return [
                Task(partial(search, image, job.row, part), part.size * self._cells(part.reach) * channels)
                for image, _ in job.requests
                for part in asked[image]
            ]

        run_block_jobs(self._blocks, self._workers, block_jobs(neighbors), self._prepare, searches)
        return best.hits()

    def _asked(self, reach: Reach) -> list[_Asked]:
        """The queries of a test image (HW,), those whose windows reach as far together."""
        asked = []
        for far in np.unique(reach[reach >= 0]).tolist():
            (at,) = np.nonzero(reach == far)
            parts = slices(len(at), min(len(at), -(-len(at) * self._cells(far) // _CALL_DISTANCES)))
            asked += [_Asked(at[part], part.stop - part.start, far) for part in parts]
        return asked

    def _window_of(self, part: _Asked) -> IntArray:
        if part.reach == self._radius:
            return self._window[part.queries]
        assert not isinstance(part.queries, slice)
        return window_of(self._blocks.level, part.reach, part.queries)

    def _prepare(self, row: int) -> _Block:
        if not self._blocks.partial:
            return _Block(self._blocks(row), None)
        inspected = self._blocks.inspected(row)
        numbers = np.full(len(inspected) + 1, -1)
        numbers[:-1][inspected] = np.arange(np.count_nonzero(inspected))
        return _Block(self._blocks(row), numbers)

    def _cells(self, reach: int) -> int:
        """How many cells, of the map and beyond, `window_of` lists for a location."""
        level = self._blocks.level
        return (2 * min(reach, level.height - 1) + 1) * (2 * min(reach, level.width - 1) + 1)


def _sq_dist_within(xq: FloatArray, xb: FloatArray, places: IntArray, bound: FloatArray, kappa: int) -> FloatArray:
    """The kernel's squared distances to those vectors that may be among the `kappa` nearest.

    Args:
        xq: (nq, C), the queries.
        xb: (HW, C), the block.
        places: (nq, cells), the rows of the block that each query is compared with; negative for none.
        bound: (nq,), the squared distance beyond which no vector is wanted.
        kappa: number of vectors to find.

    Returns:
        (nq, cells) float32, infinite where a vector is none of them.
    """
    sq_dist = direct_sq_dist(np.ascontiguousarray(xq), xb, places)
    if kappa <= sq_dist.shape[1]:
        bound = np.fmin(bound, np.partition(sq_dist, kappa - 1, axis=1)[:, kappa - 1])
    # FAISS adds up in another order: both sums of C squares are off by their rounding, and by what vanishes below float32.
    channels = xq.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        bound = bound * np.float32(1 + 6 * (channels + 2) * _HALF_UNIT) + np.float32(channels * _VANISHING)
    query, cell = np.nonzero((places >= 0) & ~(sq_dist > bound[:, None]))
    sq_dist.fill(np.inf)
    sq_dist[query, cell] = kernel_sq_dist(xq, xb, query, places[query, cell])
    return sq_dist


def window_of(level: Level, radius: int, locations: IntArray | None = None) -> IntArray:
    """The window of each location, or of some of them.

    Returns:
        (locations, cells) int64, the numbers of the locations within `radius` of each; -1 where they would lie outside of the
        map, or of the region of interest.
    """
    reach_y, reach_x = min(radius, level.height - 1), min(radius, level.width - 1)
    y, x = np.divmod(level.cells if locations is None else level.cells[locations], level.width)
    dy, dx = (step.ravel() for step in np.mgrid[-reach_y : reach_y + 1, -reach_x : reach_x + 1])
    ys, xs = y[:, None] + dy, x[:, None] + dx
    inside = (ys >= 0) & (ys < level.height) & (xs >= 0) & (xs < level.width)
    number = np.full(level.height * level.width, -1)
    number[level.cells] = np.arange(level.locations)
    return np.where(inside, number[np.where(inside, ys * level.width + xs, 0)], -1)


def _open(blocks: Blocks, workers: Workers, build: NoSettings, query: Query, encoded: Encoded | None) -> LocationSearch:
    return LocationSearch(blocks, workers, query.radius)


METHOD = SearchMethod(
    definition="Every location is compared with a window around the same place in the nearest normal images, exactly: "
    "a narrower definition than that of SPADE; distances are never smaller than its.",
    build=NoSettings,
    query=Query,
    open=_open,
    own_rois=True,
)
