"""The cache on disk: copies of what lies at URLs, checked by checksum, the least recently used ones evicted first."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from spade_faiss.core.copies import let_go
from spade_faiss.core.errors import AccessError, BankError, InputError
from spade_faiss.core.files import TEMPORARY_PATTERN, hash_file, is_full
from spade_faiss.core.inside import is_regular
from spade_faiss.core.memory import format_bytes, parse_bytes
from spade_faiss.core.settings import Caching
from spade_faiss.storage.holds import Holds, freed
from spade_faiss.storage.url import Url

FOLDER_VARIABLE = "SPADE_FAISS_CACHE"
BYTES_VARIABLE = "SPADE_FAISS_CACHE_BYTES"

_COPIES = "copies"
_KEPT = "kept"
_HOLDS = "holds"
_LOCKS = 64
# How often it is looked whether files in use have come free, where there are too many.
_LOOK_S = 1.0
# A temporary file that nothing was written to for so long was left by a process that was killed.
_ABANDONED_S = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A file of the cache that lies at its URL as well."""

    record: Path
    path: Path
    sha256: str
    bytes: int
    used_ns: int


class Cache:
    """A folder of copies, which any number of processes share.

    Of each URL there is a folder that holds the copy and, beside it, a record of each file that was checked: named by its
    checksum, so that no other file is taken for it, and saying which file that was.

    Args:
        folder: the folder; it is made when it is needed.
        most_bytes: how many bytes files that nobody uses may take.
        progress: whether to show a bar for a file that is fetched.
    """

    def __init__(self, folder: Path, most_bytes: int, *, progress: bool = False) -> None:
        self.folder = folder
        self.progress = progress
        self.most_bytes = most_bytes
        self._known: int | None = None
        self._guard = threading.Lock()
        self._is_told = False
        self._next_look_s = 0.0

    def place(self, url: Url) -> CachePlace:
        """Return the place of the copy of what lies at a URL.

        Raises:
            AccessError: if the cache's folder cannot be made.
        """
        home = self.folder / _COPIES / hashlib.sha256(str(url).encode()).hexdigest()[:32]
        try:
            for folder in (self.folder, home.parent, home, home / _KEPT):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (home / url.name).mkdir(exist_ok=True)
            return CachePlace(self, home, home / url.name)
        except OSError as error:
            raise AccessError(
                f"cannot write to the cache {self.folder}: {error.strerror or error}; choose another folder with --cache"
            ) from error

    def make_room(self, needed: int) -> None:
        """Delete files that nobody uses, those first that were used least recently, until so many bytes fit.

        Raises:
            InputError: if the disk has no room for them.
        """
        with self._guard:
            if self._known is None or self._known + needed > self.most_bytes:
                self._known = self._evict(needed)
            self._known += needed
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise InputError(
                f"the cache {self.folder} needs {format_bytes(needed)} more, its disk has {format_bytes(free)} free; make "
                "room, or choose another folder with --cache"
            )

    def grown(self, added: int) -> None:
        """Count a file that was written here, and delete others if there are too many bytes now."""
        with self._guard:
            self._known = None if self._known is None else self._known + added
            if self._known is None or self._known > self.most_bytes:
                self._known = self._evict(0)

    def trim(self, *, at_once: bool = True) -> None:
        """Delete files that nobody uses any more, if there are too many bytes.

        Args:
            at_once: False to look again only some time after it was looked last: what is in use stays so for a while.
        """
        with self._guard:
            if self._known is None or self._known <= self.most_bytes or (not at_once and time.monotonic() < self._next_look_s):
                return
            self._known = self._evict(0)
            self._next_look_s = time.monotonic() + _LOOK_S

    def _evict(self, needed: int) -> int:
        """Return how many bytes files take after some were deleted."""
        with FileLock(self.folder / "evict.lock"):
            if self._known is None:  # once: it walks through all that is here
                self._delete_leftovers()
            total = self._evict_free(needed)
            if total + needed > self.most_bytes:
                let_go()  # of what this process has mapped and does not use
                total = self._evict_free(needed)
        if total + needed > self.most_bytes and not self._is_told:
            self._is_told = True
            _log.info(
                "the cache %s holds %d bytes that are in use, and %d more are needed than --cache-bytes allows",
                self.folder,
                total,
                total + needed - self.most_bytes,
            )
        return total

    def _evict_free(self, needed: int) -> int:
        found = sorted(self._kept(), key=lambda kept: kept.used_ns)
        total = sum(kept.bytes for kept in found)
        for kept in found:
            if total + needed <= self.most_bytes:
                break
            with freed(kept.record.parent.parent / _HOLDS, kept.sha256) as is_free:
                if is_free:
                    kept.record.unlink(missing_ok=True)  # first: without it, nobody takes the file for one that was checked
                    kept.path.unlink(missing_ok=True)
                    total -= kept.bytes
        return total

    def _kept(self) -> list[_Kept]:
        found = []
        for record in (self.folder / _COPIES).glob(f"*/{_KEPT}/*"):
            if (kept := _read_record(record)) is not None:
                found.append(kept)
                continue
            with freed(record.parent.parent / _HOLDS, record.name) as is_free:  # else somebody is about to fetch it
                if is_free and _read_record(record) is None:
                    record.unlink(missing_ok=True)
        return found

    def _delete_leftovers(self) -> None:
        """Delete what processes that were killed had begun to write."""
        before_s = time.time() - _ABANDONED_S
        for path in (self.folder / _COPIES).rglob(TEMPORARY_PATTERN):
            with suppress(FileNotFoundError):
                if path.lstat().st_mtime < before_s:
                    path.unlink()


def _read_record(record: Path) -> _Kept | None:
    """Return the file that a record is of; None if it is gone or another one by now, as after a bank was compacted."""
    try:
        name, identity, _ = record.read_text().split("\n")
        path, used_ns = record.parent.parent / name, record.stat().st_mtime_ns
        status = path.lstat()
    except (OSError, ValueError):
        return None
    return _Kept(record, path, record.name, status.st_size, used_ns) if identity == _identity(status) else None


class CachePlace:
    """The copy of what lies at one URL.

    Args:
        cache: the cache.
        home: the folder of the copy and its records.
        folder: the copy.
    """

    def __init__(self, cache: Cache, home: Path, folder: Path) -> None:
        self.folder = folder
        self._cache = cache
        self._home = home
        self._holds = Holds(home / _HOLDS)
        self._staying: set[str] = set()

    def lock(self, name: str = "sync") -> FileLock:
        """Return a lock of the processes that share the copy."""
        return FileLock(self._home / f"{name}.lock")

    def hold(
        self,
        path: Path,
        sha256: str,
        size: int,
        fetch: Callable[[Path], None],
        user: object | None,
        *,
        is_checksum: bool = True,
    ) -> None:
        """Have a file with this checksum in the copy as long as `user` lives, or the process if it is None.

        Args:
            path: the file.
            sha256: the checksum.
            size: about how many bytes it takes.
            fetch: writes it to a path.
            user: what uses it.
            is_checksum: False where `sha256` only says which version of which file it is.

        Raises:
            BankError: if what was fetched has another checksum.
            InputError: if there is no room.
        """
        self._holds.take(sha256)  # before we look: it cannot be evicted from here on
        try:
            if not self.is_kept(path, sha256):
                with FileLock(self._home / f"fetch-{int(sha256[:8], 16) % _LOCKS:02d}.lock"):
                    if not self.is_kept(path, sha256):
                        self._fetch(path, sha256 if is_checksum else "", size, fetch)
                        self.keep(path, sha256)
            with suppress(FileNotFoundError):  # another process cleared the copy
                os.utime(self._record(sha256))
            self._cache.trim(at_once=False)
        except BaseException:
            self._holds.give_back(sha256, os.getpid())
            raise
        if user is not None:
            weakref.finalize(user, self._holds.give_back, sha256, os.getpid()).atexit = False
        elif sha256 in self._staying:
            self._holds.give_back(sha256, os.getpid())
        else:
            self._staying.add(sha256)

    def _fetch(self, path: Path, sha256: str, size: int, fetch: Callable[[Path], None]) -> None:
        if sha256 and is_regular(path) and hash_file(path) == sha256:  # written here, or its fetching was killed at the end
            return
        self._cache.make_room(size)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / TEMPORARY_PATTERN.replace("*", secrets.token_hex(8))
        try:
            fetch(temporary)
            if sha256 and (found := hash_file(temporary)) != sha256:
                raise BankError(
                    f"{path} is not what was written: it has sha256 {found}, expected {sha256}; restore it from a backup"
                )
            temporary.replace(path)
        except OSError as error:
            if is_full(error):
                raise InputError(
                    f"the cache {self._cache.folder} has no room for {path} ({error}); make room, or choose another folder "
                    "with --cache"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def forget(self, sha256: str) -> None:
        """Have a file fetched again when it is needed next."""
        self._record(sha256).unlink(missing_ok=True)

    def keep(self, path: Path, sha256: str) -> None:
        """Record that a file of the copy has a checksum and lies at the URL: it may be evicted when nobody uses it."""
        status, record = path.stat(), self._record(sha256)
        text = f"{path.relative_to(self._home).as_posix()}\n{_identity(status)}\n"
        # Not beside the record: whoever looks for room takes each file there for one.
        temporary = self._home / TEMPORARY_PATTERN.replace("*", secrets.token_hex(8))
        temporary.write_text(text)
        temporary.replace(record)

    def is_kept(self, path: Path, sha256: str) -> bool:
        """Whether the file on disk is the one that was recorded under a checksum."""
        kept = _read_record(self._record(sha256))
        return kept is not None and kept.path == path

    def kept_files(self) -> set[Path]:
        """Return all files of the copy that lie at the URL as well."""
        return {kept.path for record in (self._home / _KEPT).iterdir() if (kept := _read_record(record)) is not None}

    def clear(self, *, last: str) -> None:
        """Delete all files of the copy but its locks, `last` as the last: at the URL is another bank, or none any more."""
        for record in (self._home / _KEPT).iterdir():
            record.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
            elif not path.name.startswith(".") and path.name != last:
                path.unlink(missing_ok=True)
        (self.folder / last).unlink(missing_ok=True)

    def _record(self, sha256: str) -> Path:
        return self._home / _KEPT / sha256


def _identity(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


_CHOSEN: dict[str, Caching] = {}


def use_cache(caching: Caching) -> None:
    """Choose the cache of this process, before it opens anything at a URL.

    Raises:
        InputError: for a size that is none.
    """
    if caching.cache_bytes is not None:
        parse_bytes(caching.cache_bytes, "cache_bytes")
    _CHOSEN["now"] = caching
    open_cache.cache_clear()


def chosen_cache() -> Caching:
    """Return what was chosen last; the defaults, if nothing was."""
    return _CHOSEN.get("now", Caching())


def trim_cache() -> None:
    """Delete what this process used and does not use any more, if the cache holds too much; nothing where it was not opened."""
    if open_cache.cache_info().currsize:
        open_cache().trim()


@lru_cache(maxsize=1)
def open_cache() -> Cache:
    """Return the cache that was chosen; else the one that the environment names, or that of the user.

    Raises:
        InputError: for a size that is none.
    """
    caching = chosen_cache()
    users = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    folder = caching.cache or os.environ.get(FOLDER_VARIABLE) or f"{users}/spade-faiss"
    size = caching.cache_bytes if caching.cache_bytes is not None else os.environ.get(BYTES_VARIABLE, Caching.DEFAULT_BYTES)
    return Cache(Path(os.path.realpath(folder)), parse_bytes(size, "cache_bytes"), progress=caching.progress)
