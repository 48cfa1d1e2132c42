"""The pixel search at one pyramid level: how far each location is from its nearest gallery vector, and which vector that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.declaring import ALL, for_each
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.core.types import Bools, FloatArray, IntArray
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.roi import cells_with_any
from spade_faiss.index.opened_gallery import EncodedLevel, open_gallery
from spade_faiss.scoring.fusion import to_distance
from spade_faiss.scoring.memory import float32_bytes
from spade_faiss.scoring.scores import NEAREST_DTYPE, NearestArray
from spade_faiss.search.blocks import StoredArray
from spade_faiss.search.cache import BlockCache
from spade_faiss.search.levels import open_blocks, searched_levels, vectors_of
from spade_faiss.search.protocol import GallerySearch, Hits, ResolvedRecipe, WindowedSearch, check_own_rois
from spade_faiss.search.workers import Workers


class LevelScores(NamedTuple):
    """What the search of a level found for n images.

    Attributes:
        dist: (n, h, w) distances.
        nearest: (n, h, w) of `NEAREST_DTYPE`.
        passed_over: (n,), see `Scores`; None where it is not counted.
    """

    dist: FloatArray
    nearest: NearestArray
    passed_over: FloatArray | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class LevelSearch:
    """Searches the maps of the nearest normal images at one level.

    Args:
        level: the level that is searched, one of `bank_levels` or several of them as one.
        bank_levels: the levels of the bank.
        method: the parameters of SPADE.
        k_gallery: how many normal images each image is searched in.
        search: finds the nearest vectors; None if no image is to be localized.
        own_rois: whether images have regions of interest of their own, see `Layout`.
    """

    level: Level
    bank_levels: Sequence[Level]
    method: Method
    k_gallery: int
    search: GallerySearch | None
    own_rois: bool = False

    def __call__(self, query: FeatureBatch, neighbors: IntArray, gallery: IntArray, localized: IntArray) -> LevelScores:
        """Search for the nearest gallery vector of each location.

        Args:
            query: features of n images.
            neighbors: (n, k), the bank rows of each image's nearest normal images: `nearest` names their columns.
            gallery: (n, k_gallery), the bank rows that each image is searched in.
            localized: (m,), the images to search for.

        Returns:
            What was found; distances are NaN for the images that are not searched for, and outside of the region of interest.
        """
        level = self.level
        shape = (len(query), level.height, level.width)
        dist, nearest = np.full(shape, np.nan, np.float32), np.zeros(shape, NEAREST_DTYPE)
        nearest["neighbor"] = nearest["row"] = -1
        if len(localized) == 0:
            return LevelScores(dist, nearest)
        gallery, neighbors = gallery[localized], neighbors[localized]
        every = len(localized) == len(query)  # the usual case, without a copy
        inspected = None
        if self.own_rois:
            assert query.valid is not None
            inspected = cells_with_any(query.valid[localized], level.height, level.width).reshape(len(localized), -1)
        hits = self.find(lambda name: query.levels[name] if every else query.levels[name][localized], gallery, inspected)
        if inspected is not None and np.isinf(hits.sq_dist[inspected]).any():
            raise InputError(
                f"kappa={self.method.kappa} is larger than what is inspected of an image's gallery at level {level.name!r}; "
                "lower it, or raise k_gallery"
            )
        at = localized[:, None], level.cells
        dist.reshape(len(query), -1)[at] = to_distance(hits.sq_dist, self.method.distance).mean(axis=-1)
        found = np.empty(hits.row.shape, NEAREST_DTYPE)
        is_column = neighbors[:, None, :] == hits.row[..., None]
        found["neighbor"] = np.where(is_column.any(axis=-1), is_column.argmax(axis=-1), -1)
        found["row"] = hits.row
        found["y"], found["x"] = np.divmod(level.cells[hits.location], level.width)
        nearest.reshape(len(query), -1)[at] = found
        if inspected is not None:
            outside = np.ones(shape, np.bool_)
            outside[localized] = ~inspected.reshape(-1, level.height, level.width)
            dist[outside] = np.nan
            nearest["neighbor"][outside] = nearest["row"][outside] = -1
        if hits.passed_over is None:
            return LevelScores(dist, nearest)
        passed_over = np.full(len(query), np.nan, np.float32)
        passed_over[localized] = hits.passed_over
        return LevelScores(dist, nearest, passed_over)

    def find(self, maps_of: Callable[[str], StoredArray], gallery: IntArray, inspected: Bools | None) -> Hits:
        """Find the nearest gallery vectors of m images.

        Args:
            maps_of: returns their maps of one of the bank's levels, as the bank stores maps.
            gallery: (m, k_gallery), the bank rows that each of them is searched in.
            inspected: (m, HW), which of their locations are inspected, where images have regions of interest of their own: what
                is found for others means nothing, and may be nothing.
        """
        assert self.search is not None
        xq, kappa = vectors_of(self.level, self.bank_levels, maps_of), self.method.kappa
        if inspected is None or not isinstance(self.search, WindowedSearch):
            return self.search(xq, gallery, kappa)
        reach = self.search.reach(self.search.held(gallery), inspected, kappa)
        return self.search.within(xq, gallery, kappa, reach)

    def working_bytes(self, images: int) -> int:
        """The most that a call for so many images holds at a time, beside its results and the cache of decoded blocks."""
        if self.search is None:
            return 0
        search = self.search.working_bytes(images, self.k_gallery, self.method.kappa)
        return images * float32_bytes(self.level.shape) + search


def gallery_sizes(method: Method, levels: int, images: int) -> list[int]:
    """How many of a bank's images each test image is searched in, at each of the searched levels.

    Raises:
        InputError: if the method has several numbers, but not one for each level.
    """
    return [images if k == ALL else int(k) for k in for_each("k_gallery", method.k_gallery, levels)]


def open_level_searches(
    bank: Snapshot, recipe: ResolvedRecipe, method: Method, workers: Workers, cache: BlockCache[FloatArray]
) -> dict[str, LevelSearch]:
    """Open the search of every level that is searched under the method's fusion.

    Args:
        bank: the normal images.
        recipe: how their maps are searched.
        method: the parameters of SPADE.
        workers: what computes.
        cache: where decoded blocks are kept.

    Returns:
        The searches by the name of their level, in the order of the bank's levels.

    Raises:
        InputError: for a level that the bank does not have, and for a recipe or levels that cannot be searched where images
            have regions of interest of their own.
        BankError: if the index of the recipe is damaged or missing, or does not hold a level.
    """
    levels = searched_levels(bank.layout.levels, method.fusion, method.levels)
    if bank.layout.own_rois and method.localize != "none":
        check_own_rois(recipe.recipe)
        _check_not_joined(bank, levels)
    index = None
    if method.localize != "none" and recipe.method.train is not None:
        index = open_gallery(bank, recipe.recipe, levels)

    def open_search(level: Level) -> GallerySearch:
        blocks = open_blocks(bank, level, cache)
        encoded = None if index is None else EncodedLevel(index, level, blocks)
        return recipe.method.open(blocks, workers, recipe.build, recipe.query, encoded)

    return {
        level.name: LevelSearch(
            level=level,
            bank_levels=bank.layout.levels,
            method=method,
            k_gallery=len(bank) if recipe.method.whole_bank else k_gallery,
            search=None if method.localize == "none" else open_search(level),
            own_rois=bank.layout.own_rois,
        )
        for level, k_gallery in zip(levels, gallery_sizes(method, len(levels), len(bank)), strict=True)
    }


def _check_not_joined(bank: Snapshot, levels: Sequence[Level]) -> None:
    if joined := [level.name for level in levels if level not in bank.layout.levels]:
        raise InputError(
            f"levels {joined[0]!r} would be searched as one, which takes one region of interest for all images, those of "
            f"{bank.path} have their own; search each level by itself, or make a bank with one mask"
        )
