"""Decodes image files: bytes become an upright RGB image with 8 bits a channel, or an error that names the file.

No function here touches global state, so that all of them may run in many threads at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spade_faiss.core.errors import InputError
from spade_faiss.features import pnm, tiff
from spade_faiss.features.pages import PNG_START, split_page
from spade_faiss.features.pixels import FULL_DEPTH, Decoded, decoded_of, to_rgb

MAX_PIXELS = 100_000_000

# The first bytes of a file choose its reader. Image.open() would choose, too, but it warns above a pixel limit of the whole
# process (Image.MAX_IMAGE_PIXELS), which cannot be silenced or changed for one call without changing it for every thread.
_READERS: tuple[tuple[tuple[bytes, ...], type[ImageFile]], ...] = (
    ((PNG_START,), PngImageFile),
    ((b"\xff\xd8\xff",), JpegImageFile),
    ((b"BM",), BmpImageFile),
    (tiff.STARTS, TiffImageFile),
    ((b"RIFF",), WebPImageFile),
    (pnm.STARTS, PpmImageFile),
)
_CANNOT_USE = "cannot use "
_ORIENTATION = 0x0112
# How an array is turned upright: whether rows and columns change places, then whether rows and columns are reversed.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Header:
    """What a file says of an image before its pixels are decoded.

    Args:
        size: width and height of the upright image.
        is_deep: whether its channels have 16 bits, of which it may use fewer.
        decode_bytes: about how much memory decoding takes, the content of the file not counted.
    """

    size: tuple[int, int]
    is_deep: bool
    decode_bytes: int


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS, bit_depth: int | None = FULL_DEPTH) -> Image.Image:
    """Decode an image file, or a page of one (`scan.tif#2`; else its first), to upright RGB with 8 bits a channel.

    16 bits become 8 by one fixed scale, see `to_rgb`. Alpha is dropped, and color profiles are not applied.

    Raises:
        InputError: for a file that is missing, cannot be decoded, or holds more than `max_pixels` pixels (a TIFF: or more than
            `PIL.Image.MAX_IMAGE_PIXELS`); it names the path and the reason.
    """
    path = Path(path)
    with naming_file(path):
        file, page = split_page(path)
        return to_rgb(decode(file.read_bytes(), max_pixels, page, cut=bit_depth == FULL_DEPTH), bit_depth)


def read_header(stream: BinaryIO, page: int | None = None, *, max_pixels: int = MAX_PIXELS, cut: bool = False) -> Header:
    """Read what a file says of an image, without decoding its pixels; the arguments are those of `decode`.

    Raises:
        InputError: as `decode`.
    """
    start = stream.read(16)
    stream.seek(0)
    if start.startswith(tiff.STARTS):
        found = _find_page(stream, page, max_pixels)
        size, orientation = (found.width, found.height), found.orientation
        is_deep, per_pixel = found.depth in (16, 32), _tiff_bytes(found, cut=cut)
    else:
        image = _open(stream, start)
        _check_size(*image.size, max_pixels)
        size, orientation = image.size, _orientation(image)
        is_pnm = isinstance(image, PpmImageFile)
        is_deep = _is_deep(image) and not (is_pnm and pnm.depth_of(cast(PpmImageFile, image)) is not None)
        per_pixel = _bytes_per_pixel(image, cut=cut)
    turned = orientation in (5, 6, 7, 8)
    if orientation != 1:
        per_pixel *= 2
    return Header(size[::-1] if turned else size, is_deep, size[0] * size[1] * per_pixel)


def _bytes_per_pixel(image: ImageFile, *, cut: bool) -> int:
    """How much memory it takes to decode a pixel and make it RGB, measured for each kind of file."""
    if _is_deep(image) and not (cut and image.mode.startswith("RGB") and not isinstance(image, PpmImageFile)):
        return 18 if image.mode.startswith("RGB") else 8
    if isinstance(image, WebPImageFile):
        return 16  # the decoder keeps the canvas and gives a copy, which becomes an image
    coefficients = 6 if image.info.get("progressive") else 0
    return _stored_bytes(image.mode) + (0 if image.mode == "RGB" else 4) + coefficients


def _tiff_bytes(page: tiff.TiffPage, *, cut: bool) -> int:
    """How much memory it takes to decode a pixel of a page and make it RGB."""
    stored = page.samples * ((page.depth + 7) // 8)
    if not tiff.pillow_reads(page):
        return 2 * stored + 8
    unpacked = 0 if page.compression == 1 else stored  # if all pixels are in one strip
    if page.depth <= 8 or (cut and page.samples > 1):
        return unpacked + (4 if page.photometric == tiff.RGB and page.samples == 3 else 5 if page.samples == 1 else 8)
    return unpacked + (18 if page.samples > 1 else 8)


def _stored_bytes(mode: str) -> int:
    """The bytes of a pixel in Pillow's memory."""
    return 2 if mode.startswith("I;") else 1 if mode in ("1", "L", "P") else 4


def may_be_deep(stream: BinaryIO) -> bool:
    """Whether the first bytes of a file leave it open that its channels have 16 bits; of most files, they do not."""
    start = stream.read(25)
    stream.seek(0)
    if start.startswith(PNG_START):
        return start[24:] == b"\x10"  # the bit depth
    return start.startswith((*tiff.STARTS, *pnm.STARTS))


def decode(data: bytes, max_pixels: int, page: int | None = None, *, cut: bool = False) -> Decoded:
    """Decode the content of an image file to upright pixels of whatever mode the file has.

    Args:
        data: the content.
        max_pixels: the most pixels that are decoded.
        page: the page or frame, counted from 1; the first unless given.
        cut: whether the upper 8 of 16 bits are enough.

    Raises:
        InputError: for content that is empty, of an unknown format, of more than `max_pixels` pixels, or without such a page.
            On damaged content, Pillow raises nearly anything; `naming_file` makes an InputError of it.
    """
    start = data[:16]
    if start.startswith(tiff.STARTS):
        return _decode_tiff(data, max_pixels, page, cut=cut)
    image = _open(BytesIO(data), start)
    _check_size(*image.size, max_pixels)
    if isinstance(image, PpmImageFile) and _is_deep(image):
        values, depth = pnm.decode_deep(data, image)
        return Decoded(values, depth)
    frame = (page or 1) - 1
    if frame:
        if frame >= getattr(image, "n_frames", 1):
            raise InputError(f"it has {getattr(image, 'n_frames', 1)} pages, there is no page {page}")
        image.seek(frame)
    if page is not None and _is_deep(image):
        raise InputError("it is animated, with 16 bits a channel; save each frame as a file of its own")
    return _load(image, lambda: _open(BytesIO(data), start), cut=cut)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn whatever is raised inside into an InputError that names the file on one line, however odd its name is."""
    try:
        yield
    except Exception as error:  # not only in the outermost frame: on a damaged file, Pillow raises nearly anything
        if isinstance(error, InputError) and str(error).startswith(_CANNOT_USE):
            raise
        raise InputError(f"{_CANNOT_USE}{str(path)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file cannot be used."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    # What Pillow says of damage. Anything else is damage that it did not expect: its type helps whoever looks into that.
    expected = isinstance(error, OSError | SyntaxError | ValueError | EOFError) and str(error)
    said = str(error) if expected else f"{type(error).__name__}: {error}"
    return f"it is damaged, or of a kind that cannot be decoded ({said})"


def _open(stream: BinaryIO, start: bytes) -> ImageFile:
    if not start:
        raise InputError("the file is empty")
    reader = next((reader for starts, reader in _READERS if start.startswith(starts)), None)
    if reader is None:
        raise InputError(f"not a PNG, JPEG, BMP, TIFF, WebP or binary PBM, PGM or PPM file: it starts with {start[:8]!r}")
    return reader(stream)


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise InputError(f"{width} x {height} pixels are more than the {limit} allowed; scale it down or cut it up")


def _find_page(stream: BinaryIO, page: int | None, max_pixels: int) -> tiff.TiffPage:
    """The page of a TIFF, if it is one that can be read."""
    pages = tiff.read_pages(stream)
    found = pages[0] if page is None else next((one for one in pages if one.number == page), None)
    if found is None:
        raise InputError(f"it has {len(pages)} pages, there is no page {page}")
    # Of the readers, TIFF alone warns at Pillow's own limit as well: stay below it, see _READERS.
    _check_size(found.width, found.height, min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels))
    tiff.check_page(found)
    return found


def _decode_tiff(data: bytes, max_pixels: int, page: int | None, *, cut: bool) -> Decoded:
    found = _find_page(BytesIO(data), page, max_pixels)

    def reopen() -> ImageFile:
        image = TiffImageFile(BytesIO(data))
        if found.number > 1:
            image.seek(found.number - 1)
        return image

    if not tiff.pillow_reads(found):
        return _from_stored(tiff.read_by_tifffile(data, found), found)
    try:
        decoded = _load(reopen(), reopen, cut=cut)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError) as error:
        # An earlier page that Pillow does not know, a raw mode that it has not, or a codec that was not built into it. What is
        # damaged is not tried again: tifffile would fill in what is missing.
        if not isinstance(error, OSError) or tiff.is_rarely_built(found):
            return _from_stored(tiff.read_by_tifffile(data, found), found)
        raise InputError(f"this TIFF page is {found}, and its pixels could not be decoded: {error}; save it anew") from error
    if not isinstance(decoded.pixels, np.ndarray):
        return decoded
    depth = found.depth if found.depth < FULL_DEPTH else None
    if found.photometric == tiff.WHITE_IS_ZERO:
        return Decoded((np.uint16((1 << found.depth) - 1) - decoded.pixels).astype(np.uint16), depth)
    return Decoded(decoded.pixels, depth)


def _from_stored(values: npt.NDArray[Any], page: tiff.TiffPage) -> Decoded:
    """Upright pixels of those that tifffile read: colors and alpha remain, white becomes the largest value."""
    depth = 1 if values.dtype == np.bool_ else page.depth
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"its values run from {values.min()} to {values.max()}, expected 0 to 65535; save it with 16 bits")
    values = values.astype(np.uint16 if depth > 8 else np.uint8, copy=False)
    colors = 3 if page.photometric == tiff.RGB else 1
    kept = colors + (page.extra[:1] == (2,) or (colors == 3 and values.shape[2] == 4 and not page.extra))
    values = values[..., :kept]
    if page.photometric == tiff.WHITE_IS_ZERO:
        values = values.copy()
        values[..., 0] = (1 << min(depth, FULL_DEPTH)) - 1 - values[..., 0]
    transposed, rows, columns = _TURNS.get(page.orientation, (False, False, False))
    if transposed:
        values = values.swapaxes(0, 1)
    values = values[:: -1 if rows else 1, :: -1 if columns else 1]
    values = values[..., 0] if kept == 1 else values
    if depth > 8:
        return Decoded(np.ascontiguousarray(values), depth if depth < FULL_DEPTH else None)
    if depth < 8:
        values = (values.astype(np.uint16) * 255 // ((1 << depth) - 1)).astype(np.uint8)
    return Decoded(Image.fromarray(np.ascontiguousarray(values)))


def _orientation(image: ImageFile) -> int:
    """How an image is to be turned, where that can be told before it is decoded."""
    if isinstance(image, PngImageFile) and "exif" not in image.info:
        return 1  # to look for it behind the pixels, Pillow would decode them
    return int(image.getexif().get(_ORIENTATION, 1))


def _load(image: ImageFile, reopen: Callable[[], ImageFile], *, cut: bool) -> Decoded:
    """Decode an opened image and turn it upright; `reopen` opens it again."""
    raw = _raw_mode(image)
    if not _is_deep(image) or image.mode.startswith("I"):
        return decoded_of(_upright(image))
    if cut or not raw.startswith(("RGB;", "RGBA;", "RGBX;", "LA;")):
        return Decoded(_upright(image), is_cut=True)
    if raw.startswith("LA;"):
        halves = np.asarray(_upright(_with_raw_mode(image, "RGBA")))  # four bytes: gray and alpha
        return Decoded(_joined(halves[..., 0::2], halves[..., 1::2]))
    # Pillow unpacks one byte of each 16 bits. The raw mode of the other byte order unpacks the other one.
    upper = np.asarray(_upright(image))
    lower = np.asarray(_upright(_with_raw_mode(reopen(), raw[:-1] + _other_order(raw[-1]))))
    return Decoded(_joined(upper, lower))


def _joined(upper: npt.NDArray[Any], lower: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """16 bits of their upper and lower 8."""
    both = upper.astype(np.uint16)
    both <<= 8
    both |= lower
    return both


def _upright(image: ImageFile) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # this decodes the pixels as well
    return image


def _is_deep(image: ImageFile) -> bool:
    return image.mode.startswith("I") or ";16" in _raw_mode(image) or (isinstance(image, PpmImageFile) and pnm.is_deep(image))


def _raw_mode(image: ImageFile) -> str:
    """How the bytes of an image that is not decoded yet are unpacked."""
    if not image.tile:
        return ""
    arguments = image.tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _with_raw_mode(image: ImageFile, raw: str) -> ImageFile:
    tiles = cast(list[Any], image.tile)
    image.tile = [
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])) for tile in tiles
    ]  # fmt: skip
    return image


def _other_order(order: str) -> str:
    if order == "N":
        return "B" if sys.byteorder == "little" else "L"
    return "B" if order == "L" else "L"
