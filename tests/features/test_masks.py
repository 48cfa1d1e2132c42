"""Which pixels of a mask are defective: label maps, binary masks with noise and soft edges, masks drawn in alpha."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image, ImageDraw, ImageFilter

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.pictures import to_mask
from spade_faiss.features.placement import place
from tests.support.image_files import save

Values = npt.NDArray[Any]
SIZE = (320, 240)
# Every pixel of a mask, none resized.
WHOLE = Preprocess(resize_mode="stretch", size=240)


def read(path: Path, size: tuple[int, int] = (240, 240)) -> npt.NDArray[np.bool_]:
    return to_mask(path, place(*size, WHOLE))


def drawn(classes: list[int], *, thin: bool = False, seed: int = 0) -> Values:
    """Polygons, ellipses or thin lines, one a class; later ones over earlier ones."""
    rng, image = np.random.default_rng(seed), Image.new("L", (240, 240))
    draw = ImageDraw.Draw(image)
    for i, value in enumerate(classes):
        x, y = (int(place) for place in rng.integers(10, 160, 2))
        if thin:
            draw.line((x, y, x + 70, y + int(rng.integers(5, 60))), fill=value, width=1 + i % 2)
        elif i % 2:
            draw.ellipse((x, y, x + 60, y + 45), fill=value)
        else:
            draw.polygon([(x, y), (x + 60, y + 13), (x + 30, y + 55)], fill=value)
    return np.asarray(image)


def as_jpeg(values: Values, quality: int) -> Values:
    stream = BytesIO()
    Image.fromarray(values).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


LABELS = [
    [50, 200],
    [1, 255],
    [1, 2, 255],
    [85, 170, 255],
    [127, 128],
    [100, 200],
    [30, 60, 90, 120, 150, 180, 210, 240],
    list(range(1, 201, 9)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("classes", LABELS, ids=str)
def test_every_class_of_a_label_map_is_defective(tmp_path: Path, classes: list[int], thin: bool, seed: int) -> None:
    """The list of faults: of the classes 50 and 200, half of the defect was lost."""
    values = drawn(classes, thin=thin, seed=seed)
    np.testing.assert_array_equal(read(save(Image.fromarray(values), tmp_path / "m.png")), values > 0)
    deep = values.astype(np.uint16) * 255  # the same in 16 bits, as PNG and as TIFF
    np.testing.assert_array_equal(read(save(Image.fromarray(deep), tmp_path / "deep.png")), values > 0)
    tifffile.imwrite(tmp_path / "m.tif", values.astype(np.uint16), photometric="minisblack", byteorder=">")
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), values > 0)


def test_classes_side_by_side_are_all_defective(tmp_path: Path) -> None:
    """The case of the list: 50 beside 200, without black between them."""
    values = np.zeros((240, 240), np.uint8)
    values[80:140, 100:140], values[80:140, 140:180] = 200, 50
    assert read(save(Image.fromarray(values), tmp_path / "m.png")).sum() == 4800


@pytest.mark.parametrize("palette", ["black background", "no black", "all black"])
def test_palettes_of_classes(tmp_path: Path, palette: str) -> None:
    """Dark colors are classes, too; where no color is black, or nothing else is, number 0 is the background."""
    values = drawn([1, 2, 3])
    image = Image.fromarray(values, "L").convert("P")
    image.putdata(values.ravel().tolist())
    background = [0, 0, 0] if palette == "black background" else [68, 1, 84]
    image.putpalette([0] * 12 if palette == "all black" else [*background, 64, 0, 0, 0, 192, 0, 128, 64, 0])
    np.testing.assert_array_equal(read(save(image, tmp_path / "m.png")), values > 0)
    if palette == "black background":
        np.testing.assert_array_equal(read(save(image.convert("RGB"), tmp_path / "rgb.png")), values > 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("quality", [10, 30, 50, 75, 90, 95, 100])
def test_jpeg_noise_of_a_binary_mask_is_no_defect(tmp_path: Path, quality: int, thin: bool, seed: int) -> None:
    values = as_jpeg(drawn([255] * 4, thin=thin, seed=seed), quality)
    np.testing.assert_array_equal(read(save(Image.fromarray(values), tmp_path / "m.png")), values > 127)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("radius", [0.5, 1, 3, 10, 30])
def test_blurred_edges_of_a_binary_mask_are_cut_in_the_middle(tmp_path: Path, radius: float, seed: int) -> None:
    image = Image.fromarray(drawn([255] * 6, seed=seed))
    if radius == 30:  # of small shapes, nothing would be left
        ImageDraw.Draw(image).ellipse((20 + seed, 20, 220, 200), fill=255)
    values = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))
    assert values.max() > 127
    np.testing.assert_array_equal(read(save(Image.fromarray(values), tmp_path / "m.png")), values > 127)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("size", [(120, 120), (151, 149), (330, 330), (480, 480)])
@pytest.mark.parametrize("filtered", ["BILINEAR", "BICUBIC", "LANCZOS", "BOX"])
def test_resized_edges_of_a_binary_mask_are_cut_in_the_middle(
    tmp_path: Path, filtered: str, size: tuple[int, int], thin: bool, seed: int
) -> None:
    image = Image.fromarray(drawn([255] * 4, thin=thin, seed=seed)).resize(size, Image.Resampling[filtered])
    values = np.asarray(image)
    small = to_mask(save(image, tmp_path / "m.png"), place(*size, Preprocess(resize_mode="stretch", size=size[0])))
    if size[0] == size[1]:
        np.testing.assert_array_equal(small, values > 127)
    deep = to_mask(
        save(Image.fromarray(values.astype(np.uint16) * 257), tmp_path / "deep.png"),
        place(*size, Preprocess(resize_mode="stretch", size=size[0])),
    )
    np.testing.assert_array_equal(deep, small)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [[50, 200], [85, 170, 255], [100, 200]], ids=str)
def test_classes_survive_jpeg_and_resizing(tmp_path: Path, classes: list[int], seed: int) -> None:
    """Half of the darkest class is where defects begin: all but a few pixels of the outlines."""
    values = drawn(classes, seed=seed)
    for quality in (50, 75, 95):
        mask = read(save(Image.fromarray(as_jpeg(values, quality)), tmp_path / "m.png"))
        assert (mask != (values > 0)).sum() <= 0.04 * (values > 0).sum()
    image = Image.fromarray(values).resize((150, 150), Image.Resampling.BILINEAR)
    mask = to_mask(save(image, tmp_path / "m.png"), place(150, 150, Preprocess(resize_mode="stretch", size=150)))
    whole = Image.fromarray(((values > 0) * 255).astype(np.uint8)).resize((150, 150), Image.Resampling.BILINEAR)
    assert (mask != (np.asarray(whole) > 127)).sum() <= 0.04 * mask.sum()


# ---- alpha

DEFECT = drawn([255, 255])
RED = np.dstack([np.full_like(DEFECT, 255), np.zeros_like(DEFECT), np.zeros_like(DEFECT)])


@pytest.mark.parametrize(
    "color",
    [
        pytest.param(RED, id="one color"),
        pytest.param(np.zeros_like(RED), id="black"),
        pytest.param(np.where(DEFECT[..., None] > 0, RED, 0), id="black where nothing is drawn"),
        pytest.param(np.where(DEFECT[..., None] > 0, RED, 255), id="white where nothing is drawn"),
        pytest.param(np.where(np.arange(240)[:, None, None] < 120, RED, 200), id="two bright colors"),
    ],
)
@pytest.mark.parametrize("soft", [False, True])
def test_masks_drawn_in_alpha(tmp_path: Path, color: Values, soft: bool) -> None:
    """The list of faults: with one color everywhere, the whole picture counted as defective."""
    alpha = np.asarray(Image.fromarray(DEFECT).filter(ImageFilter.GaussianBlur(1))) if soft else DEFECT
    path = save(Image.fromarray(np.dstack([color, alpha]).astype(np.uint8)), tmp_path / "m.png")
    np.testing.assert_array_equal(read(path), alpha > 127)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_that_is_the_same_everywhere_says_nothing(tmp_path: Path, alpha: int) -> None:
    image = np.dstack([DEFECT, np.full_like(DEFECT, alpha)])
    np.testing.assert_array_equal(read(save(Image.fromarray(image, "LA"), tmp_path / "m.png")), DEFECT > 0)


def test_color_that_is_opaque_everywhere_but_in_a_corner_is_used(tmp_path: Path) -> None:
    """A fully opaque and defective picture: what marks everything says nothing."""
    labels = drawn([50, 200])
    alpha = np.where(labels > 0, 255, 0)
    path = save(Image.fromarray(np.dstack([labels, alpha]).astype(np.uint8), "LA"), tmp_path / "m.png")
    np.testing.assert_array_equal(read(path), labels > 0)


def test_color_and_alpha_that_disagree_are_refused(tmp_path: Path) -> None:
    other = drawn([255, 255], seed=1)
    path = save(Image.fromarray(np.dstack([DEFECT, other]), "LA"), tmp_path / "m.png")
    by_color, by_alpha = int((DEFECT > 0).sum()), int((other > 0).sum())
    with pytest.raises(InputError, match=rf"its color marks {by_color} pixels as defective, its alpha {by_alpha}, and"):
        read(path)


def test_alpha_of_sixteen_bits_and_of_palettes(tmp_path: Path) -> None:
    deep = np.dstack([*3 * [np.full(DEFECT.shape, 4000)], DEFECT.astype(np.uint16) * 257]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "m.tif", deep, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), DEFECT > 0)
    image = Image.fromarray((DEFECT > 0).astype(np.uint8), "L").convert("P")
    image.putdata((DEFECT > 0).ravel().tolist())
    image.putpalette([255, 255, 255, 200, 0, 0])
    path = save(image, tmp_path / "m.png", transparency=0)
    np.testing.assert_array_equal(read(path), DEFECT > 0)
