"""Names the pages of a file: `scan.tif#2` is page 2 of `scan.tif`. Each page of a TIFF or frame of an animation is an image.

Only headers are read here, no pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from spade_faiss.core.errors import InputError
from spade_faiss.core.files import hash_file
from spade_faiss.features import tiff
from spade_faiss.features.video_names import split_time

PNG_START = b"\x89PNG\r\n\x1a\n"
_PAGE_NAME = re.compile(r"(.+)#([1-9]\d{0,8})", re.DOTALL)


def split_page(path: Path) -> tuple[Path, int | None]:
    """The file and the page number that a path such as `scan.tif#2` names; without a page, the path and None.

    A file that is really named so is itself.
    """
    found = _PAGE_NAME.fullmatch(path.name)
    if found is None or path.is_file():
        return path, None
    return path.with_name(found[1]), int(found[2])


def list_pages(path: Path) -> list[Path]:
    """The images that a file holds: the path itself, or `path#1`, `path#2` ... if it has several pages.

    A file that cannot be read is one image, too: decoding it says what is wrong.
    """
    try:
        with path.open("rb") as stream:
            numbers = _page_numbers(stream)
    except (OSError, InputError, struct.error):
        return [path]
    return [path] if len(numbers) < 2 else [path.with_name(f"{path.name}#{number}") for number in numbers]


def file_of(path: Path) -> Path:
    """The file that holds an image: of a page or a frame of a video, that which it is a part of."""
    named = split_time(path)
    return split_page(path)[0] if named is None else named[0]


def hash_image(path: Path) -> str:
    """The sha256 that names an image: that of its file; of a page or a frame, of it and its number or time."""
    return part_digest(hash_file(file_of(path)), path)


def hash_images(paths: Sequence[Path]) -> list[str]:
    """`hash_image` of each path; a file of several images is read once."""
    files = list(dict.fromkeys(map(file_of, paths)))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = dict(zip(files, pool.map(hash_file, files), strict=True))
    return [part_digest(digests[file_of(path)], path) for path in paths]


def part_digest(file_sha256: str, path: Path) -> str:
    """The sha256 that names an image whose file has this one, see `hash_image`."""
    if (named := split_time(path)) is not None:
        return hashlib.sha256(f"{file_sha256}#t={named[1]}".encode()).hexdigest()
    page = split_page(path)[1]
    return file_sha256 if page is None else hashlib.sha256(f"{file_sha256}#{page}".encode()).hexdigest()


def _page_numbers(stream: BinaryIO) -> list[int]:
    start = stream.read(16)
    if start.startswith(tiff.STARTS):
        return [page.number for page in tiff.read_pages(stream)]
    if start.startswith(PNG_START):
        return list(range(1, _count_png_frames(stream) + 1))
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return list(range(1, _count_webp_frames(stream) + 1))
    return [1]


def _count_png_frames(stream: BinaryIO) -> int:
    """The frames of an animated PNG; its default image is one of them, whether or not it is part of the animation."""
    stream.seek(len(PNG_START))
    frames, is_animated, has_default = 0, False, False
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IDAT":
            if not is_animated:
                return 1
            has_default = has_default or frames == 0
        is_animated = is_animated or name == b"acTL"
        frames += name == b"fcTL"
        stream.seek(length + 4, 1)
    return max(1, frames + has_default)


def _count_webp_frames(stream: BinaryIO) -> int:
    stream.seek(12)
    frames = 0
    while len(head := stream.read(8)) == 8:
        name, length = struct.unpack("<4sI", head)
        if name not in (b"VP8X", b"ANMF") and frames == 0 and name in (b"VP8 ", b"VP8L"):
            return 1
        frames += name == b"ANMF"
        stream.seek(length + length % 2, 1)
    return max(1, frames)
