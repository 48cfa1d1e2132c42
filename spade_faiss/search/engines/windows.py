"""Windows by the compiled kernel: codes of maps rule vectors of a window out, and the others are compared directly."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spade_faiss.core.once import Once
from spade_faiss.core.types import Bools, FloatArray, IntArray
from spade_faiss.search.block_jobs import slices
from spade_faiss.search.blocks import SPREAD_BLOCKS, Blocks
from spade_faiss.search.native.basis import choose_center
from spade_faiss.search.native.extension import import_native
from spade_faiss.search.native.gallery import map_gallery
from spade_faiss.search.protocol import Hits
from spade_faiss.search.reach import Reach
from spade_faiss.search.workers import Workers

if TYPE_CHECKING:
    from spade_faiss.search.native._native import Gallery, WindowCodes, WindowCoding

# Normal images are searched in groups of maps of this size: their pages stay in memory until the group is done.
_GROUP_BYTES = 16 << 20
# Vectors are padded to a multiple of this many channels, codes to a multiple of four, and rows of a map to eight cells.
_ALIGN, _QUAD, _CELLS = 8, 4, 8
# All numbers of nearly all sampled vectors have codes; a vector that has none is compared always.
_SAMPLE, _NEARLY_ALL = 2048, 0.999
# Tells searches that share a cache apart.
_numbers = count()
# The smallest step: squares of smaller numbers vanish.
_LEAST_STEP = 2.0**-60


class _Group(NamedTuple):
    """Normal images that are searched together: their bank rows, which test images (rows, n) want each, and their codes."""

    rows: IntArray
    wanted: Bools
    codes: list[WindowCodes]


class WindowSearch:
    """The nearest vectors of each location's window, see `GallerySearch`.

    The result is the smallest direct distance of the kernel; of equal ones the one in the first bank row, and there the first
    location. The cost is that of comparing the windows' codes, one byte a number, which are cached beside decoded blocks; where
    there is no room for them, they are made anew at each search, once for all images that are searched in a map.

    Args:
        blocks: the blocks of one level, which can be mapped.
        workers: the threads that search: each has a part of the locations.
        radius: how many cells a window reaches up, down, left and right.
        simd_level: one of `SIMD_LEVELS` that this machine runs.
    """

    def __init__(self, blocks: Blocks, workers: Workers, radius: int, simd_level: str) -> None:
        self._blocks = blocks
        self._workers = workers
        self._radius = min(radius, max(blocks.level.height, blocks.level.width))
        self._group = max(1, _GROUP_BYTES // blocks.block_bytes)
        # Codes are of the coding of this search, and no other search of the same blocks may find them.
        self._name = f"windows {next(_numbers)}"
        self._coding = Once(partial(_choose_coding, blocks, simd_level))
        self._gallery = Once(partial(_map, blocks))

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        height, width, channels = self._blocks.level.shape
        vector = -(-channels // _ALIGN) * _ALIGN * np.dtype(np.float32).itemsize
        queries = images * height * width
        code = -(-channels // _QUAD) * _QUAD
        # Of each query also how far its window reaches, where images have regions of their own.
        found = queries * (24 * kappa + 48 + code + 8 * self._blocks.partial)
        # A group is searched while the codes of the next one are made.
        codes = height * max(width, _CELLS) * (code + 4)
        mapped = 2 * min(self._group, images * k_gallery) * (self._blocks.block_bytes + codes)
        reach_y, reach_x = min(2 * self._radius + 1, 2 * height - 1), min(2 * self._radius + 1, 2 * width - 1)
        # Of each cell of the windows of a row of the map: a bit whether it passes, and its place in a list that may grow.
        screened = width * (reach_y * (reach_x // _CELLS + 1) + 8 + 24 * min(height, reach_y) * min(width, reach_x))
        searching = mapped + self._workers.threads * (min(height, reach_y) * width * vector + screened)
        # The coding is chosen at the first call, of some blocks as a whole, before anything is mapped.
        sampled = 4 * _SAMPLE * channels * np.dtype(np.float32).itemsize
        choosing = min(SPREAD_BLOCKS, len(self._blocks)) * self._blocks.block_bytes + sampled
        return found + queries * vector + max(searching, choosing)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        return self.within(xq, neighbors, kappa, None)

    def within(self, xq: FloatArray, neighbors: IntArray, kappa: int, reach: Reach | None) -> Hits:
        """Search windows that reach so far, see `WindowedSearch`, or, without `reach`, as far as the radius."""
        self._blocks.check()  # the kernel keeps the addresses of all maps
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
                self._gallery(),
                group.rows,
                self._coding(),
                group.codes,
                group.wanted,
                flat,
                (part.start, part.stop),
                self._radius,
                *best[number],
                reach,
            )

        running: list[Future[None]] = []
        searched: IntArray = np.empty(0, np.int64)
        for group in self._groups(*_nearest_first(neighbors)):  # which makes a group's codes while the last one is searched
            self._finish(running, searched)
            running = [self._workers.submit(search, number, group) for number in range(len(parts))]
            searched = group.rows
        self._finish(running, searched)
        sq_dist, ids = (np.concatenate(of_parts, axis=1) for of_parts in zip(*best, strict=True))
        row, location = np.divmod(ids[..., 0], queries)
        location[row < 0] = 0
        return Hits(sq_dist, row, location)

    def _groups(self, rows: IntArray, wanted: Bools) -> Iterator[_Group]:
        """The images to search, as many at a time as may be mapped, with their codes; those that are not there are made."""
        for row in rows.tolist():
            self._blocks.peek(self._name, row)  # so that codes which are not needed here make room first
        for part in slices(len(rows), -(-len(rows) // self._group)):
            group = rows[part].tolist()
            # Only now: codes that are held here stay in memory, even where the cache drops them for others meanwhile.
            cached = [self._blocks.peek(self._name, row) for row in group]
            missing = [row for row, codes in zip(group, cached, strict=True) if codes is None]
            for row in missing:
                self._blocks.prefetch(row)
            made = {
                row: self._workers.submit(self._blocks.cached, self._name, row, partial(self._make, row)) for row in missing
            }
            codes = [made[row].result() if codes is None else codes for row, codes in zip(group, cached, strict=True)]
            yield _Group(rows[part], wanted[part], codes)

    def _finish(self, running: list[Future[None]], rows: IntArray) -> None:
        for task in running:
            task.result()
        self._blocks.release(*rows.tolist())

    def _make(self, row: int) -> WindowCodes:
        inside = self._blocks.inspected(row) if self._blocks.partial else None
        made: WindowCodes = import_native().WindowCodes(self._coding(), self._gallery(), row, inside)
        return made


def _nearest_first(neighbors: IntArray) -> tuple[IntArray, Bools]:
    """The rows (m,) that stand in `neighbors` (n, K), and which test images (m, n) want each.

    The nearest ones come first: what is found in them rules more of the others out.
    """
    n, k = neighbors.shape
    rows, place = np.unique(neighbors, return_inverse=True)
    place = place.reshape(n, k)
    wanted = np.zeros((len(rows), n), np.bool_)
    wanted[place, np.arange(n)[:, None]] = True
    nearest = np.full(len(rows), k)
    np.minimum.at(nearest, place, np.arange(k))
    order = np.argsort(nearest, kind="stable")
    return rows[order], wanted[order]


def _map(blocks: Blocks) -> Gallery:
    gallery = map_gallery(blocks)
    assert gallery is not None  # see `can_be_mapped`
    return gallery


def _choose_coding(blocks: Blocks, simd_level: str) -> WindowCoding:
    """The center and the step by which a level's vectors are rounded; any give the same results."""
    center = choose_center(blocks)
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.nanquantile(np.abs(blocks.typical(_SAMPLE) - center).max(axis=1), _NEARLY_ALL)
    native = import_native()
    step = max(float(largest) / native.most_window_code(simd_level), _LEAST_STEP)
    level = blocks.level
    cells = [] if level.roi is None else level.cells.tolist()
    step = step if np.isfinite(step) else 1.0
    coding: WindowCoding = native.WindowCoding(simd_level, center, step, level.height, level.width, cells)
    return coding
