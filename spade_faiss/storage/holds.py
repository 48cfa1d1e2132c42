"""Which files of a cache are in use, by locks that the system drops when their process ends; one descriptor for any number."""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Linux's locks of an open file, not of a process: two threads that open it on their own exclude each other.
_SET = getattr(fcntl, "F_OFD_SETLK", None)
_LOCK_FORMAT = "hhqqih"
_OFFSET_DIGITS = 15
_RETRY_S = 0.002

_log = logging.getLogger(__name__)


class Holds:
    """The files of a cache that this process uses, each named by its checksum.

    A file is a byte of the lock file. Where there are no such locks, nothing is held: a file that is unlinked while it is
    mapped stays readable all the same.

    Args:
        path: the lock file, which is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._count: Counter[str] = Counter()
        self._given_back: deque[str] = deque()
        self._guard = threading.Lock()
        self._descriptor = _open(self._path)

    def take(self, sha256: str) -> None:
        """Hold a file once more; wait while it is being deleted."""
        if self._pid != os.getpid():  # a fork shares the locks of its parent: it takes its own
            self._begin()
        while True:
            with self._guard:
                self._settle()
                if self._count[sha256] or _lock(self._descriptor, fcntl.F_RDLCK, sha256):
                    self._count[sha256] += 1
                    return
            time.sleep(_RETRY_S)

    def give_back(self, sha256: str, pid: int) -> None:
        """Let go of a file that the process `pid` took. The garbage collector may call it, in the midst of anything."""
        if pid != os.getpid() or pid != self._pid:
            return
        self._given_back.append(sha256)
        if self._guard.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._guard.release()

    def _settle(self) -> None:
        while self._given_back:
            sha256 = self._given_back.popleft()
            self._count[sha256] -= 1
            if self._count[sha256] <= 0:
                del self._count[sha256]
                _lock(self._descriptor, fcntl.F_UNLCK, sha256)


@contextmanager
def freed(path: Path, sha256: str) -> Iterator[bool]:
    """Tell whether no process, this one included, holds a file; until the block ends, none can take it.

    Args:
        path: the lock file.
        sha256: the file's checksum.
    """
    descriptor = _open(path)
    try:
        yield _lock(descriptor, fcntl.F_WRLCK, sha256)
    finally:
        os.close(descriptor)  # and the lock with it


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(descriptor: int, kind: int, sha256: str) -> bool:
    """Lock or unlock the byte of a file; return False if somebody else has it."""
    if _SET is None:
        return True
    start = int(sha256[:_OFFSET_DIGITS], 16)
    try:
        fcntl.fcntl(descriptor, _SET, struct.pack(_LOCK_FORMAT, kind, os.SEEK_SET, start, 1, 0, 0))
    except BlockingIOError:
        return False
    except OSError as error:
        _log.debug("the file system of the cache has no locks: %s", error)
    return True
