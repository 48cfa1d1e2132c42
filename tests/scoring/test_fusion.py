"""The arithmetic from distances to scores, against torch, scipy in float64, and numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.ndimage import gaussian_filter

from spade_faiss.features.resampling import upsample
from spade_faiss.scoring.fusion import score_maps, to_distance
from spade_faiss.scoring.scores import NEAREST_DTYPE, Scores, join

Floats = npt.NDArray[np.float32]


def smooth(seed: int, *shape: int) -> Floats:
    """Maps (n, h, w) or (n, h, w, C) of correlated values, far from 0."""
    values = np.random.default_rng(seed).normal(size=shape)
    return (20 + gaussian_filter(values, 0.8) * 5 + 0.1 * values).astype(np.float32)


def by_torch(maps: Floats, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    # In double: torch's own positions in float32 are off by more than what is allowed here.
    first = torch.from_numpy(np.moveaxis(maps, 3, 1)).double()
    resized = torch.nn.functional.interpolate(first, size=size, mode="bilinear", align_corners=False).numpy()
    return np.asarray(np.moveaxis(resized, 1, 3))


@pytest.mark.parametrize("target", [1, 2, 7, 29, 64, 117, 224, 448, 1001])
def test_upsample_has_the_size_and_the_values_of_torch(target: int) -> None:
    """Every side from 1 to 40, whether it grows or shrinks; the other axis takes another size of the same range."""
    for side in range(1, 41):
        other = 41 - side
        maps = smooth(side, 1, side, other, 2)
        resized = upsample(maps, (target, 50))
        assert (resized.shape, resized.dtype.name) == ((1, target, 50, 2), "float32")
        np.testing.assert_allclose(resized, by_torch(maps, (target, 50)), rtol=1e-6)
        np.testing.assert_allclose(upsample(maps, (50, target)), by_torch(maps, (50, target)), rtol=1e-6)


def test_upsample_of_vectors() -> None:
    """What `concat` does to the coarser levels; where one axis of the finest level is the shorter, it shrinks."""
    maps = smooth(1, 2, 15, 16, 7)
    for size in ((29, 31), (15, 31), (40, 9)):
        np.testing.assert_allclose(upsample(maps, size), by_torch(maps, size), rtol=1e-6)
    np.testing.assert_array_equal(upsample(maps[:1], (29, 31)), upsample(maps, (29, 31))[:1])


def test_upsample_by_hand() -> None:
    maps = np.array([[[[0], [4]]]], np.float32)
    assert upsample(maps, (2, 4))[..., 0].tolist() == [[[0, 1, 3, 4]] * 2]
    same = upsample(maps, (1, 2))
    assert same.tolist() == maps.tolist()
    assert not np.shares_memory(same, maps)


def test_score_maps_average_the_levels_with_equal_weights() -> None:
    levels = [np.full((2, 3, 4), 1, np.float32), np.full((2, 1, 1), 4, np.float32), np.full((2, 9, 5), 10, np.float32)]
    for sigma in (0.0, 4.0):
        maps = score_maps(levels, (11, 13), sigma)
        assert (maps.shape, maps.dtype.name) == ((2, 11, 13), "float32")
        np.testing.assert_allclose(maps, 5, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.5, 4.0])
def test_score_maps_smooth_each_image_alone(sigma: float) -> None:
    levels = [smooth(2, 3, 9, 8), smooth(3, 3, 5, 4)]
    before = [level.copy() for level in levels]
    maps = score_maps(levels, (41, 37), sigma)
    plain = score_maps(levels, (41, 37), 0.0)
    expected = np.stack([gaussian_filter(image.astype(np.float64), sigma, mode="reflect", truncate=4.0) for image in plain])
    np.testing.assert_allclose(maps, expected, rtol=1e-6)
    np.testing.assert_allclose(
        plain, np.mean([by_torch(level[..., None], (41, 37))[..., 0] for level in levels], axis=0), rtol=1e-6
    )
    for level, copy in zip(levels, before, strict=True):
        np.testing.assert_array_equal(level, copy)


def test_score_maps_of_one_level_without_smoothing_are_a_copy() -> None:
    level = smooth(4, 1, 6, 6)
    maps = score_maps([level], (6, 6), 0.0)
    np.testing.assert_array_equal(maps, level)
    assert not np.shares_memory(maps, level)


def test_zero_stays_zero() -> None:
    assert not score_maps([np.zeros((1, 7, 5), np.float32), np.zeros((1, 3, 2), np.float32)], (50, 41), 4.0).any()


def test_to_distance() -> None:
    sq_dist = np.array([0, 4, 9], np.float32)
    assert to_distance(sq_dist, "l2").tolist() == [0, 2, 3]
    assert to_distance(sq_dist, "squared_l2").tolist() == [0, 4, 9]


def scores_of(n: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)

    def floats(*shape: int) -> Floats:
        return rng.random((n, *shape)).astype(np.float32)

    return Scores(
        ids=[f"{seed}-{image}" for image in range(n)],
        image_score=floats(),
        maps=floats(5, 7),
        statistics=floats(3),
        neighbor_ids=np.array([["a", "bb"]] * n, dtype=f"<U{2 + seed}").reshape(n, 2),
        neighbor_dist=floats(2),
        level_dist={"x": floats(3, 4), "y": floats(2, 2)},
        nearest={"x": np.zeros((n, 3, 4), NEAREST_DTYPE), "y": np.ones((n, 2, 2), NEAREST_DTYPE)},
        distance="l2",
    )


def test_join_keeps_the_order_and_every_field() -> None:
    parts = [scores_of(2, 1), scores_of(1, 2), scores_of(3, 3)]
    whole = join(parts)
    assert list(whole.ids) == ["1-0", "1-1", "2-0", "3-0", "3-1", "3-2"]
    assert (len(whole), whole.distance) == (6, "l2")

    def fields(scores: Scores) -> dict[str, npt.NDArray[Any]]:
        levels = {f"{name}.{x}": getattr(scores, name)[x] for name in ("level_dist", "nearest") for x in scores.level_dist}
        names = ("image_score", "maps", "statistics", "neighbor_ids", "neighbor_dist", "map_score", "top_score", "peak")
        return {**levels, **{name: getattr(scores, name) for name in names}}

    for name, values in fields(whole).items():
        np.testing.assert_array_equal(values, np.concatenate([fields(part)[name] for part in parts]), err_msg=name)


def test_peak_and_map_score() -> None:
    scores = scores_of(3)
    for image, (y, x) in enumerate([(0, 0), (4, 6), (2, 5)]):
        scores.maps[image, y, x] = 2 + image
    assert scores.peak.tolist() == [[0, 0], [4, 6], [2, 5]]
    assert scores.map_score.tolist() == [2, 3, 4]


def test_no_images() -> None:
    empty = scores_of(0)
    assert len(empty) == 0
    assert (empty.map_score.shape, empty.map_score.dtype.name) == ((0,), "float32")
    assert empty.peak.shape == (0, 2)
    assert len(join([empty, scores_of(2)])) == 2
