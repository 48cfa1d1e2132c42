"""The colors of maps that are drawn one by one, as they come: the same for all maps that one calibration stands beside."""

from __future__ import annotations

from spade_faiss.core.types import FloatArray
from spade_faiss.decisions.rule import DecisionRule
from spade_faiss.report.pictures import color_range

# Colors begin where this share of normal pixels is above, and end as far above the threshold as this times it.
_USUAL_SHARE = 0.05
_BEYOND = 1.5


def usual_colors(rule: DecisionRule | None, scores: FloatArray) -> tuple[float, float]:
    """The pixel scores at which the colors of a map begin and end: by the calibration, so that maps compare; else its own.

    Args:
        rule: what decides by the calibration; None without one.
        scores: (H, W), the map, which is finite.
    """
    if rule is None:
        return color_range(scores.max(keepdims=True).ravel(), lambda _: scores)
    calibration, threshold = rule.calibration, rule.thresholds.pixel
    enough = _USUAL_SHARE * (len(calibration) + 1) > 1
    low = calibration.pixels.threshold(_USUAL_SHARE, len(calibration)) if enough else threshold / 2
    return min(low, threshold), max(threshold * _BEYOND, low)
