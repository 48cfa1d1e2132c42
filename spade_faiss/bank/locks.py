"""Locks: one writer at a time, which says who it is, and leases of any number of readers."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from spade_faiss.core.errors import BankError, BusyError, SpadeError
from spade_faiss.core.inside import check_inside, is_regular, read_regular
from spade_faiss.core.process import PerProcess

LOCK = ".lock"
WRITER = ".writer.json"
READERS = ".readers"

# How long to wait for a lease of one's own: whoever asks whether it is held holds it for a moment.
_LEASE_TIMEOUT_S = 1

# What is said about a writer is short, and leases have names of their own: other files in their folder are left alone.
_MOST_BYTES = 1 << 16
_MOST_CHARACTERS = 200
_LEASE = re.compile(r"([0-9]{1,18})-[0-9a-f]{16}")

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class _Hold:
    """How often the threads of one process hold a lock."""

    def __init__(self, path: Path) -> None:
        self.lock = FileLock(path, timeout=0, thread_local=False)
        self.pid = os.getpid()
        self.depth = 0

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: a fork has a copy of the object, but not the lock."""
        return self.pid == os.getpid()


class WriterLock:
    """The lock of whoever writes below a folder. The system releases it when its process ends, however that ends.

    Whoever holds it may take it again, in any thread.

    Args:
        folder: the folder.
        name: what messages call the folder.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._guard = PerProcess(threading.Lock)
        self._hold = _Hold(folder / LOCK)

    @contextmanager
    def __call__(self, entered: Callable[[], None] = _nothing) -> Iterator[None]:
        """Hold the lock inside a `with` block.

        Args:
            entered: called once the lock was taken, before the block runs; not called where it was held already.

        Raises:
            BusyError: if another process, or another `Bank` in this one, holds it; the message names it.
            BankError: if one of the lock's
                files is a link, or no file.
        """
        with self._guard():
            if not self._hold.is_ours:
                self._hold = _Hold(self._folder / LOCK)
            hold = self._hold
            if hold.depth == 0:
                self._acquire(entered)
            hold.depth += 1
        try:
            yield
        finally:
            with self._guard():
                if hold.is_ours:
                    hold.depth -= 1
                    if hold.depth == 0:
                        self._release()

    def _acquire(self, entered: Callable[[], None]) -> None:
        for name in (LOCK, WRITER):
            check_inside(self._folder, name, kind="file")
        try:
            self._hold.lock.acquire()
        except Timeout as error:
            raise BusyError(
                f"another process is writing to {self._name}: {self._holder()}; wait until it has finished"
            ) from error
        except OSError as error:
            raise BankError(f"cannot write to {self._name}: {error}") from error
        try:
            if is_regular(self._folder / WRITER):
                _log.warning(
                    "the last writer of %s, %s, was interrupted; what it had committed is kept", self._name, self._holder()
                )
            who = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._write(json.dumps(who))
            entered()
        except OSError as error:
            self._release()
            raise BankError(f"cannot write to {self._name}: {error}") from error
        except BaseException:
            self._release()
            raise

    def _write(self, text: str) -> None:
        """Write the file anew: what has its name may have another one outside of the bank."""
        path = self._folder / WRITER
        path.unlink(missing_ok=True)
        with path.open("x") as file:
            file.write(text)

    def _release(self) -> None:
        (self._folder / WRITER).unlink(missing_ok=True)
        self._hold.lock.release()

    def _holder(self) -> str:
        """Return a description of the process that took the lock last."""
        try:
            who = json.loads(read_regular(self._folder / WRITER, _MOST_BYTES))
            host, since, command = (str(who[name])[:_MOST_CHARACTERS] for name in ("host", "since", "command"))
            return f"process {int(who['pid'])} on {host} since {since} ({command})"
        except (SpadeError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return "its name is not known"


class Lease:
    """Tells others that somebody reads a state of a bank; its files stay until `end()` is called, or the process ends.

    Raises:
        BankError: if the folder of leases is a link.
    """

    def __init__(self, folder: Path, generation: int) -> None:
        check_inside(folder, READERS)  # a file in its place is no harm: there is no lease then
        self.path = folder.absolute() / READERS / f"{generation}-{secrets.token_hex(8)}"
        lock = FileLock(self.path, timeout=_LEASE_TIMEOUT_S, thread_local=False)
        try:
            self.path.parent.mkdir(exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            # Nobody compacts a bank on a read-only disk; and where the file system has no locks, reading goes on without one.
            _log.debug("reading %s without a lease: %s", folder, error)
        self.end = weakref.finalize(self, _give_back, lock, self.path, os.getpid())


def readers(folder: Path, besides: Lease) -> list[int]:
    """Return the generations of a bank that are read by others than the holder of a lease; forget dead readers."""
    generations = []
    for path in check_inside(folder.absolute(), READERS).glob("*-*"):
        named = _LEASE.fullmatch(path.name)
        if path == besides.path or named is None or not is_regular(path):
            continue
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            generations.append(int(named[1]))
        except OSError as error:  # on a read-only disk nobody deletes what others read
            _log.debug("cannot tell whether %s is held: %s", path, error)
        else:
            _give_back(lock, path, os.getpid())
    return generations


def _give_back(lock: FileLock, path: Path, pid: int) -> None:
    """Release a lease and delete its file, in the process that took it."""
    if os.getpid() != pid:  # a fork has a copy of the object, but not the lease
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)
    lock.release(force=True)
