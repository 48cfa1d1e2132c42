"""Placing images in the input: placements worked out by hand, and properties that hold for every size."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import RESIZE_MODES, Preprocess
from spade_faiss.features.decoding import MAX_PIXELS
from spade_faiss.features.pictures import to_picture
from spade_faiss.features.placement import Placement, Visible, place


def test_placements_worked_out_by_hand() -> None:
    assert place(301, 200, Preprocess()) == Placement(
        (301, 200), (385, 256), (-80, -16), (224, 224)
    )  # 385.28; (385 - 224) / 2 = 80.5, to even
    letterbox = Preprocess(resize_mode="letterbox", size=9)
    assert place(20, 10, letterbox) == Placement((20, 10), (9, 4), (0, 2), (9, 9))
    assert place(20, 10, letterbox).padding == ((2, 3), (0, 0))
    assert place(10, 20, letterbox).visible == (0, 0, 4, 9)
    assert place(1, 10_000, letterbox).resized == (1, 9)
    assert place(301, 200, Preprocess(resize_mode="stretch")) == Placement((301, 200), (224, 224), (0, 0), (224, 224))
    assert place(385, 256, Preprocess()).visible == (80, 16, 304, 240)


def test_placements_in_an_input_that_is_no_square() -> None:
    crop = Preprocess(size=(320, 640), resize=400)
    assert place(1600, 250, Preprocess(size=(320, 640), resize=500)).resized == (3200, 500)
    assert place(1600, 800, crop) == Placement((1600, 800), (800, 400), (-80, -40), (640, 320))
    assert place(400, 400, crop) == Placement((400, 400), (800, 800), (-80, -240), (640, 320))
    assert place(1600, 800, Preprocess(size=(320, 640), resize=320)).visible_share == 1
    stretch = Preprocess(resize_mode="stretch", size=(320, 640))
    assert place(301, 200, stretch) == Placement((301, 200), (640, 320), (0, 0), (640, 320))
    letterbox = Preprocess(resize_mode="letterbox", size=(320, 640))
    assert place(1600, 800, letterbox) == Placement((1600, 800), (640, 320), (0, 0), (640, 320))  # no margins
    assert place(400, 400, letterbox) == Placement((400, 400), (320, 320), (160, 0), (640, 320))
    assert place(1600, 400, letterbox).padding == ((80, 80), (0, 0))
    assert place(1600, 400, letterbox).valid.shape == (320, 640)


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    more=st.integers(0, 99),
    resize_mode=st.sampled_from(RESIZE_MODES),
)
def test_a_placement_always_fills_the_input(
    width: int, height: int, size: tuple[int, int], more: int, resize_mode: str
) -> None:
    resize = min(size) + more
    preprocess = Preprocess(resize_mode=resize_mode, size=size, resize=resize)
    scale = max(Fraction(resize * size[1], width * min(size)), Fraction(resize * size[0], height * min(size)))
    if resize_mode == "crop" and int(width * scale) * int(height * scale) > MAX_PIXELS:
        with pytest.raises(InputError, match="too thin"):
            place(width, height, preprocess)
        return
    placement = place(width, height, preprocess)
    left, top, right, bottom = placement.visible
    (above, below), (before, after) = placement.padding
    assert 0 <= left < right <= placement.resized[0]
    assert 0 <= top < bottom <= placement.resized[1]
    assert min(above, below, before, after) >= 0
    assert (above + (bottom - top) + below, before + (right - left) + after) == size
    assert max(abs(above - below), abs(before - after)) <= 1
    assert abs(left - (placement.resized[0] - right)) <= 1
    assert abs(top - (placement.resized[1] - bottom)) <= 1
    valid = place(width, height, preprocess).valid
    assert valid.shape == size
    assert valid.sum() == (right - left) * (bottom - top)
    if resize_mode == "crop":
        # It covers the input, enlarged so that its shorter side is `resize`, and no larger image does.
        assert placement.resized == (int(width * scale), int(height * scale))
    if resize_mode == "letterbox":
        assert placement.resized[0] == size[1] or placement.resized[1] == size[0]
        assert not (above and before)
        assert valid[above, before]
        assert valid[size[0] - below - 1, size[1] - after - 1]
    else:
        assert valid.all()


def test_valid_region_by_hand() -> None:
    valid = place(400, 200, Preprocess(resize_mode="letterbox")).valid
    assert valid[56:168].all()
    assert not valid[:56].any()
    assert not valid[168:].any()


def test_bad_sizes_and_modes_are_refused() -> None:
    with pytest.raises(InputError, match="width=0 must be an integer of at least 1"):
        place(0, 5, Preprocess())
    with pytest.raises(InputError, match="expected an RGB image, got mode L"):
        to_picture(Image.new("L", (5, 5)), place(5, 5, Preprocess()))


@pytest.mark.parametrize(
    ("size", "preprocess", "share"),
    [
        ((256, 256), Preprocess(), 224**2 / 256**2),
        ((512, 256), Preprocess(), 224**2 / (512 * 256)),
        ((100, 100), Preprocess(resize=224), 1),
        ((512, 256), Preprocess(resize_mode="stretch"), 1),
        ((512, 256), Preprocess(resize_mode="letterbox"), 1),
        ((3, 1000), Preprocess(resize_mode="letterbox"), 1),
    ],
)
def test_visible_share_is_that_of_the_area(size: tuple[int, int], preprocess: Preprocess, share: float) -> None:
    assert place(*size, preprocess).visible_share == pytest.approx(share)


def test_what_is_hidden_is_said_beyond_half_a_percent_on_average() -> None:
    whole = place(100, 100, Preprocess(resize=224))
    cut = place(100, 100, Preprocess())  # hides 23.4 %
    assert Visible.of([whole] * 49 + [cut], "crop").notices() == []
    (notice,) = Visible.of([whole] * 20 + [cut], "crop").notices()
    assert notice.startswith("the resize mode crop shows 99 % of the pictures on average; ")
    assert Visible.of([], "crop") == Visible("crop", None)
