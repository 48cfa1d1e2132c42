"""Files that nobody ever meets half-written: made beside their place, put safely on disk, renamed into it."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spade_faiss.errors import InputError, NotFoundError

# What a process that was killed leaves behind. Short, so that any name that fits into a folder can be written there, and
# without the suffix of the real file, so that a search for `*.h5` does not meet it.
TEMPORARY_PATTERN = ".spade-*.tmp"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path in the folder of `path`; what is written there becomes the file `path` when the block ends well.

    The file is on disk before it is renamed, and the renaming is on disk before the block is left, so that after a power cut
    `path` is the old file or the new one. If the block raises, the temporary file is removed and `path` stays as it was.
    The file must be closed by the end of the block. Its name does not tell its format: name that to whatever writes it.

    Args:
        path: the file to make or to replace; its folder exists.

    Raises:
        NotFoundError: the folder does not exist.
        InputError: `path` is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise NotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder")
    temporary = target.parent / TEMPORARY_PATTERN.replace("*", secrets.token_hex(8))
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Make or replace the file `path` with `data`, atomically; raises as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put the names in `folder` safely on disk, where the system can do that for a folder."""
    if os.name == "nt":  # a folder cannot be opened there, and a renaming is journalled
        return
    try:
        _sync(Path(folder), os.O_RDONLY)
    except OSError as error:  # some network and user-space file systems have no fsync for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
