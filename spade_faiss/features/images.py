"""Images: folders (plain or MVTec-style) to records, files to pictures, masks placement exactly as their pictures.

No function here touches global state: all of them may run in many threads at once.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.schema import check_at_least
from spade_faiss.core.settings import Preprocess

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
# A folder, an image, or a list of them.
Images = str | Path | Sequence[str | Path]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 100_000_000
LAYOUT = "ROOT/train/good/*, ROOT/test/<kind>/* and, where there are masks, ROOT/ground_truth/<kind>/<stem>_mask.png"

_by_id = attrgetter("id")

# A file's first bytes choose its reader. Image.open() would do it too, but it warns above a process-wide pixel limit
# (Image.MAX_IMAGE_PIXELS), which cannot be silenced or changed for one call without changing it for every other thread.
_READERS: tuple[tuple[tuple[bytes, ...], type[ImageFile]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ((b"\xff\xd8\xff",), JpegImageFile),
    ((b"BM",), BmpImageFile),
    ((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), TiffImageFile),
    ((b"RIFF",), WebPImageFile),
)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image file: `id` is its posix path below the root it was found under, `kind` and `mask` belong to labeled sets."""

    id: str
    path: Path
    kind: str | None = None
    mask: Path | None = None

    @property
    def defective(self) -> bool | None:
        """Whether the image shows a defect: None where nobody said."""
        return None if self.kind is None else self.kind != "good"


@dataclass(frozen=True)
class Dataset:
    """A labeled set: normal images to learn from, images of all kinds to test with."""

    root: Path
    train: list[ImageRecord]
    test: list[ImageRecord]

    @property
    def has_masks(self) -> bool:
        """Whether the defects of the test images are drawn as masks."""
        return any(record.mask is not None for record in self.test)


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """How an image lies in the backbone's input, a square with sides of `size` pixels.

    The upright image, of `original` (width, height) pixels, is resized to `resized` (width, height) and its top left corner
    put at `offset` (x, y): negative cuts off, positive leaves a margin.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: int

    @property
    def visible(self) -> tuple[int, int, int, int]:
        """The part of the resized image that the input shows: (left, top, right, bottom)."""
        (width, height), (x, y) = self.resized, self.offset
        return max(0, -x), max(0, -y), min(width, self.size - x), min(height, self.size - y)

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The rows and columns of the input around that part: ((above, below), (left, right)), for `numpy.pad`."""
        left, top, right, bottom = self.visible
        x, y = max(0, self.offset[0]), max(0, self.offset[1])
        return (y, self.size - y - (bottom - top)), (x, self.size - x - (right - left))

    @property
    def valid(self) -> Mask:
        """(H, W), the part of the input that shows the image: False in letterbox's margins."""
        left, top, right, bottom = self.visible
        return np.pad(np.ones((bottom - top, right - left), dtype=np.bool_), self.padding)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A decoded image: the `picture` (H, W, 3) that the backbone sees, how the image lies in it, the sha256 of the file."""

    picture: Picture
    placement: Placement
    sha256: str


def find_images(source: str | Path | Sequence[str | Path]) -> tuple[Path, list[ImageRecord]]:
    """Find the images of a folder (at any depth), of one file, or of a list of files and folders.

    Hidden files and folders are left out, links to folders are not followed.

    Returns:
        The root (the folder, the file's folder, or the common parent of the list) and the records: those of a folder sorted
        by id, those of a list in its order.

    Raises:
        NotFoundError: for a path that does not exist.
        InputError: where there is no image, a listed file is none, or an image is listed twice.
    """
    sources = [source] if isinstance(source, str | Path) else source
    bases: list[Path] = []
    paths: list[Path] = []
    for item in map(Path, sources):
        if item.is_dir():
            bases.append(item.resolve())
            found = sorted(_walk(bases[-1]), key=lambda path: path.relative_to(bases[-1]).as_posix())
        elif not item.exists():
            raise NotFoundError(f"{str(item)!r} does not exist; give an image file, a folder of images, or a list of both")
        else:
            bases.append(item.parent.resolve())
            found = [bases[-1] / item.name] if item.is_file() and item.suffix.lower() in SUFFIXES else []
        if not found:
            raise InputError(f"no image in {str(item)!r}: looked for files ending in {' '.join(SUFFIXES)}")
        paths += found
    if not paths:
        raise InputError(f"the list of images is empty; give files ending in {' '.join(SUFFIXES)}, or folders of them")
    root = Path(os.path.commonpath(bases))
    records = [_record(path, root) for path in paths]
    if twice := [name for name, count in Counter(record.id for record in records).items() if count > 1]:
        raise InputError(f"listed twice, in {str(root)!r}: {_first(twice)}; list every image once, alone or with its folder")
    return root, records


def load_dataset(root: str | Path) -> Dataset:
    """Read a labeled set that is laid out as MVTec AD: `train/good`, `test/<kind>`, `ground_truth/<kind>`.

    `train/good` may be missing. Without a `ground_truth` folder the set has no masks; with one, every defective image has its
    mask there, named `<stem>_mask.png` or `<stem>.png`.

    Raises:
        NotFoundError: where there is no such folder.
        InputError: where `test` holds no images, or images outside the folders that name their kind, or a mask is missing.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise NotFoundError(f"dataset folder {str(root)!r} does not exist; expected {LAYOUT}")
    entries = sorted((root / "test").iterdir()) if (root / "test").is_dir() else []
    if strays := [f"test/{path.name}" for path in entries if path.is_file() and _is_image(path.name)]:
        raise InputError(f"images of no kind in {str(root)!r}: {_first(strays)}; expected {LAYOUT}")
    kinds = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    test = [_record(path, root, kind.name, _find_mask(path, root)) for kind in kinds for path in _walk(kind)]
    if not test:
        raise InputError(f"no test images in {str(root)!r}; expected {LAYOUT}, images ending in {' '.join(SUFFIXES)}")
    unmasked = sorted(record.id for record in test if record.defective and record.mask is None)
    if unmasked and (root / "ground_truth").is_dir():
        raise InputError(
            f"{len(unmasked)} defective images in {str(root)!r} have no mask: {_first(unmasked)}; expected "
            "ground_truth/<kind>/<stem>_mask.png for each of them (without a ground_truth folder, masks are not used)"
        )
    normal = root / "train" / "good"
    train = [_record(path, root, "good") for path in _walk(normal)] if normal.is_dir() else []
    return Dataset(root, sorted(train, key=_by_id), sorted(test, key=_by_id))


def check_skipped(skipped: Sequence[Skipped], max_skipped: int) -> None:
    """Raise InputError, naming the first of them, when more than `max_skipped` images were skipped."""
    check_at_least("max_skipped", max_skipped, 0)
    if len(skipped) > max_skipped:
        named = _first([f"{item.id!r} ({item.reason})" for item in skipped])
        raise InputError(
            f"{len(skipped)} images were skipped, at most {max_skipped} may be: {named}; "
            f"repair or remove them, or go on without them: --max-skipped {len(skipped)}"
        )


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file (its first page or frame) to upright RGB with 8 bits a channel.

    16 bits become 8 by dropping the lower byte: data that uses fewer than 16 bits (as 12-bit cameras write it) comes out dark
    and should be scaled beforehand, all images alike. Alpha is dropped.

    Raises:
        InputError: for a file that is missing, cannot be decoded, or holds more than `max_pixels` pixels (a TIFF: or more than
            `PIL.Image.MAX_IMAGE_PIXELS`); names path and reason.
    """
    path = Path(path)
    with _naming(path):
        return _to_rgb(_decode(path.read_bytes(), max_pixels))


def load(record: ImageRecord, preprocess: Preprocess, *, max_pixels: int = MAX_PIXELS) -> Loaded:
    """Read a record's file once: hash it, decode it as `read_image` does, place it as `to_picture` does.

    Raises:
        InputError: as `read_image` and `place`; names path and reason.
    """
    with _naming(record.path):
        data = record.path.read_bytes()
        image = _to_rgb(_decode(data, max_pixels))
        placement = place(*image.size, preprocess)
        return Loaded(to_picture(image, placement), placement, hashlib.sha256(data).hexdigest())


def place(width: int, height: int, preprocess: Preprocess) -> Placement:
    """Compute how an image of `width` x `height` pixels lies in the input.

    `crop` computes what torchvision does for PIL images: `Resize(resize)`, then `CenterCrop(crop)`, their rounding included
    (https://github.com/pytorch/vision/blob/v0.21.0/torchvision/transforms/functional.py).

    Raises:
        InputError: for `crop` and an image so long and thin that resizing its shorter side would take more than `MAX_PIXELS`.
    """
    check_at_least("width", width, 1)
    check_at_least("height", height, 1)
    original, size = (width, height), preprocess.crop
    if preprocess.resize_mode == "stretch":
        return Placement(original, (size, size), (0, 0), size)
    if preprocess.resize_mode == "letterbox":
        longer = max(width, height)
        resized = max(1, round(size * width / longer)), max(1, round(size * height / longer))
        return Placement(original, resized, ((size - resized[0]) // 2, (size - resized[1]) // 2), size)
    shorter = min(width, height)
    resized = int(preprocess.resize * width / shorter), int(preprocess.resize * height / shorter)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise InputError(
            f"{width} x {height} pixels are too thin for resize mode crop: resized to {resized[0]} x {resized[1]}, more than "
            f"{MAX_PIXELS} pixels; use --resize-mode letterbox or stretch, or cut it up"
        )
    return Placement(original, resized, (-round((resized[0] - size) / 2), -round((resized[1] - size) / 2)), size)


def to_picture(image: Image.Image, placement: Placement) -> Picture:
    """Resize an RGB image into its place: (H, W, 3) uint8, the picture as the backbone sees it; margins repeat its border."""
    if image.mode != "RGB":
        raise InputError(f"expected an RGB image, got mode {image.mode}; read_image gives RGB")
    return np.pad(_resize(image, placement, Image.Resampling.LANCZOS), (*placement.padding, (0, 0)), mode="edge")


def to_input(picture: Picture, preprocess: Preprocess) -> npt.NDArray[np.float32]:
    """Normalize a picture (H, W, 3) to the backbone's input: (3, H, W) float32, contiguous, (value / 255 - mean) / std."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    values = picture.transpose(2, 0, 1).astype(np.float32, order="C")
    values *= (1 / (255 * std)).astype(np.float32)
    values -= (mean / std).astype(np.float32)
    return values


def to_mask(path: str | Path, placement: Placement) -> Mask:
    """Read the mask of an image and resize it into the image's own place: (H, W), True is defective.

    A pixel is as bright as its brightest channel; the upper half of the range (above 127 of 255) is defective. Where nothing
    reaches that half, the values are labels (0 and 1, class numbers, dark palette colors): all but 0 are. Margins never are.

    Raises:
        InputError: as `read_image`, and for a mask whose size is not the image's; names path and reason.
    """
    path = Path(path)
    with _naming(path):
        image = _decode(path.read_bytes(), max(MAX_PIXELS, math.prod(placement.original)))
        if image.size != placement.original:
            width, height = placement.original
            raise InputError(
                f"the mask is {image.size[0]} x {image.size[1]} pixels, its image {width} x {height}; they must be of one size"
            )
        # Not through _to_rgb: the lower byte that it drops is all there is in a 16-bit file of labels.
        deep = image.mode.startswith("I")
        bright = np.asarray(image) if deep else np.asarray(_to_rgb(image)).max(axis=2)
        half = 32767 if deep else 127
        defect = bright > (half if bright.max() > half else 0)
        small = _resize(Image.fromarray(defect.astype(np.uint8)), placement, Image.Resampling.NEAREST)
        return np.pad(small > 0, placement.padding)


def _resize(image: Image.Image, placement: Placement, resampling: Image.Resampling) -> npt.NDArray[Any]:
    return np.asarray(image.resize(placement.resized, resampling).crop(placement.visible))


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise InputError("the file is empty")
    reader = next((reader for starts, reader in _READERS if data.startswith(starts)), None)
    if reader is None:
        raise InputError(f"not a PNG, JPEG, BMP, TIFF or WebP file: it starts with {data[:8]!r}")
    image = reader(BytesIO(data))
    # TIFF alone among the readers warns at Pillow's own limit, too: stay below it, see _READERS.
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels) if reader is TiffImageFile else max_pixels
    if image.width * image.height > limit:
        raise InputError(f"{image.width} x {image.height} pixels are more than the {limit} allowed; scale it down or cut it up")
    ImageOps.exif_transpose(image, in_place=True)  # decodes as well
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InputError("its pixels are floating point numbers of unknown range; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        # One fixed scale, the one Pillow uses for 16-bit color: stretching each image to its own range would
        # make equal parts look different from image to image.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"its values run from {values.min()} to {values.max()}, expected 0 to 65535; save it with 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    # Alpha is dropped, as torchvision's loaders do: blending would invent a background, and a photograph whose writer left
    # alpha at zero would come out black. (Without the pop, Pillow warns about palettes with alpha.)
    image.info.pop("transparency", None)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong into an InputError that names the file; repr keeps odd names on one line."""
    try:
        yield
    except Exception as error:  # not only in the outermost frame: on a damaged file Pillow raises nearly anything
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"cannot use {str(path)!r}: {reason}") from error


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {str(error.filename)!r}: {error.strerror}; make it readable, or move it elsewhere")

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if _is_image(name))
        # No pipes or devices: reading one could block for ever. A broken link stays in, to be reported when it is read.
        found += (path for path in paths if path.is_file() or not path.exists())
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _find_mask(path: Path, root: Path) -> Path | None:
    place = root / "ground_truth" / path.relative_to(root / "test").parent
    candidates = (place / f"{path.stem}_mask.png", place / f"{path.stem}.png")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _record(path: Path, root: Path, kind: str | None = None, mask: Path | None = None) -> ImageRecord:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the file name {name!r} is not valid UTF-8, as which ids are stored; rename the file") from error
    return ImageRecord(name, path, kind, mask if kind != "good" else None)


def _first(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
