"""Maps of a picture in several inputs on one grid: each point of the picture has the score of the pixel that shows it."""

from __future__ import annotations

import numpy as np
import pytest

from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.placement import place
from spade_faiss.tuning.picture_grid import SIDE, on_picture, visible_in

SIZES = [(300, 200), (200, 300), (224, 224), (37, 1000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["crop", "stretch", "letterbox"])
@pytest.mark.parametrize("side", [48, (32, 64)])
def test_every_point_has_the_score_of_the_pixel_that_shows_it(
    size: tuple[int, int], mode: str, side: int | tuple[int, int]
) -> None:
    """As a loop over the points says, in exact positions: a map whose scores are its own coordinates."""
    preprocess = Preprocess(resize_mode=mode, size=side)
    height, width = preprocess.input_size
    where = place(*size, preprocess)
    scores = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    found = on_picture(scores, [size], preprocess)
    assert found.shape == (1, SIDE, SIDE)
    for y, x in ((0, 0), (0, SIDE - 1), (SIDE // 2, SIDE // 2), (SIDE - 1, 3), (90, 150), (40, 220)):
        at_y = int((y + 0.5) * where.resized[1] / SIDE) + where.offset[1]
        at_x = int((x + 0.5) * where.resized[0] / SIDE) + where.offset[0]
        shown = 0 <= at_y < height and 0 <= at_x < width
        assert found[0, y, x] == (at_y * width + at_x if shown else -np.inf)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_crop_hides_has_no_score_and_a_letterbox_hides_nothing(size: tuple[int, int]) -> None:
    for mode in ("crop", "letterbox", "stretch"):
        preprocess = Preprocess(resize_mode=mode)
        found = on_picture(np.ones((1, 224, 224), np.float32), [size], preprocess)[0]
        share = place(*size, preprocess).visible_share
        assert np.isfinite(found).mean() == pytest.approx(share, abs=0.01)
        assert np.isfinite(found).all() == (mode != "crop")


def test_visible_in_is_what_lies_inside_of_the_input() -> None:
    placement = place(300, 200, Preprocess())
    shown = visible_in((200, 300), placement, placement.valid)
    assert shown.shape == (200, 300)
    assert shown.mean() == pytest.approx(placement.visible_share, abs=0.01)
    assert not visible_in((200, 300), placement, np.zeros((224, 224), np.bool_)).any()
