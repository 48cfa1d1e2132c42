"""How many of 16 bits cameras use: the rule, the look over normal images, and every image scaled alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from spade_faiss.core.errors import InputError
from spade_faiss.core.extraction import Preprocess
from spade_faiss.features import depth as depth_module
from spade_faiss.features.datasets import ImageRecord
from spade_faiss.features.decoding import read_image
from spade_faiss.features.depth import find_bit_depth, settle
from spade_faiss.features.pictures import load_image
from tests.support.image_files import noise, save
from tests.support.layouts import png16

MEMORY = 1 << 30


@pytest.mark.parametrize(
    ("largest", "depth"),
    [
        ([], None),
        ([1023] * 5, 10),
        ([600, 512, 700], 10),
        ([4095], 12),
        ([2048, 3000, 4095], 12),
        ([0, 4000, 4010], 12),  # one black picture among others
        ([8192, 16383, 9000], 14),
        ([16384, 20000, 30000], 16),
        ([65535], 16),
        ([65280], 16),
    ],
)
def test_the_largest_value_decides(largest: list[int], depth: int | None) -> None:
    assert settle(largest) == depth


@pytest.mark.parametrize(
    ("largest", "reason"),
    [
        ([0, 0], "2 normal images have 16 bits a channel, and their values reach 0 of 65535"),  # black pictures
        ([255] * 3, "may be dark images of more bits than 8; say how many bits the camera gives: --bit-depth 10, 12, 14 or 16"),
        ([511], "may be dark images of more bits than 9"),
        ([1024], "may be dark images of more bits than 11"),
        ([2047], "may be dark images of more bits than 11"),
        ([8191], "may be dark images of more bits than 13"),
        ([1000] * 5 + [4095], "half of them stay below 1001: images of two cameras may be mixed"),
        (
            [4095] * 9 + [65535],
            "half of them stay below 4096: images of two cameras may be mixed; keep those of one, or",
        ),
    ],
)
def test_it_is_not_guessed(largest: list[int], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        settle(largest)
    assert reason in str(caught.value)


def write(path: Path, values: npt.NDArray[Any]) -> Path:
    path.write_bytes(png16(values if values.ndim == 3 else values[..., None]))
    return path


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_depth_is_found_on_the_images(tmp_path: Path, bits: int, channels: int) -> None:
    """Alpha does not count, nor do images of 8 bits, or files that cannot be read."""
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 1 << bits, (8, 9, channels), dtype=np.uint16) for _ in range(4)]
    for value in values:
        value[0, 0, 0] = (1 << bits) - 1
        if channels == 4:
            value[..., 3] = 65535
    paths = [write(tmp_path / f"{i}.png", value) for i, value in enumerate(values)]
    paths.append(save(noise(9, 8), tmp_path / "8.png"))
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    paths += [tmp_path / "broken.png", tmp_path / "empty.png", tmp_path / "gone.png"]
    assert find_bit_depth(paths, MEMORY) == bits
    assert find_bit_depth(paths[4:5], MEMORY) is None


def test_of_files_with_eight_bits_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(depth_module, "decode", lambda *given: decoded.append(given))
    paths = [save(noise(9, 8), tmp_path / f"a.{suffix}") for suffix in ("png", "jpg", "tif", "bmp", "webp")]
    assert find_bit_depth(paths, MEMORY) is None
    assert not decoded


def test_an_image_that_exceeds_the_depth_is_refused(tmp_path: Path) -> None:
    values = np.full((8, 9), 4096, np.uint16)
    record = ImageRecord("a.png", write(tmp_path / "a.png", values))
    with pytest.raises(
        InputError, match=r"a\.png.*its values reach 4096, the bank was made of images with 12 bits, up to 4095"
    ):
        load_image(record, Preprocess(bit_depth=12))
    values[:] = 4095
    write(record.path, values)
    assert load_image(record, Preprocess(bit_depth=12)).picture.max() == 255


def test_where_the_depth_is_not_known_only_what_depends_on_it_is_refused(tmp_path: Path) -> None:
    """A bank of 8-bit images, or one of an earlier version."""
    record = ImageRecord("a.png", tmp_path / "a.png")
    for largest, known in ((0, True), (1, False), (4095, False), (16383, False), (16384, True), (65535, True)):
        write(record.path, np.full((8, 9), largest, np.uint16))
        if known:
            np.testing.assert_array_equal(load_image(record, Preprocess()).picture, largest >> 8)
        else:
            with pytest.raises(InputError, match=f"its values reach {largest}; how many bits the camera gives is not known"):
                load_image(record, Preprocess())


def test_sixteen_bits_are_what_they_were(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 9, 3), dtype=np.uint16)
    path = write(tmp_path / "a.png", values)
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(Image.open(path)))
    np.testing.assert_array_equal(np.asarray(read_image(path, bit_depth=16)), values >> 8)


@pytest.mark.parametrize("value", [7, 17, 0, -1, "12", 12.5])
def test_depths_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=f"bit_depth={value!r} is not one of 8, 9, 10"):
        Preprocess(bit_depth=value)
