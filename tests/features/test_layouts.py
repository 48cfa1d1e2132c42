"""Files in every layout against the pixels that were written and a second decoder: equal, or refused in plain words."""

from __future__ import annotations

import struct
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.features import tiff
from spade_faiss.features.decoding import read_image
from tests.support.layouts import SIZE, TiffLayout, noise_values, png16, tiff_layouts, turned, write_tiff

LAYOUTS = list(tiff_layouts())
# The words of Python and of Pillow that say nothing to a user.
JARGON = ("SyntaxError", "KeyError", "IndexError", "TypeError", "unknown pixel mode", "index out of range", "raw mode")


def rgb(path: Path, **options: Any) -> npt.NDArray[np.int64]:
    return np.asarray(read_image(path, **options)).astype(np.int64)


def attempt(path: Path) -> tuple[npt.NDArray[np.int64] | None, str]:
    """The picture, or the reason why there is none."""
    try:
        return rgb(path), ""
    except InputError as error:
        return None, str(error)


def gray_or_rgb(values: npt.NDArray[Any], colors: int) -> npt.NDArray[np.int64]:
    return np.broadcast_to(values[..., :colors], (*values.shape[:2], 3)).astype(np.int64)


def upper(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values >> 8 if values.dtype.itemsize == 2 else values


def shown(values: npt.NDArray[Any], layout: TiffLayout) -> npt.NDArray[np.int64]:
    """The picture of stored values: white is zero inverted, 8 bits, upright, without what is no color."""
    if layout.colors == "miniswhite":
        values = np.iinfo(values.dtype).max - values
    return gray_or_rgb(turned(upper(values), layout.orientation), 3 if layout.colors == "rgb" else 1)


def second(data: bytes, layout: TiffLayout) -> npt.NDArray[Any]:
    """The values that tifffile finds."""
    values = np.asarray(tifffile.imread(BytesIO(data)))
    if values.ndim == 2:
        return values[..., None]
    return np.moveaxis(values, 0, -1) if layout.planar else values


def test_enough_is_compared() -> None:
    assert len(LAYOUTS) >= 200
    assert len({str(layout) for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiff_of_every_layout_is_what_was_written(tmp_path: Path, layout: TiffLayout) -> None:
    values = noise_values(layout.dtype, layout.channels)
    data = write_tiff(layout, values)
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    found = rgb(path)
    np.testing.assert_array_equal(found, shown(values, layout))
    np.testing.assert_array_equal(found, shown(second(data, layout), layout))


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one.dtype == "u2"], ids=str)
@pytest.mark.parametrize("depth", [10, 12, 14])
def test_fewer_bits_in_sixteen_are_scaled_in_every_layout(tmp_path: Path, layout: TiffLayout, depth: int) -> None:
    largest = (1 << depth) - 1
    values = noise_values("u2", layout.channels) & largest
    stored = values if layout.colors != "miniswhite" else 65535 - values
    (tmp_path / "a.tif").write_bytes(write_tiff(layout, stored))
    expected = gray_or_rgb(turned(values >> (depth - 8), layout.orientation), 3 if layout.colors == "rgb" else 1)
    np.testing.assert_array_equal(rgb(tmp_path / "a.tif", bit_depth=depth), expected)
    if values.max() == largest:
        with pytest.raises(InputError, match=rf"its values reach {largest}, the bank was made of images with {depth - 1} bits"):
            read_image(tmp_path / "a.tif", bit_depth=depth - 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_without_tifffile_a_tiff_is_right_or_refused(
    tmp_path: Path, layout: TiffLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = noise_values(layout.dtype, layout.channels)
    (tmp_path / "a.tif").write_bytes(write_tiff(layout, values))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    found, reason = attempt(tmp_path / "a.tif")
    if found is not None:
        np.testing.assert_array_equal(found, shown(values, layout))
        return
    assert "needs the package tifffile: pip install 'spade-faiss[tiff]'; or save it as" in reason
    assert not any(word in reason for word in JARGON)
    # Older builds of Pillow lack zstd and lzma, and the modes of extra channels.
    rare = layout.compression in ("zstd", "lzma") or layout.extra == "unspecified"
    assert layout.planar or layout.dtype == "u2" or layout.big or rare


@pytest.mark.parametrize("layout", LAYOUTS[::2], ids=str)
@pytest.mark.parametrize("share", [0.03, 0.4, 0.9])
def test_damaged_tiff_is_refused_in_plain_words(tmp_path: Path, layout: TiffLayout, share: float) -> None:
    """Cut off in its directory, in the middle, and near the end, where what is missing may be no part of the picture."""
    values = noise_values(layout.dtype, layout.channels)
    data = write_tiff(layout, values)
    (tmp_path / "a.tif").write_bytes(data[: int(share * len(data))])
    found, reason = attempt(tmp_path / "a.tif")
    if found is not None:
        assert share == 0.9
        np.testing.assert_array_equal(found, shown(values, layout))
    else:
        assert reason.startswith("cannot use")
        assert not any(word in reason for word in JARGON)


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        ("f2", {}, "floating point numbers of unknown range; save it with 8 or 16 bits"),
        ("f4", {}, "floating point numbers of unknown range"),
        ("f8", {}, "floating point numbers of unknown range"),
        ("f4", {"photometric": "miniswhite"}, "floating point numbers of unknown range"),
        ("c8", {}, "with 1 channel of 64 bits; save it with 8 or 16 unsigned bits"),
        ("u8", {}, "with 1 channel of 64 bits; save it with 8 or 16 unsigned bits"),
        ("u4", {}, r"values run from \d+ to \d+, expected 0 to 65535"),
        ("i2", {}, r"values run from -\d+ to \d+, expected 0 to 65535"),
        ("i1", {}, r"values run from -\d+ to \d+, expected 0 to 65535"),
    ],
)
def test_numbers_of_unknown_range_are_refused_in_plain_words(
    tmp_path: Path, dtype: str, options: dict[str, Any], reason: str
) -> None:
    """The list of faults: float TIFF said "SyntaxError: unknown pixel mode"."""
    values = (np.random.default_rng(0).random(SIZE) * 1e5 - (5e4 if dtype[0] == "i" else 0)) % 3e4 - (
        100 if dtype[0] == "i" else 0
    )
    values = values * (1000 if dtype == "u4" else 1)
    tifffile.imwrite(tmp_path / "a.tif", values.astype(np.int64).astype(dtype), **{"photometric": "minisblack", **options})
    with pytest.raises(InputError, match=reason) as caught:
        read_image(tmp_path / "a.tif")
    assert not any(word in str(caught.value) for word in JARGON)


@pytest.mark.parametrize("dtype", ["i2", "i1", "u4", "i4"])
def test_numbers_within_the_range_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 128, SIZE).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    expected = values.astype(np.int64) if dtype == "i1" else np.zeros(SIZE, np.int64)
    np.testing.assert_array_equal(rgb(tmp_path / "a.tif")[..., 0], expected)


@pytest.mark.parametrize("channels", [4, 5])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_four_planes_are_read(tmp_path: Path, channels: int, dtype: str) -> None:
    """The list of faults: a planar TIFF of 4 channels said "string index out of range"."""
    values = noise_values(dtype, channels)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(rgb(tmp_path / "a.tif"), upper(values[..., :3]))


def test_a_tiff_of_cmyk_planes_with_more_channels_says_what_it_is(tmp_path: Path) -> None:
    values = np.moveaxis(noise_values("u1", 5), -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="separated", planarconfig="separate")
    with pytest.raises(
        InputError, match="this TIFF page is CMYK with 5 channels of 8 bits in separate planes, which is not read"
    ):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("bit_depth", [None, 12, 16])
def test_packed_bits_say_their_depth_themselves(tmp_path: Path, bits: int, bit_depth: int | None) -> None:
    values = noise_values("u2", 1)[..., 0] & ((1 << bits) - 1)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", bitspersample=bits)
    np.testing.assert_array_equal(rgb(tmp_path / "a.tif", bit_depth=bit_depth)[..., 0], values >> (bits - 8))


def test_uncompressed_cmyk_and_lab(tmp_path: Path) -> None:
    values = noise_values("u2", 4)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="separated")
    expected = np.asarray(Image.fromarray((values >> 8).astype(np.uint8), "CMYK").convert("RGB"))
    np.testing.assert_array_equal(rgb(tmp_path / "a.tif"), expected)
    with pytest.raises(
        InputError, match=r"only the upper 8 of its 16 bits can be read \(CMYK\), not 12 of them; save it as RGB"
    ):
        read_image(tmp_path / "a.tif", bit_depth=12)
    tifffile.imwrite(tmp_path / "b.tif", noise_values("u1", 3), photometric="cielab")
    with pytest.raises(InputError, match="its pixels are LAB colors; save it with 8 or 16 bits a channel in RGB"):
        read_image(tmp_path / "b.tif")


def test_directories_that_lead_in_a_circle_end(tmp_path: Path) -> None:
    data = bytearray(write_tiff(TiffLayout("u1", "minisblack"), noise_values("u1", 1)))
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    struct.pack_into("<I", data, start + 2 + 12 * count, start)
    assert len(tiff.read_pages(BytesIO(data))) == 1


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
def test_sixteen_bit_png_of_every_kind(tmp_path: Path, channels: int, interlaced: bool, depth: int) -> None:
    values = noise_values("u2", channels)
    colors = channels - (channels % 2 == 0)
    values[..., :colors] &= (1 << depth) - 1
    data = png16(values, interlaced=interlaced)
    np.testing.assert_array_equal(np.reshape(imagecodecs.png_decode(data), values.shape), values)
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(rgb(tmp_path / "a.png", bit_depth=depth), gray_or_rgb(values >> (depth - 8), colors))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("largest", [1, 100, 255, 1023, 4095, 40000, 65535])
def test_pnm(tmp_path: Path, mode: str, largest: int) -> None:
    """What the header calls the largest value is white, whatever the bank's depth; 65535 may be a camera's 12 bits."""
    shape = SIZE if mode == "L" else (*SIZE, 3)
    values = np.random.default_rng(0).integers(0, largest + 1, shape)
    values.flat[0], values.flat[1] = 0, largest
    header = f"P{5 if mode == 'L' else 6}\n# a comment\n{SIZE[1]} {SIZE[0]}\n{largest}\n".encode()
    body = values.astype(">u2" if largest > 255 else "u1").tobytes()
    path = tmp_path / "a.pnm"
    path.write_bytes(header + body)
    found = rgb(path, bit_depth=16)
    found = found[..., 0] if mode == "L" else found
    np.testing.assert_allclose(found, values / largest * 255, atol=1)
    assert (found.min(), found.max()) == (0, 255)
    if largest == 65535:
        path.write_bytes(header + (values >> 4).astype(">u2").tobytes())
        found = rgb(path, bit_depth=12)
        np.testing.assert_array_equal(found[..., 0] if mode == "L" else found, values >> 8)
    elif largest > 255:
        np.testing.assert_array_equal(rgb(path, bit_depth=12), rgb(path, bit_depth=None))
    for damaged in (path.read_bytes()[:-5], header[:9]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot use"):
            read_image(path)


@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("bmp", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 95})]
)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "CMYK"])
def test_eight_bits_by_a_second_decoder(tmp_path: Path, suffix: str, mode: str, options: dict[str, Any]) -> None:
    image = Image.fromarray(noise_values("u1", 3)).convert(mode)
    try:
        image.save(tmp_path / f"a.{suffix}", **options)
    except (OSError, ValueError):
        pytest.skip("no such file")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    found = rgb(tmp_path / f"a.{suffix}")
    if suffix == "png" and mode != "P":
        other = np.asarray(imagecodecs.png_decode(data)).reshape(*SIZE, -1)
    elif suffix == "webp":
        other = np.asarray(imagecodecs.webp_decode(data))[..., :3]
    elif suffix == "jpg" and mode != "CMYK":
        other = np.asarray(imagecodecs.jpeg_decode(data)).reshape(*SIZE, -1)
    else:
        other = np.asarray(image.convert("RGB"))
    colors = {2: 1, 4: 3}.get(other.shape[2], other.shape[2])
    expected = gray_or_rgb(other, colors)
    if other.max() == 1:
        expected = expected * 255
    np.testing.assert_allclose(found, expected, atol=12 if (suffix, mode) == ("jpg", "CMYK") else 0)
