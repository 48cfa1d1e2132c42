"""Scores of tiles become those of the image that they were cut out of: one map without seams, and one of each image score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.settings import Method
from spade_faiss.features.tiles import Places, Tile, TileGrid, grid_of
from spade_faiss.scoring.image_scores import map_statistics
from spade_faiss.scoring.scores import NearestArray, Scores


def check_tiling(bank: Snapshot, method: Method, *, whole_bank: bool) -> None:
    """Raise InputError for settings that a bank of tiles, or one of whole images, has no use for.

    Args:
        bank: the bank.
        method: the parameters of SPADE.
        whole_bank: whether the recipe searches the whole bank, whatever the neighbors are.
    """
    if method.tile_neighbors != Method.tile_neighbors:
        if not bank.is_tiled:
            raise InputError(
                f"tile_neighbors={method.tile_neighbors!r} is of banks of tiles, {bank.path} holds whole images; leave it out"
            )
        if whole_bank:
            raise InputError(
                f"tile_neighbors={method.tile_neighbors!r} is not for a recipe that searches the whole bank; use another one"
            )
    if bank.is_tiled and method.localize == "flagged":
        raise InputError(
            f"localize='flagged' is not for banks of tiles such as {bank.path}: the score of an image is known once all of its "
            f"tiles are scored; use all or none"
        )


class Stitcher:
    """Takes the scores of tiles, image by image and in the order of their grids, and puts them together.

    Only one map stays in memory, that of the image: each of its pixels is from the tile in which it is the most central.

    Args:
        preprocess: says how images are cut into tiles.
        method: `sigma` smooths maps once they are whole, so that no seam remains; `top_share` is for their statistics.
    """

    def __init__(self, preprocess: Preprocess, method: Method) -> None:
        self._preprocess = preprocess
        self._method = method
        self._image: _Image | None = None

    def add(self, image: str, places: Places, tiles: Scores) -> Scores | None:
        """Add the scores of the next tiles of an image.

        Args:
            image: the id of the image.
            places: (n, 4) where the tiles lie, see `TILE_COLUMNS`.
            tiles: their scores; the maps are not smoothed.

        Returns:
            The scores of the image if these were its last tiles; else None.

        Raises:
            InputError: for tiles that are not the next ones of the image.
        """
        if self._image is None:
            self._image = _Image(image, grid_of(places, self._preprocess))
        self._image.add(image, places, tiles)
        if not self._image.is_complete:
            return None
        done, self._image = self._image, None
        return done.scores(self._method)

    def check_complete(self) -> None:
        """Raise InputError if tiles of an image are missing."""
        if self._image is not None:
            raise InputError(
                f"image {self._image.id!r} has {len(self._image.grid)} tiles, {self._image.count} of them were given; give all "
                f"tiles of an image, in their order"
            )


class _Image:
    """An image of which some tiles have been scored."""

    def __init__(self, name: str, grid: TileGrid) -> None:
        self.id = name
        self.grid = grid
        self._tiles = list(grid)
        self._places = grid.places
        self._map = np.empty((grid.height, grid.width), np.float32)
        self._parts: list[Scores] = []
        self.count = 0

    @property
    def is_complete(self) -> bool:
        return self.count == len(self._tiles)

    def add(self, name: str, places: Places, tiles: Scores) -> None:
        expected = self._places[self.count : self.count + len(places)]
        if name != self.id or not np.array_equal(places, expected):
            raise InputError(
                f"image {self.id!r} has {len(self.grid)} tiles, of which {self.count} were given, and not the next ones after "
                f"them; give all tiles of an image, in their order"
            )
        for tile, scores in zip(self._tiles[self.count :], tiles.maps, strict=False):
            self._map[tile.rows, tile.columns] = scores[_inside(tile.rows, tile.top), _inside(tile.columns, tile.left)]
        self._parts.append(replace(tiles, maps=np.empty((len(places), 0, 0), np.float32)))
        self.count += len(places)

    def scores(self, method: Method) -> Scores:
        """The scores of the image."""
        if method.sigma and method.localize != "none":
            from scipy import ndimage  # takes longer to import than an image takes to score, and few banks need it

            # scipy's defaults, as in `fusion.score_maps`: reflect, truncated at 4 sigma.
            ndimage.gaussian_filter(self._map, method.sigma, output=self._map)
        maps = self._map[None]
        peak = divmod(int(self._map.argmax()), self.grid.width)
        at_peak = next(number for number, tile in enumerate(self._tiles) if _is_in(peak, tile))
        worst = int(np.concatenate([part.image_score for part in self._parts]).argmax())
        (of_worst, in_worst), (of_peak, in_peak) = self._find(worst), self._find(at_peak)
        return Scores(
            ids=[self.id],
            image_score=of_worst.image_score[in_worst],
            maps=maps,
            statistics=map_statistics(maps, None, method.top_share),
            neighbor_ids=of_worst.neighbor_ids[in_worst],
            neighbor_dist=of_worst.neighbor_dist[in_worst],
            level_dist={level: dist[in_peak] for level, dist in of_peak.level_dist.items()},
            nearest={level: _columns_of(found[in_peak], at_peak == worst) for level, found in of_peak.nearest.items()},
            distance=of_worst.distance,
            passed_over={
                level: np.concatenate([part.passed_over[level] for part in self._parts if level in part.passed_over]).mean(
                    keepdims=True
                )
                for level in dict.fromkeys(level for part in self._parts for level in part.passed_over)
            },
            sizes=np.array([self._map.shape], np.int64),
            corners=self._places[at_peak : at_peak + 1, 1::-1].astype(np.int64),
        )

    def _find(self, number: int) -> tuple[Scores, slice]:
        """The scores that hold a tile, and where in them it is."""
        for part in self._parts:
            if number < len(part):
                break
            number -= len(part)
        return part, slice(number, number + 1)


def _columns_of(nearest: NearestArray, are_shown: bool) -> NearestArray:
    """Locations of neighbors: their columns are -1 unless these neighbors are those of the image."""
    if are_shown:
        return nearest
    found = nearest.copy()
    found["neighbor"] = -1
    return found


def _inside(pixels: slice, start: int) -> slice:
    """The same pixels, counted from the beginning of a tile."""
    return slice(pixels.start - start, pixels.stop - start)


def _is_in(peak: tuple[int, int], tile: Tile) -> bool:
    return peak[0] in range(tile.rows.start, tile.rows.stop) and peak[1] in range(tile.columns.start, tile.columns.stop)
