"""P-values of the structure score: each image by the others, exact for any statistics, and together with other scores."""

from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.decisions.conformal import (
    Doubles,
    alarm_thresholds,
    alarms,
    combined_p_values,
    p_values,
    p_values_in_bags,
)
from spade_faiss.decisions.structure import structure_bags
from spade_faiss.scoring.image_scores import structure_scores

ALPHAS = (0.1, 0.2, 0.25, 1 / 3, 0.5, 0.8)


def slowly(reference: Doubles, own: npt.NDArray[np.floating]) -> float:
    """The definition, statistic by statistic."""
    total = 0.0
    for values, value in zip(reference.T.tolist(), own.tolist(), strict=True):
        largest = max(map(abs, [*values, value]))
        scale = max(statistics.pstdev(values), 1e-6 * largest)
        total += ((value - statistics.fmean(values)) / scale) ** 2 if scale else 0.0
    return math.sqrt(total)


def images_of(most: int, columns: int = 3) -> st.SearchStrategy[Doubles]:
    """Statistics of images, few values and many ties; some are as good as constant."""
    row = st.tuples(*[st.integers(0, 5).map(float)] * columns)
    return st.lists(row, min_size=3, max_size=most).map(lambda rows: np.array(rows, np.float64))


def split(images: Doubles, new: int) -> tuple[Doubles, Doubles]:
    """The calibration images and the new one."""
    return np.delete(images, new, axis=0), images[new : new + 1]


def test_by_hand() -> None:
    # Means 2, 10, 0; standard deviations 1, 2, 0, of which the last becomes a millionth of the largest value.
    normal = np.array([[1.0, 8, 0], [3, 12, 0]])
    assert structure_scores(normal, np.array([[2.0, 10, 0], [5, 14, 0], [2, 6, 0]])).tolist() == [0, math.sqrt(9 + 4), 2]
    assert structure_scores(normal, np.array([[2.0, 10, 3]]))[0] == pytest.approx(1e6)
    assert np.isnan(structure_scores(normal, np.full((1, 3), np.nan))).all()
    assert structure_scores(normal, np.zeros((0, 3))).shape == (0,)


@given(images=images_of(8))
def test_every_image_is_scored_by_all_others(images: Doubles) -> None:
    for new in range(len(images)):
        normal, own = split(images, new)
        (bag,) = structure_bags(normal, own)
        ordered = np.concatenate([normal, own])
        expected = [slowly(np.delete(ordered, i, axis=0), ordered[i]) for i in range(len(ordered))]
        np.testing.assert_allclose(bag, expected, rtol=1e-6, atol=1e-7)
        assert bag[-1] == np.float32(structure_scores(normal, own)[0])


def test_of_large_statistics() -> None:
    """An outlier among the calibration images leaves the variance without it as it is."""
    rng = np.random.default_rng(0)
    normal = 1000 + rng.normal(size=(30, 3))
    normal[7] = 1e6
    own = 1000 + rng.normal(size=(1, 3))
    (bag,) = structure_bags(normal, own)
    ordered = np.concatenate([normal, own])
    np.testing.assert_allclose(bag, [slowly(np.delete(ordered, i, axis=0), ordered[i]) for i in range(31)], rtol=1e-4)


@given(images=images_of(9), alpha=st.sampled_from(ALPHAS))
def test_whichever_of_the_images_is_new_at_most_alpha_of_them_are_alarms(images: Doubles, alpha: float) -> None:
    parts = [split(images, new) for new in range(len(images))]
    p = np.concatenate([p_values_in_bags(structure_bags(*part)) for part in parts])
    assert alarms(p, alpha=alpha).sum() <= alpha * len(images) + 1e-6
    alone = np.concatenate(
        [combined_p_values(np.empty((len(normal), 0)), np.empty((1, 0)), structure_bags(normal, own)) for normal, own in parts]
    )
    assert alone.tolist() == p.tolist()


@given(images=images_of(9, columns=6), alpha=st.sampled_from(ALPHAS))
def test_four_scores_together_keep_alpha(images: Doubles, alpha: float) -> None:
    p = []
    for new in range(len(images)):
        normal, own = split(images, new)
        bags = list(structure_bags(normal[:, 3:], own[:, 3:]))
        p.append(combined_p_values(normal[:, :3], own[:, :3], bags)[0])
        least = min(p_values_in_bags(bags)[0], *(p_values(normal[:, t], own[:, t])[0] for t in range(3)))
        assert least - 1e-12 <= p[-1] <= 4 * least + 1e-12
        # Without a map the p-value is at least what it would be with any map, so that the promise holds for it, too.
        (unknown,) = combined_p_values(normal[:, :3], own[:, :3], structure_bags(normal[:, 3:], np.full((1, 3), np.nan)))
        assert unknown >= p[-1]
    assert alarms(np.array(p), alpha=alpha).sum() <= alpha * len(images) + 1e-6


def test_an_image_without_a_map_has_no_p_value_of_its_structure() -> None:
    normal = np.random.default_rng(2).normal(size=(9, 3))
    bags = list(structure_bags(normal, np.array([[np.nan] * 3, [50.0] * 3])))
    p = p_values_in_bags(bags)
    assert (np.isnan(p[0]), p[1]) == (True, 0.1)
    assert combined_p_values(np.empty((9, 0)), np.empty((2, 0)), bags).tolist() == [1.0, 0.1]


@pytest.mark.parametrize("alpha", [2 / 41, 0.1, 0.3])
def test_thresholds_of_other_scores_hold_whatever_the_structure_is(alpha: float) -> None:
    rng = np.random.default_rng(3)
    calibration, normal = rng.normal(size=(40, 2)), rng.normal(size=(40, 3))
    limits = alarm_thresholds(calibration, alpha, bags=True)
    assert (np.array(limits) >= np.array(alarm_thresholds(calibration, alpha))).all()
    for test, limit in enumerate(limits):
        if math.isinf(limit):
            assert alpha < 3 / 41, "three tests share alpha"
            continue
        scores = np.full((60, 2), -np.inf)
        scores[:, test] = np.nextafter(limit, np.inf)
        p = combined_p_values(calibration, scores, structure_bags(normal, rng.normal(size=(60, 3)) * 3))
        assert (p <= alpha + 1e-12).all()


def test_simulated_false_alarms_stay_below_alpha() -> None:
    """Heavy tails and few images, where scoring the calibration images by themselves breaks the promise."""
    rng, n, new, alpha, repetitions = np.random.default_rng(5), 19, 4, 0.1, 1500
    alone, together, few_alone, naive = 0, 0, 0, 0
    for _ in range(repetitions):
        common = rng.standard_t(2, (n + new, 1))
        images = np.exp(0.5 * (common + rng.standard_t(3, (n + new, 6))).clip(-20, 20))
        normal, tested = images[:n], images[n:]
        bags = list(structure_bags(normal[:, 3:], tested[:, 3:]))
        alone += int((p_values_in_bags(bags) <= alpha).sum())
        together += int((combined_p_values(normal[:, :3], tested[:, :3], bags) <= alpha).sum())
        few = normal[:9, 3:]
        few_alone += int((p_values_in_bags(structure_bags(few, tested[:, 3:])) <= alpha).sum())
        naive += int((p_values(structure_scores(few, few), structure_scores(few, tested[:, 3:])) <= alpha).sum())
    total, margin = repetitions * new, 3 * math.sqrt(alpha * (1 - alpha) / repetitions)
    assert alpha / 2 <= alone / total <= alpha + margin
    assert alpha / 4 <= together / total <= alpha + margin, "best ranks of few images tie, and ties speak for normal"
    assert alpha / 2 <= few_alone / total <= alpha + margin
    assert naive / total > alpha + 2 * margin
