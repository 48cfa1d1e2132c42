"""The files of the history, named by the ids of their records: pictures as they came, and their score maps.

Nothing that a client sends becomes part of a path. What is not in the database yet lies in a folder of its own, so that after a
kill it is known which files have no record.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spade_faiss.core.errors import InputError
from spade_faiss.core.types import FloatArray
from spade_faiss.serve.history.records import is_id, time_of

MAP = ".map.npy"
_PICTURES, _INCOMING, _NORMALS, _EXPORTS = "pictures", "incoming", "normals", "exports"
# What a file begins with, and the suffix that it gets: that of a client's name means nothing.
_STARTS = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"BM", ".bmp"),
    (b"II", ".tif"),
    (b"MM", ".tif"),
    (b"RIFF", ".webp"),
    (b"P4", ".pbm"),
    (b"P5", ".pgm"),
    (b"P6", ".ppm"),
)
SUFFIXES = tuple(dict.fromkeys(suffix for _, suffix in _STARTS))
_LARGEST_HALF = 65504.0


class Files:
    """The files below the server's folder.

    Args:
        root: the folder; it is made if there is none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        for name in (_PICTURES, _INCOMING, _NORMALS, _EXPORTS):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @property
    def exports(self) -> Path:
        """The folder of what is made to be downloaded, which is emptied at every start."""
        return self.root / _EXPORTS

    def incoming(self, name: str, suffix: str = ".part") -> Path:
        """Where a file lies before its record is in the database."""
        return self.root / _INCOMING / f"{_checked(name)}{suffix}"

    def picture_path(self, name: str, suffix: str) -> Path:
        """The picture of a record, as it came."""
        return self._found(name, suffix)

    def map_path(self, name: str) -> Path:
        """The score map of a record, `.npy`."""
        return self._found(name, MAP)

    def normals(self, bank: str) -> Path:
        """The folder of the pictures that answers put into a bank, whose records may be removed."""
        return self.root / _NORMALS / _folder_name(bank)

    def write_map(self, name: str, scores: FloatArray) -> int:
        """Write a score map (H, W) where files without records lie; returns its bytes.

        It is kept as float16, which is exact to three digits, unless that is too small for its values.
        """
        dtype = np.float16 if float(np.abs(scores).max(initial=0.0)) <= _LARGEST_HALF else np.float32
        content = io.BytesIO()  # NumPy writes to a file without saying why it cannot, such as that the disk is full
        np.save(content, scores.astype(dtype), allow_pickle=False)
        return self.incoming(name, MAP).write_bytes(content.getbuffer())

    def read_map(self, name: str) -> FloatArray | None:
        """The score map of a record as float32; None if it has none, or no more."""
        try:
            with self.map_path(name).open("rb") as file:
                return np.load(file, allow_pickle=False).astype(np.float32)  # type: ignore[no-any-return]
        except FileNotFoundError:
            return None

    def settle(self, name: str, suffixes: tuple[str, ...]) -> None:
        """Move the files of a record, which is in the database by now, to their place."""
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in suffixes:
            self.incoming(name, suffix).replace(folder / f"{name}{suffix}")

    def drop(self, name: str) -> None:
        """Remove the files of a picture that gets no record."""
        for suffix in (".part", MAP, *SUFFIXES):
            self.incoming(name, suffix).unlink(missing_ok=True)

    def remove(self, name: str, suffix: str) -> None:
        """Remove the files of a record."""
        for path in (self.picture_path(name, suffix), self.map_path(name)):
            path.unlink(missing_ok=True)

    def unsettled(self) -> dict[str, list[Path]]:
        """The files that a kill left where files without records lie, by the ids in their names."""
        found: dict[str, list[Path]] = {}
        for path in (self.root / _INCOMING).iterdir():
            found.setdefault(path.name.split(".", 1)[0], []).append(path)
        return found

    def forget_empty_folders(self) -> None:
        """Remove the folders whose pictures were all removed."""
        for day in (self.root / _PICTURES).iterdir():
            for folder in (*_folders(day), day):
                try:
                    folder.rmdir()
                except OSError:
                    continue

    def _found(self, name: str, suffix: str) -> Path:
        """Where a file of a record is, or would be; a kill may have left it among those without one."""
        path = self._folder(name) / f"{name}{suffix}"
        if not path.exists() and (unsettled := self.incoming(name, suffix)).exists():
            return unsettled
        return path

    def _folder(self, name: str) -> Path:
        moment = time_of(_checked(name))
        return self.root / _PICTURES / f"{moment:%Y-%m-%d}" / f"{moment:%H}"


def suffix_of(start: bytes) -> str:
    """The suffix for a file that begins with these bytes.

    Raises:
        InputError: if it is of no kind that can be read.
    """
    for begins, suffix in _STARTS:
        if start.startswith(begins):
            return suffix
    raise InputError(f"not a PNG, JPEG, BMP, TIFF, WebP or binary PBM, PGM or PPM file: it starts with {start[:8]!r}")


def _checked(name: str) -> str:
    if not is_id(name):
        raise InputError(f"{name[:40]!r} is no id of a picture: 32 hex characters")
    return name


def _folder_name(bank: str) -> str:
    """The name of a bank as that of a folder; banks are named by whoever starts the server, yet are no paths."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in bank).lstrip(".") or "_"


def _folders(day: Path) -> Iterator[Path]:
    with os.scandir(day) as entries:
        yield from (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
