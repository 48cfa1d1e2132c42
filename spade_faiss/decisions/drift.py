"""The drift test: whether recent scores are those of normal images, by the two-sample Kolmogorov-Smirnov test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.decisions.calibration import Calibration
from spade_faiss.decisions.conformal import Doubles, p_values

LEVEL = 0.01
DEFECTS = 0.05
# The scores that are tested, and what people call them.
TESTED_SCORES = {"image": "image score", "map": "map maximum"}

# How many numbers of defects are tried, from none to as many as are allowed.
_TRIED = 21
# Up to so many scores, computing the exact distribution takes no noticeable time.
_EXACT = 1000


@dataclass(frozen=True, kw_only=True)
class ScoreShift:
    """How one kind of score differs between recent images and the calibration.

    Args:
        distance: the Kolmogorov-Smirnov distance: the largest difference between the shares of recent and of calibration images
            that score below some value.
        p_value: the chance of such a distance or a larger one if normal images have not changed and at most the given share
            of the recent images are defects.
        median_p: the median of the recent images' p-values among the calibration's scores: 0.5 if nothing has changed, less if
            scores have risen.
    """

    distance: float
    p_value: float
    median_p: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Drift:
    """The result of the drift test.

    Args:
        moved: whether recent images score unlike the calibration's, at `level`.
        verdict: that in a sentence.
        p_value: the p-value of all tests together (Bonferroni).
        level: the chance of a false alarm of the test.
        defects: the share of recent images that may be defects.
        images: the number of recent images.
        calibration: the calibration that they are compared with.
        outdated: why the calibration does not hold for the bank as it is now; empty if it does.
        tests: the shift of `image`, the image score, and of `map`, the map maximum, if all images have a map.
        p_values: the p-values of the recent images, for each test.
    """

    moved: bool
    verdict: str
    p_value: float
    level: float
    defects: float
    images: int
    calibration: Calibration
    outdated: str
    tests: dict[str, ScoreShift]
    p_values: dict[str, Doubles]


def find_drift(
    calibration: Calibration, recent: Mapping[str, Doubles], *, level: float, defects: float, outdated: str = ""
) -> Drift:
    """Compare the scores of recent images with those of a calibration.

    Args:
        calibration: the calibration.
        recent: the (m,) scores of m images by the names in `TESTED_SCORES`; `map` may be missing.
        level: the chance of a false alarm of the test.
        defects: the share of recent images, those with the highest scores, that may be defects without counting as drift.
        outdated: why the calibration does not hold for the bank as it is now, for the result.
    """
    before = {"image": calibration.scores["knn"], "map": calibration.scores["max"]}
    p = {name: p_values(before[name], scores) for name, scores in recent.items()}
    tests = {
        name: ScoreShift(
            distance=_compare(scores, before[name])[0],
            p_value=shift_p_value(before[name], scores, defects),
            median_p=float(np.median(p[name])),
        )
        for name, scores in recent.items()
    }
    images = len(recent["image"])
    p_value = min(1.0, len(tests) * min(test.p_value for test in tests.values()))
    return Drift(
        moved=p_value <= level,
        verdict=_verdict(tests, p_value, images, level, defects),
        p_value=p_value,
        level=level,
        defects=defects,
        images=images,
        calibration=calibration,
        outdated=outdated,
        tests=tests,
        p_values=p,
    )


def shift_p_value(calibration: npt.NDArray[Any], recent: npt.NDArray[Any], defects: float) -> float:
    """The p-value of two samples having one distribution, if up to a share of `defects` of the second, its highest, is ignored.

    The number of defects is not known. The number among those allowed that makes the samples most alike is taken: if defects
    score above normal images, the p-value is too high, never too low.

    Args:
        calibration: (n,) scores.
        recent: (m,) scores.
        defects: a share, from 0 to below 1.
    """
    ordered = np.sort(recent)
    most = min(int(defects * len(ordered)), len(ordered) - 1)
    tried = np.unique(np.linspace(0, most, min(_TRIED, most + 1)).round().astype(int))
    return max(_compare(ordered[: len(ordered) - count], calibration)[1] for count in tried)


def _compare(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[float, float]:
    """The distance of two samples and its p-value."""
    from scipy import stats  # takes longer to import than an image takes to score

    found = stats.ks_2samp(a.tolist(), b.tolist(), method="exact" if max(len(a), len(b)) <= _EXACT else "asymp")
    return float(found.statistic), float(found.pvalue)


def _verdict(tests: Mapping[str, ScoreShift], p_value: float, images: int, level: float, defects: float) -> str:
    if p_value > level:
        return f"No drift found: {images} recent images score like the calibration's (p = {p_value:.2g})."
    allowed = f", even if {100 * defects:g} % of them are defects" if defects else ""
    name, strongest = min(tests.items(), key=lambda item: item[1].p_value)
    direction = "higher" if strongest.median_p < 0.5 else "lower"
    return (
        f"Scores have drifted: the {TESTED_SCORES[name]} of {images} recent images is {direction} than the calibration's "
        f"(p = {p_value:.2g}){allowed}. Look at these images; if they are normal, add some to the bank and calibrate again."
    )
