"""Location search: each location is compared with a window around the same place in the neighbors' maps; nothing is built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import BlockJob, Task, block_jobs, in_flight, run_block_jobs, slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist
from spade_faiss.search.protocol import Encoded, Hits, NoSettings, SearchMethod
from spade_faiss.search.running_best import RunningBest
from spade_faiss.search.workers import Workers

# The most distances that one call evaluates: with the places that they are for, they take a few megabytes.
_CALL_DISTANCES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Query:
    """`radius` is how many cells of a level's own grid the nearest vector may lie up, down, left and right of the location."""

    radius: int = 3

    def __post_init__(self) -> None:
        check_at_least("radius", self.radius, 0)


class LocationSearch:
    """The nearest vectors within a window, by direct distances, see `GallerySearch`.

    It is exact for a definition of its own: what is normal at a place. Where images of a product are not aligned to within the
    window, distances are larger than those of exact search; they are never smaller.

    Args:
        blocks: the blocks of one level.
        workers: the threads that search.
        radius: see `Query`.
    """

    def __init__(self, blocks: Blocks, workers: Workers, radius: int) -> None:
        self._blocks = blocks
        self._workers = workers
        self._window = window_of(blocks.level, radius)

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, cells = map(int, self._window.shape)
        blocks = in_flight(self._workers.threads) * self._blocks.block_bytes
        part = min(queries, 1 + _CALL_DISTANCES // cells)
        each = 12 * part * cells + RunningBest.merge_bytes(part, cells, kappa)
        return RunningBest.nbytes(images, queries, kappa) + blocks + self._workers.threads * each

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, channels = xq.shape
        cells = self._window.shape[1]
        if kappa > (least := neighbors.shape[1] * int((self._window >= 0).sum(axis=1).min())):
            raise InputError(
                f"kappa={kappa} is larger than the window of a corner, {least} vectors at level {self._blocks.level.name!r}; "
                f"raise radius or k_gallery, or lower kappa"
            )
        best = RunningBest(n, queries, kappa, locations=queries)
        parts = slices(queries, -(-queries * cells // _CALL_DISTANCES))

        def search(image: int, row: int, part: slice, xb: FloatArray) -> None:
            places = self._window[part]
            best.merge(image, part, row, places, direct_sq_dist(xq[image, part], xb, places))

        def searches(job: BlockJob) -> list[Task[FloatArray]]:
            return [
                Task(partial(search, image, job.row, part), (part.stop - part.start) * cells * channels)
                for image, _ in job.requests
                for part in parts
            ]

        run_block_jobs(self._blocks, self._workers, block_jobs(neighbors), self._blocks, searches)
        return best.hits()


def window_of(level: Level, radius: int) -> IntArray:
    """The window of each location.

    Returns:
        (locations, cells) int64, the numbers of the locations within `radius` of each; -1 where they would lie outside of the
        map, or of the region of interest.
    """
    reach_y, reach_x = min(radius, level.height - 1), min(radius, level.width - 1)
    y, x = np.divmod(level.cells, level.width)
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
)
