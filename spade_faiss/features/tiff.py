"""Reads TIFF pages: what each page holds, which of its layouts Pillow reads right, and the others by tifffile if it is there.

Pillow opens most TIFF files, and some of them wrongly: 16-bit planes that are not compressed come out as garbage, 16-bit gray
whose white is zero is not inverted, signed bytes count as unsigned. So the tags of a page are read first, and Pillow gets what
the tests have shown it to read right. Everything else goes to tifffile (`pip install 'spade-faiss[tiff]'`), or is refused.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL.TiffImagePlugin import COMPRESSION_INFO

from spade_faiss.core.errors import InputError

STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
_PHOTOMETRIC = {0: "white is zero", 1: "gray", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4

# The tags that say how pixels are stored, with the value of a file that leaves them out; a page without a size is none.
_TAGS = {
    254: (0,),  # NewSubfileType
    255: (0,),  # SubfileType
    256: (0,),  # ImageWidth
    257: (0,),  # ImageLength
    258: (1,),  # BitsPerSample
    259: (1,),  # Compression
    262: (0,),  # PhotometricInterpretation
    266: (1,),  # FillOrder
    274: (1,),  # Orientation
    277: (1,),  # SamplesPerPixel
    284: (1,),  # PlanarConfiguration
    338: (),  # ExtraSamples
    339: (1,),  # SampleFormat
    32997: (1,),  # ImageDepth
}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# Compressions that every build of Pillow has: CCITT, LZW, JPEG, Deflate and PackBits.
_COMMON = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
_MOST_VALUES = 64
_MOST_PAGES = 10_000


@dataclass(frozen=True)
class TiffPage:
    """How the pixels of a page are stored. `number` counts from 1; `extra` says what the channels beyond the colors are."""

    number: int
    width: int
    height: int
    bits: tuple[int, ...]
    photometric: int
    compression: int
    planar: bool
    formats: tuple[int, ...]
    extra: tuple[int, ...]
    fill_order: int
    orientation: int
    image_depth: int
    is_reduced: bool
    big_endian: bool
    is_big: bool

    @property
    def samples(self) -> int:
        """The number of channels."""
        return len(self.bits)

    @property
    def depth(self) -> int:
        """The most bits that a channel has."""
        return max(self.bits)

    def __str__(self) -> str:
        kind = _PHOTOMETRIC.get(self.photometric, f"photometric {self.photometric}")
        channels = "1 channel" if self.samples == 1 else f"{self.samples} channels"
        signed = "signed " if _SIGNED in self.formats else ""
        planes = " in separate planes" if self.planar else ""
        compression = (
            "" if self.compression == 1 else f", compression {COMPRESSION_INFO.get(self.compression, self.compression)}"
        )
        return f"{kind} with {channels} of {self.depth} {signed}bits{planes}{compression}"


def read_pages(stream: BinaryIO) -> list[TiffPage]:
    """The pages of a file. Thumbnails, smaller copies and transparency masks of other pages are none, unless there is no other.

    Raises:
        InputError: for a file that is cut off or damaged.
    """
    try:
        pages = [_page(number, *found) for number, found in enumerate(_directories(stream), start=1)]
    except struct.error as error:
        raise InputError("this TIFF is cut off: a directory of its pages is missing") from error
    if not pages:
        raise InputError("this TIFF has no page")
    return [page for page in pages if not page.is_reduced] or pages[:1]


def pillow_reads(page: TiffPage) -> bool:
    """Whether Pillow reads this layout right."""
    if page.compression not in COMPRESSION_INFO or page.image_depth != 1:
        return False
    if page.is_big and page.big_endian:
        return False  # Pillow loses the orientation, and warns
    if set(page.formats) - {_UNSIGNED, _UNDEFINED}:
        # Signed numbers of one channel: they are checked for negative ones.
        return page.formats == (_SIGNED,) and page.bits in ((16,), (32,)) and page.photometric == BLACK_IS_ZERO
    if page.depth <= 8:
        if not page.planar:
            return True
        compressed = page.compression != 1
        if page.photometric == RGB:
            return page.extra in ((), (2,)) or (compressed and page.extra in ((0,), (0, 0), (0, 0, 0)))
        return page.photometric == CMYK and page.extra == ()
    if page.fill_order != 1:
        return False
    if page.bits == (16,):
        return page.photometric == BLACK_IS_ZERO or (page.photometric == WHITE_IS_ZERO and not page.big_endian)
    if page.bits in ((12,), (32,)):
        return page.photometric == BLACK_IS_ZERO and not page.big_endian and (page.depth == 32 or page.compression == 1)
    if set(page.bits) != {16} or page.planar:
        return False
    return (page.photometric == RGB and page.extra in ((), (0,), (1,), (2,))) or (page.photometric == CMYK and not page.extra)


def is_rarely_built(page: TiffPage) -> bool:
    """Whether Pillow may lack the codec, or the room for channels that are no colors in planes of their own."""
    return page.compression not in _COMMON or (page.planar and page.extra != ())


def check_page(page: TiffPage) -> None:
    """Raise InputError for pixels that are no plain numbers of a known range, whoever reads them."""
    if _FLOAT in page.formats:
        raise InputError("its pixels are floating point numbers of unknown range; save it with 8 or 16 bits a channel")
    if set(page.formats) - {_UNSIGNED, _SIGNED, _UNDEFINED} or page.depth > 32:
        raise InputError(f"this TIFF page is {page}; save it with 8 or 16 unsigned bits a channel")
    if page.image_depth != 1:
        raise InputError(
            f"this TIFF page is a volume of {page.image_depth} layers; save each layer as a page or file of its own"
        )


def read_by_tifffile(data: bytes, page: TiffPage) -> npt.NDArray[Any]:
    """The pixels of a page as they are stored: (H, W, C) integers, not turned, white is zero where the page says so.

    Raises:
        InputError: for a page that tifffile does not read either, or without tifffile.
    """
    hint = "save it as a plain TIFF or PNG, not in planes, with 8 or 16 bits a channel"
    is_packed = page.depth % 8 and (page.big_endian or len(set(page.bits)) > 1)
    if page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) or 1 in page.extra or is_packed:
        raise InputError(f"this TIFF page is {page}, which is not read; {hint}")
    tifffile = _import_tifffile()
    if tifffile is None:
        raise InputError(
            f"this TIFF page is {page}, which needs the package tifffile: pip install 'spade-faiss[tiff]'; or {hint}"
        )
    try:
        with tifffile.TiffFile(BytesIO(data)) as file:
            found = file.pages[page.number - 1]
            ends = [start + size for start, size in zip(found.dataoffsets, found.databytecounts, strict=True)]
            if not ends or max(ends) > len(data) or min(found.databytecounts) == 0:
                raise InputError("this TIFF is cut off: some of its pixels are missing")
            values = np.asarray(found.asarray(maxworkers=1))
    except InputError:
        raise
    except Exception as error:  # on damaged data, tifffile and its codecs raise nearly anything
        raise InputError(f"this TIFF page is {page}, and could not be decoded ({error}); {hint}") from error
    if page.planar and page.samples > 1:
        values = np.moveaxis(values, 0, -1)
    return values.reshape(page.height, page.width, page.samples)


def _import_tifffile() -> ModuleType | None:
    try:
        return importlib.import_module("tifffile")
    except ImportError:
        return None


def _directories(stream: BinaryIO) -> Iterator[tuple[dict[int, tuple[int, ...]], bool, bool]]:
    """The tags of `_TAGS` in each directory of the chain, whether the file is big endian, and whether it is a BigTIFF."""
    stream.seek(0)
    start = stream.read(4)
    big_endian, is_big = start[:1] == b"M", b"+" in start
    order = ">" if big_endian else "<"
    if is_big:
        stream.seek(8)
    word = "Q" if is_big else "I"
    offset, seen = _unpack(stream, order + word)[0], set[int]()
    while offset and offset not in seen and len(seen) < _MOST_PAGES:
        seen.add(offset)
        stream.seek(offset)
        count = _unpack(stream, order + ("Q" if is_big else "H"))[0]
        entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
        body = stream.read(entry.size * min(count, 65535))
        if len(body) < entry.size * count:
            raise struct.error("cut off")
        tags = dict(_TAGS)
        offset = _unpack(stream, order + word)[0]
        for tag, kind, length, value in entry.iter_unpack(body):
            if tag in _TAGS and kind in _INTEGERS and 0 < length <= _MOST_VALUES:
                tags[tag] = _values(stream, order, word, (_INTEGERS[kind], length, value))
        yield tags, big_endian, is_big


def _values(stream: BinaryIO, order: str, word: str, entry: tuple[str, int, bytes]) -> tuple[int, ...]:
    """The numbers of a tag, which are in its entry if they fit, else where the entry says."""
    code, length, value = entry
    numbers = struct.Struct(f"{order}{length}{code}")
    if numbers.size > len(value):
        stream.seek(struct.unpack(order + word, value)[0])
        value = stream.read(numbers.size)
    return numbers.unpack(value[: numbers.size])


def _unpack(stream: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _page(number: int, tags: dict[int, tuple[int, ...]], big_endian: bool, is_big: bool) -> TiffPage:
    samples, bits, formats = tags[277][0], tags[258], tags[339]
    if len(bits) != samples:
        bits = (bits * samples)[:samples] if samples <= _MOST_VALUES and len(bits) == 1 else bits[: max(1, samples)]
    return TiffPage(
        number=number,
        width=tags[256][0],
        height=tags[257][0],
        bits=bits,
        photometric=tags[262][0],
        compression=tags[259][0],
        planar=tags[284][0] == 2 and len(bits) > 1,
        formats=formats[:1] if len(set(formats)) == 1 else formats,
        extra=tags[338],
        fill_order=tags[266][0],
        orientation=tags[274][0],
        image_depth=tags[32997][0],
        # Bit 0: a smaller copy of another page; bit 2: a transparency mask of another page.
        is_reduced=bool(tags[254][0] & 5) or tags[255][0] == 2,
        big_endian=big_endian,
        is_big=is_big,
    )
