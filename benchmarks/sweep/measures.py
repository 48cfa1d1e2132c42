"""The metrics of the benchmark, on plain arrays: how much of the truth an index found, and what that does to anomaly scores.

Whether a neighbor counts is asked of its distance, never of its id: of several at the same distance, each is as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Two distances are the same if they differ by no more than float32's rounding of sums of some thousand squares.
ROUNDING = 1e-5
RESAMPLES, SEED = 1000, 1234
_CONFIDENCE = (0.025, 0.975)


@dataclass(frozen=True)
class Estimate:
    """A value, and the limits of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def recall(ids: npt.NDArray[np.int64], dist: Doubles, truth: Doubles, k: int, rounding: float = ROUNDING) -> float:
    """The share of the k nearest that was found, by distance: each returned neighbor counts if it is no farther than the
    truly k-th nearest, whichever one it is.

    Args:
        ids: (nq, m) of what was returned, m at least k; -1 for nothing. One returned twice counts once.
        dist: (nq, m), the true distance of each.
        truth: (nq, at least k), the true distances of the nearest, ascending.
        k: neighbors that were asked for.
        rounding: by which share a distance may be larger and still count as the same.
    """
    ids, dist = ids[:, :k], dist[:, :k]
    order = np.argsort(ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, np.bool_)
    np.put_along_axis(again, order[:, 1:], sorted_ids[:, 1:] == sorted_ids[:, :-1], axis=1)
    near_enough = dist <= truth[:, k - 1 : k] * (1 + rounding)
    return float((near_enough & (ids >= 0) & ~again).sum() / (len(ids) * k))


def share_as_near(dist: npt.NDArray[Any], exact: npt.NDArray[Any], rounding: float = ROUNDING) -> float:
    """The share of distances to one nearest vector that are no larger than exact search's."""
    exact = np.asarray(exact, np.float64)
    return float((np.asarray(dist, np.float64) <= exact * (1 + rounding)).mean())


def score_excess(score: npt.NDArray[Any], exact: npt.NDArray[Any]) -> Doubles:
    """By how much scores are above exact search's, as a share of these; 0 where both are 0."""
    score, exact = np.asarray(score, np.float64), np.asarray(exact, np.float64)
    excess: Doubles = np.divide(score - exact, exact, out=np.where(score == exact, 0.0, np.inf), where=exact > 0)
    return excess


def rank_correlation(score: npt.NDArray[Any], exact: npt.NDArray[Any]) -> float:
    """Spearman's, ties at their mean rank; 1 where both put all images at one rank."""
    first, second = stats.rankdata(score), stats.rankdata(exact)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float(np.array_equal(first, second))
    return float(np.corrcoef(first, second)[0, 1])


class Bootstrap:
    """Resamples of n images, the same for everything that is compared: a difference is taken resample by resample.

    Good and defective images are drawn apart, so that each resample has both.
    """

    def __init__(self, defective: Bools, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        self.defective = defective
        # (1 + resamples, n): how often each image is drawn; first, all of them once.
        self.weights = np.ones((1 + resamples, len(defective)))
        for part in (np.flatnonzero(defective), np.flatnonzero(~defective)):
            drawn = rng.multinomial(len(part), np.full(len(part), 1 / max(1, len(part))), size=resamples)
            self.weights[1:, part] = drawn

    def image_auroc(self, score: npt.NDArray[Any]) -> Doubles:
        """(1 + resamples,), a tie counting half."""
        positive, negative = score[self.defective], score[~self.defective]
        wins = np.sign(positive[:, None] - negative[None, :]) / 2 + 0.5
        above, below = self.weights[:, self.defective], self.weights[:, ~self.defective]
        total: Doubles = ((above @ wins) * below).sum(axis=1) / (above.sum(axis=1) * below.sum(axis=1))
        return total

    def pixel(self, counts: PixelCounts, fpr_limit: float = 0.3) -> tuple[Doubles, Doubles]:
        """(1 + resamples,) each: pixel AUROC and AUPRO."""
        intact = np.cumsum(self.weights @ counts.intact, axis=1)
        found = np.cumsum(self.weights @ counts.defective, axis=1)
        regions = np.cumsum(self.weights[:, counts.image_of_region] @ counts.region_share, axis=1)
        fpr, tpr, overlap = (_from_zero(curve / curve[:, -1:]) for curve in (intact, found, regions))
        auroc = np.asarray(np.trapezoid(tpr, fpr, axis=1))
        aupro = np.array([_area_below(x, y, fpr_limit) for x, y in zip(fpr, overlap, strict=True)]) / fpr_limit
        return auroc, aupro


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """How many pixels of each image lie in which range of scores, the highest range first.

    Args:
        intact, defective: (n, bins), pixels of each image.
        region_share: (regions, bins), the share of each defective region.
        image_of_region: (regions,), the image that it lies in.
    """

    intact: Doubles
    defective: Doubles
    region_share: Doubles
    image_of_region: npt.NDArray[np.int64]


def pixel_counts(maps: npt.NDArray[Any], regions: npt.NDArray[np.integer[Any]], valid: Bools, edges: Doubles) -> PixelCounts:
    """Count the pixels of score maps.

    Args:
        maps: (n, H, W).
        regions: (n, H, W), each defective region's number, in all images together, from 1; 0 for intact pixels.
        valid: (n, H, W), pixels that count.
        edges: ascending, between ranges of scores.
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
    """The value of all images, and the interval that the resamples give."""
    low, high = np.quantile(samples[1:], _CONFIDENCE)
    return Estimate(float(samples[0]), float(low), float(high))


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x by least squares: y grows as x to that power."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def intrinsic_dimension(dist: Doubles) -> Doubles:
    """(n,), the local intrinsic dimension at each point, from the distances (n, k) to its nearest, ascending and above 0.

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
