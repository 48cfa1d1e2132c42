"""Any other URL, by fsspec: it is read, and results can be written there. Nothing can be written on a condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from spade_faiss.core.errors import InputError
from spade_faiss.storage.failures import Failures, in_short
from spade_faiss.storage.objects import NoConditions, Stored, ignore
from spade_faiss.storage.url import Url

_FAILURES = Failures(failed=(OSError, ValueError, RuntimeError))
# How file systems call the version of a file, and the time when it was written.
_VERSIONS = ("ETag", "etag", "checksum", "md5Hash", "version_id", "ino")
_TIMES = ("LastModified", "mtime", "last_modified", "created", "updated")


class FileSystemStore:
    """Files below a URL.

    Raises:
        InputError: for a scheme that fsspec does not know, or whose package is missing.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(str(url), use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url} cannot be opened: {in_short(error)}") from error

    def _path(self, name: str) -> str:
        return f"{str(self._root).rstrip('/')}/{name}"

    def list(self) -> list[Stored]:
        """See `ObjectStore.list`."""
        start = len(self._path(""))
        try:
            with _FAILURES.named(self.url, "listed"):
                self._files.invalidate_cache()
                found = self._files.find(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted((_stored(path[start:], info) for path, info in found.items()), key=lambda stored: stored.name)

    def find(self, name: str) -> Stored | None:
        """See `ObjectStore.find`."""
        try:
            with _FAILURES.named(self.url, "read", name):
                self._files.invalidate_cache()
                return _stored(name, self._files.info(self._path(name)))
        except FileNotFoundError:
            return None

    def read(self, name: str, most: int) -> tuple[bytes, str]:
        """See `ObjectStore.read`."""
        with _FAILURES.named(self.url, "read", name), self._files.open(self._path(name), "rb") as file:
            content: bytes = file.read(most + 1)
        return content, ""

    def download(self, name: str, path: Path, advance: Callable[[int], object] = ignore) -> None:
        """See `ObjectStore.download`."""
        with _FAILURES.named(self.url, "read", name):
            self._files.get_file(self._path(name), str(path))
        advance(path.stat().st_size)

    def create(self, name: str, content: bytes | Path) -> str:
        """See `ObjectStore.create`."""
        raise NoConditions(f"{self.url.scheme}:// is reached by fsspec, which has none")

    def replace(self, name: str, content: bytes, version: str) -> str:
        """See `ObjectStore.replace`."""
        raise NoConditions(f"{self.url.scheme}:// is reached by fsspec, which has none")

    def put(self, name: str, content: bytes | Path) -> None:
        """See `ObjectStore.put`."""
        with _FAILURES.named(self.url, "written", name):
            self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            if isinstance(content, Path):
                self._files.put_file(str(content), self._path(name))
            else:
                self._files.pipe_file(self._path(name), content)

    def delete(self, names: Sequence[str]) -> None:
        """See `ObjectStore.delete`."""
        for name in names:
            try:
                with _FAILURES.named(self.url, "deleted", name):
                    self._files.rm_file(self._path(name))
            except FileNotFoundError:
                continue


def _stored(name: str, info: Mapping[str, Any]) -> Stored:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    modified = next((info[key] for key in _TIMES if info.get(key)), 0.0)
    time = modified.timestamp() if isinstance(modified, datetime) else float(modified) if _is_number(modified) else 0.0
    size = int(info.get("size") or 0)
    return Stored(name, size, version or f"{size}-{time}", time)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
