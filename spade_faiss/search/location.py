"""Search at the same place: a window of cells around each location in the neighbors' maps. Nothing is built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.block_jobs import Piece, Visit, in_flight, slices, sweep, visits_of
from spade_faiss.search.blocks import Blocks
from spade_faiss.search.distances import direct_sq_dist
from spade_faiss.search.protocol import Encoded, Hits, NoSettings, SearchMethod
from spade_faiss.search.running_best import Found, smallest_of
from spade_faiss.search.workers import Workers

# Distances that one call evaluates, at most: a few megabytes with the places they are of.
_CALL_DISTANCES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Query:
    """`radius`: how many cells, in each level's own grid, the nearest vector may lie up, down and to the sides."""

    radius: int = 3

    def __post_init__(self) -> None:
        check_at_least("radius", self.radius, 0)


class LocationSearch:
    """The nearest vectors within a window, by direct distances, see `GallerySearch`.

    It is exact for a definition of its own: normality at a place. Where images of a product are not aligned to within the
    window, distances are larger than those of `exact`; never smaller.
    """

    def __init__(self, blocks: Blocks, workers: Workers, radius: int) -> None:
        self._blocks = blocks
        self._workers = workers
        self._window = window_of(blocks.level, radius)

    def working_bytes(self, images: int, k_gallery: int, kappa: int) -> int:
        """See `GallerySearch`."""
        queries, cells = map(int, self._window.shape)
        found = Found.nbytes(images, k_gallery, queries, min(kappa, cells))
        blocks = in_flight(self._workers.threads) * self._blocks.block_bytes
        return found + blocks + self._workers.threads * 5 * 8 * max(_CALL_DISTANCES, cells)

    def __call__(self, xq: FloatArray, neighbors: IntArray, kappa: int) -> Hits:
        """See `GallerySearch`."""
        queries, channels = xq.shape[1:]
        cells = self._window.shape[1]
        if kappa > (least := neighbors.shape[1] * int((self._window >= 0).sum(axis=1).min())):
            raise InputError(
                f"kappa={kappa} is larger than the window of a corner, {least} vectors at level {self._blocks.level.name!r}; "
                f"raise radius or k_gallery, or lower kappa"
            )
        k = min(kappa, cells)
        found = Found(neighbors, queries, k)
        parts = slices(queries, -(-queries * cells // _CALL_DISTANCES))

        def look(image: int, column: int, part: slice, xb: FloatArray) -> None:
            places = self._window[part]
            D = direct_sq_dist(xq[image, part], xb, places)
            found.sq_dist[image, column, part], found.location[image, column, part] = smallest_of([(D, places)], k)

        def looks(visit: Visit) -> list[Piece[FloatArray]]:
            return [
                Piece(partial(look, image, column, part), (part.stop - part.start) * cells * channels)
                for image, column in visit.asked
                for part in parts
            ]

        sweep(self._blocks, self._workers, visits_of(found.rows), self._blocks, looks)
        return found.hits(kappa)


def window_of(level: Level, radius: int) -> IntArray:
    """(H*W, cells): the locations within `radius` of each, `y * W + x`; -1 where they would lie outside of the map."""
    reach_y, reach_x = min(radius, level.height - 1), min(radius, level.width - 1)
    y, x = np.divmod(np.arange(level.height * level.width), level.width)
    dy, dx = (step.ravel() for step in np.mgrid[-reach_y : reach_y + 1, -reach_x : reach_x + 1])
    ys, xs = y[:, None] + dy, x[:, None] + dx
    inside = (ys >= 0) & (ys < level.height) & (xs >= 0) & (xs < level.width)
    return np.where(inside, ys * level.width + xs, -1)


def _open(blocks: Blocks, workers: Workers, build: NoSettings, query: Query, kept: Encoded | None) -> LocationSearch:
    return LocationSearch(blocks, workers, query.radius)


METHOD = SearchMethod(
    definition="Every location is compared with a window around the same place in the nearest normal images, exactly: "
    "a narrower definition than that of SPADE; distances are never smaller than its.",
    build=NoSettings,
    query=Query,
    open=_open,
)
