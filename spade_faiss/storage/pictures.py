"""Pictures at a URL: they are fetched into the cache, and read there as those of a folder are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from spade_faiss.core.copies import register
from spade_faiss.core.errors import InputError, NotFoundError
from spade_faiss.core.progress import progress_bar
from spade_faiss.core.schema import shorten
from spade_faiss.storage.cache import Cache, CachePlace, open_cache
from spade_faiss.storage.objects import ObjectStore, Stored
from spade_faiss.storage.stores import open_store
from spade_faiss.storage.url import Url, is_url, local_path, parse_url

_WORKERS = 16
_LONGEST_NAME = 255


def local_pictures(
    place: str | Path,
    is_read: Callable[[str], bool],
    *,
    progress: bool = False,
    what: str = "a picture or a folder of pictures",
) -> Path:
    """Return the folder or the file of this machine that holds pictures, or other files to read; what is at a URL is fetched.

    Args:
        place: a path or a URL.
        is_read: tells by the name of a file whether it is read; of others, there is an empty file of that name.
        progress: show a bar on stderr if that is a terminal.
        what: what is looked for, for messages.

    Raises:
        NotFoundError: if there is nothing at a URL.
        InputError: for names that no file can have, or if the cache has no room.
        StorageError: if a URL cannot be reached.
    """
    if not is_url(place):
        return local_path(place)
    url = parse_url(str(place))
    store = open_store(url)
    listed = [stored for stored in store.list() if stored.name and not stored.name.endswith("/")]
    if listed:
        return _fetch_all(store, listed, is_read, progress)
    # A file by itself: it is looked for in its folder.
    parent, _, name = url.path.rpartition("/")
    found = None
    if parent:
        store = open_store(Url(url.scheme, parent))
        found = store.find(name)
    if found is None:
        raise NotFoundError(f"there is nothing at {url}; give {what} there")
    return _fetch_all(store, [found], is_read, progress, only=True) / name


def _fetch_all(
    store: ObjectStore, listed: Sequence[Stored], is_read: Callable[[str], bool], progress: bool, *, only: bool = False
) -> Path:
    """Return the folder that has copies of what was listed, under the same names; with `only`, others may stay there."""
    cache = open_cache()
    place = cache.place(store.url)
    register(place.folder, str(store.url))
    for stored in listed:
        _check_name(stored.name, store.url)
    with place.lock("pictures"):
        names = {stored.name for stored in listed}
        for path in [] if only else _files(place.folder):
            if path.relative_to(place.folder).as_posix() not in names:
                path.unlink()
        wanted = []
        for stored in listed:
            if is_read(stored.name.rpartition("/")[2]):
                wanted.append(stored)
            else:
                _touch(place.folder / stored.name, store.url)
        with (
            progress_bar(sum(stored.bytes for stored in wanted), "fetch", progress, unit="B") as bar,
            ThreadPoolExecutor(_WORKERS) as pool,
        ):
            for size in pool.map(lambda stored: _fetch(store, place, stored), wanted):
                bar.update(size)
    return place.folder


def fetch_pictures(url: str, names: Sequence[str], user: object) -> Path:
    """Have some pictures below a URL in the cache, as long as `user` lives.

    Returns:
        The folder that has copies of them, under the same names.

    Raises:
        InputError: for one that is not there, or if the cache has no room.
        StorageError: if the URL cannot be reached.
    """
    store, place = _opened(open_cache(), parse_url(url))
    register(place.folder, url)

    def fetch(name: str) -> None:
        if (found := store.find(name)) is None:
            raise _deleted(store, name)
        _fetch(store, place, found, user)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(fetch, names):
            pass
    return place.folder


@lru_cache(maxsize=8)
def _opened(cache: Cache, url: Url) -> tuple[ObjectStore, CachePlace]:
    """What lies at a URL, and the place of its copy, opened once for many calls."""
    return open_store(url), cache.place(url)


def _fetch(store: ObjectStore, place: CachePlace, stored: Stored, user: object | None = None) -> int:
    """Have a copy of a picture in the cache as long as `user` lives, or this process if it is None; return its size."""
    key = hashlib.sha256(f"{stored.version}\n{stored.bytes}\n{stored.name}".encode()).hexdigest()
    path = place.folder / stored.name
    if not stored.version:  # nothing tells whether it has changed
        place.forget(key)

    def fetch(to: Path) -> None:
        try:
            store.download(stored.name, to)
        except FileNotFoundError as error:
            raise _deleted(store, stored.name) from error

    try:
        place.hold(path, key, stored.bytes, fetch, user, is_checksum=False)
    except OSError as error:
        if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
            raise _no_file(stored.name, store.url) from error
        raise
    return stored.bytes


def _deleted(store: ObjectStore, name: str) -> InputError:
    return InputError(f"{store.url}/{name} was deleted while pictures were fetched; run the command again")


def _touch(path: Path, url: Url) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise _no_file(path.name, url) from error


def _files(folder: Path) -> list[Path]:
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def _check_name(name: str, url: Url) -> None:
    """Raise InputError for a name that would lead out of the cache, or that no file can have."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > _LONGEST_NAME for part in parts):
        raise _no_file(name, url)


def _no_file(name: str, url: Url) -> InputError:
    return InputError(f"{shorten(name)} below {url} cannot be the name of a file here; rename it")
