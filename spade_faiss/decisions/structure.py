"""The image score `structure` among those of normal images, so that its p-values are exact.

The score standardizes by the statistics of the calibration images. If each of these were scored by statistics that it is itself
part of, and the new image by statistics that it is not part of, they would not be exchangeable, and normal images would become
alarms more often than promised. So the new image is put among the n calibration images, and each of the n + 1 is scored by the
n others: all are treated alike. This is full conformal prediction (Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random
World", 2005, section 2.2); no image is spent on the standardization.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from spade_faiss.decisions.conformal import Doubles
from spade_faiss.scoring.image_scores import standardized_distance


def structure_bags(normal: Doubles, statistics: npt.NDArray[np.floating]) -> Iterator[Doubles]:
    """For each of m images, the scores of the n calibration images and, last, its own, each by the n others: (n + 1,).

    An image's own score is that of `image_scores.structure_scores`. Replacing one of n values changes their mean and variance
    by what Welford's update says, so that a bag takes O(n): Welford, "Note on a method for calculating corrected sums of
    squares and products", 1962. Scores are rounded to float32, so that rounding decides no tie.

    Args:
        normal: (n, 3), `map_statistics` of the calibration images.
        statistics: (m, 3), of the images; NaN for an image without a map, whose bag is NaN.
    """
    n, mean, variance, highest = len(normal), normal.mean(axis=0), normal.var(axis=0), np.abs(normal).max(axis=0)
    for own in np.asarray(statistics, np.float64):
        means = mean + (own - normal) / n
        variances = np.maximum(0, variance + (own - normal) * ((own - means) + (normal - mean)) / n)
        largest = np.maximum(highest, np.abs(own))
        others = standardized_distance(normal, means, variances, largest)
        bag = np.append(others, standardized_distance(own, mean, variance, largest))
        yield bag.astype(np.float32).astype(np.float64)
