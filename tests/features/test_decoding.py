"""Decoding image files: hand-known pixels of every mode, and files that are refused by name."""

from __future__ import annotations

import hashlib
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import MAX_PIXELS, read_image
from spade_faiss.features.pictures import load_image
from tests.support.image_files import LOSSLESS, noise, pixels, png, save


def palette(transparency: bytes | int | None) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 2])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def row(mode: str, *values: Any) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


COLORS = [[[0, 0, 0], [10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (row("1", 0, 255), "a.png", [[[0, 0, 0], [255, 255, 255]]]),
        (row("1", 0, 255), "a.tif", [[[0, 0, 0], [255, 255, 255]]]),
        (row("L", 0, 7, 255), "a.bmp", [[[0, 0, 0], [7, 7, 7], [255, 255, 255]]]),
        (row("LA", (100, 0), (7, 255)), "a.png", [[[100, 100, 100], [7, 7, 7]]]),
        (row("RGB", (10, 20, 30)), "a.tiff", [[[10, 20, 30]]]),
        (row("RGBA", (10, 20, 30, 0), (1, 2, 3, 128)), "a.png", [[[10, 20, 30], [1, 2, 3]]]),
        (palette(None), "a.png", COLORS),
        (palette(bytes([0, 128, 255])), "a.png", COLORS),
        (palette(1), "a.png", COLORS),
        (row("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)), "a.tif", [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]),
        (row("YCbCr", (128, 128, 128), (255, 128, 128)), "a.tif", [[[128, 128, 128], [255, 255, 255]]]),
        (row("I", 0, 255, 256, 65535), "a.tif", [[[0] * 3, [0] * 3, [1] * 3, [255] * 3]]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, name: str, expected: list[Any]) -> None:
    assert pixels(save(image, tmp_path / name)) == expected


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpeg_modes(tmp_path: Path, mode: str) -> None:
    color: Any = {"CMYK": (0, 255, 0, 0), "L": 90, "RGB": (200, 100, 50)}[mode]
    expected = {"CMYK": (255, 0, 255), "L": (90, 90, 90), "RGB": (200, 100, 50)}[mode]
    path = save(Image.new(mode, (16, 16), color), tmp_path / "a.jpg", quality=100)
    assert np.abs(np.array(pixels(path)) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["png", "tif", "big endian tif", "hand-made png"])
def test_sixteen_bits_are_scaled_by_the_same_factor_in_every_image(tmp_path: Path, kind: str) -> None:
    values = [0, 255, 256, 1000, 128 * 257, 65535]
    for shown in (values, values[:4]):  # the second without its brightest pixels: the others must not change
        path = tmp_path / f"a.{kind[-3:]}"
        if kind == "hand-made png":
            path.write_bytes(png(len(shown), 1, 16, 0, [struct.pack(f">{len(shown)}H", *shown)]))
        else:
            save(Image.fromarray(np.array([shown], dtype=">u2" if "big" in kind else "<u2")), path)
        assert [pixel[0] for pixel in pixels(path)[0]] == [0, 0, 1, 3, 128, 255][: len(shown)]


def test_sixteen_bit_color_has_the_scale_of_sixteen_bit_gray(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1, 1, 16, 2, [struct.pack(">3H", 255, 1000, 65535)]))
    assert pixels(tmp_path / "a.png") == [[[0, 3, 255]]]
    (tmp_path / "b.png").write_bytes(png(1, 1, 16, 4, [struct.pack(">2H", 1000, 0)]))
    assert pixels(tmp_path / "b.png") == [[[3, 3, 3]]]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (row("F", 0.5), "floating point.*save it with 8 or 16 bits"),
        (row("I", 0, 70000), "values run from 0 to 70000, expected 0 to 65535"),
        (row("I", -1, 5), "values run from -1 to 5, expected 0 to 65535"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, image: Image.Image, reason: str) -> None:
    with pytest.raises(InputError, match=rf"a\.tif.*{reason}"):
        read_image(save(image, tmp_path / "a.tif"))


# The six pixels
#   1 2 3
#   4 5 6
# are stored; the tag says how a viewer has to turn them.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("suffix", "dtype"), [("png", "u1"), ("tif", "u1"), ("webp", "u1"), ("png", "u2"), ("tif", "u2")])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str, dtype: str) -> None:
    values = np.array(UPRIGHT[1], dtype=dtype) * (256 if dtype == "u2" else 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    path = save(Image.fromarray(values), tmp_path / f"a.{suffix}", exif=exif, **options)
    assert np.asarray(read_image(path))[:, :, 0].tolist() == UPRIGHT[orientation]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = save(noise(40, 30), tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], whole[:4], whole[:1], b"GIF89a" + whole[6:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"cannot use '.*a\.{suffix}': \w+"):
            read_image(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"GIF89a....", "not a PNG, JPEG, BMP, TIFF, WebP or binary PBM, PGM or PPM file: it starts with b'GIF89a"),
        (b"<html></html>", "not a PNG"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "it is damaged, or of a kind that cannot be decoded"),
        (png(1, 2, 8, 0, [b"\x01", b"\x02"])[:-24], "truncated"),
        (png(0, 3, 8, 0, []), "not identified"),
    ],
    ids=["empty", "gif", "html", "wav", "truncated", "no columns"],
)
def test_files_that_are_no_images_say_why(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"cannot use '.*a\.png': .*{reason}") as error:
        read_image(tmp_path / "a.png")
    assert not any(word in str(error.value) for word in ("InputError", "OSError", "SyntaxError", "ValueError"))
    assert str(error.value).count("cannot use") == 1


def test_file_is_read_by_its_content_whatever_its_suffix(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.jpg", "PNG")
    assert pixels(tmp_path / "a.jpg") == [[[1, 2, 3]]]


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(10_001, 10_000, 1, 0, []))  # a header without pixels: decoding would call it truncated
    with pytest.raises(InputError, match=rf"a\.png.*10001 x 10000 pixels are more than the {MAX_PIXELS} allowed"):
        read_image(path)
    path.write_bytes(png(10_000, 10_000, 1, 0, []))
    with pytest.raises(InputError, match="truncated"):
        read_image(path)


def test_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    record = ImageRecord("a.png", save(noise(6, 5), tmp_path / "a.png"))
    assert read_image(record.path, max_pixels=30).size == (6, 5)
    assert load_image(record, Preprocess(), max_pixels=30).placement.original == (6, 5)
    for read in (lambda: read_image(record.path, max_pixels=29), lambda: load_image(record, Preprocess(), max_pixels=29)):
        with pytest.raises(InputError, match="6 x 5 pixels are more than the 29 allowed"):
            read()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_pillows_own_limit_never_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = save(noise(4, 4), tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow warns above it (an error in these tests), and fails above 20
    if suffix == "tif":
        with pytest.raises(InputError, match="4 x 4 pixels are more than the 10 allowed"):
            read_image(path)
    else:
        assert read_image(path).size == (4, 4)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_many_threads_read_the_same_as_one(tmp_path: Path) -> None:
    suffixes = [*LOSSLESS, "jpg"]
    paths = [save(noise(64, 48, seed), tmp_path / f"{seed}.{suffixes[seed % 5]}") for seed in range(20)]
    paths.append(tmp_path / "broken.png")
    paths[-1].write_bytes(paths[0].read_bytes()[:500])

    def digest(path: Path) -> str:
        try:
            return hashlib.sha256(read_image(path).tobytes()).hexdigest()
        except InputError as error:
            return str(error)

    alone = [digest(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(digest, paths * 5)) == alone * 5


def test_pictures_do_not_depend_on_the_file_format(tmp_path: Path) -> None:
    image = noise(50, 40)
    for suffix in LOSSLESS:
        path = save(image, tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(image))
