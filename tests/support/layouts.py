"""Image files in every layout: TIFF, PNG, PNM, WebP and BMP, with the pixels that they hold."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

Values = npt.NDArray[Any]

ORDERS: tuple[Literal["<"], Literal[">"]] = ("<", ">")
SIZE = (19, 23)  # height and width: no tile and no strip divides them
_EXTRA = {"none": None, "unspecified": ["unspecified"], "alpha": ["unassalpha"]}


@dataclass(frozen=True)
class TiffLayout:
    """How a TIFF is written: `colors` is `minisblack`, `miniswhite`, `rgb` or `separated` (CMYK)."""

    dtype: str
    colors: str
    extra: str = "none"
    planar: bool = False
    order: Literal["<", ">"] = "<"
    compression: str | None = None
    predictor: bool = False
    tiled: bool = False
    orientation: int = 1
    big: bool = False

    @property
    def channels(self) -> int:
        return {"rgb": 3, "separated": 4}.get(self.colors, 1) + (self.extra != "none")

    def __str__(self) -> str:
        planes = "planes" if self.planar else "pixels"
        tiles = "tiles" if self.tiled else "strips"
        parts = [self.dtype, self.colors, self.extra, planes, self.order, self.compression or "raw", tiles]
        return " ".join([*parts, *(["predictor"] * self.predictor), str(self.orientation), *(["big"] * self.big)])


def tiff_layouts() -> Iterator[TiffLayout]:
    for dtype in ("u1", "u2"):
        for colors, extra in (
            ("minisblack", "none"),
            ("miniswhite", "none"),
            ("minisblack", "alpha"),
            ("minisblack", "unspecified"),
            ("rgb", "none"),
            ("rgb", "alpha"),
            ("rgb", "unspecified"),
        ):
            many = colors == "rgb" or extra != "none"
            for planar in (False, True) if many else (False,):
                for order in ORDERS:
                    yield TiffLayout(dtype, colors, extra, planar, order)
                    yield TiffLayout(dtype, colors, extra, planar, order, tiled=True)
                    yield TiffLayout(dtype, colors, extra, planar, order, "lzw", predictor=True)
                    yield TiffLayout(dtype, colors, extra, planar, order, "zlib", tiled=True)
        for orientation in range(2, 9):
            yield TiffLayout(dtype, "rgb", planar=orientation % 2 == 0, orientation=orientation)
            yield TiffLayout(dtype, "minisblack", order=">", orientation=orientation)
        for compression in ("packbits", "zstd", "lzma"):
            yield TiffLayout(dtype, "rgb", compression=compression)
        yield TiffLayout(dtype, "rgb", big=True)
        yield TiffLayout(dtype, "minisblack", planar=False, big=True, order=">")


def write_tiff(layout: TiffLayout, values: Values) -> bytes:
    """The content of a TIFF of values (H, W, C)."""
    stored = values[..., 0] if values.shape[2] == 1 else np.moveaxis(values, -1, 0) if layout.planar else values
    stream = BytesIO()
    tifffile.imwrite(
        stream,
        stored,
        photometric=layout.colors,
        planarconfig=None if values.shape[2] == 1 else "separate" if layout.planar else "contig",
        byteorder=layout.order,
        compression=layout.compression,
        predictor=layout.predictor or None,
        tile=(16, 16) if layout.tiled else None,
        rowsperstrip=None if layout.tiled else 7,
        extrasamples=_EXTRA[layout.extra],
        extratags=[(274, "H", 1, layout.orientation, True)] if layout.orientation != 1 else (),
        bigtiff=layout.big,
        metadata=None,
    )
    return stream.getvalue()


def noise_values(dtype: str, channels: int, seed: int = 0) -> Values:
    """(H, W, C) values over the whole range of an integer type."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (*SIZE, channels), dtype=dtype)


def turned(values: Values, orientation: int) -> Values:
    """The upright pixels of those that are stored with an orientation, by Pillow's own table of turns."""
    turn = Image.Transpose
    method = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }.get(orientation)
    if method is None:
        return values
    bands = [np.asarray(Image.fromarray(values[..., i].astype(np.int32)).transpose(method)) for i in range(values.shape[2])]
    return np.dstack(bands)


def png16(values: Values, *, interlaced: bool = False) -> bytes:
    """A PNG of 16 bits: gray, gray with alpha, RGB or RGB with alpha."""
    height, width, channels = values.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for y, x, down, right in passes:
        part = values[y::down, x::right]
        rows += b"".join(b"\0" + row.astype(">u2").tobytes() for row in part) if part.size else b""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
