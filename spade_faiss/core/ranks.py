"""The rank of a score among those of normal images, as a p-value; `decisions.conformal` says why it is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Values = npt.NDArray[np.floating[Any]]


def p_values(calibration: Values, scores: Values) -> Doubles:
    """(m,) p-values: (1 + the number of calibration scores that are at least as high) / (n + 1).

    The p-value of a normal image is at most alpha with a probability of at most alpha, for any alpha, with ties or without.

    Args:
        calibration: (n,) scores of normal images.
        scores: (m,); NaN for an image that was not scored, whose p-value is NaN.
    """
    ordered, scores = np.sort(np.asarray(calibration, np.float64)), np.asarray(scores, np.float64)
    reached = len(ordered) - np.searchsorted(ordered, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + reached) / (len(ordered) + 1))
