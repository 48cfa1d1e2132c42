"""Distances to score maps: the arithmetic of SPADE on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spade_faiss.core.types import FloatArray
from spade_faiss.features.resampling import resample


def to_distance(sq_dist: FloatArray, distance: str) -> FloatArray:
    """Squared L2 distances as the distance that scores are made of; the only place where a root is taken."""
    return np.sqrt(sq_dist) if distance == "l2" else sq_dist


def score_maps(level_dist: Sequence[FloatArray], size: tuple[int, int], sigma: float) -> FloatArray:
    """(n, H, W): the levels' distances (n, h, w), upsampled, averaged with equal weights, smoothed by a Gaussian.

    Source: Cohen & Hoshen, arXiv 2005.02357, section 3.3; scipy's defaults for the Gaussian (reflect, truncated at 4 sigma).
    """
    total = np.zeros((len(level_dist[0]), *size), np.float32)
    for dist in level_dist:
        total += resample(dist, size, sigma)
    return total / np.float32(len(level_dist))
