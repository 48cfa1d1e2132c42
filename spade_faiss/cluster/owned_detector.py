"""A detector whose bank is searched by the owners of its shards: what it finds is what a detector finds that has all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.cluster.merging import PartHits, merge_hits, merge_neighbors
from spade_faiss.cluster.owner import GalleryRequest, HeldRequest, Shards
from spade_faiss.cluster.owners import Owners
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method, Run
from spade_faiss.core.types import Bools, IntArray
from spade_faiss.scoring.detector import Detector
from spade_faiss.scoring.level_search import LevelSearch
from spade_faiss.scoring.memory import float32_bytes
from spade_faiss.scoring.neighbors import ImageSearch
from spade_faiss.search.blocks import StoredArray
from spade_faiss.search.levels import parts_of
from spade_faiss.search.protocol import Hits, WindowedSearch
from spade_faiss.search.reach import BYTES_A_LOCATION
from spade_faiss.search.recipe import Recipe

if TYPE_CHECKING:
    from spade_faiss.features.backbone import Backbone

# What a location's answer takes, beside its distances: a row and a place in its map.
_PLACE_BYTES = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnedLevelSearch(LevelSearch):
    """Asks the owners of the neighbors' shards for the nearest vectors of a level.

    Args:
        owners: the owners.
        bank: the bank, for which row is in which shard.
        whole_bank: whether all rows are searched, so that none need be named.
    """

    owners: Owners
    bank: Snapshot
    whole_bank: bool

    def find(self, maps_of: Callable[[str], StoredArray], gallery: IntArray, inspected: Bools | None) -> Hits:
        """See `LevelSearch`: the features of an image travel once to each owner that it visits, and minima come back.

        Where windows may have to be widened, owners count first what their images hold: none of them can tell alone.
        """
        reach = None
        if inspected is not None and isinstance(self.search, WindowedSearch):
            reach = self.search.reach(self._held(gallery), inspected, self.method.kappa)
        names = [part.name for part in parts_of(self.level, self.bank_levels)]
        maps = {name: np.ascontiguousarray(maps_of(name)) for name in names}
        images, every = len(gallery), self.whole_bank and gallery.shape[1] == len(self.bank)
        shard_of = None if every else self.bank.shard_of(gallery)

        def request_of(shards: Shards) -> tuple[Any, ...] | None:
            if shard_of is None:
                return (GalleryRequest(self.level.name, np.arange(images), maps, None, reach),)
            at, rows = self._rows_of(shards, shard_of, gallery)
            if not len(at):
                return None
            there = maps if len(at) == images else {name: stored[at] for name, stored in maps.items()}
            return (GalleryRequest(self.level.name, at, there, rows, None if reach is None else reach[at]),)

        found: list[PartHits] = self.owners.ask("find", request_of)
        hits = merge_hits(found, images, self.level.locations, self.method.kappa)
        if not self.own_rois and np.isinf(hits.sq_dist).any():  # no owner can tell: each has a part
            raise InputError(
                f"kappa={self.method.kappa} is larger than the smallest number of vectors that a location is compared with at "
                f"level {self.level.name!r}; raise radius or k_gallery, or lower kappa"
            )
        return hits

    def _held(self, gallery: IntArray) -> IntArray:
        """What `WindowedSearch.held` returns, summed up over the owners."""
        shard_of = self.bank.shard_of(gallery)

        def request_of(shards: Shards) -> tuple[Any, ...] | None:
            at, rows = self._rows_of(shards, shard_of, gallery)
            return (HeldRequest(self.level.name, at, rows),) if len(at) else None

        held = np.zeros((len(gallery), self.level.locations), np.int64)
        for at, counts in self.owners.ask("held", request_of):
            held[at] += counts
        return held

    @staticmethod
    def _rows_of(shards: Shards, shard_of: IntArray, gallery: IntArray) -> tuple[IntArray, list[IntArray]]:
        """Which images have rows of some shards in their gallery, and which."""
        mine = np.isin(shard_of, shards)
        at = np.flatnonzero(mine.any(axis=1))
        return at, [np.sort(gallery[i, mine[i]]) for i in at.tolist()]

    def working_bytes(self, images: int) -> int:
        """See `LevelSearch`: what travels, and what is merged."""
        counted = BYTES_A_LOCATION * self.own_rois
        answers = images * self.level.locations * (3 * (4 * self.method.kappa + 2 * _PLACE_BYTES) + counted)
        return 2 * images * float32_bytes(self.level.shape) + answers


class OwnedDetector(Detector):
    """A `Detector` that has the owners of the bank's shards search them.

    Its image search is exact, whatever index the recipe names. Scores are those of a `Detector`, to the bit, where the recipe
    is exact and the compiled kernel searches.

    Args:
        bank, recipe, method, run, backbone: see `Detector`.
        owners: the owners.
    """

    def __init__(
        self,
        bank: Snapshot,
        recipe: Recipe,
        method: Method,
        run: Run,
        backbone: str | Backbone | None,
        owners: Owners,
    ) -> None:
        if method.tile_neighbors != Method.tile_neighbors:
            raise InputError(f"tile_neighbors={method.tile_neighbors!r} looks at all normal images; leave replicas out")
        self._owners = owners
        super().__init__(bank, recipe, method, run, backbone)

    def __reduce__(self) -> tuple[type[OwnedDetector], tuple[Any, ...]]:
        of_detector: tuple[Any, ...] = super().__reduce__()[1]
        return type(self), (*of_detector, self._owners)

    @property
    def owners(self) -> Owners:
        """The owners of the bank's shards."""
        return self._owners

    def _open_searches(self) -> dict[str, LevelSearch]:
        """See `Detector`."""
        here = super()._open_searches()
        whole = self.resolved.method.whole_bank
        return {
            name: OwnedLevelSearch(**vars(search), owners=self._owners, bank=self.bank, whole_bank=whole)
            for name, search in here.items()
        }

    def _open_image_search(self) -> ImageSearch:
        """See `Detector`."""
        owners = self._owners
        return lambda embedding, k: merge_neighbors(owners.ask("nearest", lambda shards: (embedding, k)), k)
