"""Windows by the compiled kernel: maps are read where the bank stores them, and all vectors of a window compared directly."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.block_jobs import BlockJob, block_jobs, slices
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.native.extension import import_native
from spade_faiss.search.native.gallery import map_gallery
from spade_faiss.search.protocol import Hits
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Gallery

# Normal images are searched in groups of maps of this size: their pages stay in memory until the group is done.
_GROUP_BYTES = 16 << 20
# Vectors are padded to a multiple of this many channels.
_ALIGN = 8


class _Group(NamedTuple):
    """Normal images that are searched together: their bank rows, which test images (rows, n) want each, and their maps."""

    rows: IntArray
    wanted: npt.NDArray[np.bool_]
    gallery: Gallery


class WindowSearch:
    """The nearest vectors of each location's window, see `GallerySearch`.

    The result is the smallest direct distance of the kernel; of equal ones the one in the first bank row, and there the first
    location. The cost is that of the windows, and of reading each map once for all images that are searched in it.

    Args:
        blocks: the blocks of one level, which can be mapped.
        workers: the threads that search: each has a part of the locations.
        radius: how many cells a window reaches up, down, left and right.
    """

    def __init__(self, blocks: Blocks, workers: Workers, radius: int) -> None:
        self._blocks = blocks
        self._workers = workers
        self._radius = min(radius, max(blocks.level.height, blocks.level.width))
        self._group = max(1, _GROUP_BYTES // blocks.block_bytes)

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, channels = self._blocks.level.shape
        vector = -(-channels // _ALIGN) * _ALIGN * np.dtype(np.float32).itemsize
        queries = images * height * width
        found = queries * (24 * kappa + 40)
        # A group is searched while the next one's maps are asked for.
        mapped = 2 * min(self._group, images * k_gallery) * self._blocks.block_bytes
        decoded = self._workers.threads * min(height, 2 * self._radius + 1) * width * vector
        return found + queries * vector + mapped + decoded

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        n, queries, channels = xq.shape
        flat = np.ascontiguousarray(xq).reshape(-1, channels)
        parts = slices(queries, min(queries, self._workers.threads))
        best = [
            (np.full((n, size, kappa), np.inf, np.float32), np.full((n, size, kappa), -1, np.int64))
            for size in (part.stop - part.start for part in parts)
        ]

        def search(number: int, group: _Group) -> None:
            part = parts[number]
            import_native().search_windows(
                group.gallery, group.rows, group.wanted, flat, (part.start, part.stop), self._radius, *best[number]
            )

        running: list[Future[None]] = []
        searched: IntArray = np.empty(0, np.int64)
        for group in self._groups(neighbors):  # which opens a group while the last one is searched
            self._finish(running, searched)
            running = [self._workers.submit(search, number, group) for number in range(len(parts))]
            searched = group.rows
        self._finish(running, searched)
        sq_dist, ids = (np.concatenate(of_parts, axis=1) for of_parts in zip(*best, strict=True))
        row, location = np.divmod(ids[..., 0], queries)
        location[row < 0] = 0
        return Hits(sq_dist, row, location)

    def _groups(self, neighbors: IntArray) -> Iterator[_Group]:
        """The images to search, the nearest first: what is found in them ends the comparison with others early."""
        jobs = sorted(block_jobs(neighbors), key=lambda job: int(job.columns.min()))
        for start in range(0, len(jobs), self._group):
            yield self._open(jobs[start : start + self._group], len(neighbors))

    def _open(self, jobs: list[BlockJob], n: int) -> _Group:
        wanted = np.zeros((len(jobs), n), np.bool_)
        for place, job in enumerate(jobs):
            self._blocks.prefetch(job.row)
            wanted[place, job.images] = True
        rows = [job.row for job in jobs]
        gallery = map_gallery(self._blocks, rows)
        assert gallery is not None
        return _Group(np.array(rows, np.int64), wanted, gallery)

    def _finish(self, running: list[Future[None]], rows: IntArray) -> None:
        for task in running:
            task.result()
        for row in rows.tolist():
            self._blocks.release(row)
