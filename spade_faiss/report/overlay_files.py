"""Overlays as PNG files that are named after their images, as far as a file system has such names."""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
from pathlib import Path, PurePosixPath

from spade_faiss.core.text import printable
from spade_faiss.report.pictures import Picture, write_png

# What a file system answers to a name that it does not have.
_NO_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
_NAME_BYTES = 255
# Of Linux; what is written here is moved to a folder with a name of up to 255 bytes.
_PATH_BYTES = 4096 - _NAME_BYTES - 64
_SHORT_BYTES = 100


class OverlayFiles:
    """Writes overlays into a folder, each under a name of its own, also where letters of both cases are one.

    `spot/1.png` becomes `spot/1.png.png`. A name that is too long, or taken, is shortened and gets a part of its checksum; so
    does one with characters that are orders to whatever lists the folder, and these are escaped.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._name_bytes = min(_NAME_BYTES, os.statvfs(folder.parent).f_namemax or _NAME_BYTES)

    def write(self, image: str, picture: Picture) -> str:
        """Write the overlay of an image; returns its path below the folder, with `/` on any system."""
        name = self._choose(image)
        try:
            self._write(name, picture)
        except OSError as error:
            if error.errno not in _NO_NAME:
                raise
            name = PurePosixPath(_digest(image) + ".png")
            self._write(name, picture)
        self._files.add(_key(name))
        self._folders.update(map(_key, name.parents))
        return name.as_posix()

    def _write(self, name: PurePosixPath, picture: Picture) -> None:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, picture)

    def _choose(self, image: str) -> PurePosixPath:
        *folders, last = image.split("/")
        short = f"{_cut(printable(last))}-{_digest(image)[:16]}.png"
        candidates = ([*folders, f"{last}.png"], [*folders, short], [short])
        return next(PurePosixPath(*parts) for parts in candidates if parts == [short] or self._is_free(parts))

    def _is_free(self, parts: list[str]) -> bool:
        if any(part in ("", ".", "..") or len(os.fsencode(part)) > self._name_bytes for part in parts):
            return False
        if any(part != printable(part) for part in parts):
            return False
        path = PurePosixPath(*parts)
        if len(os.fsencode(self._folder / path)) > _PATH_BYTES:
            return False
        key = _key(path)
        return key not in self._files | self._folders and not any(_key(parent) in self._files for parent in path.parents)


def _key(path: PurePosixPath) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path.as_posix()).casefold())


def _digest(image: str) -> str:
    return hashlib.sha256(image.encode("utf-8", "surrogateescape")).hexdigest()


def _cut(name: str) -> str:
    """The beginning of a name, in whole characters."""
    return os.fsencode(name)[:_SHORT_BYTES].decode("utf-8", "ignore")
