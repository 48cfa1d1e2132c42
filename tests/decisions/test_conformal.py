"""Conformal arithmetic, against counts by hand, its definition in exact fractions, and what must hold for any data."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spade_faiss.core.errors import InputError
from spade_faiss.decisions.conformal import (
    PixelCounts,
    alarm_thresholds,
    alarms,
    allowed,
    combined_p_values,
    images_needed,
    p_values,
    rate_bound,
    rate_interval,
    threshold,
)

Doubles = npt.NDArray[np.float64]

# Few values, so that ties are common.
small = st.integers(0, 6).map(float)


def pairs(least: int, most: int) -> st.SearchStrategy[Doubles]:
    return st.lists(st.tuples(small, small), min_size=least, max_size=most).map(lambda rows: np.array(rows, np.float64))


class TestOneTest:
    def test_by_hand(self) -> None:
        # Four calibration scores; 5 possible p-values. At a tie, the calibration score counts as being as high.
        found = p_values(np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 2.0, 2.5, 3.0, 9.0]))
        assert found.tolist() == [1, 1, 4 / 5, 2 / 5, 2 / 5, 1 / 5]

    def test_what_was_not_scored_has_no_p_value(self) -> None:
        assert np.isnan(p_values(np.array([1.0, 2.0]), np.array([np.nan, 5.0]))).tolist() == [True, False]

    @given(scores=st.lists(small, min_size=2, max_size=9), alpha=st.sampled_from([0.05, 0.1, 1 / 7, 0.25, 1 / 3, 0.5, 0.9]))
    def test_whichever_of_the_images_is_new_at_most_alpha_of_them_are_alarms(self, scores: list[float], alpha: float) -> None:
        """Finite-sample validity, in full: each of the n + 1 is the new one in turn."""
        values = np.array(scores)
        hits = sum(
            bool(alarms(p_values(np.delete(values, new), values[new : new + 1]), alpha=alpha)[0]) for new in range(len(values))
        )
        assert hits <= alpha * len(values) + 1e-6

    def test_a_threshold_separates_what_the_p_value_does(self) -> None:
        rng = np.random.default_rng(0)
        calibration = rng.integers(0, 30, 57).astype(np.float64)
        scores = np.arange(-1, 32, 0.5)
        for alpha in (1 / 58, 0.02, 0.05, 0.1, 0.5, 0.99):
            limit = threshold(calibration, alpha)
            assert ((p_values(calibration, scores) <= alpha + 1e-12) == (scores > limit)).all(), alpha


class TestSmallestAlpha:
    @pytest.mark.parametrize(
        ("alpha", "needed"), [(0.01, 99), (0.02, 49), (0.05, 19), (0.1, 9), (0.5, 1), (1 / 3, 2), (0.003, 333)]
    )
    def test_images_needed(self, alpha: float, needed: int) -> None:
        assert images_needed(alpha) == needed
        assert allowed(alpha, needed) == 1
        with pytest.raises(InputError, match=rf"it takes {needed} of them"):
            allowed(alpha, needed - 1)

    def test_rounding_never_loses_the_smallest(self) -> None:
        for n in range(1, 400):
            assert allowed(1 / (n + 1), n) == 1
            assert images_needed(1 / (n + 1)) == n
            assert allowed(3 / (n + 3), n + 2) == 3
            assert alarms(np.array([1 / (n + 1)]), alpha=1 / (n + 1)).tolist() == [True]

    @pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, float("nan"), True, "0.1"])
    def test_no_rate(self, alpha: float) -> None:
        with pytest.raises(InputError, match="must be a number between 0 and 1"):
            allowed(alpha, 100)


class TestBothTests:
    def test_by_hand(self) -> None:
        # Calibration: A (1, 9), B (2, 2), C (3, 1). New image N (4, 1).
        # Ranks among the four by the first test: A 4, B 3, C 2, N 1; by the second: A 1, B 2, C 4, N 4 (a tie).
        # The best of each: A 1, B 2, C 2, N 1. As good as N's: A and N, 2 of 4.
        calibration = np.array([[1.0, 9], [2, 2], [3, 1]])
        assert combined_p_values(calibration, np.array([[4.0, 1]])).tolist() == [2 / 4]
        assert combined_p_values(calibration, np.array([[4.0, 10]])).tolist() == [1 / 4], "the highest in both"
        assert combined_p_values(calibration, np.array([[0.0, 0]])).tolist() == [1]

    @given(calibration=pairs(1, 8), scores=pairs(1, 3))
    def test_as_defined(self, calibration: Doubles, scores: Doubles) -> None:
        for score, found in zip(scores, combined_p_values(calibration, scores), strict=True):
            every = [tuple(row) for row in [*calibration, score]]
            best = [min(sum(other[t] >= own[t] for other in every) for t in (0, 1)) for own in every]
            assert found == float(Fraction(sum(value <= best[-1] for value in best), len(every)))

    @given(images=pairs(2, 8), alpha=st.sampled_from([0.1, 0.2, 0.25, 1 / 3, 0.5, 0.8]))
    def test_whichever_of_the_images_is_new_at_most_alpha_of_them_are_alarms(self, images: Doubles, alpha: float) -> None:
        hits = sum(
            bool(alarms(combined_p_values(np.delete(images, new, axis=0), images[new : new + 1]), alpha=alpha)[0])
            for new in range(len(images))
        )
        assert hits <= alpha * len(images) + 1e-6

    @given(calibration=pairs(1, 9), scores=pairs(1, 4))
    def test_between_the_smaller_p_value_and_bonferroni(self, calibration: Doubles, scores: Doubles) -> None:
        least = np.minimum(*(p_values(calibration[:, t], scores[:, t]) for t in (0, 1)))
        found = combined_p_values(calibration, scores)
        assert (found >= least - 1e-12).all()
        assert (found <= 2 * least + 1e-12).all()

    @given(calibration=pairs(1, 9), score=pairs(1, 1), more=st.tuples(small, small))
    def test_a_higher_score_is_never_less_suspicious(
        self, calibration: Doubles, score: Doubles, more: tuple[float, float]
    ) -> None:
        assert combined_p_values(calibration, score + np.array([more])) <= combined_p_values(calibration, score)

    @given(calibration=pairs(1, 9), scores=pairs(1, 4))
    def test_a_test_that_was_not_made_speaks_for_normal(self, calibration: Doubles, scores: Doubles) -> None:
        without = scores.copy()
        without[:, 1] = np.nan
        lowest = scores.copy()
        lowest[:, 1] = -1
        found = combined_p_values(calibration, without)
        assert found.tolist() == combined_p_values(calibration, lowest).tolist()
        assert (found >= combined_p_values(calibration, scores)).all()
        assert combined_p_values(calibration, np.full((1, 2), np.nan)).tolist() == [1]

    @pytest.mark.parametrize("alpha", [1 / 41, 2 / 41, 0.1, 0.3, 0.9])
    def test_thresholds_of_each_test_alone(self, alpha: float) -> None:
        rng = np.random.default_rng(1)
        calibration = rng.normal(size=(40, 2)).round(1)
        found = alarm_thresholds(calibration, alpha)
        for test, limit in enumerate(found):
            scores = np.full((200, 2), -np.inf)
            scores[:, test] = np.linspace(-4, 4, 200)
            passed = combined_p_values(calibration, scores) <= alpha + 1e-12
            assert passed.tolist() == (scores[:, test] > limit).tolist()
        if alpha < 2 / 41:  # the highest of the other test is as remarkable
            assert found == (math.inf, math.inf)

    def test_arguments_stay_as_they_are(self) -> None:
        calibration, scores = np.array([[1.0, 2], [3, 4]]), np.array([[np.nan, 1.0]])
        combined_p_values(calibration, scores)
        assert np.isnan(scores[0, 0])
        assert calibration.tolist() == [[1, 2], [3, 4]]


class TestSeveralTests:
    """Three image scores or four decide together."""

    @pytest.mark.parametrize("tests", [1, 3, 4])
    @given(data=st.data())
    def test_whichever_of_the_images_is_new_at_most_alpha_of_them_are_alarms(self, tests: int, data: st.DataObject) -> None:
        row = st.tuples(*[small] * tests)
        images = np.array(data.draw(st.lists(row, min_size=2, max_size=8)), np.float64)
        alpha = data.draw(st.sampled_from([0.1, 0.2, 0.25, 1 / 3, 0.5, 0.8]))
        p = [combined_p_values(np.delete(images, new, axis=0), images[new : new + 1])[0] for new in range(len(images))]
        assert alarms(np.array(p), alpha=alpha).sum() <= alpha * len(images) + 1e-6
        new = images[-1:]
        least = min(p_values(images[:-1, t], new[:, t])[0] for t in range(tests))
        assert least - 1e-12 <= p[-1] <= tests * least + 1e-12
        if tests == 1:
            assert p[-1] == p_values(images[:-1, 0], new[:, 0])[0]

    @pytest.mark.parametrize("tests", [3, 4])
    def test_simulated_false_alarms_stay_below_alpha(self, tests: int) -> None:
        """Scores that depend on each other, with heavy tails and ties; the smallest p-value by itself would not pass."""
        rng, alpha, alarmed, alone, repetitions, new = np.random.default_rng(8), 0.1, 0, 0, 1500, 4
        for _ in range(repetitions):
            common = rng.standard_t(2, (39 + new, 1))
            images = (common + rng.standard_t(2, (39 + new, tests))).round(1)
            alarmed += int((combined_p_values(images[:39], images[39:]) <= alpha).sum())
            best = np.min([p_values(images[:39, t], images[39:, t]) for t in range(tests)], axis=0)
            alone += int((best <= alpha).sum())
        # Images that share a calibration are not independent: the repetitions are.
        margin = 3 * math.sqrt(alpha * (1 - alpha) / repetitions)
        assert alarmed / (repetitions * new) <= alpha + margin
        assert alarmed / (repetitions * new) >= alpha / 2, "no test that alarms nobody"
        assert alone / (repetitions * new) > alpha + 2 * margin


class TestBatches:
    def test_benjamini_hochberg_by_hand(self) -> None:
        # Sorted p times 5 / rank: 0.05, 0.0375, 0.0667, 0.5, 0.9: the largest rank that is at most 0.05 is 2.
        p = np.array([0.9, 0.01, 0.04, 0.015, 0.4])
        assert alarms(p, fdr=0.05).tolist() == [False, True, False, True, False]
        assert alarms(p, alpha=0.05).tolist() == [False, True, True, True, False]
        assert alarms(np.zeros(0), fdr=0.05).tolist() == []

    def test_one_rule(self) -> None:
        for rule in ({}, {"alpha": 0.1, "fdr": 0.1}):
            with pytest.raises(InputError, match="one of the two"):
                alarms(np.zeros(2), **rule)
        with pytest.raises(InputError, match="fdr=0"):
            alarms(np.zeros(2), fdr=0)


class TestPixels:
    def test_counts_add_up(self) -> None:
        rng = np.random.default_rng(2)
        maps = rng.gamma(2, 3, (5, 8, 9)).astype(np.float32)
        maps[0, 0] = 0
        maps[1, 0, 0] = -0.0
        every = PixelCounts.of(maps)
        assert PixelCounts.of(maps[:2]) + PixelCounts.of(maps[2:4]) + PixelCounts.of(maps[4:]) == every
        assert PixelCounts(keys=(), counts=()) + every == every
        assert sum(every.counts) == maps.size
        assert every.counts[0] == 10
        assert list(every.keys) == sorted(set(every.keys))

    @pytest.mark.parametrize("alpha", [0.1, 0.2, 0.35, 0.5, 0.9])
    def test_the_share_of_pixels_by_definition(self, alpha: float) -> None:
        """Conformal risk control: the smallest t with (sum of the images' shares above t + 1) / (n + 1) <= alpha."""
        rng = np.random.default_rng(3)
        maps = rng.gamma(2, 3, (9, 8, 9)).astype(np.float32)
        values = np.sort(maps.ravel()).astype(np.float64)

        def risk(t: float) -> float:
            return float(((maps > t).mean(axis=(1, 2)).sum() + 1) / 10)

        exact = next(t for t in values if risk(t) <= alpha + 1e-12)
        found = PixelCounts.of(maps).threshold(alpha, 9)
        assert risk(found) <= alpha + 1e-12
        assert exact <= found <= exact * 1.001

    def test_no_smaller_share_than_the_smallest(self) -> None:
        counts = PixelCounts.of(np.ones((9, 2, 2), np.float32))
        assert counts.threshold(0.1, 9) >= 1
        with pytest.raises(InputError, match="it takes 11 of them"):
            counts.threshold(0.09, 9)

    def test_the_bound_holds_for_whichever_image_is_new(self) -> None:
        rng = np.random.default_rng(4)
        maps = rng.gamma(2, 3, (12, 6, 6)).astype(np.float32) * rng.uniform(0.5, 2, (12, 1, 1)).astype(np.float32)
        for alpha in (1 / 12, 0.1, 0.25, 0.5):
            shares = [
                float((maps[new] > PixelCounts.of(np.delete(maps, new, axis=0)).threshold(alpha, 11)).mean())
                for new in range(12)
            ]
            assert np.mean(shares) <= alpha + 1e-9


class TestRates:
    def test_bound_of_one_calibration(self) -> None:
        """The rate of a calibration of n uniform scores, above its own threshold."""
        rng = np.random.default_rng(5)
        own = [1 - threshold(rng.random(99), 0.05) for _ in range(4000)]
        assert np.mean(np.array(own) <= rate_bound(0.05, 99)) == pytest.approx(0.9, abs=0.02)
        assert np.mean(own) == pytest.approx(0.05, abs=0.002)

    def test_interval_by_hand(self) -> None:
        low, high = rate_interval(0, 10)
        assert low == 0
        assert high == pytest.approx(1 - 0.025**0.1)
        low, high = rate_interval(3, 20)
        assert stats.binom.sf(2, 20, low) == pytest.approx(0.025)
        assert stats.binom.cdf(3, 20, high) == pytest.approx(0.025)


def test_every_order_of_four_images() -> None:
    """All 24 orders of four distinct scores: each p-value of the last one appears equally often."""
    found = [p_values(np.array(order[:3]), np.array(order[3:]))[0] for order in itertools.permutations([1.0, 2.0, 3.0, 4.0])]
    assert sorted(found) == sorted([0.25, 0.5, 0.75, 1.0] * 6)
