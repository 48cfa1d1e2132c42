from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import Bools
from spade_faiss.scoring.metrics import CURVE_POINTS, Curve, Detection, detection_metrics, localization_metrics

Scores = npt.NDArray[Any]

fast = settings(max_examples=40, deadline=None)

few_values = st.integers(-3, 3).map(float)
any_value = st.floats(-1e3, 1e3, width=32)


@st.composite
def ranked_images(draw: st.DrawFn) -> tuple[Bools, Scores]:
    n = draw(st.integers(2, 40))
    labels = draw(hnp.arrays(np.bool_, n))
    assume(labels.any() and not labels.all())
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return labels, draw(hnp.arrays(dtype, n, elements=draw(st.sampled_from([few_values, any_value]))))


@st.composite
def ranked_maps(draw: st.DrawFn) -> tuple[Bools, Scores, Bools]:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    masks, valid = draw(hnp.arrays(np.bool_, shape)), draw(hnp.arrays(np.bool_, shape))
    assume((masks & valid).any() and (~masks & valid).any())
    maps = draw(hnp.arrays(np.float32, shape, elements=draw(st.sampled_from([few_values, any_value]))))
    return masks, maps, valid


def area(curve: Curve) -> float:
    return float(np.trapezoid(curve.y, curve.x))


def same(a: Detection, b: Detection, *, but: str = "") -> None:
    """Numbers and curves are equal up to the rounding of sums."""
    for name in {field.name for field in fields(a)} - {but}:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Curve):
            np.testing.assert_allclose(x.x, y.x, rtol=0, atol=1e-12)
            np.testing.assert_allclose(x.y, y.y, rtol=0, atol=1e-12)
        else:
            assert x == pytest.approx(y, rel=0, abs=1e-12), name


# Worked out by hand. Positives score 3, 2, 1 and negatives 2, 0.
#   threshold  tp  fp   precision  recall  F1 = 2 tp / (3 + tp + fp)
#       3       1   0       1       1/3    2/4
#       2       2   1      2/3      2/3    4/6
#       1       3   1      3/4       1     6/7   <- best
LABELS = np.array([True, False, True, False, True])
SCORES = np.array([2, 2, 3, 0, 1], np.float32)


def test_auroc_by_hand() -> None:
    # 3 beats both; 2 ties with 2 and beats 0; 1 beats 0: 2 + 1.5 + 1 of 3 * 2 pairs.
    assert detection_metrics(LABELS, SCORES).auroc == 4.5 / 6


def test_ap_by_hand() -> None:
    # Recall rises by 1/3 at each of the three thresholds: (1 + 2/3 + 3/4) / 3.
    assert detection_metrics(LABELS, SCORES).ap == pytest.approx(29 / 36, abs=1e-15)


def test_f1_max_by_hand() -> None:
    result = detection_metrics(LABELS, SCORES)
    assert (result.f1_max, result.f1_threshold) == (6 / 7, 1.0)


def test_f1_threshold_is_the_largest_of_equals() -> None:
    # Positives 4, 1 and negatives 3, 2: F1 is 2 / (2 + 1) at 4, and 4 / (2 + 4) at 1.
    result = detection_metrics(np.array([True, True, False, False]), np.array([4, 1, 3, 2], np.float32))
    assert (result.f1_max, result.f1_threshold) == (2 / 3, 4.0)


def test_curves_by_hand() -> None:
    result = detection_metrics(LABELS, SCORES)
    roc = list(dict.fromkeys(zip(result.roc.x, result.roc.y, strict=True)))
    assert roc == [(0, 0), (0, 1 / 3), (1 / 2, 2 / 3), (1 / 2, 1), (1, 1)]
    steps = list(zip(result.precision_recall.x, result.precision_recall.y, strict=True))
    assert steps == [(0, 1), (1 / 3, 1), (1 / 3, 2 / 3), (2 / 3, 2 / 3), (2 / 3, 3 / 4), (1, 3 / 4)]


# A region of one pixel (score 4) and one of two (3 and 1), at the same place of successive images; defect-free: 3, 2, 0.
#   threshold  overlap           false positives of 3
#       4      (1 + 0) / 2              0
#       3      (1 + 1/2) / 2 = 3/4      1
#       2      3/4                      2
#       1      1                        2
#       0      1                        3
MASKS = np.array([[[True, False, False]], [[True, True, False]]])
MAPS = np.array([[[4, 3, 0]], [[3, 1, 2]]], np.float32)


def test_aupro_by_hand() -> None:
    result = localization_metrics(MASKS, MAPS, fpr_limit=0.5)
    assert list(dict.fromkeys(zip(result.pro.x, result.pro.y, strict=True))) == [
        *[(0, 0), (0, 1 / 2), (1 / 3, 3 / 4)],
        *[(2 / 3, 3 / 4), (2 / 3, 1), (1, 1)],
    ]
    assert (result.regions, result.aupro_fpr_limit) == (2, 0.5)
    # A trapezoid of width 1/3 from 1/2 to 3/4, then 3/4 high to the limit, 1/6 away: (5/24 + 3/24) / 0.5.
    assert result.aupro == pytest.approx(2 / 3, abs=1e-15)
    # The limit cuts the trapezoid in its middle, where it is 5/8 high: the mean of 1/2 and 5/8.
    assert localization_metrics(MASKS, MAPS, fpr_limit=1 / 6).aupro == pytest.approx(9 / 16, abs=1e-15)
    # The whole curve: 5/24 + 1/3 * 3/4 + 1/3.
    assert localization_metrics(MASKS, MAPS, fpr_limit=1.0).aupro == pytest.approx(19 / 24, abs=1e-15)


def test_pixel_metrics_are_those_of_one_ranking_of_all_pixels() -> None:
    result = localization_metrics(MASKS, MAPS)
    # 4 beats 3, 2, 0; 3 ties with 3 and beats 2, 0; 1 beats 0: (3 + 2.5 + 1) / 9.
    assert result.auroc == 6.5 / 9
    pixels = detection_metrics(MASKS.ravel(), MAPS.ravel())
    for name in ("auroc", "ap", "f1_max", "f1_threshold"):
        assert getattr(result, name) == getattr(pixels, name)


def test_regions_touch_diagonally_but_not_across_images_and_are_cut_by_valid() -> None:
    masks = np.stack([np.eye(3, dtype=np.bool_), np.eye(3, dtype=np.bool_)])
    maps = np.zeros((2, 3, 3), np.float32)
    assert localization_metrics(masks, maps).regions == 2
    valid = np.ones_like(masks)
    valid[0, 1, 1] = False
    assert localization_metrics(masks, maps, valid).regions == 3


@fast
@given(ranked_images())
def test_equals_scikit_learn(data: tuple[Bools, Scores]) -> None:
    labels, scores = data
    result = detection_metrics(labels, scores)
    assert result.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert result.ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert result.f1_max == pytest.approx(f1.max(), abs=1e-12)
    best = thresholds[f1[:-1] >= f1.max() - 1e-12]
    assert result.f1_threshold == best.max()
    called = scores >= result.f1_threshold
    assert 2 * (called & labels).sum() / (called.sum() + labels.sum()) == result.f1_max


def regions_of(mask: Bools) -> Iterator[list[tuple[int, int]]]:
    """Flood fill, in eight directions."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while left:
        front = [left.pop()]
        region = list(front)
        while front:
            y, x = front.pop()
            near = left & {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            left -= near
            front += near
            region += near
        yield region


def slow_aupro(masks: Bools, maps: Scores, valid: Bools, limit: float) -> float:
    """The definition, threshold by threshold and region by region."""
    regions = [(n, region) for n, mask in enumerate(masks & valid) for region in regions_of(mask)]
    intact = [float(score) for score in maps[~masks & valid]]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(score) for score in maps[valid]}, reverse=True):
        overlap = [sum(maps[n, y, x] >= threshold for y, x in region) / len(region) for n, region in regions]
        points.append((sum(score >= threshold for score in intact) / len(intact), sum(overlap) / len(overlap)))
    total = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            total += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return total / limit


@fast
@given(ranked_maps(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_aupro_equals_the_definition(data: tuple[Bools, Scores, Bools], limit: float) -> None:
    masks, maps, valid = data
    result = localization_metrics(masks, maps, valid, fpr_limit=limit)
    assert result.aupro == pytest.approx(slow_aupro(masks, maps, valid, limit), abs=1e-12)
    assert result.regions == sum(1 for mask in masks & valid for _ in regions_of(mask))


@fast
@given(ranked_maps())
def test_valid_leaves_pixels_out_of_everything(data: tuple[Bools, Scores, Bools]) -> None:
    masks, maps, valid = data
    result = localization_metrics(masks, maps, valid)
    same(detection_metrics(masks[valid], maps[valid]), result)
    holes = np.where(valid, maps, np.float32(np.nan))
    same(result, localization_metrics(masks ^ ~valid, holes, valid))


@fast
@given(ranked_maps())
def test_only_the_order_of_scores_matters(data: tuple[Bools, Scores, Bools]) -> None:
    masks, maps, valid = data
    result = localization_metrics(masks, maps, valid)
    rank = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)
    transformed = localization_metrics(masks, np.exp(rank / 7) - 2, valid)
    same(result, transformed, but="f1_threshold")
    np.testing.assert_array_equal(maps >= result.f1_threshold, np.exp(rank / 7) - 2 >= transformed.f1_threshold)


@fast
@given(ranked_maps(), st.randoms(use_true_random=False))
def test_order_of_images_and_memory_does_not_matter(data: tuple[Bools, Scores, Bools], random: Any) -> None:
    result = localization_metrics(*data)
    order = list(range(len(data[0])))
    random.shuffle(order)
    masks, maps, valid = (array[order, ::-1] for array in data)
    same(result, localization_metrics(masks, maps, valid))
    same(result, localization_metrics(np.asfortranarray(masks), maps, np.asfortranarray(valid)))
    same(result, localization_metrics(*(array.transpose(0, 2, 1) for array in data)))


@fast
@given(ranked_images())
def test_reversed_scores_reverse_auroc(data: tuple[Bools, Scores]) -> None:
    labels, scores = data
    auroc = detection_metrics(labels, scores).auroc
    assert detection_metrics(labels, -scores).auroc == pytest.approx(1 - auroc, abs=1e-12)
    assert detection_metrics(~labels, scores).auroc == pytest.approx(1 - auroc, abs=1e-12)


@fast
@given(ranked_maps())
def test_perfect_scores_give_exactly_one_and_reversed_ones_zero(data: tuple[Bools, Scores, Bools]) -> None:
    masks, maps, valid = data
    maps = np.where(masks, maps + 3000, maps)
    best, worst = localization_metrics(masks, maps, valid), localization_metrics(~masks, maps, valid)
    assert (best.auroc, best.ap, best.f1_max) == (1, 1, 1)
    assert best.aupro == pytest.approx(1, abs=1e-15)
    assert best.f1_threshold == maps[masks & valid].min()
    assert (worst.auroc, worst.aupro) == (0, 0)


def test_constant_scores_are_chance() -> None:
    result = detection_metrics(LABELS, np.zeros(5, np.float32))
    assert (result.auroc, result.ap, result.f1_max, result.f1_threshold) == (0.5, 3 / 5, 6 / 8, 0.0)


def test_float16_float64_and_integer_scores_give_the_same() -> None:
    results = [detection_metrics(LABELS, SCORES.astype(dtype)) for dtype in ("f2", "f4", "f8", "u1", "i8")]
    for result in results[1:]:
        same(results[0], result)


def test_caller_keeps_its_arrays() -> None:
    masks, maps, valid = MASKS.copy(), MAPS.copy(), np.ones_like(MASKS)
    for array in (masks, maps, valid):
        array.setflags(write=False)
    localization_metrics(masks, maps, valid)
    labels, scores = LABELS.copy(), SCORES.copy()
    detection_metrics(labels, scores)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(scores, SCORES)


@pytest.mark.parametrize("ties", [False, True])
def test_long_curves_are_thinned_without_changing_their_area(ties: bool) -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 64, 64), np.bool_)
    masks[:8, 10:30, 20:50] = True
    masks[:4, 50, 50] = True
    maps = rng.gamma(2, size=masks.shape).astype(np.float32) + masks
    if ties:
        maps = np.round(maps, 3)
    result = localization_metrics(masks, maps, fpr_limit=1.0)
    curves = {"auroc": result.roc, "ap": result.precision_recall, "aupro": result.pro}
    for name, curve in curves.items():
        assert CURVE_POINTS / 4 < len(curve.x) == len(curve.y) <= CURVE_POINTS
        assert area(curve) == pytest.approx(getattr(result, name), abs=2e-5), name
        assert (np.diff(curve.x) >= 0).all()
        assert (curve.x[0], curve.x[-1]) == (0, 1)
    for curve in (result.roc, result.pro):
        assert (curve.y[0], curve.y[-1]) == (0, 1)
        assert (np.diff(curve.y) >= 0).all()


def test_thinning_keeps_corners() -> None:
    # All but one of 5000 positives lie above the negatives: up to 0.9998, right to 1/2, up to 1, right to 1.
    labels = np.arange(10000) >= 5000
    scores = np.where(labels, 1e6, 0) + np.arange(10000)
    scores[5000] = 2499.5
    roc = detection_metrics(labels, scores).roc
    assert len(roc.x) <= CURVE_POINTS
    corners = set(zip(roc.x, roc.y, strict=True))
    assert {(0, 0), (0, 4999 / 5000), (1 / 2, 4999 / 5000), (1 / 2, 1), (1, 1)} <= corners


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        (np.zeros(3, np.bool_), np.arange(3.0), "got 0 anomalous and 3 normal images"),
        (np.ones(3, np.bool_), np.arange(3.0), "got 3 anomalous and 0 normal images"),
        (np.zeros(0, np.bool_), np.zeros(0), "got 0 anomalous and 0 normal images"),
        (LABELS, SCORES[:4], r"shape \(5,\), scores of shape \(4,\): both must be \(n\)"),
        (LABELS[None], SCORES[None], r"both must be \(n\)"),
        (LABELS.astype(int), SCORES, "labels is of type int64, expected bool; .* pass labels > 0"),
        (LABELS, SCORES.astype(complex), "scores is of type complex128, expected real"),
        (LABELS, np.array([1, 2, np.nan, 3, np.inf]), "2 image scores are NaN or infinite"),
        (LABELS, np.array([1, -np.inf, 2, 3, 4]), "1 image scores are NaN or infinite"),
    ],
)
def test_images_that_cannot_be_measured(labels: Bools, scores: Scores, message: str) -> None:
    with pytest.raises(InputError, match=message):
        detection_metrics(labels, scores)


@pytest.mark.parametrize(
    ("masks", "maps", "valid", "message"),
    [
        (np.zeros_like(MASKS), MAPS, None, "got 0 anomalous and 6 normal pixels"),
        (np.ones_like(MASKS), MAPS, None, "got 6 anomalous and 0 normal pixels"),
        (MASKS, MAPS, ~MASKS, "got 0 anomalous and 3 normal pixels"),
        (MASKS, MAPS, np.zeros_like(MASKS), "got 0 anomalous and 0 normal pixels"),
        (MASKS[:0], MAPS[:0], None, "got 0 anomalous and 0 normal pixels"),
        (MASKS, MAPS[:1], None, r"masks of shape \(2, 1, 3\), maps of shape \(1, 1, 3\): both must be \(n, H, W\)"),
        (MASKS[0], MAPS[0], None, r"both must be \(n, H, W\)"),
        (MASKS, MAPS, np.ones_like(MASKS[:1]), r"valid of shape \(1, 1, 3\), maps of shape \(2, 1, 3\)"),
        (MASKS.astype(np.uint8) * 255, MAPS, None, "masks is of type uint8, expected bool"),
        (MASKS, MAPS, MAPS, "valid is of type float32, expected bool"),
        (MASKS, np.where(MAPS == 0, np.nan, MAPS), None, "1 pixel scores are NaN or infinite"),
    ],
)
def test_maps_that_cannot_be_measured(masks: Bools, maps: Scores, valid: Bools | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        localization_metrics(masks, maps, valid)


@pytest.mark.parametrize("limit", [0.0, -0.3, 1.01, float("nan")])
def test_fpr_limit_out_of_range(limit: float) -> None:
    with pytest.raises(InputError, match="fpr_limit"):
        localization_metrics(MASKS, MAPS, fpr_limit=limit)
