"""Results at a URL: they are written into a folder of this machine, and stored when they are complete, the report last."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spade_faiss.core.copies import register
from spade_faiss.core.errors import AccessError, InputError
from spade_faiss.core.progress import progress_bar
from spade_faiss.report.exchange import FOLDERS, PARTS, REPORT, RESULTS
from spade_faiss.storage.cache import open_cache
from spade_faiss.storage.names import MANIFEST
from spade_faiss.storage.objects import ObjectStore
from spade_faiss.storage.stores import open_store
from spade_faiss.storage.url import Url

# What is stored last: whoever sees it sees all of the run.
_LAST = (REPORT, "report.html")
_RESULTS = "results"
# Below the URL: what runs on a cluster that were lost have scored, see `workflows.stored_parts`.
KEPT_PARTS = ".spade-parts"

_log = logging.getLogger(__name__)


def check_url(url: Url, others: Sequence[Url] = ()) -> None:
    """Raise InputError if a URL is no place for results.

    Args:
        url: where they are to be stored.
        others: the URLs of the bank and of what is read.

    Raises:
        StorageError: if it cannot be reached.
    """
    for other in others:
        if url.holds(other) or other.holds(url):
            raise InputError(f"out={url} and {other}, which is read, lie in one another; choose another URL")
    _check_listed(url, [stored.name for stored in open_store(url).list()])


def _check_listed(url: Url, names: Sequence[str]) -> None:
    tops = sorted({name.partition("/")[0] for name in names})
    if MANIFEST in tops:
        raise InputError(f"out={url} is a bank; choose another URL")
    others = [name for name in tops if name not in RESULTS and not name.startswith(".")]
    if others and REPORT not in tops and not any(name in tops for name in RESULTS):
        some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise InputError(f"out={url} holds other objects and no results ({some}); choose another URL")


@contextmanager
def folder_for(url: Url, replaces: Collection[str]) -> Iterator[Path]:
    """Yield a folder for results that does not exist yet; what is there when the block ends well is stored at the URL.

    Until then, the URL shows what it showed. Results of a run before that this one has none of are deleted.

    Args:
        url: where results are stored.
        replaces: the results that go when those of this run come.

    Raises:
        InputError: if other objects lie there, and no results.
        StorageError: if the URL cannot be reached, or cannot be written to; the results are kept in the folder then.
    """
    store = open_store(url)
    _check_listed(url, [stored.name for stored in store.list()])
    work = open_cache().folder / _RESULTS / secrets.token_hex(8)
    try:
        work.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise AccessError(f"cannot write to {work}: {error.strerror}; choose another folder with --cache") from error
    folder = work / url.name
    register(folder, str(url))
    try:
        yield folder
    except BaseException:
        if not [path for path in work.iterdir() if path.name.endswith(".unfinished")]:
            shutil.rmtree(work, ignore_errors=True)
        raise
    try:
        _store_all(store, folder, replaces)
    except BaseException:
        _log.warning("results could not be stored at %s; they are kept in %s", url, work)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _store_all(store: ObjectStore, folder: Path, replaces: Collection[str]) -> None:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = [name for name in names if name.partition("/")[0] in RESULTS]
    ordered = sorted(names, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name))
    with progress_bar(sum((folder / name).stat().st_size for name in names), "store", open_cache().progress, unit="B") as bar:
        for name in ordered:
            store.put(name, folder / name)
            bar.update((folder / name).stat().st_size)
    there = {stored.name for stored in store.list()}
    store.delete(sorted(name for name in there - {*names} if _is_result(name, replaces)))


def _is_result(name: str, replaces: Collection[str]) -> bool:
    """Whether an object is a result that a run replaces, or a part of one; what others put there is not ours to delete."""
    top, _, below = name.partition("/")
    if top == KEPT_PARTS:
        return PARTS in replaces
    return top in replaces and (not below or name.endswith(FOLDERS.get(top, ())))
