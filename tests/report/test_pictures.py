"""Heat maps, overlays, outlines: colors that can be compared, pictures that are not changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.report import pictures
from tests.support.scores import leftovers


class TestPictures:
    low, high = 2.0, 4.0

    def picture(self, size: tuple[int, int] = (12, 16)) -> pictures.Picture:
        return np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)

    def test_the_picture_stays_where_the_score_is_low_and_turns_to_the_map_where_it_is_high(self) -> None:
        picture = self.picture()
        scores = np.full((12, 16), 1.0, np.float32)
        scores[0], scores[1], scores[2] = self.low, 3.0, 99.0
        before = picture.copy(), scores.copy()
        shaded = pictures.overlay(picture, scores, self.low, self.high)
        np.testing.assert_array_equal(shaded[3:], picture[3:])
        np.testing.assert_array_equal(shaded[0], picture[0])
        heat = pictures.heat_map(scores, self.low, self.high).astype(float)
        distance = np.abs(shaded - heat).mean(axis=(1, 2))
        assert distance[2] < distance[1] < distance[0]
        assert distance[2] < 0.2 * np.abs(picture - heat).mean(axis=(1, 2))[2]
        np.testing.assert_array_equal(picture, before[0])
        np.testing.assert_array_equal(scores, before[1])

    def test_colors_get_lighter_with_the_score_and_stop_at_the_ends_of_the_range(self) -> None:
        scores = np.linspace(self.low, self.high, 50, dtype=np.float32)[None]
        heat = pictures.heat_map(scores, self.low, self.high)
        assert heat.shape == (1, 50, 3)
        assert (np.diff(heat[0] @ np.array([0.2126, 0.7152, 0.0722])) > 0).all()
        ends = pictures.heat_map(np.array([[-9, 2, 4, 99]], np.float32), self.low, self.high)[0]
        assert ends[0].tolist() == ends[1].tolist() == list(pictures.color_scale(9)[0])
        assert ends[2].tolist() == ends[3].tolist() == list(pictures.color_scale(9)[-1])

    def test_the_outline_goes_around_the_mask_and_leaves_its_inside(self) -> None:
        picture, mask = self.picture(), np.zeros((12, 16), bool)
        mask[4:7, 0:5] = True
        before = picture.copy()
        drawn = pictures.outline(picture, mask)
        np.testing.assert_array_equal(drawn[mask], picture[mask])
        assert (drawn[3, 0:6] == pictures.OUTLINE).all()
        assert (drawn[3:8, 5] == pictures.OUTLINE).all()
        np.testing.assert_array_equal(drawn[9:], picture[9:])
        np.testing.assert_array_equal(picture, before)
        np.testing.assert_array_equal(pictures.outline(picture, np.zeros((12, 16), bool)), picture)

    def test_cells_cover_the_picture(self) -> None:
        assert pictures.cell_box((1, 2), (4, 4), (224, 224)) == (56, 112, 112, 168)
        assert pictures.cell_box((1, 0), (3, 3), (10, 10)) == (3, 0, 7, 4)
        with pytest.raises(InputError, match="outside"):
            pictures.cell_box((3, 0), (3, 3), (10, 10))

    def test_color_range_by_hand(self) -> None:
        def colors(*maxima: float, labels: list[bool] | None = None) -> tuple[float, float]:
            """Those of maps of a hundred pixels, of which one scores."""
            maps = [np.append(np.zeros(99, np.float32), np.float32(top)).reshape(10, 10) for top in maxima]
            return pictures.color_range(np.array(maxima, np.float32), maps.__getitem__, labels)

        # Normal maxima 1, 2, 3 and defective ones 10, 20, 60: color from 2, full at 20.
        assert colors(1, 2, 3, 10, 20, 60, labels=[False, False, False, True, True, True]) == (2.0, 20.0)
        low, high = colors(1, 2, 3, 4)
        assert low == 0.0
        assert 3.9 < high <= 4.0
        assert colors(1, 2, 3, 4, labels=[True] * 4) == (0.0, 2.5)
        low, high = colors(0, 0)  # nothing scores, yet the range rises
        assert low == 0.0 < high
        with pytest.raises(InputError, match="at least one map"):
            colors()
        with pytest.raises(InputError, match="1 labels for 2 maps"):
            colors(1, 2, labels=[True])
        with pytest.raises(InputError, match="finite"):
            colors(1, np.nan)

    def test_the_colors_of_many_maps_take_few_of_them(self) -> None:
        asked = list[int]()

        def map_of(i: int) -> np.ndarray:
            asked.append(i)
            return np.full((2, 2), i, np.float32)

        low, high = pictures.color_range(np.arange(1001, dtype=np.float32), map_of)
        assert (low, high) == (500.0, 990.0)
        assert len(asked) == len(set(asked)) == 64
        assert (min(asked), max(asked)) == (0, 1000)
        asked.clear()
        pictures.color_range(np.arange(1001, dtype=np.float32), map_of, [i > 500 for i in range(1001)])
        assert not asked

    @pytest.mark.parametrize("size", [(1024, 1000), (1500, 2049), (3, 1025)])
    def test_what_is_shown_of_large_pictures(self, size: tuple[int, int]) -> None:
        """A pixel is the mean of a square of the picture, and the highest of it in the map: a small defect is still seen."""
        factor = -(-max(size) // 1024)
        assert pictures.shrink_factor(size) == factor
        rng = np.random.default_rng(2)
        picture, scores = self.picture(size), rng.random(size, dtype=np.float32)
        mask = rng.random(size) > 0.99
        shown, shown_map, shown_mask = pictures.shrink(picture), pictures.shrink_map(scores), pictures.shrink_mask(mask)
        height, width = -(-size[0] // factor), -(-size[1] // factor)
        assert shown.shape == (height, width, 3)
        assert shown_map.shape == shown_mask.shape == (height, width)
        assert pictures.shrink(shown) is shown
        for y, x in [(0, 0), (height - 1, width - 1), (height // 2, width // 3)]:
            square = np.s_[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            np.testing.assert_allclose(shown[y, x], picture[square].mean(axis=(0, 1)), atol=1)
            assert shown_map[y, x] == scores[square].max()
            assert shown_mask[y, x] == mask[square].any()
        box = pictures.shrink_box((1, 7, 3, 1000), size)
        assert box == (1 // factor, 7 // factor, -(-3 // factor), -(-1000 // factor))

    def test_pictures_that_do_not_fit_are_refused(self) -> None:
        scores = np.zeros((12, 16), np.float32)
        for bad in (self.picture((16, 12)), self.picture().astype(np.float32), self.picture()[..., 0]):
            with pytest.raises(InputError, match="picture"):
                pictures.overlay(bad, scores, 0, 1)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must rise"):
            pictures.heat_map(scores, 1, 1)

    def test_png_round_trip(self, tmp_path: Path) -> None:
        pictures.write_png(tmp_path / "p.png", self.picture())
        with Image.open(tmp_path / "p.png") as image:
            np.testing.assert_array_equal(np.asarray(image), self.picture())
        assert leftovers(tmp_path) == ["p.png"]
