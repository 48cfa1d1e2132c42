"""The benchmark's metrics: numbers worked out by hand, libraries that people trust, and metrics that are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score

from benchmarks.sweep import measures
from benchmarks.sweep.measures import Bootstrap, estimate, pixel_counts
from spade_faiss.scoring.metrics import localization_metrics

Recall = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64], int], float]


def check_recall(recall: Recall) -> None:
    """Two queries, K = 3. Rows 4 and 5 are as near as each other, and third: either will do."""
    truth = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    found = np.array([[0, 1, 5], [7, 8, 9]])
    dist = np.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    assert recall(found, dist, truth, 3) == 1
    # One of the first query's is too far; of the second's, one is missing and one is there twice.
    found = np.array([[0, 6, 5], [7, 7, -1]])
    dist = np.array([[1.0, 3.5, 3.0], [1.0, 1.0, np.inf]])
    assert recall(found, dist, truth, 3) == pytest.approx(3 / 6)
    # Rounding is no miss; a thousandth is.
    dist = np.array([[1.0, 2.0, 3.0 * (1 + 1e-7)], [1.0, 1.0, 1.001]])
    assert recall(np.array([[0, 1, 5], [7, 8, 9]]), dist, truth, 3) == pytest.approx(5 / 6)
    # The nearest alone.
    assert recall(np.array([[1, 0], [8, 7]]), np.array([[2.0, 1.0], [1.0, 1.0]]), truth, 1) == pytest.approx(1 / 2)


def by_id(ids: npt.NDArray[np.int64], dist: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], k: int) -> float:
    true_ids = np.array([[0, 1, 4], [7, 8, 9]])
    return float(np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(ids, true_ids, strict=True)]))


def without_rounding(
    ids: npt.NDArray[np.int64], dist: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], k: int
) -> float:
    return measures.recall(ids, dist, truth, k, rounding=0)


def counting_twice(ids: npt.NDArray[np.int64], dist: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], k: int) -> float:
    return float((dist[:, :k] <= truth[:, k - 1 : k] * (1 + measures.ROUNDING)).mean())


def test_recall_counts_by_distance() -> None:
    check_recall(measures.recall)


@pytest.mark.parametrize("broken", [by_id, without_rounding, counting_twice])
def test_a_broken_recall_turns_red(broken: Recall) -> None:
    # The invariant: a tie is worth as much as what it ties with, rounding is no miss, and nothing counts twice.
    with pytest.raises(AssertionError):
        check_recall(broken)


def test_share_as_near_and_excess_by_hand() -> None:
    exact = np.array([1.0, 2.0, 0.0, 4.0])
    ours = np.array([1.0 + 1e-7, 2.5, 0.0, 4.0], np.float32)
    assert measures.share_as_near(ours, exact) == 0.75
    np.testing.assert_allclose(measures.score_excess(ours, exact), [0, 0.25, 0, 0], atol=1e-6)
    assert measures.score_excess(np.array([1.0]), np.array([0.0]))[0] == np.inf


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 12, 40).astype(float)
    second = first + rng.normal(0, 4, 40).round()
    assert measures.rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert measures.rank_correlation(first, first**3) == pytest.approx(1)
    assert measures.rank_correlation(np.ones(4), np.ones(4)) == 1


def test_the_interval_of_image_auroc() -> None:
    rng = np.random.default_rng(1)
    defective = np.arange(80) % 5 < 3
    score = (rng.normal(0, 1, 80) + defective).round(1)
    samples = Bootstrap(defective).image_auroc(score)
    assert samples[0] == pytest.approx(roc_auc_score(defective, score))
    found = estimate(samples)
    assert found.low < found.value < found.high
    # Of 80 images, Hanley and McNeil's standard error is about a twentieth.
    assert 0.1 < found.high - found.low < 0.3
    np.testing.assert_array_equal(samples, Bootstrap(defective).image_auroc(score))
    one = Bootstrap(defective, resamples=3)
    drawn = np.repeat(np.arange(80), one.weights[2].astype(int))
    assert one.image_auroc(score)[2] == pytest.approx(roc_auc_score(defective[drawn], score[drawn]))
    assert one.weights[1:, defective].sum(axis=1).tolist() == [defective.sum()] * 3


def labeled_maps() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    rng = np.random.default_rng(2)
    masks = np.zeros((6, 30, 30), np.bool_)
    masks[1, 3:9, 4:12] = masks[2, 20:24, 20:29] = masks[2, 2:5, 2:5] = masks[4, 10:11, 0:30] = True
    maps = ndimage.gaussian_filter(rng.normal(0, 1, masks.shape) + 1.5 * masks, (0, 1, 1)) + 3
    valid = np.ones(masks.shape, np.bool_)
    valid[:, :, :2] = False
    return maps, masks, valid


def test_resampled_pixel_metrics_are_those_of_the_resample() -> None:
    maps, masks, valid = labeled_maps()
    regions = ndimage.label(masks & valid, np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]))[0]
    edges = np.unique(np.quantile(maps, np.linspace(0, 1, 2000)))
    resamples = Bootstrap(np.isin(np.arange(6), (1, 2, 4)), resamples=4)
    auroc, aupro = resamples.pixel(pixel_counts(maps, regions, valid, edges))
    for sample, weights in enumerate(resamples.weights):
        drawn = np.repeat(np.arange(len(maps)), weights.astype(int))
        expected = localization_metrics(masks[drawn], maps[drawn], valid[drawn])
        assert auroc[sample] == pytest.approx(expected.auroc, abs=1e-3)
        assert aupro[sample] == pytest.approx(expected.aupro, abs=3e-3)


@pytest.mark.parametrize("dimension", [2, 8])
def test_intrinsic_dimension_of_a_flat_sheet_is_its_own(dimension: int) -> None:
    rng = np.random.default_rng(3)
    points = rng.random((3000, dimension)) @ np.linalg.qr(rng.normal(size=(50, dimension)))[0].T
    dist = np.sort(np.linalg.norm(points[:60, None] - points[None], axis=-1), axis=1)[:, 1:41]
    assert np.median(measures.intrinsic_dimension(dist)) == pytest.approx(dimension, rel=0.25)  # edges take some


def test_exponent_of_a_power_law() -> None:
    assert measures.exponent([1, 10, 100], [3, 3 * 10**1.5, 3 * 10**3]) == pytest.approx(1.5)
