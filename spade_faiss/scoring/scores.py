"""The result of scoring: image scores, score maps, and the normal images that they were measured against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.scoring.image_scores import STATISTICS
from spade_faiss.scoring.routing import Routes

# Where a location's nearest gallery vector comes from: the column of `neighbor_ids` (-1: not one of them), the cell in that
# image's map, and the image's row in the bank.
NearestArray = npt.NDArray[np.void]
NEAREST_DTYPE = np.dtype([("neighbor", np.int32), ("y", np.int16), ("x", np.int16), ("row", np.int32)])


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of n images; every distance is of the kind that `distance` names.

    Args:
        ids: n image names.
        image_score: (n,), mean distance to the `k_image` nearest normals.
        maps: (n, H, W), smoothed pixel scores at the size of the backbone's input; 0 where nothing is inspected: in the
            margins around an image and outside of the region of interest. An image that was not localized has NaN here, in
            `statistics` and in `level_dist`, and neighbor -1 in `nearest`.
        statistics: (n, 3), statistics of the maps where they are inspected, see `image_scores.map_statistics`.
        neighbor_ids: (n, k), the pictures of the nearest entries of the bank, nearest first: a picture that has several entries
            may be named as often; k is the larger of `k_image` and `k_gallery`, or `k_image` if the gallery is the whole bank.
        neighbor_dist: (n, k), their distances.
        level_dist: for each level, (n, h, w), the pixel distances before fusion, NaN outside of the region of interest; levels
            that were searched as one have one entry, `concat` if it is all of them.
        nearest: for each level, (n, h, w) of `NEAREST_DTYPE`, the gallery vector each distance was measured to (with kappa > 1,
            the nearest of them).
        distance: `l2` or `squared_l2`.
        valid: (n, H, W), where the maps are inspected; None for everywhere.
        passed_over: for each level whose search counts it, (n,) the share of the gallery's vectors that it ruled out without a
            look at their codes; NaN for an image that was not localized.
        sizes: (n, 2), where images were scored in tiles: the height and width of each one's own map, which is the top left part
            of its array in `maps`; the rest is 0. `image_score`, `neighbor_ids` and `neighbor_dist` are then those of the tile
            with the highest image score, `level_dist` and `nearest` those of the tile that has the map's strongest pixel.
        corners: (n, 2), likewise: top and left of that tile in the map.
        routes: of a bank of several products, which one each image shows; it was scored against that one alone. The neighbors
            of a product with fewer images than others have neighbors are followed by empty names at distance NaN. None
            elsewhere.
    """

    ids: Sequence[str]
    image_score: FloatArray
    maps: FloatArray
    statistics: FloatArray
    neighbor_ids: npt.NDArray[np.str_]
    neighbor_dist: FloatArray
    level_dist: dict[str, FloatArray]
    nearest: dict[str, NearestArray]
    distance: str
    passed_over: dict[str, FloatArray] = field(default_factory=dict)
    valid: npt.NDArray[np.bool_] | None = None
    sizes: IntArray | None = None
    corners: IntArray | None = None
    routes: Routes | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def map_score(self) -> FloatArray:
        """(n,), the maximum of each map, the other image score in common use."""
        return self.maps.max(axis=(1, 2)) if len(self) else np.zeros(0, np.float32)

    @property
    def top_score(self) -> FloatArray:
        """(n,), the mean of each map's highest pixels."""
        return self.statistics[:, STATISTICS.index("top")]

    @property
    def image_scores(self) -> dict[str, FloatArray]:
        """The (n,) image scores by their names in `IMAGE_SCORES`, without `structure`: that takes a calibration."""
        return {"knn": self.image_score, "max": self.map_score, "top": self.top_score}

    def own_maps(self) -> Iterator[FloatArray]:
        """The (h, w) map of each image, of its own size."""
        for i, scores in enumerate(self.maps):
            yield scores if self.sizes is None else scores[: self.sizes[i, 0], : self.sizes[i, 1]]

    @property
    def peak(self) -> npt.NDArray[np.int64]:
        """(n, 2), row and column of each map's strongest pixel."""
        n, height, width = self.maps.shape
        flat = self.maps.reshape(n, height * width).argmax(axis=1)
        return np.stack(np.divmod(flat, width), axis=1)


def join(parts: Sequence[Scores]) -> Scores:
    """Concatenate results of the same detector, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return Scores(
        ids=[name for part in parts for name in part.ids],
        image_score=np.concatenate([part.image_score for part in parts]),
        maps=_joined_maps(parts),
        statistics=np.concatenate([part.statistics for part in parts]),
        neighbor_ids=np.concatenate([part.neighbor_ids for part in parts]),
        neighbor_dist=np.concatenate([part.neighbor_dist for part in parts]),
        level_dist={level: np.concatenate([part.level_dist[level] for part in parts]) for level in first.level_dist},
        nearest={level: np.concatenate([part.nearest[level] for part in parts]) for level in first.nearest},
        distance=first.distance,
        passed_over={
            level: _shares_of(level, parts) for level in dict.fromkeys(level for part in parts for level in part.passed_over)
        },
        valid=None if first.valid is None else np.concatenate([part.valid for part in parts if part.valid is not None]),
        sizes=_joined(part.sizes for part in parts),
        corners=_joined(part.corners for part in parts),
        routes=None if first.routes is None else Routes.join([part.routes for part in parts if part.routes is not None]),
    )


def _shares_of(level: str, parts: Sequence[Scores]) -> FloatArray:
    """The shares of all parts that were passed over at a level, NaN for parts that did not count them."""
    return np.concatenate([part.passed_over.get(level, np.full(len(part), np.nan, np.float32)) for part in parts])


def _joined_maps(parts: Sequence[Scores]) -> FloatArray:
    """The maps of all parts, as large as the largest of them."""
    if len({part.maps.shape[1:] for part in parts}) == 1:
        return np.concatenate([part.maps for part in parts])
    size = np.max([part.maps.shape[1:] for part in parts], axis=0)
    maps, start = np.zeros((sum(map(len, parts)), *size), np.float32), 0
    for part in parts:
        maps[start : start + len(part), : part.maps.shape[1], : part.maps.shape[2]] = part.maps
        start += len(part)
    return maps


def _joined(parts: Iterable[IntArray | None]) -> IntArray | None:
    """The rows of all parts; None if they have none."""
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None
