"""The statistics of maps that image scores are made of, by hand and beside their definitions written out slowly."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss import Detector
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Method
from spade_faiss.core.types import Bools
from spade_faiss.scoring import image_scores
from spade_faiss.scoring.image_scores import STATISTICS, map_statistics
from tests.support.oracle import bank_of, batch_of, product

Floats = npt.NDArray[np.float32]
SHAPES = {"fine": (9, 11, 4), "coarse": (5, 6, 6)}


def as_map(*rows: list[float]) -> Floats:
    return np.array([rows], np.float32)


def slowly(scores: Floats, valid: Bools, share: float) -> list[float]:
    """The definitions, pixel by pixel, without NumPy's arithmetic."""
    places = [(y, x) for y in range(scores.shape[0]) for x in range(scores.shape[1]) if valid[y, x]]
    values = {place: float(scores[place]) for place in places}
    count = max(1, math.floor(round(share * len(values), 6)))
    steps = [abs(values[y, x] - values[other]) for y, x in places for other in ((y + 1, x), (y, x + 1)) if other in values]
    return [
        statistics.fmean(sorted(values.values(), reverse=True)[:count]),
        statistics.pstdev(values.values()),
        statistics.fmean(steps) if steps else 0.0,
    ]


class TestByHand:
    def test_every_statistic(self) -> None:
        # Half of six pixels: 9, 5, 4. Mean 4: squares of 9, 1, 0, 25, 4, 1. Steps: 3, 1 and 4, 3 in rows, 0, 8, 1 in columns.
        found = map_statistics(as_map([1, 4, 3], [1, 12, 3]), None, 0.5)
        assert STATISTICS == ("top", "std", "total_variation")
        assert found[0, 0] == pytest.approx((12 + 4 + 3) / 3)
        assert found[0, 1] == pytest.approx(math.sqrt((9 + 0 + 1 + 9 + 64 + 1) / 6))
        assert found[0, 2] == pytest.approx((3 + 1 + 11 + 9 + 0 + 8 + 0) / 7)
        assert found.dtype == np.float32

    def test_at_least_one_pixel_and_never_more_than_asked_for(self) -> None:
        scores = np.arange(200, dtype=np.float32).reshape(1, 10, 20)
        tops = {share: float(map_statistics(scores, None, share)[0, 0]) for share in (1e-9, 0.005, 0.0149, 0.015, 1.0)}
        assert tops == {1e-9: 199, 0.005: 199, 0.0149: 198.5, 0.015: 198, 1.0: 99.5}
        # 0.29 * 100 is 28.999999999999996 in floating point.
        assert map_statistics(scores[:, :5], None, 0.29)[0, 0] == pytest.approx(np.arange(71, 100).mean())

    def test_ties_count_as_often_as_they_are_taken(self) -> None:
        assert map_statistics(as_map([7, 7, 7, 1]), None, 0.5)[0, 0] == 7
        assert map_statistics(as_map([9, 2, 2, 2]), None, 0.5)[0, 0] == 5.5
        assert map_statistics(as_map([3, 3, 3, 3]), None, 0.01).tolist() == [[3, 0, 0]]

    def test_one_pixel(self) -> None:
        assert map_statistics(as_map([2.5]), None, 0.01).tolist() == [[2.5, 0, 0]]

    def test_margins_do_not_count(self) -> None:
        """A margin holds 0, and the step to it would be the largest of the map."""
        scores = as_map([0, 5, 7, 0], [0, 6, 6, 0])
        valid = scores > 0
        inner = map_statistics(scores[:, :, 1:3], None, 0.25)
        assert map_statistics(scores, valid, 0.25).tolist() == inner.tolist()
        assert inner[0].tolist() == pytest.approx([7, math.sqrt(0.5), (2 + 0 + 1 + 1) / 4])
        scores[~valid] = 99
        assert map_statistics(scores, valid, 0.25).tolist() == inner.tolist()

    def test_nothing_to_inspect(self) -> None:
        scores = np.stack([np.full((2, 3), np.nan, np.float32), np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)])
        valid = np.ones((3, 2, 3), np.bool_)
        valid[2] = False
        found = map_statistics(scores, valid, 0.01)
        assert np.isnan(found).all(axis=1).tolist() == [True, False, True]
        assert map_statistics(scores[:0], None, 0.01).shape == (0, 3)


@given(data=st.data())
def test_beside_the_definitions_written_out(data: st.DataObject) -> None:
    height, width, n = (data.draw(st.integers(1, most)) for most in (6, 6, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = rng.integers(0, 5, (n, height, width)).astype(np.float32) * np.float32(data.draw(st.sampled_from([1, 0.1, 1e6])))
    valid = rng.random((n, height, width)) < data.draw(st.sampled_from([1.0, 0.7]))
    valid[:, 0, 0] = True
    share = data.draw(st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0]))
    before = scores.copy()
    found = map_statistics(scores, valid, share)
    expected = [slowly(one, inspected, share) for one, inspected in zip(scores, valid, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(scores, before)
    # Of each image by itself, to the bit, wherever its pixels lie.
    for i in range(n):
        assert map_statistics(scores[i : i + 1], valid[i : i + 1], share)[0].tolist() == found[i].tolist()
    assert map_statistics(scores[:, ::-1, ::-1], valid[:, ::-1, ::-1], share)[:, 0].tolist() == found[:, 0].tolist()


@pytest.mark.parametrize("block", [1, 5, 7, 64])
def test_a_large_map_is_reduced_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    maps, valid = rng.random((2, 13, 9), dtype=np.float32), rng.random((2, 13, 9)) > 0.3
    whole = map_statistics(maps, None, 0.1), map_statistics(maps, valid, 0.1)
    assert whole[0][0, 1] == np.float32(maps[0].std(dtype=np.float64))
    monkeypatch.setattr(image_scores, "_BLOCK", block)
    np.testing.assert_allclose(map_statistics(maps, None, 0.1), whole[0], rtol=1e-6)
    np.testing.assert_allclose(map_statistics(maps, valid, 0.1), whole[1], rtol=1e-6)


def test_of_a_detector(tmp_path: Any) -> None:
    """The top mean of each map, the maximum where it is of one pixel; independent of the batch."""
    bank_of(tmp_path / "bank", product(1, 12, SHAPES, 8), input_size=(40, 43))
    queries = batch_of(product(2, 5, SHAPES, 8), [f"query {i}" for i in range(5)])
    found = Detector.open(tmp_path / "bank").score_features(queries)
    highest = np.sort(found.maps.reshape(5, -1), axis=1)[:, -17:]  # 1 % of 1720 pixels
    np.testing.assert_allclose(found.top_score, highest.mean(axis=1, dtype=np.float64), rtol=1e-6)
    assert (found.top_score < found.map_score).all()
    single = Detector.open(tmp_path / "bank", method=Method(top_share=1e-6)).score_features(queries)
    assert single.top_score.tolist() == single.map_score.tolist() == found.map_score.tolist()
    for i in range(5):
        alone = Detector.open(tmp_path / "bank").score_features(queries[i : i + 1])
        assert alone.statistics.tolist() == found.statistics[i : i + 1].tolist()
    without = Detector.open(tmp_path / "bank", method=Method(localize="none")).score_features(queries)
    assert np.isnan(without.statistics).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "mean"}, "score='mean' is not one of knn, max, top, structure"),
        ({"image_scores": ()}, "must name some of knn, max, top"),
        ({"image_scores": ("knn", "knn")}, "each once"),
        ({"image_scores": ("knn", "mean")}, "must name some of"),
        ({"image_scores": "knn"}, "must name some of"),
        ({"top_share": 0}, "top_share=0 must be a number above 0 and at most 1"),
        ({"top_share": 1.01}, "at most 1"),
        ({"top_share": float("nan")}, "at most 1"),
        ({"localize": "none", "score": "top"}, "score=top is made of maps"),
        ({"localize": "none", "score": "structure"}, "score=structure is made of maps"),
        ({"localize": "none", "image_scores": ("max", "top")}, "image_scores=max,top is made of maps"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Method(**settings)
