"""Pictures, inputs and masks: torchvision's geometry and arithmetic, and masks that stay on their pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw
from torchvision import transforms

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import RESIZE_MODES, Preprocess
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import read_image
from spade_faiss.features.pictures import load_image, to_input, to_mask, to_picture
from spade_faiss.features.placement import place
from tests.support.image_files import noise, save

SIZES = [(200, 200), (400, 200), (120, 360), (301, 199), (97, 331), (1001, 333)]


def test_load_reads_picture_size_and_hash(tmp_path: Path) -> None:
    path = save(noise(300, 200), tmp_path / "a.png")
    loaded = load_image(ImageRecord("a.png", path), Preprocess())
    assert loaded.placement.original == (300, 200)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(loaded.picture, to_picture(read_image(path), loaded.placement))
    with pytest.raises(InputError, match=r"gone\.png.*No such file"):
        load_image(ImageRecord("gone.png", tmp_path / "gone.png"), Preprocess())


def test_load_names_an_image_too_thin_to_be_cropped(tmp_path: Path) -> None:
    record = ImageRecord("a.png", save(Image.new("L", (2000, 1)), tmp_path / "a.png"))
    with pytest.raises(InputError, match=r"a\.png.*2000 x 1 pixels are too thin.*512000 x 256.*letterbox or stretch"):
        load_image(record, Preprocess())
    for resize_mode in ("letterbox", "stretch"):
        assert load_image(record, Preprocess(resize_mode=resize_mode)).picture.shape == (224, 224, 3)


def test_exif_orientation_is_applied_to_jpeg_sizes_and_masks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(Image.new("L", (32, 16)), tmp_path / "a.jpg", exif=exif)
    loaded = load_image(ImageRecord("a.jpg", path), Preprocess())
    assert loaded.placement.original == (16, 32)
    assert to_mask(path, place(*loaded.placement.original, Preprocess())).shape == (224, 224)


@pytest.mark.parametrize("size", [*SIZES, (256, 256), (257, 255), (103, 222), (632, 403), (31, 47), (1, 3), (224, 224)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (65, 32), (33, 33)])
def test_crop_is_torchvisions(size: tuple[int, int], resize: int, crop: int) -> None:
    image = noise(*size)
    resized = transforms.Resize(resize, interpolation=transforms.InterpolationMode.LANCZOS)(image)
    expected = np.asarray(transforms.CenterCrop(crop)(resized))
    preprocess = Preprocess(resize=resize, size=crop)
    assert place(*size, preprocess).resized == resized.size
    np.testing.assert_array_equal(to_picture(image, place(*image.size, preprocess)), expected)


def test_stretch_resizes_the_whole_image() -> None:
    image = noise(60, 30)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(to_picture(image, place(*image.size, Preprocess(resize_mode="stretch", size=32))), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_letterbox_repeats_the_border(turned: bool) -> None:
    image = noise(16, 8)
    expected = np.pad(np.asarray(image), ((4, 4), (0, 0), (0, 0)), mode="edge")
    assert expected[0].tolist() == np.asarray(image)[0].tolist()
    if turned:
        image, expected = image.transpose(Image.Transpose.TRANSPOSE), expected.transpose(1, 0, 2)
    np.testing.assert_array_equal(to_picture(image, place(*image.size, Preprocess(resize_mode="letterbox", size=16))), expected)


def test_input_is_what_torchvision_computes() -> None:
    picture = to_picture(noise(300, 200), place(300, 200, Preprocess()))
    before = picture.copy()
    values = to_input(picture, Preprocess())
    normalize = transforms.Normalize(Preprocess().mean, Preprocess().std)
    expected = normalize(transforms.ToTensor()(Image.fromarray(picture))).numpy()
    assert values.dtype == np.float32
    assert values.shape == (3, 224, 224)
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(picture, before)


def test_input_by_hand() -> None:
    picture = np.array([[[0, 255, 51]]], dtype=np.uint8)
    values = to_input(picture, Preprocess(mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 0.1)))
    np.testing.assert_allclose(values.ravel(), [-1, 2, 2], rtol=1e-6)


@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
@pytest.mark.parametrize("size", SIZES)
def test_mask_lies_where_the_defect_is(tmp_path: Path, resize_mode: str, size: tuple[int, int]) -> None:
    """The same shape in the picture and the mask: NEAREST moves an edge by half a pixel, a shifted frame by one."""
    (width, height), short = size, min(size)
    left, top = width // 2 - round(0.3 * short), height // 2 - round(0.2 * short)
    shape = Image.new("L", size)
    ImageDraw.Draw(shape).rectangle((left, top, left + round(0.45 * short), top + round(0.5 * short)), fill=255)
    preprocess = Preprocess(resize_mode=resize_mode)
    picture = to_picture(shape.convert("RGB"), place(*size, preprocess))[:, :, 0].astype(float)
    mask = to_mask(save(shape, tmp_path / "mask.png"), place(*size, preprocess))

    def center(weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.array([np.average(axis, weights=weights) for axis in np.indices(weights.shape)])

    assert mask.shape == picture.shape
    np.testing.assert_allclose(center(mask), center(picture), atol=0.45)
    # Where the picture is plain, the mask agrees exactly; they may differ only along the resampled outline.
    assert (mask != (picture > 127)).sum() <= 0.05 * mask.sum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_margins_are_never_defective(tmp_path: Path, resize_mode: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess(resize_mode=resize_mode)
    mask = to_mask(save(Image.new("L", size, 255), tmp_path / "mask.png"), place(*size, preprocess))
    np.testing.assert_array_equal(mask, place(*size, preprocess).valid)


def palette_mask(color: tuple[int, int, int]) -> Callable[[npt.NDArray[np.uint8]], Image.Image]:
    def make(defect: npt.NDArray[np.uint8]) -> Image.Image:
        image = Image.fromarray(defect).convert("P")
        image.putdata(defect.ravel().tolist())
        image.putpalette([0, 0, 0, *color])
        return image

    return make


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(lambda defect: Image.fromarray(defect * 255), id="0 and 255"),
        pytest.param(lambda defect: Image.fromarray(defect * 127 + 1), id="1 and 128"),
        pytest.param(lambda defect: Image.fromarray(defect), id="0 and 1"),
        pytest.param(lambda defect: Image.fromarray(defect * np.arange(1, 17, dtype=np.uint8)), id="class numbers"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(bool)), id="1 bit"),
        pytest.param(lambda defect: Image.fromarray(defect * 255).convert("RGB"), id="RGB"),
        pytest.param(lambda defect: Image.fromarray(defect * 255).convert("LA"), id="LA"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(np.uint16)), id="16 bit, 0 and 1"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(np.uint16) * 255), id="16 bit, 0 and 255"),
        pytest.param(lambda defect: Image.fromarray(defect.astype(np.uint16) * 65535), id="16 bit, 0 and 65535"),
        pytest.param(palette_mask((255, 255, 255)), id="white palette"),
        pytest.param(palette_mask((0, 0, 200)), id="blue palette"),
        pytest.param(palette_mask((1, 0, 0)), id="dark palette"),
    ],
)
def test_masks_may_be_stored_in_many_ways(tmp_path: Path, store: Callable[[npt.NDArray[np.uint8]], Image.Image]) -> None:
    defect = np.random.default_rng(0).integers(0, 2, (16, 16), dtype=np.uint8)
    path = save(store(defect), tmp_path / "mask.png")
    mask = to_mask(path, place(16, 16, Preprocess(resize_mode="stretch", size=16)))
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, defect == 1)


def test_soft_outline_is_cut_in_the_middle(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8)), tmp_path / "mask.png")
    assert to_mask(path, place(2, 2, Preprocess(resize_mode="stretch", size=2))).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "I;16"])
def test_empty_mask_is_legal(tmp_path: Path, mode: str) -> None:
    assert not to_mask(save(Image.new(mode, (30, 20)), tmp_path / "mask.png"), place(30, 20, Preprocess())).any()


def test_mask_of_another_size_or_damaged_is_refused(tmp_path: Path) -> None:
    path = save(Image.new("L", (30, 20)), tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png.*the mask is 30 x 20 pixels, its image 20 x 30"):
        to_mask(path, place(20, 30, Preprocess()))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"cannot use '.*mask\.png'"):
        to_mask(path, place(30, 20, Preprocess()))
