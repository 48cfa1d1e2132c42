"""How well scores find defects: AUROC, AP, F1-max, AUPRO and the curves behind them.

Every number and curve comes from one ranking: the score of each positive (an anomalous image, a defective pixel) among all
others. A curve turns only where a threshold passes a positive, and is flat between two of them. So the negatives, nearly all
pixels of a test set, are sorted as bare values and counted by bisection; only the positives are argsorted. Nothing is
approximated: counts are integers, and tied scores pass a threshold together. Memory: one copy of the scores and about 170 bytes
a positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Bools

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

CURVE_POINTS = 1000

# Pixels that touch in the same image, diagonally too, are one region; the first axis counts images and joins nothing.
_NEIGHBORHOOD = np.zeros((3, 3, 3), np.bool_)
_NEIGHBORHOOD[1] = True


@dataclass(frozen=True, eq=False)
class Curve:
    """The corners of a curve, joined by straight lines: at most `CURVE_POINTS` of them, with `x` never falling.

    The area under the curve is its metric, up to the error of thinning it to so many points.
    """

    x: Doubles
    y: Doubles


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection:
    """How well scores separate positives from negatives.

    Args:
        auroc: area under the ROC curve: the chance that a positive scores above a negative, a tie counting half.
        ap: average precision, the step-wise area under the precision-recall curve.
        f1_max: the best F1 of any threshold t, a score of t or more being called positive.
        f1_threshold: that t, the largest one if several are best.
        roc: x the false positive rate, y the true positive rate.
        precision_recall: x the recall, y the precision, drawn as the steps whose area is `ap`.
    """

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    roc: Curve
    precision_recall: Curve


@dataclass(frozen=True, eq=False, kw_only=True)
class Localization(Detection):
    """How well score maps find defective pixels, with all pixels in one ranking, and regions, all of equal weight.

    Args:
        aupro: area under `pro` up to a false positive rate of `aupro_fpr_limit`, divided by that limit.
        aupro_fpr_limit: the false positive rate at which the area ends.
        pro: x the false positive rate over defect-free pixels, y the share of a region that is found, averaged over regions.
        regions: the number of regions in all masks.
    """

    aupro: float
    aupro_fpr_limit: float
    pro: Curve
    regions: int


def detection_metrics(labels: Bools, scores: npt.NDArray[Any]) -> Detection:
    """Measure how well image scores tell anomalous images from normal ones.

    Args:
        labels: (n,), True for an anomalous image.
        scores: (n,), the higher the more anomalous; any real dtype.

    Returns:
        AP as scikit-learn defines it, and AUROC, both with tied scores grouped; the best F1; both curves.

    Raises:
        InputError: if shapes differ, a score is not finite, `labels` are not boolean, or one of the two classes is missing.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    _check(labels, scores, "labels", "scores", "n")
    return _detection(_rank(scores, labels, ~labels, "image"))


def localization_metrics(
    masks: Bools, maps: npt.NDArray[Any], valid: Bools | None = None, *, fpr_limit: float = 0.3
) -> Localization:
    """Measure how well score maps find defective pixels and defective regions.

    The per-region overlap is that of Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021,
    https://doi.org/10.1007/s11263-020-01400-4: a region is an 8-connected component of one mask, and the area under the curve
    runs from (0, 0) to `fpr_limit`, interpolated linearly there.

    Args:
        masks: (n, H, W), True for a defective pixel.
        maps: (n, H, W), the higher the more anomalous; any real dtype.
        valid: (n, H, W), False for pixels that were not scored: they are ignored, whatever `maps` holds there.
        fpr_limit: the false positive rate at which the area under the PRO curve ends, above 0 and at most 1.

    Returns:
        The metrics of all pixels as one ranking, and AUPRO.

    Raises:
        InputError: if shapes differ, a scored pixel is not finite, masks are not boolean, there is no defective or no
            defect-free pixel, or `fpr_limit` is out of range.
    """
    masks, maps = np.asarray(masks), np.asarray(maps)
    _check(masks, maps, "masks", "maps", "n, H, W")
    if not 0 < fpr_limit <= 1:
        raise InputError(f"fpr_limit={fpr_limit} must be above 0 and at most 1")
    if valid is None:
        defective, intact = masks, ~masks
    else:
        valid = np.asarray(valid)
        _check(valid, maps, "valid", "maps", "n, H, W")
        defective, intact = masks & valid, ~masks & valid
    ranking = _rank(maps, defective, intact, "pixel")
    share, regions = _share_of_region(defective)
    found = ranking.cumulate(share)
    fpr, overlap = ranking.fp / ranking.negatives, np.repeat(np.append(0, found / found[-1]), 2)
    inside = int(np.searchsorted(fpr, fpr_limit, side="right"))
    area = _area(np.append(fpr[:inside], fpr_limit), np.append(overlap[:inside], np.interp(fpr_limit, fpr, overlap)))
    return Localization(
        **vars(_detection(ranking)),
        aupro=area / fpr_limit,
        aupro_fpr_limit=fpr_limit,
        pro=_thin(fpr, overlap),
        regions=regions,
    )


@dataclass(frozen=True, eq=False)
class _Ranking:
    """How many positives and negatives reach each threshold, which are the g distinct scores of positives.

    Args:
        order: (positives,), sorts the positives by falling score.
        threshold: (g,), falling scores.
        tp: (g,), the positives that reach each threshold.
        fp: (2 + 2g,), the negatives at each corner of the curves: none, those above and those at each threshold in turn, all.
    """

    order: Ints
    threshold: npt.NDArray[Any]
    tp: Ints
    fp: Ints

    @property
    def positives(self) -> int:
        return int(self.tp[-1])

    @property
    def negatives(self) -> int:
        return int(self.fp[-1])

    def cumulate(self, weights: Doubles) -> Doubles:
        """(g,) sums of the (positives,) weights of those positives that reach each threshold."""
        return np.cumsum(weights[self.order])[self.tp - 1]


def _rank(scores: npt.NDArray[Any], positive: Bools, negative: Bools, unit: str) -> _Ranking:
    positives, negatives = scores[positive], scores[negative]  # copies: sorting in place leaves the caller's array alone
    if not positives.size or not negatives.size:
        got = f"got {positives.size} anomalous and {negatives.size} normal"
        raise InputError(f"{got} {unit}s; the metrics need at least one of each")
    if bad := sum(values.size - np.count_nonzero(np.isfinite(values)) for values in (positives, negatives)):
        raise InputError(f"{bad} {unit} scores are NaN or infinite; leave out every {unit} that was not scored")
    # Numpy's default sorts are vectorized, `stable` ones are not, and the order inside a tie does not matter.
    # 29 million float32, numpy 2.4, one AVX-512 core: sort 0.13 s, argsort 2 s, stable argsort 5 s.
    negatives.sort()
    order = np.argsort(positives)[::-1]
    positives = positives[order]
    tp = np.append(np.flatnonzero(positives[1:] != positives[:-1]) + 1, positives.size)
    threshold = positives[tp - 1]
    fp = np.empty(2 + 2 * tp.size, np.int64)
    fp[0], fp[-1] = 0, negatives.size
    fp[1:-1:2] = negatives.size - np.searchsorted(negatives, threshold, side="right")
    fp[2:-1:2] = negatives.size - np.searchsorted(negatives, threshold, side="left")
    return _Ranking(order, threshold, tp, fp)


def _detection(ranking: _Ranking) -> Detection:
    fp, tp = ranking.fp, np.repeat(np.append(0, ranking.tp), 2)
    called = ranking.tp + fp[2:-1:2]
    precision = np.repeat(ranking.tp / called, 2)
    f1 = 2 * ranking.tp / (ranking.positives + called)
    best = int(f1.argmax())
    return Detection(
        auroc=_area(fp, tp) / (ranking.positives * ranking.negatives),
        ap=_area(tp[1:-1], precision) / ranking.positives,
        f1_max=float(f1[best]),
        f1_threshold=float(ranking.threshold[best]),
        roc=_thin(fp / ranking.negatives, tp / ranking.positives),
        precision_recall=_thin(tp[1:-1] / ranking.positives, precision),
    )


def _share_of_region(defective: Bools) -> tuple[Doubles, int]:
    """The share that each defective pixel, in C order, has in its region, and the number of regions."""
    from scipy import ndimage  # takes longer to import than an image takes to score, and few runs need it

    images = defective[defective.any(axis=(1, 2))]
    labels, regions = ndimage.label(images, _NEIGHBORHOOD)
    region = labels[images] - 1
    return (1 / np.bincount(region))[region], int(regions)


def _area(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """The area by trapezoids; integer counts stay integers, so AUROC is exact; they fit int64 below three billion scores."""
    return float(np.dot(np.diff(x), y[1:] + y[:-1]) / 2)


def _thin(x: Doubles, y: Doubles) -> Curve:
    """Cut a curve into pieces of equal length and keep both ends of each piece, so that a straight line keeps its ends."""
    if x.size > CURVE_POINTS:
        length = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        piece = (length * ((CURVE_POINTS // 2 - 1) / length[-1])).astype(np.int64)
        turns = piece[1:] != piece[:-1]
        keep = np.append(True, turns) | np.append(turns, True)
        x, y = x[keep], y[keep]
    return Curve(x, y)


def _check(flags: npt.NDArray[Any], scores: npt.NDArray[Any], flags_name: str, scores_name: str, axes: str) -> None:
    if flags.dtype != np.bool_:
        raise InputError(f"{flags_name} is of type {flags.dtype}, expected bool; if it holds 0 and 255, pass {flags_name} > 0")
    if scores.dtype.kind not in "fiu":
        raise InputError(f"{scores_name} is of type {scores.dtype}, expected real numbers")
    if flags.shape != scores.shape or scores.ndim != axes.count(",") + 1:
        raise InputError(f"{flags_name} of shape {flags.shape}, {scores_name} of shape {scores.shape}: both must be ({axes})")
