"""Files and folders of a bank, which may come from anybody: never through a link, never a pipe, a socket or a device.

The path of the bank itself may be a link. Of what lies below it, every folder has to be a folder and every file a file: whoever
made the bank must not choose what else is read, written or deleted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path

from spade_faiss.core.errors import AccessError, BankError, InputError, SpadeError

# A pipe that nobody writes to, or a device, would keep an open waiting; a link would lead out of the bank.
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_READ_BYTES = 1 << 20

# What a link to a folder is on Windows, where it is no symbolic link.
_JUNCTION = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)


def check_inside(root: Path, *names: str, kind: str | None = None) -> Path:
    """Return a path below a folder, and check that nothing on it is a link.

    Args:
        root: the folder; it may be a link.
        names: the parts of the path below it. All but the last are folders; any may be missing.
        kind: what the last one has to be where it is not missing, a `file` or a `folder`; None for either.

    Raises:
        BankError: if one of them is a link, or not what it has to be.
        AccessError: if the operating system does not let us look.
    """
    path = root
    for number, name in enumerate(names, start=1):
        path /= name
        found, expected = _kind(path), "folder" if number < len(names) else kind
        if found is None:
            break
        if expected not in (None, found):
            raise BankError(f"{path} is a {found}, expected a {expected}; remove it")
    return root.joinpath(*names)


def is_regular(path: Path) -> bool:
    """Tell whether there is a file at a path; it raises what `check_inside` raises for a link, a pipe and the like."""
    return _kind(path) == "file"


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder whose names match a pattern, no folders; it raises what `is_regular` raises."""
    return [path for path in sorted(folder.glob(pattern)) if is_regular(path)]


def check_tree(folder: Path, names: Collection[str], depth: int) -> None:
    """Check that all that lies below a folder under some names, so many folders deep, are files and folders.

    Raises:
        BankError: for a link, a pipe, a socket or a device; the message names it.
    """
    for name in sorted(names):
        if _kind(folder / name) == "folder":
            _check_folder(folder / name, depth - 1)


def _check_folder(folder: Path, depth: int) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    continue
                if _kind(Path(entry.path)) == "folder" and depth > 0:
                    _check_folder(Path(entry.path), depth - 1)
    except FileNotFoundError:  # another process has just removed it
        return
    except OSError as error:
        raise cannot_open(folder, error) from error


def open_regular(path: Path, *, follow_links: bool = False) -> int:
    """Open a file for reading, without waiting; return its descriptor.

    Args:
        path: the file.
        follow_links: whether it may be a link to a file, as a file of the user's may, and one of a bank's may not.

    Raises:
        FileNotFoundError: if there is none.
        BankError: for a link, a folder, a pipe, a socket or a device.
        AccessError: if the operating system does not open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_WAITING | (0 if follow_links else _NO_LINK))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_open(path, error) from error
    try:
        if not stat.S_ISREG(status := os.fstat(descriptor).st_mode):
            raise BankError(f"{path} is {_called(status)}, expected a file; remove it")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path, most: int, remedy: str = "remove it") -> bytes:
    """Read a whole file of up to `most` bytes; it raises what `open_regular` raises, and BankError for a larger file."""
    descriptor = open_regular(path)
    try:
        if (size := os.fstat(descriptor).st_size) > most:
            raise BankError(f"{path} is of {size} bytes, more than the {most} that such a file may have; {remedy}")
        parts, rest = [], size
        while rest and (part := os.read(descriptor, min(rest, _READ_BYTES))):
            parts.append(part)
            rest -= len(part)
        return b"".join(parts)
    except OSError as error:
        raise cannot_open(path, error) from error
    finally:
        os.close(descriptor)


def cannot_open(path: Path, error: OSError) -> SpadeError:
    """Return the error that says why the operating system does not open a file: that is not damage in most cases."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return AccessError(f"cannot open {path}: too many files are open; close some, or raise the limit with: ulimit -n 4096")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessError(f"cannot open {path}: permission denied; give yourself the right to read it")
    if error.errno == errno.ENOMEM:
        return AccessError(
            f"cannot open {path}: the process has no memory left for it; raise its limit, or use a machine with more"
        )
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return _link(path)
    if error.errno == errno.ENXIO:  # a socket, or a pipe
        return BankError(f"{path} is no file; remove it")
    return AccessError(f"cannot read {path}: {error.strerror or error}")


def _kind(path: Path) -> str | None:
    """Return whether a `file` or a `folder` is there, None if there is nothing; raise BankError for anything else."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # a NUL, or text that no file name can have
        raise InputError(f"{str(path)!r} cannot be the name of a file: {error}") from error
    except OSError as error:
        raise cannot_open(path, error) from error
    if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", -1) == _JUNCTION:
        raise _link(path)
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    raise BankError(f"{path} is {_called(status.st_mode)}, expected a file or a folder; remove it")


def _link(path: Path) -> BankError:
    return BankError(
        f"{path} is a link, and a bank must not lead out of its folder; put a copy of what it links to in its place"
    )


def _called(mode: int) -> str:
    kinds = [(stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISLNK, "a link")]
    return next((name for test, name in kinds if test(mode)), "a device")
