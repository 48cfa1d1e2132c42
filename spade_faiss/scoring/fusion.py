"""Distances to score maps: the arithmetic of SPADE on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spade_faiss.core.types import FloatArray
from spade_faiss.features.resampling import resample

# Inspected locations count at a pixel if their weights sum up to more. In its own cell, a pixel's are never so small.
_LEAST_WEIGHT = 1e-20


def to_distance(sq_dist: FloatArray, distance: str) -> FloatArray:
    """Squared L2 distances as the distance that scores are made of; the only place where a root is taken."""
    return np.sqrt(sq_dist) if distance == "l2" else sq_dist


def score_maps(level_dist: Sequence[FloatArray], size: tuple[int, int], sigma: float) -> FloatArray:
    """(n, H, W): the levels' distances (n, h, w), upsampled, averaged with equal weights, smoothed by a Gaussian.

    Source: Cohen & Hoshen, arXiv 2005.02357, section 3.3; scipy's defaults for the Gaussian (reflect, truncated at 4 sigma).

    Where locations are not inspected, which have NaN, a pixel is the mean of the inspected ones alone, weighted as they are
    among all; 0 where none of them reaches (normalized convolution: Knutsson & Westin, "Normalized and differential
    convolution", 1993).
    """
    total = np.zeros((len(level_dist[0]), *size), np.float32)
    for dist in level_dist:
        inspected = ~np.isnan(dist)
        if inspected.all():
            total += resample(dist, size, sigma)
            continue
        if (inspected == inspected[0]).all():  # as in all images of a bank with one region of interest
            inspected = inspected[:1]
        weight = resample(inspected.astype(np.float32), size, sigma)
        summed = resample(np.where(inspected, dist, np.float32(0)), size, sigma)
        total += np.divide(summed, weight, out=np.zeros_like(summed), where=weight > _LEAST_WEIGHT)
    return total / np.float32(len(level_dist))
