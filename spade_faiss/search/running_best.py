"""The nearest gallery vectors that queries have met so far, in whatever order blocks are searched."""

from __future__ import annotations

import threading

import numpy as np

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.search.distances import sort_by_distance
from spade_faiss.search.protocol import Hits

_NOWHERE = np.iinfo(np.int64).max


class RunningBest:
    """The `kappa` nearest vectors that each query of a batch of test images has met so far.

    Candidates may be merged in any order and by several threads at a time. Of equal distances, the vector of the smaller bank
    row comes first, and within a row the one at the smaller location; a vector that is merged twice counts once. So the outcome
    depends on which vectors were merged, and on nothing else.

    Args:
        images: number of test images.
        queries: number of locations of a test image.
        kappa: number of vectors to find for each query.
        locations: number of locations of a normal image's map.
    """

    def __init__(self, images: int, queries: int, kappa: int, locations: int) -> None:
        self.kappa = kappa
        self._locations = locations
        self._sq_dist = np.full((images, queries, kappa), np.inf, np.float32)
        # The row and the location as one number: row * locations + location orders vectors as ties are broken.
        self._place = np.full((images, queries, kappa), _NOWHERE, np.int64)
        self._locks = [threading.Lock() for _ in range(images)]

    @staticmethod
    def nbytes(images: int, queries: int, kappa: int) -> int:
        """Bytes of such an object and of the hits that it returns."""
        return images * queries * (12 * kappa + 40)

    @staticmethod
    def merge_bytes(queries: int, candidates: int, kappa: int) -> int:
        """Bytes that one merge takes while it runs."""
        return queries * (40 * candidates + 80) if kappa == 1 else queries * ((candidates + kappa) * 64 + 80)

    def bound(self, image: int, queries: slice | IntArray, row: int) -> FloatArray:
        """The squared distance of each of m queries beyond which no vector of a bank row changes anything.

        Another thread may lower it meanwhile: a search that uses it then evaluates more than it has to, but misses nothing.

        Returns:
            (m,) squared distances; -inf where not even a vector at distance 0 changes anything.
        """
        with self._locks[image]:
            bound = self._sq_dist[image, queries, -1].copy()
            bound[(bound == 0) & (self._place[image, queries, -1] < row * self._locations)] = -np.inf
        return bound

    def furthest(self) -> FloatArray:
        """(images, queries), the kappa-th smallest squared distance so far; infinite where fewer vectors were met."""
        return self._sq_dist[..., -1].copy()

    def merge(
        self, image: int, queries: slice | IntArray, row: int | IntArray, location: IntArray, sq_dist: FloatArray
    ) -> None:
        """Take in candidates, in any order.

        Args:
            image: the test image.
            queries: m of its queries, none of them twice.
            row: the bank rows of the candidates, (m, c), or the one that all of them are in.
            location: (m, c), their locations in the maps of those rows; negative where there is no candidate. No vector stands
                twice in a line.
            sq_dist: (m, c) squared distances. For one vector they must be the same to the bit whenever it is merged.
        """
        # A distance that is no number hides no other from fmin, which is several times as fast along the first axis.
        least = np.fmin.reduce(np.ascontiguousarray(sq_dist.T))
        with self._locks[image]:
            (which,) = np.nonzero(least <= self._sq_dist[image, queries, -1])
            if len(which):
                of_row = row if isinstance(row, int) else row.take(which, axis=0)
                at_location = location.take(which, axis=0)
                places = np.where(at_location < 0, _NOWHERE, of_row * self._locations + at_location)
                at = which + (queries.start or 0) if isinstance(queries, slice) else queries[which]
                update = self._update_nearest if self.kappa == 1 else self._update
                update(image, at, sq_dist.take(which, axis=0), places)

    def _update_nearest(self, image: int, at: IntArray, D: FloatArray, places: IntArray) -> None:
        if D.shape[1] > 1:
            D, places = _smallest(D, places, 1)
        before, place_before = self._sq_dist[image, at, 0], self._place[image, at, 0]
        nearer = (D[:, 0] < before) | ((D[:, 0] == before) & (places[:, 0] < place_before))
        self._sq_dist[image, at[nearer]], self._place[image, at[nearer]] = D[nearer], places[nearer]

    def _update(self, image: int, at: IntArray, D: FloatArray, places: IntArray) -> None:
        if D.shape[1] > self.kappa:
            D, places = _smallest(D, places, self.kappa)
        D = np.concatenate([self._sq_dist[image].take(at, axis=0), D], axis=1)
        places = np.concatenate([self._place[image].take(at, axis=0), places], axis=1)
        order = D.argsort(axis=1, kind="stable")
        order += np.arange(0, D.size, D.shape[1])[:, None]
        D, places = D.take(order), places.take(order)
        tied = (D[:, 1:] == D[:, :-1]) & (places[:, 1:] != _NOWHERE)
        if tied.any():
            lines = np.flatnonzero(tied.any(axis=1))
            D[lines], places[lines] = _without_repeats(*sort_by_distance(D[lines], places[lines]))
        self._sq_dist[image, at], self._place[image, at] = D[:, : self.kappa], places[:, : self.kappa]

    def vectors(self) -> tuple[IntArray, IntArray]:
        """Bank rows and locations of the vectors, (images, queries, kappa) each, the nearest first; -1 where there is none."""
        row, location = np.divmod(self._place, self._locations)
        nowhere = self._place == _NOWHERE
        row[nowhere] = location[nowhere] = -1
        return row, location

    def hits(self) -> Hits:
        """What was found; row -1 and location 0 where nothing was, as for queries that are no numbers."""
        nearest = self._place[..., 0]
        row, location = np.divmod(nearest, self._locations)
        nowhere = nearest == _NOWHERE
        row[nowhere], location[nowhere] = -1, 0
        return Hits(self._sq_dist, row, location)


def _smallest(D: FloatArray, places: IntArray, k: int) -> tuple[FloatArray, IntArray]:
    """The k smallest of more distances in each line, and their places; equal ones are those of the smaller places."""
    if k == 1:
        least = np.fmin.reduce(D, axis=1, keepdims=True)
        return least, np.where(least == D, places, _NOWHERE).min(axis=1, keepdims=True)
    chosen = D.argpartition(k - 1, axis=1)[:, :k]
    smallest, at = np.take_along_axis(D, chosen, axis=1), np.take_along_axis(places, chosen, axis=1)
    # Of distances that equal the largest one chosen, the partition takes any.
    largest = smallest.max(axis=1, keepdims=True)
    (tied,) = np.nonzero((largest == D).sum(axis=1) > (largest == smallest).sum(axis=1))
    if len(tied):
        in_order, places_in_order = sort_by_distance(D[tied], places[tied])
        smallest[tied], at[tied] = in_order[:, :k], places_in_order[:, :k]
    return smallest, at


def _without_repeats(D: FloatArray, places: IntArray) -> tuple[FloatArray, IntArray]:
    """Sorted lines of distances and places, in which every place is left once."""
    again = (places[:, 1:] == places[:, :-1]) & (places[:, 1:] != _NOWHERE)
    if not again.any():
        return D, places
    D[:, 1:][again], places[:, 1:][again] = np.inf, _NOWHERE
    return sort_by_distance(D, places)
