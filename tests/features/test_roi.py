"""Regions of interest: how they are written down, at other sizes, on the grids of levels, and from mask files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.core.roi import Roi
from spade_faiss.core.schema import from_mapping
from spade_faiss.core.types import Bools
from spade_faiss.features.batch import Level
from spade_faiss.features.layout import Layout
from spade_faiss.features.roi import cells_of, mask_of, nearest_cells, on_grid, resized
from spade_faiss.features.roi_files import place_roi, read_roi
from tests.support.image_files import save


@st.composite
def masks(draw: st.DrawFn, most: int = 12) -> Bools:
    """Masks with something inside, some of them with whole rows or columns of it."""
    shape = draw(st.integers(1, most)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(shape) < draw(st.sampled_from([0.05, 0.5, 0.95, 1.0]))
    mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return mask


@given(masks())
def test_a_mask_is_the_same_after_it_was_written_down(mask: Bools) -> None:
    roi = Roi.of(mask)
    np.testing.assert_array_equal(mask_of(roi), mask)
    assert cells_of(roi).tolist() == [y * mask.shape[1] + x for y, x in np.argwhere(mask).tolist()]
    assert roi.share == pytest.approx(mask.mean())
    assert from_mapping(Roi, asdict(roi), "x") == roi


def test_the_runs_of_a_mask_written_out_by_hand() -> None:
    assert Roi.of(np.array([[False, True, True], [True, False, False]])).runs == "1 3 2"
    assert Roi.of(np.array([[True, False]])).runs == "0 1 1"
    assert Roi.of(np.ones((2, 3), np.bool_)).runs == "0 6"


@pytest.mark.parametrize(
    ("runs", "wrong"),
    [
        ("6", "nothing inside"),
        ("3 2", "not those of 2 x 3 cells"),
        ("3 0 3", "not those of 2 x 3 cells"),
        ("", "whole numbers"),
        ("-1 7", "whole numbers"),
        ("1  5", "whole numbers"),
        ("1 ٥", "whole numbers"),
        ("9" * 5000, "whole numbers"),
        ("1 " * (1 << 20), "smooth its outline"),
    ],
)
def test_runs_that_are_those_of_no_region(runs: str, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        Roi(height=2, width=3, runs=runs)


def test_a_region_takes_a_mask_with_something_inside() -> None:
    with pytest.raises(InputError, match="nothing inside"):
        Roi.of(np.zeros((2, 3), np.bool_))
    with pytest.raises(InputError, match=r"uint8 of shape \(2, 3\)"):
        Roi.of(np.ones((2, 3), np.uint8))
    with pytest.raises(InputError, match="too large"):
        Roi(height=1 << 20, width=1 << 20, runs=f"0 {1 << 40}")


@given(masks(), st.integers(1, 12), st.integers(1, 12))
def test_a_location_is_inspected_where_its_cell_holds_anything_that_is(mask: Bools, height: int, width: int) -> None:
    height, width = min(height, mask.shape[0]), min(width, mask.shape[1])
    expected = np.zeros((height, width), np.bool_)
    for y, x in np.argwhere(mask):
        # The pixel covers y to y + 1; the cell, height * y / H to height * (y + 1) / H of the map.
        for v, u in np.ndindex(height, width):
            meets_y = v * mask.shape[0] < (y + 1) * height and (v + 1) * mask.shape[0] > y * height
            meets_x = u * mask.shape[1] < (x + 1) * width and (u + 1) * mask.shape[1] > x * width
            expected[v, u] |= meets_y and meets_x
    np.testing.assert_array_equal(mask_of(on_grid(Roi.of(mask), height, width)), expected)


@given(masks())
def test_the_nearest_inspected_cell(mask: Bools) -> None:
    inside = np.argwhere(mask)
    for cell, found in enumerate(nearest_cells(Roi.of(mask)).tolist()):
        distance = ((inside - np.divmod(cell, mask.shape[1])) ** 2).sum(axis=1)
        assert distance[found] == distance.min()


def test_a_region_at_another_size() -> None:
    mask = np.array([[True, False, False], [False, False, True]])
    np.testing.assert_array_equal(resized(Roi.of(mask), 4, 6), mask.repeat(2, axis=0).repeat(2, axis=1))
    # Of three columns, the centers of two fall into the first and the last one.
    np.testing.assert_array_equal(resized(Roi.of(mask), 2, 2), mask[:, [0, 2]])


def test_a_layout_puts_the_region_on_the_grids_of_its_levels() -> None:
    mask = np.zeros((40, 43), np.bool_)
    mask[3:5, 30:32] = True
    level = Level("fine", 4, stride=4, height=10, width=11)
    layout = Layout(levels=(level,), embedding_dim=3, input_size=(40, 43), roi=Roi.of(mask))
    assert layout.levels[0].stored_shape == (layout.levels[0].locations, 4)
    # Rows 0 and 1 of ten, for the pixels 3 and 4; columns 7 and 8 of eleven, which meet at 31.3 of 43 pixels.
    assert layout.levels[0].cells.tolist() == [7, 8, 11 + 7, 11 + 8]
    assert layout.image_bytes == 4 * 3 + layout.levels[0].locations * 4 * 2
    assert layout.whole_levels == (level,)
    # A backbone that was opened from another bank does not carry its region on.
    assert Layout(levels=layout.levels, embedding_dim=3, input_size=(40, 43)).levels == (level,)
    assert from_mapping(Layout, asdict(layout), "x") == layout
    with pytest.raises(InputError, match=r"region of interest is 40 x 43, the input \(43, 40\)"):
        Layout(levels=(level,), embedding_dim=3, input_size=(43, 40), roi=Roi.of(mask))
    with pytest.raises(InputError, match="too coarse for a level of 10 x 11"):
        Layout(levels=(level,), embedding_dim=3, input_size=(9, 43), roi=Roi.of(mask[:9]))
    with pytest.raises(InputError, match="10 x 11 locations, its region of interest 40 x 43"):
        Level("fine", 4, stride=4, height=10, width=11, roi=Roi.of(mask))


def drawn(width: int = 40, height: int = 30) -> Bools:
    mask = np.zeros((height, width), np.bool_)
    mask[5:20, 8:30] = True
    return mask


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_masks_are_read_in_any_depth(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(drawn().astype(np.uint8) * np.uint8(255))
    image = Image.fromarray(drawn().astype(np.uint16) * np.uint16(65535)) if mode == "I;16" else gray.convert(mode)
    np.testing.assert_array_equal(mask_of(read_roi(save(image, tmp_path / "mask.png"))), drawn())


def test_noise_and_soft_edges_are_cut_in_the_middle(tmp_path: Path) -> None:
    values = np.where(drawn(), 250, 4).astype(np.uint8)
    values[6, 9], values[1, 1] = 128, 127
    np.testing.assert_array_equal(mask_of(read_roi(save(Image.fromarray(values), tmp_path / "mask.png"))), drawn())


def test_masks_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    black, colored = np.zeros((30, 40), np.uint8), np.zeros((30, 40, 3), np.uint8)
    colored[drawn()] = 255, 0, 0
    labels = black + drawn()
    for image, wrong in (
        (Image.fromarray(black), "nowhere white, its brightest pixel has 0 of 255"),
        (Image.fromarray(labels), "nowhere white, its brightest pixel has 1 of 255"),
        (Image.fromarray(colored), "it is colored; save it as grayscale"),
        (Image.fromarray(black).convert("LA"), "it is transparent; save it without alpha"),
    ):
        path = save(image, tmp_path / "mask.png")
        with pytest.raises(InputError, match=wrong) as error:
            read_roi(path)
        assert str(path) in str(error.value)
    with pytest.raises(InputError, match="is a folder; give a file"):
        read_roi(tmp_path)
    with pytest.raises(NotFoundError, match="no mask of a region of interest at"):
        read_roi(tmp_path / "gone.png")
    with pytest.raises(InputError, match="smooth its outline"):
        Roi.of(np.indices((1000, 1000)).sum(axis=0) % 2 == 0)


def test_a_region_is_placed_as_its_pictures_are() -> None:
    roi = Roi.of(drawn())  # of 40 x 30 pixels
    stretched = place_roi(Preprocess(resize_mode="stretch", size=(60, 80), roi=roi))
    assert stretched is not None
    np.testing.assert_array_equal(mask_of(stretched), drawn().repeat(2, axis=0).repeat(2, axis=1))
    letterbox = place_roi(Preprocess(resize_mode="letterbox", size=80, roi=roi))
    assert letterbox is not None
    np.testing.assert_array_equal(mask_of(letterbox), np.pad(mask_of(stretched), ((10, 10), (0, 0))))
    crop = place_roi(Preprocess(resize_mode="crop", resize=60, size=40, roi=roi))
    assert crop is not None
    np.testing.assert_array_equal(mask_of(crop), mask_of(stretched)[10:50, 20:60])
    assert place_roi(Preprocess()) is None


def test_a_region_that_the_input_does_not_show_is_refused() -> None:
    mask = np.zeros((30, 90), np.bool_)
    mask[:, :5] = True
    with pytest.raises(InputError, match=r"resize mode crop shows nothing of the region of interest .*letterbox"):
        place_roi(Preprocess(size=64, roi=Roi.of(mask)))
