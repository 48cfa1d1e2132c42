"""Distances to scores: the arithmetic of SPADE on plain arrays, and the result type that carries it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse

from spade_faiss.features import FloatArray

# Where a location's nearest gallery vector came from: the column of `neighbor_ids` (-1: none of them), the cell in that
# image's map, and its row in the bank.
NearestArray = npt.NDArray[np.void]
NEAREST_DTYPE = np.dtype([("neighbor", np.int32), ("y", np.int16), ("x", np.int16), ("row", np.int32)])


@dataclass(frozen=True, eq=False)
class Scores:
    """What the engine says of n images; every distance in it is of the kind that `distance` names.

    Args:
        ids: n image names.
        image_score: (n,), mean distance to the `k_image` nearest normals.
        maps: (n, H, W), smoothed pixel scores at the size of the backbone's input; 0 where it shows no image. NaN
            throughout for an image that was not localised; so are its pixel distances, its nearest vectors are of neighbour -1.
        neighbor_ids: (n, k), names of the nearest normals, nearest first; k is the larger of `k_image` and `k_gallery`.
        neighbor_dist: (n, k), their distances.
        level_dist: for each level, (n, h, w), the pixel distances before fusion; one entry named `concat` under that fusion.
        nearest: for each level, (n, h, w) of `NEAREST_DTYPE`, the gallery vector each distance was measured to (with kappa > 1,
            the nearest of them).
        distance: `l2` or `squared_l2`.
    """

    ids: Sequence[str]
    image_score: FloatArray
    maps: FloatArray
    neighbor_ids: npt.NDArray[np.str_]
    neighbor_dist: FloatArray
    level_dist: dict[str, FloatArray]
    nearest: dict[str, NearestArray]
    distance: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def map_score(self) -> FloatArray:
        """(n,), the maximum of each map: the other image score in common use."""
        return self.maps.max(axis=(1, 2)) if len(self) else np.zeros(0, np.float32)

    @property
    def peak(self) -> npt.NDArray[np.int64]:
        """(n, 2), row and column of each map's strongest pixel."""
        n, height, width = self.maps.shape
        flat = self.maps.reshape(n, height * width).argmax(axis=1)
        return np.stack(np.divmod(flat, width), axis=1)


def join(parts: Sequence[Scores]) -> Scores:
    """One result of several from the same detector, in their order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    return Scores(
        ids=[name for part in parts for name in part.ids],
        image_score=np.concatenate([part.image_score for part in parts]),
        maps=np.concatenate([part.maps for part in parts]),
        neighbor_ids=np.concatenate([part.neighbor_ids for part in parts]),
        neighbor_dist=np.concatenate([part.neighbor_dist for part in parts]),
        level_dist={level: np.concatenate([part.level_dist[level] for part in parts]) for level in first.level_dist},
        nearest={level: np.concatenate([part.nearest[level] for part in parts]) for level in first.nearest},
        distance=first.distance,
    )


def to_distance(sq_dist: FloatArray, distance: str) -> FloatArray:
    """Squared L2 distances as the distance that scores are made of; the only place where a root is taken."""
    return np.sqrt(sq_dist) if distance == "l2" else sq_dist


def upsample(maps: FloatArray, size: tuple[int, int]) -> FloatArray:
    """Resize (n, h, w, ...) to (n, H, W, ...) bilinearly, pixel centres aligned (torch: align_corners=False)."""
    return _resample(maps, size, 0.0)


def score_maps(level_dist: Sequence[FloatArray], size: tuple[int, int], sigma: float) -> FloatArray:
    """(n, H, W): the levels' distances (n, h, w), upsampled, averaged with equal weights, smoothed by a Gaussian.

    Source: Cohen & Hoshen, arXiv 2005.02357, section 3.3; scipy's defaults for the Gaussian (reflect, truncated at 4 sigma).
    """
    total = np.zeros((len(level_dist[0]), *size), np.float32)
    for dist in level_dist:
        total += _resample(dist, size, sigma)
    return total / np.float32(len(level_dist))


def _resample(maps: FloatArray, size: tuple[int, int], sigma: float) -> FloatArray:
    n, h, w, *rest = maps.shape
    rows = _resampling(h, size[0], sigma) @ np.moveaxis(maps, 1, 0).reshape(h, -1)
    columns = np.moveaxis(rows.reshape(size[0], n, w, -1), 2, 0).reshape(w, -1)
    resized = (_resampling(w, size[1], sigma) @ columns).reshape(size[1], size[0], n, *rest)
    return np.ascontiguousarray(np.moveaxis(resized, (2, 1), (0, 1)))


@lru_cache(maxsize=64)
def _resampling(length: int, target: int, sigma: float) -> sparse.csr_array:
    """(target, length): the matrix that resizes an axis bilinearly and smooths it.

    Both are linear and work on one axis at a time, so that a product with a small matrix replaces them: it is what scipy makes
    of the unit vectors. Nearly all of it is 0, and a sparse product keeps NumPy's BLAS threads, which spin after each product,
    from taking the cores from FAISS's.
    """
    resized = ndimage.zoom(np.eye(length), (target / length, 1), order=1, mode="nearest", grid_mode=True)
    if sigma > 0:
        resized = ndimage.gaussian_filter1d(resized, sigma, axis=0)
    return sparse.csr_array(resized.astype(np.float32))
