"""What a threshold promises, and where things are drawn."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import pytest

from spade_faiss.decisions.conformal import threshold
from spade_faiss.serve.web.page.evidence import alpha_curve, region_box


def alpha_of(curve: dict[str, Any], score: float) -> float:
    """What page.js makes of the curve."""
    place = bisect_right(curve["scores"], score)
    return float((1 + (curve["above"][place - 1] if place else curve["n"])) / (curve["n"] + 1))


def test_a_threshold_means_the_alpha_that_gives_it() -> None:
    """By hand: of 9 maxima, 2 lie above 7.0 (8 and 9), so it means (2 + 1) / 10."""
    curve = alpha_curve([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert alpha_of(curve, 7.0) == pytest.approx(0.3)
    assert alpha_of(curve, 6.99) == pytest.approx(0.4)
    assert alpha_of(curve, 9.0) == pytest.approx(0.1)
    assert alpha_of(curve, 0.5) == 1
    assert threshold(np.arange(1.0, 10), 0.3) == 7.0


@pytest.mark.parametrize("n", [1, 24, 209])
def test_the_curve_agrees_with_thresholds_with_ties_too(n: int) -> None:
    maxima = np.random.default_rng(n).integers(1, max(2, n // 2), n).astype(np.float64)
    curve = alpha_curve(maxima)
    for allowed in range(1, n + 1):
        alpha = allowed / (n + 1)
        score = threshold(maxima, alpha)
        assert alpha_of(curve, score) <= alpha + 1e-12
        assert alpha_of(curve, score) == pytest.approx((1 + (maxima > score).sum()) / (n + 1))


def test_a_long_curve_is_thinned_out_and_never_promises_too_much() -> None:
    maxima = np.random.default_rng(5).gamma(4, 2, 20_000)
    curve = alpha_curve(maxima)
    assert curve["n"] == 20_000
    assert len(curve["scores"]) <= 1000
    for score in np.quantile(maxima, np.linspace(0, 1, 501)):
        assert alpha_of(curve, score + 1e-3) >= (1 + (maxima > score + 1e-3).sum()) / 20_001 - 1e-12
    # Where anybody sets a threshold, nothing is left out.
    top = np.sort(maxima)[-300:]
    for score in top:
        for near in (np.nextafter(score, 0), score, np.nextafter(score, np.inf)):
            assert alpha_of(curve, near) == pytest.approx((1 + (maxima > near).sum()) / 20_001)


def test_the_box_of_a_small_region_can_be_seen_and_stays_on_the_picture() -> None:
    def box(*sides: int) -> tuple[float, float, float, float]:
        return region_box({"input": {"box": sides}}, (100, 200))

    assert box(50, 40, 30, 20) == (50, 40, 30, 20)
    assert box(0, 0, 1, 1) == (0, 0, 14, 14)
    assert box(199, 99, 1, 1) == (186, 86, 14, 14)
