"""PBM, PGM and PPM files are read where Pillow reads them in bounded time, and refused otherwise."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.core.errors import InputError
from spade_faiss.features.decoding import read_image
from tests.support.image_files import noise, pixels, save


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def gray(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"P5 3 1 255\n\x00\x07\xff", gray(0, 7, 255)),
        (b"P5\n# by a camera\n3 1\n255\n\x00\x07\xff", gray(0, 7, 255)),
        (b"P5 3 1 65535\n\x00\x00\x80\x7f\xff\xff", gray(0, 128, 255)),
        (b"P5 3 1 1023\n\x00\x00\x02\x00\x03\xff", gray(0, 128, 255)),  # 10 bits, and it says so
        (b"P5 3 1 3\n\x00\x01\x03", gray(0, 85, 255)),
        (b"P6 2 1 255\n\x01\x02\x03\xff\xfe\xfd", [[1, 2, 3], [255, 254, 253]]),
        (b"P6 1 1 65535\n\x00\x00\x80\x7f\xff\xff", [[0, 128, 255]]),
        (b"P4 3 1\n\x40", gray(255, 0, 255)),
    ],
)
def test_values_are_those_of_the_file(tmp_path: Path, content: bytes, expected: list[list[int]]) -> None:
    (row,) = pixels(write(tmp_path / "a.pgm", content))
    assert row == expected


@pytest.mark.parametrize("suffix", ["ppm", "pnm"])
def test_color_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    image = noise(11, 7)
    np.testing.assert_array_equal(
        np.asarray(read_image(save(image, tmp_path / f"a.{suffix}", format="PPM"))), np.asarray(image)
    )


@pytest.mark.parametrize(
    "content",
    [
        *(b"P5", b"P5 ", b"P5 3", b"P5 3 1 255\n", b"P5 3 1 255\n\x00\x07", b"P5 3 1 1023\n\x00\x00\x02", b"P6 1 1 255\n\x01"),
        *(b"P5 3 1 0\n\x00\x07\xff", b"P5 3 1 65536\n" + bytes(12), b"P5 0 1 255\n", b"P5 -3 -1 255\n\x00\x07\xff"),
        *(b"P5 x y 255\n", b"P5# a comment without an end", b"P5 99999999999 1 255\n", b"P5 20000 20000 255\n", b"P6garbage"),
        *(b"P2 1 1 255\n7", b"P3 1 1 255\n1 2 3", b"P1 1 1\n1", b"Pf 1 1 -1.0\n" + bytes(4), b"P7\nWIDTH 1\n"),
    ],
)
def test_what_is_damaged_or_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"cannot use '.*a\.pgm': "):
        read_image(write(tmp_path / "a.pgm", content))


def test_a_file_of_comments_takes_no_quadratic_time(tmp_path: Path) -> None:
    start = time.perf_counter()
    for magic in (b"P1", b"P2", b"P5"):
        with pytest.raises(InputError):
            read_image(write(tmp_path / "a.pgm", magic + b"\n9 9\n" + b"#\n" * 200_000))
    assert time.perf_counter() - start < 2
