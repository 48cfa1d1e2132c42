"""Connected parts of masks, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from spade_faiss.core.types import Bools
from spade_faiss.decisions.components import components


def check(mask: Bools) -> int:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    found = list(components(mask))
    assert len(found) == count
    for number, ((rows, columns, inside), box) in enumerate(zip(found, ndimage.find_objects(labels), strict=True), 1):
        assert (rows, columns) == box
        np.testing.assert_array_equal(inside, labels[box] == number)
    return len(found)


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.booleans()))
def test_parts_are_those_of_scipy_in_their_order(mask: Bools) -> None:
    check(mask)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.45, 0.6, 1.0])
def test_parts_of_noise(share: float) -> None:
    for seed, shape in enumerate([(224, 224), (1, 300), (300, 1), (40, 33)]):
        check(np.random.default_rng(seed).random(shape) < share)


def test_a_spiral_is_one_part_though_its_rows_meet_late() -> None:
    mask = np.zeros((60, 60), np.bool_)
    for ring in range(0, 30, 2):
        end = 60 - ring
        mask[ring, max(0, ring - 1) : end] = mask[ring:end, end - 1] = mask[end - 1, ring:end] = mask[ring + 2 : end, ring] = (
            True
        )
    assert check(mask) == 1


def test_pixels_that_touch_diagonally_are_one_part() -> None:
    assert check(np.eye(7, dtype=np.bool_)) == check(np.eye(7, dtype=np.bool_)[::-1]) == 1
