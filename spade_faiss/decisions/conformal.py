"""Conformal arithmetic on plain arrays: the rank of a score among those of normal images gives p-values, thresholds and alarms.

Everything rests on one fact: if a new normal image and n calibration images are exchangeable, each of the n + 1 ranks is
equally likely (Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005; for anomalies: Laxhammar &
Falkman, "Conformal prediction for distribution-independent anomaly detection in streaming vessel data", 2010).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.ranks import Doubles as Doubles  # for whoever looks for them beside the rest
from spade_faiss.core.ranks import Values as Values
from spade_faiss.core.ranks import p_values as p_values
from spade_faiss.core.types import Bools
from spade_faiss.decisions.beta import beta_quantile

# alpha * (n + 1) may be a whole number that floating point misses by a little.
_ROUNDING = 1e-9
# The trailing bits of a float32 that are dropped before pixels are counted: the others tell values apart that differ by 0.1 %.
_DROPPED_BITS = 13


def check_rate(name: str, value: object) -> float:
    """Return `value`; raise InputError unless it is a number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not 0 < value < 1:
        raise InputError(f"{name}={value!r} must be a number between 0 and 1, for instance 0.01")
    return float(value)


def images_needed(alpha: float) -> int:
    """The fewest calibration images that can promise a false-alarm rate of `alpha`."""
    return max(1, math.ceil(1 / alpha - _ROUNDING) - 1)


def allowed(alpha: float, n: int) -> int:
    """How many of n + 1 exchangeable images may be alarms: alpha * (n + 1), rounded down.

    Raises:
        InputError: if none may be, as the smallest p-value of n calibration images, 1 / (n + 1), is above alpha.
    """
    count = math.floor(check_rate("alpha", alpha) * (n + 1) + _ROUNDING)
    if count == 0:
        raise InputError(
            f"alpha={alpha:g} is below {1 / (n + 1):.4g}, the smallest p-value that {n} calibration images can give; "
            f"it takes {images_needed(alpha)} of them, or a larger alpha"
        )
    return min(count, n)


def p_values_in_bags(bags: Iterable[Doubles]) -> Doubles:
    """(m,) p-values of images whose calibration scores depend on the image.

    Args:
        bags: for each of m images, (n + 1,): the scores of the n calibration images and, last, its own, such that they would be
            the same in another order if the images were; NaN for an image that was not scored, whose p-value is NaN.
    """
    return np.array([math.nan if np.isnan(bag[-1]) else (bag >= bag[-1]).sum() / len(bag) for bag in bags], np.float64)


def combined_p_values(calibration: Values, scores: Values, bags: Iterable[Doubles] | None = None) -> Doubles:
    """(m,) p-values of several tests together, which are as valid as those of one test.

    The image is put among the calibration images. Each of the n + 1 gets its rank in every test, and the best of these ranks is
    its statistic; the p-value is the rank of the image's statistic. The statistic treats the n + 1 images alike, so they stay
    exchangeable, however the tests depend on each other. The p-value lies between the smallest p-value of the tests and that
    times their number, which is Bonferroni's correction.

    Source: the minimum of p-values, calibrated by ranks (Westfall & Young, "Resampling-Based Multiple Testing", 1993; Pesarin,
    "Multivariate Permutation Tests", 2001), here over the exchangeable images of full conformal prediction.

    Args:
        calibration: (n, t) scores of normal images in t tests.
        scores: (m, t); NaN if a test was not made: the image counts as normal in it.
        bags: one more test, whose calibration scores depend on the image, see `p_values_in_bags`; None if there is none. For an
            image that is NaN in it, the p-value is the largest that it may have, whatever its score would have been.
    """
    calibration = np.asarray(calibration, np.float64)
    scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores, np.float64))
    n = len(calibration)
    ordered, reached = np.sort(calibration, axis=0), np.empty(calibration.shape, np.int64)
    for test, line in enumerate(ordered.T):
        reached[:, test] = n - np.searchsorted(line, calibration[:, test])
    found = np.empty(len(scores))
    for i, (score, bag) in enumerate(zip(scores, itertools.repeat(None) if bags is None else bags, strict=bags is not None)):
        own = (1 + (calibration >= score).sum(axis=0)).min(initial=n + 1)
        best = (reached + (calibration <= score)).min(axis=1, initial=n + 1)
        more = 0
        if bag is not None and np.isnan(bag[-1]):
            more = own  # of n + 1 images, at most so many have a rank in the test that is as good
        elif bag is not None:
            ranks = n + 1 - np.searchsorted(np.sort(bag), bag, side="left")
            own, best = min(own, ranks[-1]), np.minimum(best, ranks[:-1])
        found[i] = min(n + 1, 1 + (best <= own).sum() + more) / (n + 1)
    return found


def threshold(calibration: Values, alpha: float) -> float:
    """The score above which p-values are at most alpha; at or below it they are larger.

    Args:
        calibration: (n,) scores of normal images.
        alpha: the share of normal images that may lie above.

    Raises:
        InputError: for an alpha that n images cannot promise.
    """
    n = len(calibration)
    return float(np.sort(calibration)[n - allowed(alpha, n)])


def alarm_thresholds(calibration: Values, alpha: float, *, bags: bool = False) -> tuple[float, ...]:
    """For each of t tests, the score above which it alone makes `combined_p_values` at most alpha; infinite if no score does.

    Args:
        calibration: (n, t) scores of normal images.
        alpha: the false-alarm rate.
        bags: whether there is one more test, by `bags`: thresholds then hold whatever its scores are.

    Raises:
        InputError: for an alpha that n images cannot promise.
    """
    calibration = np.asarray(calibration, np.float64)
    n, tests = calibration.shape
    level = allowed(alpha, n) / (n + 1)
    unknown = [np.full(n + 1, np.nan)] if bags else None
    found = []
    for test in range(tests):
        steps: Doubles = np.unique(calibration[:, test])  # the p-value changes only there, and never rises with the score

        def passes(place: int, test: int = test, steps: Doubles = steps) -> bool:
            alone = np.full((1, tests), -np.inf)
            alone[0, test] = np.nextafter(steps[place], np.inf)
            return bool(combined_p_values(calibration, alone, unknown)[0] <= level * (1 + _ROUNDING))

        first = bisect_left(range(len(steps)), True, key=passes)
        found.append(float(steps[first]) if first < len(steps) else math.inf)
    return tuple(found)


def alarms(p: Doubles, *, alpha: float | None = None, fdr: float | None = None) -> Bools:
    """(n,) which p-values are alarms: those of at most alpha, or those that keep the share of false alarms below `fdr`.

    Under `fdr`, at most that share of this batch's alarms is expected to be false: Benjamini & Hochberg, "Controlling the false
    discovery rate", 1995. For p-values that share one calibration, Bates et al., "Testing for outliers with conformal
    p-values", 2023, prove it for a single test.

    Args:
        p: (n,) p-values.
        alpha: the false-alarm rate, or None.
        fdr: the share of false alarms among the alarms, or None; exactly one of the two is given.
    """
    if (alpha is None) == (fdr is None):
        raise InputError(f"alarms need alpha or fdr, one of the two; got alpha={alpha} and fdr={fdr}")
    if alpha is not None:
        found: Bools = p <= check_rate("alpha", alpha) * (1 + _ROUNDING)
        return found
    level = check_rate("fdr", fdr)
    from scipy import stats  # takes longer to import than an image takes to score

    return np.asarray(stats.false_discovery_control(p) <= level * (1 + _ROUNDING)) if len(p) else np.zeros(0, np.bool_)


def rate_bound(alpha: float, n: int, confidence: float = 0.9) -> float:
    """The false-alarm rate that a share of `confidence` of all calibrations with n images stays below.

    Alpha bounds the average rate over calibrations. Given the calibration, the rate of one test with continuous scores follows
    Beta(k, n + 1 - k), k = alpha (n + 1) rounded down: Vovk, "Conditional validity of inductive conformal predictors", 2012.
    """
    k = allowed(alpha, n)
    return beta_quantile(k, n + 1 - k, confidence)


def rate_interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a rate of which `count` of `total` were observed: Clopper & Pearson, 1934."""
    beyond = (1 - confidence) / 2
    low = beta_quantile(count, total - count + 1, beyond) if count else 0.0
    return low, beta_quantile(count + 1, total - count, 1 - beyond) if count < total else 1.0


@dataclass(frozen=True, kw_only=True)
class PixelCounts:
    """A histogram of the pixel scores of normal maps, in steps of 0.1 %; the maps themselves would take 200 KB each.

    Args:
        keys: the leading bits of the float32 scores, ascending.
        counts: the number of pixels of each key.
    """

    keys: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(maps: npt.NDArray[np.float32]) -> PixelCounts:
        """Count the scores of n maps, (n, ...), none of which is negative or NaN."""
        # The bits of non-negative floats rise with their values. Adding 0 turns -0, whose bits do not, into 0.
        keys, counts = np.unique((maps.ravel() + np.float32(0)).view(np.uint32) >> _DROPPED_BITS, return_counts=True)
        return PixelCounts(keys=tuple(keys.tolist()), counts=tuple(counts.tolist()))

    def __add__(self, other: PixelCounts) -> PixelCounts:
        keys, places = np.unique([*self.keys, *other.keys], return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, [*self.counts, *other.counts])
        return PixelCounts(keys=tuple(map(int, keys)), counts=tuple(counts.tolist()))

    def threshold(self, alpha: float, n: int) -> float:
        """The score that at most a share of alpha of a normal image's pixels is expected to exceed.

        It bounds (n * share + 1) / (n + 1), the share over the n calibration images and one more about which nothing is known:
        Angelopoulos et al., "Conformal Risk Control", 2022, theorem 1. The score is at most 0.1 % too high.

        Args:
            alpha: the share of pixels.
            n: the number of images that were counted.

        Raises:
            InputError: for an alpha that n images cannot promise.
        """
        allowed(alpha, n)
        share = max(0.0, (alpha * (n + 1) - 1) / n)
        above = np.cumsum(self.counts[::-1])[::-1] - self.counts
        first = int((above <= share * sum(self.counts) + _ROUNDING).argmax())
        last_of_bucket = np.uint32(((self.keys[first] + 1) << _DROPPED_BITS) - 1)
        return float(last_of_bucket.view(np.float32))
