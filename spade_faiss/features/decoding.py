"""Decodes image files: bytes become an upright RGB image with 8 bits a channel, or an error that names the file.

No function here touches global state, so that all of them may run in many threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spade_faiss.core.errors import InputError

MAX_PIXELS = 100_000_000

# The first bytes of a file choose its reader. Image.open() would choose, too, but it warns above a pixel limit of the whole
# process (Image.MAX_IMAGE_PIXELS), which cannot be silenced or changed for one call without changing it for every thread.
_READERS: tuple[tuple[tuple[bytes, ...], type[ImageFile]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ((b"\xff\xd8\xff",), JpegImageFile),
    ((b"BM",), BmpImageFile),
    ((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), TiffImageFile),
    ((b"RIFF",), WebPImageFile),
    # Binary ones. Of those written as text (P1 to P3), Pillow reads a file of comments in quadratic time.
    ((b"P4", b"P5", b"P6"), PpmImageFile),
)


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file (its first page or frame) to upright RGB with 8 bits a channel.

    16 bits become 8 by dropping the lower byte: data that uses fewer than 16 bits, as 12-bit cameras write it, comes out dark
    and should be scaled beforehand, all images alike. Alpha is dropped.

    Raises:
        InputError: for a file that is missing, cannot be decoded, or holds more than `max_pixels` pixels (a TIFF: or more than
            `PIL.Image.MAX_IMAGE_PIXELS`); it names the path and the reason.
    """
    path = Path(path)
    with naming_file(path):
        return to_rgb(decode(path.read_bytes(), max_pixels))


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the content of an image file to an upright image of whatever mode the file has.

    Raises:
        InputError: for content that is empty, of an unknown format, or of more than `max_pixels` pixels. On damaged content,
            Pillow raises nearly anything; `naming_file` makes an InputError of it.
    """
    if not data:
        raise InputError("the file is empty")
    reader = next((reader for starts, reader in _READERS if data.startswith(starts)), None)
    if reader is None:
        raise InputError(f"not a PNG, JPEG, BMP, TIFF, WebP or binary PBM, PGM or PPM file: it starts with {data[:8]!r}")
    image = reader(BytesIO(data))
    # Of the readers, TIFF alone warns at Pillow's own limit as well: stay below it, see _READERS.
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels) if reader is TiffImageFile else max_pixels
    if image.width * image.height > limit:
        raise InputError(f"{image.width} x {image.height} pixels are more than the {limit} allowed; scale it down or cut it up")
    ImageOps.exif_transpose(image, in_place=True)  # this decodes the pixels as well
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB with 8 bits a channel, see `read_image`.

    Raises:
        InputError: for floating point pixels, and for integers beyond 16 bits.
    """
    if image.mode == "F":
        raise InputError("its pixels are floating point numbers of unknown range; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        # One fixed scale, which Pillow uses for 16-bit color, too: stretching each image to its own range would make equal
        # parts look different from image to image.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"its values run from {values.min()} to {values.max()}, expected 0 to 65535; save it with 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    # Alpha is dropped, as torchvision's loaders do: blending would invent a background, and a photograph whose writer left
    # alpha at zero would come out black. (Without the pop, Pillow warns about palettes with alpha.)
    image.info.pop("transparency", None)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn whatever is raised inside into an InputError that names the file on one line, however odd its name is."""
    try:
        yield
    except Exception as error:  # not only in the outermost frame: on a damaged file, Pillow raises nearly anything
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"cannot use {str(path)!r}: {reason}") from error
