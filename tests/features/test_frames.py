"""Images from memory score as a file would that holds the same pixels; what cannot be used is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spade_faiss import Backbone, Detector, Extraction, fit
from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.backbone import Backbone as Network
from spade_faiss.scoring.scores import Scores
from tests.support.image_files import noise, save
from tests.support.layouts import png16

RGB = np.asarray(noise(90, 80))


@pytest.fixture(scope="module")
def detector(fitted_bank: Path, backbone: Backbone) -> Detector:
    return Detector.open(fitted_bank, backbone=backbone)


def equal(a: Scores, b: Scores) -> None:
    np.testing.assert_array_equal(a.image_score, b.image_score)
    np.testing.assert_array_equal(a.maps, b.maps)
    np.testing.assert_array_equal(a.neighbor_ids, b.neighbor_ids)


EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(RGB, id="RGB"),
        pytest.param(RGB[..., 0], id="gray"),
        pytest.param(RGB[::-1, ::2], id="a view with strides"),
        pytest.param(RGB.astype(np.uint16) * 257, id="16 bits RGB"),
        pytest.param(RGB[..., 1].astype(np.uint16) * 257, id="16 bits gray"),
        pytest.param(RGB[..., 1].astype(">u2") * 257, id="big endian"),
    ],
)
def test_an_array_scores_as_its_file(tmp_path: Path, detector: Detector, frame: npt.NDArray[Any]) -> None:
    before = frame.copy()
    if frame.dtype.itemsize == 2:
        values = frame.astype(np.uint16)
        (tmp_path / "a.png").write_bytes(png16(values if values.ndim == 3 else values[..., None]))
    else:
        save(Image.fromarray(frame), tmp_path / "a.png")
    equal(detector.score(frame), detector.score(tmp_path / "a.png"))
    np.testing.assert_array_equal(frame, before)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_a_pillow_image_scores_as_its_file(tmp_path: Path, detector: Detector, mode: str) -> None:
    image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(RGB).convert(mode)
    path = save(image, tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    equal(detector.score(image), detector.score(path))
    assert image.mode == mode


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_a_pillow_image_is_turned_as_its_file_is(tmp_path: Path, detector: Detector, suffix: str) -> None:
    path = save(Image.fromarray(RGB[:60]), tmp_path / f"a.{suffix}", exif=EXIF)
    with Image.open(path) as image:
        equal(detector.score(image), detector.score(path))
        assert image.size == ((60, 90) if suffix == "tif" else (90, 60))


def test_several_frames_have_ids(detector: Detector) -> None:
    frames: list[npt.NDArray[Any] | Image.Image] = [RGB, Image.fromarray(RGB[::-1]), RGB[..., 0]]
    assert detector.score(frames).ids == ["frame-0", "frame-1", "frame-2"]
    named = detector.score(frames, ids=["a", "b/c", "d"])
    assert named.ids == ["a", "b/c", "d"]
    stacked = detector.score(np.stack([RGB, RGB[::-1]]), ids=("x", "y"))
    assert stacked.ids == ["x", "y"]
    assert detector.score(RGB, ids="camera 1").ids == ["camera 1"]
    np.testing.assert_allclose(stacked.image_score, named.image_score[:2], rtol=1e-4)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (RGB.astype(np.float32), "image 'frame-0' is of dtype float32; expected .* uint8 or uint16.*: scale it to 0 to 255"),
        (RGB.astype(np.int64), "is of dtype int64"),
        (RGB > 3, "is of dtype bool"),
        (RGB[..., :2], r"has shape \(80, 90, 2\); expected \(H, W, 3\) RGB or \(H, W\) gray"),
        (np.dstack([RGB, RGB[..., 0]]), r"has shape \(80, 90, 4\)"),
        (RGB.transpose(2, 0, 1), r"has shape \(3, 80, 90\)"),
        (RGB[0, 0], r"has shape \(3,\)"),
        (RGB[:0], r"has shape \(0, 90, 3\)"),
        ([RGB, RGB[..., :1]], r"image 'frame-1' has shape \(80, 90, 1\)"),
        ([RGB, "a.png"], "paths and images from memory are mixed"),
        ([RGB, 5], "image 'frame-1' is a int; expected"),
        ([RGB, None], "image 'frame-1' is a NoneType"),
        (Image.new("F", (9, 8)), "floating point numbers"),
        (Image.new("RGB", (0, 8)), "is empty: 0 x 8 pixels"),
    ],
)
def test_what_is_no_image_is_refused(detector: Detector, frames: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        detector.score(frames)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (["a"], "1 ids were given for 2 images"),
        (["a", "a"], "image id 'a' appears more than once"),
        (["a", ""], "an image id is empty"),
        (["a", 5], "the id 5 is a int; ids are strings"),
        (["a", "b\0"], "must be a string without NUL"),
    ],
)
def test_ids_that_cannot_be_used_are_refused(detector: Detector, ids: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        detector.score([RGB, RGB], ids=ids)


def test_ids_of_files_are_their_paths(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="images from files have their paths as ids: leave ids out"):
        detector.score(save(Image.fromarray(RGB), tmp_path / "a.png"), ids=["a"])


def test_a_tiff_that_pillow_opened_with_more_than_eight_bits_is_refused(detector: Detector, tmp_path: Path) -> None:
    save(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), tmp_path / "a.tif")
    with (
        Image.open(tmp_path / "a.tif") as image,
        pytest.raises(InputError, match="is a TIFF of more than 8 bits that Pillow opened, not always right; give its path"),
    ):
        detector.score(image)


def test_frames_of_twelve_bits_are_scaled_as_the_bank_says(tmp_path: Path, backbone: Network) -> None:
    """The depth is found on the normal images and applied to every query; a brighter one is refused."""
    rng = np.random.default_rng(0)
    for i in range(6):
        gray = rng.integers(0, 256, (80, 90), dtype=np.uint16)
        (tmp_path / "8").mkdir(exist_ok=True)
        (tmp_path / "12").mkdir(exist_ok=True)
        save(Image.fromarray(gray.astype(np.uint8)), tmp_path / "8" / f"{i}.png")
        (tmp_path / "12" / f"{i}.png").write_bytes(png16((gray * 16 + 15)[..., None]))
    for name in ("8", "12"):
        fit(
            tmp_path / name,
            bank=tmp_path / f"{name}.bank",
            preset="spade",
            extraction=Extraction(backbone=backbone),
            calibrate=False,
        )
    of_8, of_12 = (Detector.open(tmp_path / f"{name}.bank", backbone=backbone) for name in ("8", "12"))
    assert (of_8.backbone.source.preprocess.bit_depth, of_12.backbone.source.preprocess.bit_depth) == (None, 12)
    gray = rng.integers(0, 256, (80, 90), dtype=np.uint16)
    expected = of_8.score(gray.astype(np.uint8))
    equal(of_12.score(gray * 16 + 3), expected)
    equal(of_12.score(gray.astype(np.uint8)), expected)
    with pytest.raises(InputError, match=r"frame-0': its values reach 6\d{4}, the bank was made of images with 12 bits"):
        of_12.score(gray * 257)
    with pytest.raises(InputError, match=r"its values reach .* how many bits the camera gives is not known"):
        of_8.score(gray * 16)
    # Adding goes on with the bank's own depth; another one is another bank.
    again = fit(
        tmp_path / "12", bank=tmp_path / "12.bank", preset="spade", extraction=Extraction(backbone=backbone), calibrate=False
    )
    assert (again.present, again.added) == (6, 0)
    other = Network.with_bit_depth(backbone, 14)
    with pytest.raises(InputError, match=r"preprocess\.bit_depth=12, these features with 14"):
        fit(tmp_path / "12", bank=tmp_path / "12.bank", preset="spade", extraction=Extraction(backbone=other), calibrate=False)


def test_the_given_depth_is_taken(tmp_path: Path) -> None:
    from spade_faiss import load_backbone

    (tmp_path / "dark").mkdir()
    (tmp_path / "dark" / "0.png").write_bytes(png16(np.full((80, 90, 1), 300, np.uint16)))
    given = Extraction(backbone="efficientnet_lite0", preprocess=Preprocess(resize=72, size=64))
    with pytest.raises(InputError, match="say how many bits the camera gives: --bit-depth"):
        fit(tmp_path / "dark", bank=tmp_path / "bank", preset="spade", extraction=given)
    assert not (tmp_path / "bank").exists()
    backbone = load_backbone("efficientnet_lite0", preprocess=Preprocess(resize=72, size=64, bit_depth=9))
    bank = fit(
        tmp_path / "dark", bank=tmp_path / "bank", preset="spade", extraction=Extraction(backbone=backbone), calibrate=False
    ).bank
    assert bank.manifest.source is not None
    assert bank.manifest.source.preprocess.bit_depth == 9
