"""Image scores: the numbers that rank images, and the statistics of a score map that some of them are made of.

- `knn`: the mean distance to the nearest normal images (Cohen & Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid
  Correspondences", 2020, https://arxiv.org/abs/2005.02357, equation 1).
- `max`: the maximum of the map, as in PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", 2022,
  https://arxiv.org/abs/2106.08265, equation 6, without its reweighting).
- `top`: the mean of the map's highest pixels, 1 % of them unless another share is asked for, as in AnomalyDINO (Damm et al.,
  "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", 2025, https://arxiv.org/abs/2405.14529).
- `structure`: how far the map's standard deviation, total variation and mean of the highest pixels are from those of normal
  maps (Chae et al., "StructCore: Structure-Aware Image-Level Scoring for Training-Free Unsupervised Anomaly Detection", 2026,
  https://arxiv.org/abs/2602.17048: a Mahalanobis distance with a diagonal covariance).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import Bools, FloatArray

Doubles = npt.NDArray[np.float64]

# The columns of `map_statistics`.
STATISTICS = ("top", "std", "total_variation")

# The least standard deviation of a statistic over normal maps, as a share of the largest value: where they all agree, a map
# that does not is far away, and its distance is still a number.
_LEAST_STD = 1e-6
# Pixels that are in float64 at a time: an image that is scored in tiles has many.
_BLOCK = 1 << 20
# top_share * pixels may be a whole number that floating point misses by a little.
_ROUNDING = 1e-9


def map_statistics(maps: FloatArray, valid: Bools | None, top_share: float) -> FloatArray:
    """Reduce each score map to a few numbers.

    - `top`: the mean of the highest pixels: `top_share` of those that are inspected, rounded down, at least one.
    - `std`: the standard deviation of the pixels, that of the population.
    - `total_variation`: the mean absolute difference of two pixels that are neighbors in a row or in a column; 0 without such.

    Sums are float64, of each image by itself: a result does not depend on what else is in the batch.

    Args:
        maps: (n, H, W); NaN for an image without a map.
        valid: (n, H, W), False for pixels that are not inspected: they do not count, nor do differences to them; None if all
            are.
        top_share: the share of the pixels that `top` averages, above 0 and at most 1.

    Returns:
        (n, 3), in the order of `STATISTICS`; NaN for an image without a map, or without a pixel that is inspected.
    """
    found = np.full((len(maps), len(STATISTICS)), np.nan, np.float32)
    for i, scores in enumerate(maps):
        inspected = None if valid is None or valid[i].all() else valid[i]
        pixels = scores.ravel() if inspected is None else scores[inspected]
        if pixels.size and not np.isnan(pixels).any():
            found[i] = _top_mean(pixels, top_share), _std(pixels), _total_variation(scores, inspected)
    return found


def _top_mean(pixels: FloatArray, share: float) -> float:
    count = max(1, int(share * pixels.size + _ROUNDING))
    highest = np.partition(pixels, pixels.size - count)[pixels.size - count :]
    # Sorted, so that the rounding of the sum does not depend on where the pixels lie.
    return float(np.sort(highest).mean(dtype=np.float64))


def _std(pixels: FloatArray) -> float:
    """The standard deviation of the population, as NumPy computes it, with a block of the pixels in float64 at a time."""
    starts = range(0, pixels.size, _BLOCK)
    mean = sum(float(pixels[at : at + _BLOCK].sum(dtype=np.float64)) for at in starts) / pixels.size
    squares = (np.square(pixels[at : at + _BLOCK] - np.float64(mean)) for at in starts)
    return math.sqrt(sum(float(block.sum()) for block in squares) / pixels.size)


def _total_variation(scores: FloatArray, inspected: Bools | None) -> float:
    total, pairs = 0.0, 0
    for axis in (0, 1):
        # A few rows at a time, and the first of the next ones where it is the neighbor of the last.
        rows = max(1, _BLOCK // scores.shape[1])
        for start in range(0, len(scores), rows):
            block = slice(start, start + rows + (axis == 0))
            steps = np.abs(np.diff(scores[block].astype(np.float64), axis=axis))
            if inspected is not None:
                of_block = inspected[block]
                steps = steps[of_block[1:] & of_block[:-1] if axis == 0 else of_block[:, 1:] & of_block[:, :-1]]
            total, pairs = total + float(steps.sum()), pairs + steps.size
    return total / pairs if pairs else 0.0


def structure_scores(normal: Doubles, statistics: npt.NDArray[np.floating]) -> Doubles:
    """(m,) how far the statistics of m maps lie from those of normal maps.

    Each statistic is standardized by its mean and its standard deviation (that of the population, and at least a millionth of
    the largest value, be it of a normal map or of the one that is scored); the score is the Euclidean norm of the three. It
    rises to either side: a map that is flatter than all normal ones is anomalous.

    Args:
        normal: (n, 3), `map_statistics` of normal maps.
        statistics: (m, 3), of the maps to score; NaN for an image without a map, whose score is NaN.
    """
    of_maps: Doubles = np.asarray(statistics, np.float64)
    largest = np.maximum(np.abs(normal).max(axis=0), np.abs(of_maps))
    return standardized_distance(of_maps, normal.mean(axis=0), normal.var(axis=0), largest)


def standardized_distance(statistics: Doubles, mean: Doubles, variance: Doubles, largest: Doubles) -> Doubles:
    """(m,) the norms of (m, 3) statistics that are standardized by a mean and a variance.

    Args:
        statistics: (m, 3).
        mean, variance: (3,) or (m, 3), over the normal maps.
        largest: (3,) or (m, 3), the largest absolute value of each statistic, which bounds the standard deviation from below.
    """
    scale = np.maximum(np.sqrt(variance), np.maximum(_LEAST_STD * largest, np.finfo(np.float64).tiny))
    distance: Doubles = np.sqrt((((statistics - mean) / scale) ** 2).sum(axis=-1))
    return distance
