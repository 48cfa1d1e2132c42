"""An owner: it holds some shards of a bank, and searches them for whoever asks. It runs as a Ray actor, one on each node."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.cluster.merging import PartHits
from spade_faiss.core.memory import parse_bytes
from spade_faiss.core.once import Once
from spade_faiss.core.settings import Method
from spade_faiss.core.types import Arrays, FloatArray, IntArray
from spade_faiss.index.image_index import ImageIndex
from spade_faiss.scoring.level_search import LevelSearch, open_level_searches
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.distances import import_faiss
from spade_faiss.search.levels import vectors_of
from spade_faiss.search.protocol import Hits, PartialSearch, WindowedSearch, resolve_recipe
from spade_faiss.search.reach import Reach
from spade_faiss.search.recipe import Recipe
from spade_faiss.search.workers import Workers

Shards = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class OwnedBank:
    """What owners search, and how.

    Args:
        bank: the bank, which each owner opens for itself in the same state.
        recipe: how it is searched.
        method: the parameters of SPADE.
        memory: how much memory decoded maps may take.
        threads: how many threads search.
        replicas: how many owners each shard has.
    """

    bank: Snapshot
    recipe: Recipe
    method: Method
    memory: str | int
    threads: int
    replicas: int


@dataclass(frozen=True, eq=False)
class GalleryRequest:
    """Images to search for, and in which rows of the bank.

    Args:
        level: the name of the searched level.
        images: (m,) which images of the batch they are.
        maps: the maps (m, ...) of each of the bank's levels that the searched level consists of, as the bank stores maps.
        gallery: the rows that each of them is searched in; None for all rows of the shards.
        reach: (m, HW), how far windows reach, for a `WindowedSearch` where images have regions of interest of their own; else
            None.
    """

    level: str
    images: IntArray
    maps: Arrays
    gallery: list[IntArray] | None
    reach: Reach | None = None


@dataclass(frozen=True, eq=False)
class HeldRequest:
    """Galleries whose vectors are to be counted, see `WindowedSearch.held`.

    Args:
        level, images, gallery: see `GalleryRequest`.
    """

    level: str
    images: IntArray
    gallery: list[IntArray]


class _Part:
    """Some shards of a bank, opened as a bank of their own, whose rows are numbered anew in the same order."""

    def __init__(self, owned: OwnedBank, shards: Shards) -> None:
        whole = owned.bank
        self.bank = whole.with_shards(shards)
        rows = [whole.rows_of_shard(number) for number in shards]
        # (rows of the part,), which row of the bank each is; ascending.
        self.rows: IntArray = np.concatenate([np.empty(0, np.int64), *(of[of >= 0] for of in rows)])
        self.images = ImageIndex(self.bank, import_faiss().IndexFlatL2(self.bank.layout.embedding_dim), ())
        cache: BlockCache[FloatArray] = BlockCache()
        cache.capacity = parse_bytes(owned.memory) // (owned.replicas + 1)
        workers, recipe = Workers(threads=owned.threads), resolve_recipe(owned.recipe)
        self.searches = open_level_searches(self.bank, recipe, owned.method, workers, cache)

    def held(self, request: HeldRequest) -> tuple[IntArray, IntArray]:
        """Which images were asked for, and how many rows of the part that each asks for hold a vector at each location."""
        search = self.searches[request.level].search
        assert isinstance(search, WindowedSearch)
        counts = [search.held(np.searchsorted(self.rows, rows)[np.newaxis])[0] for rows in request.gallery]
        return request.images, np.stack(counts).astype(np.int32)

    def find(self, request: GalleryRequest) -> PartHits:
        """Search for images in those rows of the part that each of them asks for."""
        search, of_images = self.searches[request.level], request.gallery
        if of_images is None:
            of_images = [self.rows] * len(request.images)
        xq = vectors_of(search.level, self.bank.layout.levels, lambda name: request.maps[name])
        counts = np.array([len(rows) for rows in of_images])
        found: list[tuple[IntArray, Hits]] = []
        for count in np.unique(counts).tolist():  # a search takes as many rows for each image
            at = np.flatnonzero(counts == count)
            local = np.searchsorted(self.rows, np.stack([of_images[i] for i in at.tolist()]))
            reach = None if request.reach is None else request.reach[at]
            found.append((at, self._search(search, xq if len(at) == len(xq) else xq[at], local, reach)))
        order = np.argsort(np.concatenate([at for at, _ in found]))
        hits = [hits for _, hits in found]
        row = np.concatenate([each.row for each in hits])[order]
        passed_over = [each.passed_over for each in hits if each.passed_over is not None]
        whole = Hits(
            np.concatenate([each.sq_dist for each in hits])[order],
            np.where(row < 0, -1, self.rows[row]).astype(np.int32),  # half of what travels
            np.concatenate([each.location for each in hits])[order].astype(np.int32),
            np.concatenate(passed_over)[order] if len(passed_over) == len(hits) else None,
        )
        return PartHits(request.images, whole, counts * search.level.locations)

    @staticmethod
    def _search(search: LevelSearch, xq: FloatArray, rows: IntArray, reach: Reach | None) -> Hits:
        """Search some rows; where they have fewer vectors than are asked for, others have the rest."""
        assert search.search is not None
        kappa = search.method.kappa
        there = min(kappa, rows.shape[1] * search.level.locations)
        if reach is not None:
            assert isinstance(search.search, WindowedSearch)
            found = search.search.within(xq, rows, there, reach)
        else:
            find = search.search.partial if isinstance(search.search, PartialSearch) else search.search
            found = find(xq, rows, there)
        if there == kappa:
            return found
        missing = np.full((*found.row.shape, kappa - there), np.inf, np.float32)
        return replace(found, sq_dist=np.concatenate([found.sq_dist, missing], axis=2))


class ShardOwner:
    """Searches shards of a bank. Which ones are its own, those who ask say: they move when another owner is lost.

    Args:
        pickled: an `OwnedBank`, as bytes: a bank that cannot be opened is an error of the first question, and does not end the
            owner.
    """

    def __init__(self, pickled: bytes) -> None:
        self._open = Once(partial(pickle.loads, pickled))
        # The parts that were searched last: one for each replica, and those before a loss.
        self._parts: OrderedDict[Shards, _Part] = OrderedDict()
        self._lock = Lock()

    def nearest(self, shards: Shards, embedding: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Squared distances and rows of the bank of the k nearest of some shards, or of all that they hold."""
        part = self._part(shards)
        D, rows = part.images.search(embedding, min(k, len(part.rows)))
        return D, part.rows[rows]

    def held(self, shards: Shards, request: HeldRequest) -> tuple[IntArray, IntArray]:
        """How many images of some shards hold a vector at each location."""
        return self._part(shards).held(request)

    def find(self, shards: Shards, request: GalleryRequest) -> PartHits:
        """The nearest vectors in the maps of some shards."""
        return self._part(shards).find(request)

    def _part(self, shards: Shards) -> _Part:
        with self._lock:
            owned: OwnedBank = self._open()
            part = self._parts.pop(shards, None) or _Part(owned, shards)
            self._parts[shards] = part
            while len(self._parts) > owned.replicas + 1:
                self._parts.popitem(last=False)
            return part
