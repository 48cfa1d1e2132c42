"""The drift test: as many false alarms as promised, and few defects are no drift."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from spade_faiss.decisions.drift import shift_p_value


def test_two_samples_by_hand() -> None:
    # All three recent scores above all three others: the distance is 1, and 2 of the 20 orders are as far apart.
    assert shift_p_value(np.array([1.0, 2, 3]), np.array([4.0, 5, 6]), 0.0) == pytest.approx(2 / 20)


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    p = np.array([shift_p_value(rng.normal(size=60), rng.normal(size=50), 0.0) for _ in range(400)])
    for level in (0.01, 0.05, 0.2):
        assert stats.binom.sf((p <= level).sum() - 1, 400, level) > 1e-3
    assert (p <= 0.2).mean() > 0.1, "the test has power"


def test_few_defects_are_no_drift() -> None:
    rng = np.random.default_rng(1)
    calibration = rng.normal(size=200)
    recent = np.append(rng.normal(size=475), 50 + rng.normal(size=25))
    plain, robust = shift_p_value(calibration, recent, 0.0), shift_p_value(calibration, recent, 0.05)
    assert robust == shift_p_value(calibration, recent[:475], 0.0) >= plain
    many = np.append(rng.normal(size=300), 50 + rng.normal(size=200))
    assert shift_p_value(calibration, many, 0.05) < 1e-6


def test_a_shift_is_found_although_defects_are_allowed() -> None:
    rng = np.random.default_rng(2)
    calibration = rng.normal(size=200)
    assert shift_p_value(calibration, rng.normal(size=300) + 0.6, 0.05) < 1e-3
    assert shift_p_value(calibration, rng.normal(size=300) - 0.6, 0.05) < 1e-3
    assert shift_p_value(calibration, 0.4 * rng.normal(size=300), 0.05) < 1e-3, "closer together"


def test_ties_and_few_images() -> None:
    assert shift_p_value(np.zeros(20), np.zeros(30), 0.05) == 1
    assert shift_p_value(np.zeros(20), np.zeros(1), 0.9) == 1
