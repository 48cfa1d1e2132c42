"""Where the parts of a run are kept: in a folder that all nodes share, or, if its results go to a URL, there as well.

What is at the URL has the names that `kept_parts` gives it in a folder, below a hidden one, and goes when results are complete.
A worker writes a part into the cache of its node and stores it, its record last; the command fetches its scores from there.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spade_faiss.core.errors import ClusterError, NotFoundError
from spade_faiss.report.exchange import SCORES
from spade_faiss.report.output_folder import OutputFolder
from spade_faiss.storage.cache import open_cache
from spade_faiss.storage.objects import ObjectStore
from spade_faiss.storage.stores import open_store
from spade_faiss.storage.url import parse_url
from spade_faiss.workflows.kept_parts import COLLECTED, PartRecord, PartsRecord, ScoredPart, begin_parts

# A run and a part, as `kept_parts` names them: what is listed may have been put there by anybody.
_RECORDS = re.compile(rf"[0-9a-f]{{32}}/(?:{re.escape(PartsRecord.FILE)}|[0-9]{{6}}/{re.escape(PartRecord.FILE)})")
_MOST_BYTES = 1 << 20
# Below the cache: a folder for each part that a worker of this node has in hand, and how long one stays whose worker was lost.
_IN_HAND = "parts"
_LOST_AFTER_S = 24 * 3600.0


class PartsPlace(Protocol):
    """Where the parts of a run are kept. It travels to the workers."""

    def part(self, name: str) -> AbstractContextManager[Path]:
        """On a worker: the folder of a part, with what was kept of it; what is in it when the block ends well is kept."""

    def taken(self, name: str, part: ScoredPart) -> ScoredPart:
        """In the command: a part that a worker has returned, with scores that this process can open."""


@dataclass(frozen=True)
class SharedParts:
    """Parts in a folder that all nodes have at the same path.

    Args:
        folder: the folder of the run.
    """

    folder: Path

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """See `PartsPlace`.

        Raises:
            NotFoundError: if the folder is not shared.
        """
        if not self.folder.is_dir():
            raise NotFoundError(
                f"there is no folder {self.folder} here; write results to storage that all nodes have at the same path, or to "
                "a URL"
            )
        yield self.folder / name

    def taken(self, name: str, part: ScoredPart) -> ScoredPart:
        """See `PartsPlace`."""
        return part


@dataclass(frozen=True)
class StoredParts:
    """Parts at a URL.

    Args:
        url: what holds the parts of the run.
        folder: where the command has those that it took.
    """

    url: str
    folder: Path

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """See `PartsPlace`.

        Raises:
            StorageError: if the URL cannot be reached, or cannot be written to.
        """
        store, work = open_store(parse_url(f"{self.url}/{name}")), _work_folder()
        folder = work / name
        try:
            before = _fetch_part(store, folder)
            yield folder
            record = folder / PartRecord.FILE
            if record.read_bytes() != before:
                for file in (SCORES, COLLECTED, PartRecord.FILE):  # the record says that the others are whole
                    if (folder / file).exists():
                        store.put(file, folder / file)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def taken(self, name: str, part: ScoredPart) -> ScoredPart:
        """See `PartsPlace`.

        Raises:
            ClusterError: if somebody else has deleted it meanwhile.
            StorageError: if the URL cannot be reached.
        """
        if part.file is None:
            return part
        file = self.folder / name / SCORES
        file.parent.mkdir(exist_ok=True)
        try:
            open_store(parse_url(self.url)).download(f"{name}/{SCORES}", file)
        except FileNotFoundError as error:
            raise ClusterError(
                f"{self.url}/{name} was deleted before it was taken, by another run that wrote to the same URL, maybe; run the "
                "command again, one at a time"
            ) from error
        return part._replace(file=file)


def begin_run(folder: OutputFolder, key: str, record: PartsRecord) -> tuple[PartsPlace, Path, PartsRecord]:
    """Begin the parts of a run, or go on with those of one that was lost, see `begin_parts`.

    Args:
        folder: the folder of the results.
        key, record: see `begin_parts`.

    Returns:
        Where they are kept, the folder that this process has of it, and what they have in common.
    """
    if not folder.kept_url:
        place, found = begin_parts(folder.kept_parts, key, record)
        return SharedParts(place), place, found
    store = open_store(parse_url(folder.kept_url))
    for stored in store.list():
        if _RECORDS.fullmatch(stored.name):
            path = folder.kept_parts / stored.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_read(store, stored.name) or b"")
    place, found = begin_parts(folder.kept_parts, key, record)
    store.put(f"{key}/{PartsRecord.FILE}", place / PartsRecord.FILE)
    return StoredParts(f"{folder.kept_url}/{key}", place), place, found


def _fetch_part(store: ObjectStore, folder: Path) -> bytes | None:
    """Fetch a part that says it is whole; return its record, None if there is none."""
    folder.mkdir()
    if (record := _read(store, PartRecord.FILE)) is None:
        return None
    for file in (SCORES, COLLECTED):
        if store.find(file) is not None:  # there are no scores where no image could be read
            store.download(file, folder / file)
    (folder / PartRecord.FILE).write_bytes(record)
    return record


def _read(store: ObjectStore, name: str) -> bytes | None:
    try:
        return store.read(name, _MOST_BYTES)[0]
    except FileNotFoundError:  # it was deleted since it was listed
        return None


def _work_folder() -> Path:
    """A new folder for a part in hand; those that lost workers have left long ago go."""
    home = open_cache().folder / _IN_HAND
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in home.iterdir():
        if path.exists() and time.time() - path.stat().st_mtime > _LOST_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)
    work = home / secrets.token_hex(8)
    work.mkdir(mode=0o700)
    return work
