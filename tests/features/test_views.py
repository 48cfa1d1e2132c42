"""Views of a picture: what they show, and that nothing of them is left to chance."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.augmentation import Augmentation
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.pictures import load_bytes, load_views
from spade_faiss.features.views import View, view_id
from tests.support.image_files import noise, save

STRETCHED = Preprocess(resize_mode="stretch", size=24)


def views_of(path: Path, preprocess: Preprocess, augment: str) -> dict[str, View]:
    loaded, views = load_views(ImageRecord(path.name, path), preprocess, Augmentation.parse(augment))
    assert len(views) == Augmentation.parse(augment).views - 1
    return {"": View("", loaded.picture, loaded.placement.valid), **{view.name: view for view in views}}


def test_quarter_turns_of_a_square_are_exact(tmp_path: Path) -> None:
    found = views_of(save(noise(30, 30), tmp_path / "a.png"), STRETCHED, "rotate=4")
    assert list(found) == ["", "rotate=90", "rotate=180", "rotate=270"]
    for quarter, view in enumerate(found.values()):
        np.testing.assert_array_equal(view.picture, np.rot90(found[""].picture, quarter))
        assert view.valid.all()


def test_mirror_images_are_of_all_turns_and_brightness_is_of_the_picture(tmp_path: Path) -> None:
    found = views_of(save(noise(30, 30), tmp_path / "a.png"), STRETCHED, "rotate=3,flip,brightness=0.5:1.25")
    names = ["", "rotate=120", "rotate=240", "flip", "rotate=120,flip", "rotate=240,flip", "brightness=0.5", "brightness=1.25"]
    assert list(found) == names
    for name in names[:3]:
        mirrored = f"{name},flip".removeprefix(",")
        np.testing.assert_array_equal(found[mirrored].picture, found[name].picture[:, ::-1])
    values = found[""].picture.astype(np.float64)
    np.testing.assert_array_equal(found["brightness=0.5"].picture, np.rint(values / 2))
    np.testing.assert_array_equal(found["brightness=1.25"].picture, np.minimum(255, np.rint(values * 1.25)))
    again = views_of(tmp_path / "a.png", STRETCHED, "rotate=3,flip,brightness=0.5:1.25")
    assert all((again[name].picture == view.picture).all() for name, view in found.items())
    assert all(view.picture.dtype == np.uint8 and view.picture.shape == (24, 24, 3) for view in found.values())


@pytest.mark.parametrize("preprocess", [Preprocess(resize=40, size=24), Preprocess(resize=26, size=(24, 18))])
def test_a_turned_picture_shows_what_was_cut_off_and_then_repeats_the_border(tmp_path: Path, preprocess: Preprocess) -> None:
    """Each pixel is the bilinear value of the whole resized image at its place, turned around the picture's center."""
    path = save(noise(50, 40), tmp_path / "a.png")
    loaded, _ = load_views(ImageRecord("a.png", path), preprocess, None)
    placement = loaded.placement
    whole = np.asarray(noise(50, 40).resize(placement.resized, Image.Resampling.LANCZOS), np.float64)
    found = views_of(path, preprocess, "rotate=8")["rotate=45"].picture
    (height, width), turn = preprocess.input_size, math.radians(45)
    for y, x in [(0, 0), (3, 11), (height - 1, 2), (height // 2, width // 2), (height - 1, width - 1)]:
        dy, dx = y - (height - 1) / 2, x - (width - 1) / 2
        # Counterclockwise, as seen by people: y points down.
        at_y = (height - 1) / 2 + math.cos(turn) * dy + math.sin(turn) * dx - placement.offset[1]
        at_x = (width - 1) / 2 - math.sin(turn) * dy + math.cos(turn) * dx - placement.offset[0]
        at_y, at_x = min(max(at_y, 0), whole.shape[0] - 1), min(max(at_x, 0), whole.shape[1] - 1)
        y0, x0 = min(int(at_y), whole.shape[0] - 2), min(int(at_x), whole.shape[1] - 2)
        v, u = at_y - y0, at_x - x0
        expected = (1 - v) * ((1 - u) * whole[y0, x0] + u * whole[y0, x0 + 1]) + v * (
            (1 - u) * whole[y0 + 1, x0] + u * whole[y0 + 1, x0 + 1]
        )
        np.testing.assert_allclose(found[y, x], expected, atol=0.51)


def test_no_view_is_black_at_its_corners(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (60, 40), (200, 150, 100)), tmp_path / "a.png")
    for preprocess in (STRETCHED, Preprocess(resize=28, size=24), Preprocess(resize_mode="letterbox", size=24)):
        for view in views_of(path, preprocess, "rotate=8,flip").values():
            assert (view.picture == [200, 150, 100]).all()


def test_margins_turn_with_the_picture(tmp_path: Path) -> None:
    """Of an input of 24 x 24, an image twice as wide as high fills rows 6 to 17; turned upright, columns 6 to 17."""
    found = views_of(save(noise(48, 24), tmp_path / "a.png"), Preprocess(resize_mode="letterbox", size=24), "rotate=4,flip")
    rows = np.zeros((24, 24), np.bool_)
    rows[6:18] = True
    for name, view in found.items():
        np.testing.assert_array_equal(view.valid, rows.T if "90" in name or "270" in name else rows)


def test_ids_of_views_are_no_paths() -> None:
    assert view_id("good/001.png", "rotate=45,flip") == "good/001.png//rotate=45,flip"


def test_views_cost_memory(tmp_path: Path) -> None:
    record = ImageRecord("a.png", save(noise(50, 40), tmp_path / "a.png"))
    plain, few, many = (
        load_bytes(record, STRETCHED, augmentation=None if text is None else Augmentation.parse(text))
        for text in (None, "flip", "rotate=16,flip")
    )
    assert plain < few < many
    assert many - few >= 30 * 3 * 24 * 24
