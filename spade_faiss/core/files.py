"""Atomic file writes: a file is written under a temporary name, synced to disk, and renamed into its place."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from spade_faiss.core.copies import copy_of
from spade_faiss.core.errors import BankError, InputError, NotFoundError
from spade_faiss.core.inside import is_regular, open_regular

_log = logging.getLogger(__name__)

# The names of temporary files, which a killed process leaves behind. They are short, so that a file with the longest possible
# name can be written; they lack the suffix of the real file, so that a search for `*.h5` does not find them.
TEMPORARY_PATTERN = ".spade-*.tmp"

# What the names of files in a bank consist of. A record may come from anybody, and must not lead to another folder.
_FILE_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Of Linux's renameat2(2).
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there becomes `path` when the block ends without an error.

    The content reaches the disk before the file is renamed, and the new name reaches the disk before the block is left: after
    a power cut, `path` is either the old file or the new one. If the block raises, the temporary file is removed and `path`
    stays as it was. The file must be closed by the end of the block. Its name has no suffix that tells its format.

    Args:
        path: the file to create or replace.

    Raises:
        NotFoundError: if the folder of `path` does not exist.
        InputError: if `path` is a folder, or the disk has no room.
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_full(error):
            raise InputError(
                f"there is no room for {target} ({error}); make room and run the command again: what was there before is intact"
            ) from error
        raise
    sync_folder(target.parent)


def is_full(error: BaseException | None) -> bool:
    """Tell whether a disk, a quota or a limit on file sizes is exhausted. HDF5 has the error number in its text only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and (
        error.errno in numbers or any(f"errno = {number}," in str(error) for number in numbers)
    )


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Create or replace the file `path` atomically. It raises what `atomic_path` raises."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def exchange(one: Path, other: Path) -> None:
    """Give two files or folders each other's name, in one step that nobody sees half of.

    Raises:
        OSError: where the system or the file system cannot do that, or one of them is a mount point.
    """
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, "this system cannot exchange two names", str(one))
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Sync a folder, so that the names of its files survive a power cut; do nothing where the system cannot sync folders."""
    if os.name == "nt":  # Windows cannot open a folder, and its file system journals renames
        return
    try:
        _sync(Path(folder), os.O_RDONLY)
    except OSError as error:  # some network and user-space file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content. A link to a file is followed; a pipe, a device or the like is refused.

    Raises:
        FileNotFoundError: if there is none.
        BankError: if it is no file.
        AccessError: if the operating system does not open it.
    """
    with open(open_regular(path, follow_links=True), "rb") as file:  # noqa: PTH123  # of a descriptor
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(value: str) -> None:
    """Raise InputError unless a text is a sha256 in hex: it becomes part of the names of files."""
    if not _SHA256.fullmatch(value):
        raise InputError(f"sha256={value[:80]!r} is no checksum")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A record of a file that is written once: its name, size, modification time and checksum."""

    file: str
    bytes: int
    mtime_ns: int
    sha256: str

    def __post_init__(self) -> None:
        if not (0 <= self.mtime_ns < 1 << 63 and 0 <= self.bytes < 1 << 63 and _FILE_NAME.fullmatch(self.file)):
            raise InputError(
                f"file={self.file[:80]!r} with mtime_ns={self.mtime_ns} and bytes={self.bytes} cannot be the record of a file"
            )

    @staticmethod
    def of(path: Path, sha256: str) -> FileEntry:
        """Record a file whose checksum is known."""
        status = path.stat()
        return FileEntry(file=path.name, bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)


def check_file(path: Path, entry: FileEntry, name: str, where: str, remedy: str) -> None:
    """Check that the file at `path` is the one that was recorded.

    A file of the recorded size and modification time is trusted; of any other, the checksum is compared. One of a bank at a URL
    need not be here yet: its checksum is compared when it is fetched.

    Args:
        path: the file.
        entry: its record.
        name: what messages call the file.
        where: what messages call the place of the record.
        remedy: what the user can do about a file that is missing or changed; it ends the message.

    Raises:
        BankError: if the file is missing, is a link or no file, or is not the one that was recorded.
    """
    if copy_of(path) is not None:
        return
    if not is_regular(path):
        raise BankError(f"{name}, which {where} names, is missing; {remedy}")
    status = path.lstat()
    if (status.st_size, status.st_mtime_ns) == (entry.bytes, entry.mtime_ns):
        return
    found = f"{status.st_size} bytes" if status.st_size != entry.bytes else f"sha256 {hash_file(path)}"
    expected = f"{entry.bytes} bytes" if status.st_size != entry.bytes else f"sha256 {entry.sha256}"
    if found != expected:
        raise BankError(f"{name} has changed since it was written: {found}, {where} says {expected}; {remedy}")
    _log.info("%s has a new modification time, but its checksum is right", name)
    # The bank was copied: with its recorded time, the file need not be read in full when it is opened again. Where the file has
    # another name as well, it may be that of a file outside of the bank.
    if status.st_nlink > 1:
        return
    try:
        os.utime(path, ns=(status.st_atime_ns, entry.mtime_ns))
    except OSError:
        _log.info("could not restore the modification time of %s; it is read in full whenever it is opened", path)
