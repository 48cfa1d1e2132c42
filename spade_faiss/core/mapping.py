"""Files that are mapped into memory without a descriptor of their own, and a few descriptors that all of them share.

A bank of many shards has all of them mapped, while a process may have as few as 256 files open. Python's own `mmap` keeps a
descriptor for each mapping before version 3.13.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.core.errors import AccessError, BankError
from spade_faiss.core.inside import cannot_open, open_regular

# The same on Linux, macOS and the BSDs; Python's `mmap` does not name it.
_MAP_FIXED = 0x10

# Descriptors that stay open between reads. More are opened while more threads read at the same time.
_OPEN = 32


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was when it was mapped: where it is, which one it is, and how long."""

    path: Path
    device: int
    inode: int
    size: int

    @staticmethod
    def of(path: Path, descriptor: int) -> FileIdentity:
        """Return the identity of an opened file."""
        status = os.fstat(descriptor)
        return FileIdentity(path, status.st_dev, status.st_ino, status.st_size)

    def is_of(self, status: os.stat_result) -> bool:
        """Tell whether a file is the one that was mapped.

        Raises:
            BankError: if it is, and has become shorter: its mapping must not be read any more.
        """
        if (status.st_dev, status.st_ino) != (self.device, self.inode):
            return False
        if status.st_size < self.size:
            raise BankError(f"{self.path} is shorter than when it was opened; restore it from a backup")
        return True

    def check_length(self) -> None:
        """Raise BankError if the file has become shorter since: reading its mapping would end the process."""
        try:
            self.is_of(self.path.stat())
        except FileNotFoundError:  # it was deleted: what is mapped of it stays
            return
        except OSError as error:
            raise cannot_open(self.path, error) from error


def map_file(descriptor: int, size: int) -> mmap.mmap:
    """Map a file into memory, read-only. The mapping keeps no descriptor; that of the file may be closed.

    Raises:
        OSError: if it cannot be mapped.
    """
    if os.name == "nt":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    # A mapping of nothing has no descriptor, and one of the file is put into its place.
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    found = _libc().mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    if found != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return mapped


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    return libc


@dataclass
class _Open:
    """A descriptor that is open, and how many threads read from it now."""

    descriptor: int
    users: int = 0


class Descriptors:
    """Descriptors that stay open between reads, so many at most; files that were not read for long are closed first.

    Args:
        most: how many.
    """

    def __init__(self, most: int = _OPEN) -> None:
        self._most = most
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()
        self._keys = itertools.count()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def __len__(self) -> int:
        return len(self._open)

    def register(self, owner: object) -> int:
        """Return a key for an object that reads a file; the file is closed when the object is gone."""
        key = next(self._keys)
        weakref.finalize(owner, self._close, key).atexit = False
        return key

    @contextmanager
    def of(self, key: int, file: FileIdentity) -> Iterator[int | None]:
        """Yield a descriptor of a file; None if it is not the file that was mapped any more, or no more files can be opened.

        Raises:
            BankError: if the file has become shorter.
        """
        opened = self._take(key, file)
        try:
            yield None if opened is None else opened.descriptor
        finally:
            if opened is not None:
                with self._lock:
                    opened.users -= 1
                    self._close_some()

    def _take(self, key: int, file: FileIdentity) -> _Open | None:
        with self._lock:
            opened = self._open.pop(key, None)
            if opened is None and (descriptor := _open_same(file)) is not None:
                opened = _Open(descriptor)
            if opened is not None:
                opened.users += 1
                self._open[key] = opened  # last: it was read most recently
                self._close_some()
            return opened

    def _close_some(self) -> None:
        idle = (key for key, opened in self._open.items() if not opened.users)
        for key in list(itertools.islice(idle, max(0, len(self._open) - self._most))):
            os.close(self._open.pop(key).descriptor)

    def _close(self, key: int) -> None:
        # Called by the garbage collector, maybe in a thread that holds the lock: single operations on a dict need none.
        opened = self._open.pop(key, None)
        if opened is not None:
            os.close(opened.descriptor)

    def _forked(self) -> None:
        """Forget who was reading in the parent: its threads do not exist here."""
        self._lock = threading.Lock()
        for opened in self._open.values():
            opened.users = 0


def _open_same(file: FileIdentity) -> int | None:
    try:
        descriptor = open_regular(file.path)
    except (FileNotFoundError, AccessError):  # its mapping is read instead
        return None
    try:
        if file.is_of(os.fstat(descriptor)):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
