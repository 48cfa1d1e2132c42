"""Computes the metrics of the benchmark from plain arrays: how many neighbors were found, and how that changes anomaly scores.

Whether a neighbor counts depends on its distance, never on its id: of several at the same distance, each is as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from spade_faiss.core.types import Bools

Doubles = npt.NDArray[np.float64]

# Two distances are the same if they differ by no more than the rounding of float32 in sums of some thousand squares.
ROUNDING = 1e-5
RESAMPLES, SEED = 1000, 1234
_CONFIDENCE = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A value with the limits of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def recall(ids: npt.NDArray[np.int64], dist: Doubles, truth: Doubles, k: int, rounding: float = ROUNDING) -> float:
    """Return the share of the k nearest that was found, by distance.

    A neighbor that was returned counts if it is no farther than the true k-th nearest, whichever one it is.

    Args:
        ids: what was returned, (nq, m) with m at least k; -1 stands for nothing. What was returned twice counts once.
        dist: the true distance of each, (nq, m).
        truth: the true distances of the nearest, (nq, at least k), ascending.
        k: the number of neighbors that were asked for.
        rounding: a distance may be larger by this share and still count as the same.
    """
    ids, dist = ids[:, :k], dist[:, :k]
    order = np.argsort(ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(again, order[:, 1:], sorted_ids[:, 1:] == sorted_ids[:, :-1], axis=1)
    near_enough = dist <= truth[:, k - 1 : k] * (1 + rounding)
    return float((near_enough & (ids >= 0) & ~again).sum() / (len(ids) * k))


def share_as_near(dist: npt.NDArray[Any], exact: npt.NDArray[Any], rounding: float = ROUNDING) -> float:
    """Return the share of the distances to the nearest vector that are no larger than those of exact search."""
    exact = np.asarray(exact, np.float64)
    return float((np.asarray(dist, np.float64) <= exact * (1 + rounding)).mean())


def score_excess(score: npt.NDArray[Any], exact: npt.NDArray[Any]) -> Doubles:
    """Return by how much scores exceed those of exact search, as a share of these; 0 where both are 0."""
    score, exact = np.asarray(score, np.float64), np.asarray(exact, np.float64)
    excess: Doubles = np.divide(score - exact, exact, out=np.where(score == exact, 0.0, np.inf), where=exact > 0)
    return excess


def rank_correlation(score: npt.NDArray[Any], exact: npt.NDArray[Any]) -> float:
    """Return Spearman's rank correlation, with ties at their mean rank; it is 1 if both give all images one rank."""
    first, second = stats.rankdata(score), stats.rankdata(exact)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float(np.array_equal(first, second))
    return float(np.corrcoef(first, second)[0, 1])


class Bootstrap:
    """Draws resamples of n images, the same for everything that is compared, so that differences are paired.

    Normal and defective images are drawn separately, so that each resample has both.
    """

    def __init__(self, defective: Bools, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        self.defective = defective
        # How often each image is drawn, (1 + resamples, n); in the first row, each once.
        self.weights = np.ones((1 + resamples, len(defective)))
        for part in (np.flatnonzero(defective), np.flatnonzero(~defective)):
            drawn = rng.multinomial(len(part), np.full(len(part), 1 / max(1, len(part))), size=resamples)
            self.weights[1:, part] = drawn

    def image_auroc(self, score: npt.NDArray[Any]) -> Doubles:
        """Return the image AUROC of each resample, (1 + resamples,); a tie counts half."""
        positive, negative = score[self.defective], score[~self.defective]
        wins = np.sign(positive[:, None] - negative[None, :]) / 2 + 0.5
        above, below = self.weights[:, self.defective], self.weights[:, ~self.defective]
        total: Doubles = ((above @ wins) * below).sum(axis=1) / (above.sum(axis=1) * below.sum(axis=1))
        return total

    def pixel(self, counts: PixelCounts, fpr_limit: float = 0.3) -> tuple[Doubles, Doubles]:
        """Return the pixel AUROC and the AUPRO of each resample, (1 + resamples,) each."""
        intact = np.cumsum(self.weights @ counts.intact, axis=1)
        found = np.cumsum(self.weights @ counts.defective, axis=1)
        regions = np.cumsum(self.weights[:, counts.image_of_region] @ counts.region_share, axis=1)
        fpr, tpr, overlap = (_from_zero(curve / curve[:, -1:]) for curve in (intact, found, regions))
        auroc = np.asarray(np.trapezoid(tpr, fpr, axis=1))
        aupro = np.array([_area_below(x, y, fpr_limit) for x, y in zip(fpr, overlap, strict=True)]) / fpr_limit
        return auroc, aupro


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """How many pixels have scores in which range, the highest range first.

    Args:
        intact: intact pixels of each image, (n, bins).
        defective: defective pixels of each image, (n, bins).
        region_share: the share of each defective region, (regions, bins).
        image_of_region: the image that each region lies in, (regions,).
    """

    intact: Doubles
    defective: Doubles
    region_share: Doubles
    image_of_region: npt.NDArray[np.int64]


def pixel_counts(maps: npt.NDArray[Any], regions: npt.NDArray[np.integer[Any]], valid: Bools, edges: Doubles) -> PixelCounts:
    """Count the pixels of score maps by their scores.

    Args:
        maps: the score maps, (n, H, W).
        regions: the number of the defective region of each pixel, (n, H, W), from 1 in all images together; 0 where intact.
        valid: which pixels count, (n, H, W).
        edges: the limits between ranges of scores, ascending.
    """
    bins, n = len(edges) + 1, len(maps)
    place = bins - 1 - np.searchsorted(edges, maps)
    count = int(regions.max())
    intact, share = np.zeros((n, bins)), np.zeros((count, bins))
    image_of_region = np.zeros(count, np.int64)
    for image in range(n):
        intact[image] = np.bincount(place[image][valid[image] & (regions[image] == 0)], minlength=bins)
        for number in np.unique(regions[image][valid[image] & (regions[image] > 0)]):
            share[number - 1] = np.bincount(place[image][valid[image] & (regions[image] == number)], minlength=bins)
            image_of_region[number - 1] = image
    defective = np.zeros((n, bins))
    np.add.at(defective, image_of_region, share)
    seen = share.sum(axis=1) > 0
    return PixelCounts(intact, defective, share[seen] / share[seen].sum(axis=1, keepdims=True), image_of_region[seen])


def estimate(samples: Doubles) -> Estimate:
    """Return the value of all images, with the interval that the resamples give."""
    low, high = np.quantile(samples[1:], _CONFIDENCE)
    return Estimate(float(samples[0]), float(low), float(high))


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x by least squares: y grows as x to that power."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def intrinsic_dimension(dist: Doubles) -> Doubles:
    """Return the local intrinsic dimension at each point, (n,).

    Args:
        dist: the distances of each point to its nearest, (n, k), ascending and above 0.

    Source: Levina & Bickel, "Maximum Likelihood Estimation of Intrinsic Dimension", NIPS 2004, equation 8, with the unbiased
    k - 2 of their section 3.
    """
    found: Doubles = (dist.shape[1] - 2) / np.log(dist[:, -1:] / dist[:, :-1]).sum(axis=1)
    return found


def _from_zero(curve: Doubles) -> Doubles:
    return np.concatenate([np.zeros((len(curve), 1)), curve], axis=1)


def _area_below(x: Doubles, y: Doubles, limit: float) -> float:
    inside = int(np.searchsorted(x, limit, side="right"))
    xs, ys = np.append(x[:inside], limit), np.append(y[:inside], np.interp(limit, x, y))
    return float(np.trapezoid(ys, xs))
