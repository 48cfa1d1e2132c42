"""Distances to score maps: the arithmetic of SPADE on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spade_faiss.core.types import FloatArray
from spade_faiss.features.resampling import axis_taps, resample
from spade_faiss.search.native.extension import import_native, is_built

# Inspected locations count at a pixel if their weights sum up to more. In its own cell, a pixel's are never so small.
_LEAST_WEIGHT = 1e-20


def to_distance(sq_dist: FloatArray, distance: str) -> FloatArray:
    """Squared L2 distances as the distance that scores are made of; the only place where a root is taken."""
    return np.sqrt(sq_dist) if distance == "l2" else sq_dist


def score_maps(
    level_dist: Sequence[FloatArray], size: tuple[int, int], sigma: float, weights: Sequence[float] = ()
) -> FloatArray:
    """(n, H, W): the levels' distances (n, h, w), upsampled, averaged, smoothed by a Gaussian.

    Source: Cohen & Hoshen, arXiv 2005.02357, section 3.3; scipy's defaults for the Gaussian (reflect, truncated at 4 sigma).

    Where locations are not inspected, which have NaN, a pixel is the mean of the inspected ones alone, weighted as they are
    among all; 0 where none of them reaches (normalized convolution: Knutsson & Westin, "Normalized and differential
    convolution", 1993).

    Args:
        level_dist: the distances of each level.
        size: (H, W).
        sigma: the width of the Gaussian, in pixels of the result.
        weights: what each level weighs in the average; all the same unless given.
    """
    are_equal = len(set(weights)) < 2  # then without a product, whose rounding would show
    total = np.zeros((len(level_dist[0]), *size), np.float32)
    for dist, weight in zip(level_dist, weights or [1.0] * len(level_dist), strict=True):
        found = _resampled(dist, size, sigma)
        total += found if are_equal else found * np.float32(weight)
    return total / np.float32(len(level_dist) if are_equal else sum(weights))


def _resampled(dist: FloatArray, size: tuple[int, int], sigma: float) -> FloatArray:
    """(n, H, W): the distances of a level, upsampled and smoothed, those of inspected locations alone."""
    inspected = ~np.isnan(dist)
    if inspected.all():
        return _smooth(dist, size, sigma)
    if (inspected == inspected[0]).all():  # as in all images of a bank with one region of interest
        inspected = inspected[:1]
    weight = _smooth(inspected.astype(np.float32), size, sigma)
    summed = _smooth(np.where(inspected, dist, np.float32(0)), size, sigma)
    return np.divide(summed, weight, out=np.zeros_like(summed), where=weight > _LEAST_WEIGHT)


def _smooth(maps: FloatArray, size: tuple[int, int], sigma: float) -> FloatArray:
    """Do what `resample` does, to the last bit: by the compiled kernel, which is several times as fast, where it was built."""
    if not is_built():
        return resample(maps, size, sigma)
    rows, columns = (axis_taps(length, target, sigma) for length, target in zip(maps.shape[1:], size, strict=True))
    taps = rows.positions, rows.weights, columns.positions, columns.weights
    found: FloatArray = import_native().resample(np.ascontiguousarray(maps), *taps)
    return found
