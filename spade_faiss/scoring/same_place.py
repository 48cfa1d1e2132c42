"""The neighbors of a tile that lie in its own place: those of other images of the same size, at the same corner."""

from __future__ import annotations

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.once import once
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.search.distances import scan

_NONE = np.empty(0, np.int64)


class SamePlace:
    """Finds the rows of a bank that lie where tiles do, the nearest first. There are as many as normal images, at most.

    Args:
        bank: a bank of tiles.
    """

    def __init__(self, bank: Snapshot) -> None:
        self._bank = bank

    def search(self, query: FeatureBatch, k: int, own: IntArray | None = None) -> tuple[FloatArray, IntArray]:
        """Search for the nearest rows by embedding, by direct distances.

        Args:
            query: n tiles.
            k: the number of neighbors.
            own: (n,) the rows of the tiles, if they are the bank's own: the tiles of their siblings are left out.

        Returns:
            Squared L2 distances (n, k), ascending, and rows (n, k).

        Raises:
            InputError: if there are fewer in a place.
        """
        assert query.places is not None
        sq_dist, found = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int64)
        for i, rows in enumerate(self._rows(query, own)):
            if len(rows) < k:
                left, top, width, height = query.places[i].tolist()
                raise InputError(
                    f"{len(rows)} {'other ' if own is not None else ''}normal images in {self._bank.path} have a tile at "
                    f"({left}, {top}) of {width} x {height} pixels, k={k} were asked for; use tile_neighbors='anywhere' for "
                    f"images of several sizes, lower k_image and k_gallery, or add images"
                )
            D, I = scan(query.embedding[i : i + 1], self._bank.embedding(rows), k)
            sq_dist[i], found[i] = D[0], rows[I[0]]
        return sq_dist, found

    def gallery(self, query: FeatureBatch, nearest: IntArray, own: IntArray | None) -> IntArray:
        """(n, K) all rows in the places of n tiles, of which `nearest` (n, k) come first; for `own`, see `search`."""
        rows = self._rows(query, own)
        lines = [np.concatenate([first, there[~np.isin(there, first)]]) for first, there in zip(nearest, rows, strict=True)]
        return np.stack(lines)

    def _rows(self, query: FeatureBatch, own: IntArray | None) -> list[IntArray]:
        """The rows in the place of each tile, ascending."""
        assert query.places is not None
        found = [self._rows_at.get(place, _NONE) for place in map(tuple, query.places.tolist())]
        if own is None:
            return found
        siblings = self._bank.siblings
        return [rows[siblings.of(rows) != of] for rows, of in zip(found, siblings.of(own), strict=True)]

    @once
    def _rows_at(self) -> dict[tuple[int, ...], IntArray]:
        """The rows of each place."""
        places = self._bank.tile_places
        assert places is not None
        known, number = np.unique(places, axis=0, return_inverse=True)
        order = np.argsort(number.ravel(), kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(number.ravel(), minlength=len(known)))[:-1])
        return dict(zip(map(tuple, known.tolist()), rows, strict=True))
