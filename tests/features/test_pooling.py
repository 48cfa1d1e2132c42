"""Means over neighborhoods, against scipy to the last bit: banks that are there hold what scipy computed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from spade_faiss.features.pooling import pooled


@pytest.mark.parametrize("side", [3, 5, 9, 15])
@pytest.mark.parametrize("shape", [(1, 56, 56, 24), (3, 28, 17, 5), (2, 5, 3, 4), (1, 1, 1, 3), (2, 2, 7, 1)])
def test_means_are_those_of_scipy_to_the_last_bit(shape: tuple[int, ...], side: int) -> None:
    rng = np.random.default_rng(0)
    maps = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape)).astype(np.float32)
    before = maps.copy()
    found = pooled(maps, side)
    np.testing.assert_array_equal(found, ndimage.uniform_filter(maps, (1, side, side, 1), mode="constant"))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(maps, before)


def test_a_mean_by_hand() -> None:
    assert pooled(np.full((1, 2, 2, 1), 9, np.float32), 3).tolist() == [[[[4], [4]], [[4], [4]]]]
