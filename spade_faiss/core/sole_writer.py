"""One writer at a time for something that is named, which says who it is; the lock goes when its holder goes."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from spade_faiss.core.errors import InputError

LOCK = "lock"
# Where a file system has no locks: writing goes on without.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_TRIES = 100

_log = logging.getLogger(__name__)


class SoleWriter:
    """Holds a lock file in a folder of its own, from its making to `end()`, which removes both.

    Args:
        folder: the folder; it is made, and removed if nothing else is left in it.
        name: what messages call that which is written.

    Raises:
        InputError: if another process holds it; names that process.
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._file = folder / LOCK
        self._descriptor = self._acquire()
        self.holds = True  # until `end`
        who = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(who).encode(), 0)
        except BaseException:
            self.end()
            raise

    def _acquire(self) -> int:
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                self._folder.mkdir()
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # the one before us has just removed the folder
                continue
            if self._lock(descriptor):
                return descriptor
        raise InputError(f"cannot write {self._name}: other processes begin and end all the time; try again")

    def _lock(self, descriptor: int) -> bool:
        """Whether the lock of an open file was got; False if the file had been removed when it was."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.info("the file system of %s has no locks: nobody keeps a second writer away", self._name)
                return True
            holder = _name_holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise InputError(
                f"another process is writing {self._name}: {holder}; wait until it has finished, or choose another folder"
            ) from error
        if os.fstat(descriptor).st_nlink:
            return True
        os.close(descriptor)
        return False

    def end(self) -> None:
        """Let others write."""
        # The file goes while it is locked: whoever has opened it already sees that it has no name, and makes a new one.
        for remove in (self._file.unlink, self._folder.rmdir):
            try:
                remove()
            except OSError as error:  # the next one has come, or something that is not ours is left
                _log.debug("cannot remove %s: %s", self._folder, error)
        os.close(self._descriptor)
        self.holds = False


def _name_holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']} ({who['command']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "its name is not known"
