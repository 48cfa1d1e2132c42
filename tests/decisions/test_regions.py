"""Regions: what is connected, and where it is in the input and in the original image."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from spade_faiss.core.extraction import Preprocess
from spade_faiss.decisions.regions import Region, find_regions
from spade_faiss.decisions.run_lengths import decode
from spade_faiss.features.pictures import to_mask
from spade_faiss.features.placement import Placement, place

Floats = npt.NDArray[np.float32]

SAME = Placement(original=(12, 8), resized=(12, 8), offset=(0, 0), size=(12, 12))


def regions_of(scores: Floats, threshold: float, placement: Placement = SAME) -> list[Region]:
    return find_regions(scores, threshold, lambda values: 1 / values, placement)


def test_by_hand() -> None:
    scores = np.zeros((8, 12), np.float32)
    scores[1:3, 2:5] = 2
    scores[2, 4] = 3
    scores[3, 5] = 2.5  # touches the corner of the first
    scores[6:8, 10] = 4
    scores[0, 8] = 1  # the threshold itself is not above
    strongest, other = regions_of(scores, 1)
    assert (strongest.score, strongest.p_value) == (4, 0.25)
    assert strongest.input.box == (10, 6, 1, 2)
    assert (other.score, other.input.box, other.input.area, other.input.peak) == (3, (2, 1, 4, 3), 7, (2, 4))
    assert strongest.input == strongest.original
    for region in (strongest, other):
        expected = scores > 1
        expected &= (np.arange(12) > 6) == (region is strongest)
        np.testing.assert_array_equal(decode(region.input.counts, (8, 12)), expected)


def test_none() -> None:
    assert regions_of(np.ones((8, 12), np.float32), 1) == []
    assert regions_of(np.full((8, 12), np.nan, np.float32), 1) == []


@pytest.mark.parametrize("resize_mode", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("size", [(64, 48), (300, 200), (30, 90), (17, 23), (224, 224)])
@pytest.mark.parametrize("input_size", [(32, 32), (32, 56), (40, 24)])
def test_back_in_the_original(resize_mode: str, size: tuple[int, int], input_size: tuple[int, int]) -> None:
    preprocess = Preprocess(resize_mode=resize_mode, resize=40, size=input_size)
    placement = place(*size, preprocess)
    scores = np.zeros(input_size, np.float32)
    y, x = input_size[0] // 2, input_size[1] // 2
    scores[y - 2 : y + 4, x - 4 : x + 2] = 1 + np.arange(36).reshape(6, 6)
    (region,) = find_regions(scores, 0.5, lambda values: values, placement)
    assert region.original.size == (size[1], size[0])
    mask = decode(region.original.counts, region.original.size)
    assert mask.sum() == region.original.area > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert region.original.box == (columns[0], rows[0], columns.size, rows.size)
    assert mask[region.original.peak]
    # By definition: the original's pixels whose centers fall into the region.
    expected = np.zeros_like(mask)
    for y, x in np.ndindex(*mask.shape):
        at_y = int(np.floor((y + 0.5) * placement.resized[1] / size[1])) + placement.offset[1]
        at_x = int(np.floor((x + 0.5) * placement.resized[0] / size[0])) + placement.offset[0]
        expected[y, x] = 0 <= at_y < input_size[0] and 0 <= at_x < input_size[1] and scores[at_y, at_x] > 0.5
    np.testing.assert_array_equal(mask, expected)


def test_framed_as_an_image_it_is_the_region_again(tmp_path: Path) -> None:
    preprocess = Preprocess(resize=36, size=32)
    scores = np.zeros((32, 32), np.float32)
    scores[5:11, 20:29] = 2
    (region,) = find_regions(scores, 1, lambda values: values, place(180, 144, preprocess))
    path = tmp_path / "mask.png"
    Image.fromarray(decode(region.original.counts, region.original.size).astype(np.uint8) * 255).save(path)
    np.testing.assert_array_equal(to_mask(path, place(180, 144, preprocess)), scores > 1)


def test_a_region_smaller_than_a_pixel_of_the_original() -> None:
    scores = np.zeros((32, 32), np.float32)
    scores[9, 9] = 1
    placement = place(8, 8, Preprocess(resize_mode="stretch", size=32))
    (region,) = find_regions(scores, 0.5, lambda values: values, placement)
    assert (region.original.area, region.original.box, region.original.peak) == (1, (2, 2, 1, 1), (2, 2))


@given(
    scores=arrays(np.float32, (8, 12), elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])),
    threshold=st.sampled_from([0.5, 1.5, 2.0]),
)
def test_regions_are_what_is_above_and_nothing_twice(scores: Floats, threshold: float) -> None:
    found = regions_of(scores, threshold)
    masks = [decode(region.input.counts, (8, 12)) for region in found]
    np.testing.assert_array_equal(np.sum([np.zeros((8, 12), int), *masks], axis=0), scores > threshold)
    assert [region.score for region in found] == sorted((scores[mask].max() for mask in masks), reverse=True)
    for region, mask in zip(found, masks, strict=True):
        assert mask[region.input.peak]
        assert scores[region.input.peak] == region.score


def test_a_region_of_a_large_image_takes_little_memory() -> None:
    """Fault: of 81 megapixels, finding the regions took 3 GiB, whatever --memory said."""
    placement = place(9000, 9000, Preprocess(resize=72, size=64))
    tracemalloc.start()
    (region,) = find_regions(np.ones((64, 64), np.float32), 0.5, lambda scores: scores, placement)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert region.original.area == 8000 * 8000
    assert most < 0.2 * region.original.area
