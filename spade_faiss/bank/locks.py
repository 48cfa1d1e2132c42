"""Who uses a bank: one writer at a time, who says who it is, and any number of readers."""

from __future__ import annotations

import json
import logging
import os
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

from spade_faiss.core.errors import BankError

LOCK = ".lock"
WRITER = ".writer.json"
READERS = ".readers"

# A lease is waited for as long: one who asks whether it is held holds it for a moment.
_PATIENCE_S = 1

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class WriterLock:
    """The right to write below a folder. The system gives it back when its process ends, however that ends.

    What its holder does may ask for it again, in any of its threads. `name` is what messages call the folder.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._guard = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._lock = FileLock(self._folder / LOCK, timeout=0, thread_local=False)
        self._depth = 0
        self._pid = os.getpid()

    @contextmanager
    def __call__(self, entered: Callable[[], None] = _nothing) -> Iterator[None]:
        """Hold the right.

        Args:
            entered: called when it was got, before anybody uses it; not called where it was held already.

        Raises:
            BankError: if another process, or another `Bank` in this one, holds it; names it.
        """
        with self._guard:
            if self._pid != os.getpid():  # a fork has a copy of the object, not the right
                self._begin()
            if self._depth == 0:
                self._acquire(entered)
            self._depth += 1
        try:
            yield
        finally:
            with self._guard:
                if self._pid == os.getpid():
                    self._depth -= 1
                    if self._depth == 0:
                        self._release()

    def _acquire(self, entered: Callable[[], None]) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise BankError(
                f"another process is writing to {self._name}: {self._holder()}; wait until it has finished"
            ) from error
        except OSError as error:
            raise BankError(f"cannot write to {self._name}: {error}") from error
        try:
            if (self._folder / WRITER).exists():
                _log.warning(
                    "the last writer of %s, %s, was interrupted; what it had committed is kept", self._name, self._holder()
                )
            who = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            (self._folder / WRITER).write_text(json.dumps(who))
            entered()
        except OSError as error:
            self._release()
            raise BankError(f"cannot write to {self._name}: {error}") from error
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        (self._folder / WRITER).unlink(missing_ok=True)
        self._lock.release()

    def _holder(self) -> str:
        """Who wrote its name there last."""
        try:
            who = json.loads((self._folder / WRITER).read_bytes())
            return f"process {who['pid']} on {who['host']} since {who['since']} ({who['command']})"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "its name is not known"


class Lease:
    """Says that somebody reads a bank's state, until its `end()`: files that it names stay as long."""

    def __init__(self, folder: Path, generation: int) -> None:
        self.path = folder.absolute() / READERS / f"{generation}-{secrets.token_hex(8)}"
        lock = FileLock(self.path, timeout=_PATIENCE_S, thread_local=False)
        try:
            self.path.parent.mkdir(exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            # On a disk that cannot be written nobody compacts either; and without locks, reading goes on without one.
            _log.debug("reading %s without a lease: %s", folder, error)
        self.end = weakref.finalize(self, _give_back, lock, self.path, os.getpid())


def readers(folder: Path, besides: Lease) -> list[int]:
    """The generations of a bank that others than the holder of a lease read; forgets readers that died."""
    generations = []
    for path in (folder / READERS).glob("*-*"):
        if path == besides.path:
            continue
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            with suppress(ValueError):  # none of ours
                generations.append(int(path.name.partition("-")[0]))
        except OSError as error:  # a disk that cannot be written: nobody there deletes what others read
            _log.debug("cannot tell whether %s is held: %s", path, error)
        else:
            _give_back(lock, path, os.getpid())
    return generations


def _give_back(lock: FileLock, path: Path, pid: int) -> None:
    if os.getpid() != pid:  # a fork has a copy of the object, not the lease
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)
    lock.release(force=True)
