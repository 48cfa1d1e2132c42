"""One committed state of a bank: its manifest, and which image stands in which row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.manifest import Manifest
from spade_faiss.bank.places import SHARDS
from spade_faiss.bank.shards import Shard, ShardEntry, map_shard
from spade_faiss.core.errors import BankError
from spade_faiss.core.once import Once
from spade_faiss.core.types import IntArray

T = TypeVar("T")

# A removed image's shard, and its position in it.
Place = tuple[int, int]


class RowIds:
    """The image ids of a state in row order. States that follow each other by appending share one list, which only grows.

    A long extraction commits one state for each shard: copying or reading the ids of all earlier shards each time would make
    its cost grow with the square of the number of shards.
    """

    def __init__(self, ids: list[str], row_of: dict[str, int], count: int) -> None:
        self._ids = ids
        self._row_of = row_of
        self._count = count  # what stands behind belongs to later states
        self._listed = Once(partial(_first, ids, count))

    @classmethod
    def of(cls, ids: Sequence[str]) -> RowIds:
        """Number ids from 0."""
        return cls(list(ids), {name: row for row, name in enumerate(ids)}, len(ids))

    def __len__(self) -> int:
        return self._count

    def row(self, name: str) -> int | None:
        """Return the row of an image; None for an id that this state does not have."""
        row = self._row_of.get(name)
        return row if row is not None and row < self._count else None

    def listed(self) -> list[str]:
        """Return all ids; the list is made at the first call."""
        return self._listed()

    def followed_by(self, ids: Sequence[str]) -> RowIds:
        """Return the ids of the state that is made by appending images to this one."""
        if len(self._ids) > self._count:  # another state follows this one already
            return RowIds.of([*self.listed(), *ids])
        self._ids.extend(ids)
        self._row_of.update({name: self._count + number for number, name in enumerate(ids)})
        return RowIds(self._ids, self._row_of, len(self._ids))


class BankState:
    """One committed state of a bank. It never changes: a bank replaces its state as a whole.

    Rows are the images that were not removed, in the order in which they were added.

    Args:
        path: the bank's folder.
        manifest: what was committed.
        ids: the ids of all rows, where they are known; they are read from the shards at their first use otherwise.
        removed: removed image id -> its place, likewise.
    """

    def __init__(
        self, path: Path, manifest: Manifest, *, ids: RowIds | None = None, removed: dict[str, Place] | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        # The first row of each shard, and the number of all rows.
        self.starts: IntArray = np.cumsum([0, *(shard.live_count for shard in manifest.shards)], dtype=np.int64)
        # None of them refers to this object: see `Once`.
        self._ids = Once(partial(_read_ids, path, manifest) if ids is None else partial(_given, ids))
        self._removed = Once(partial(_read_removed, path, manifest) if removed is None else partial(_given, removed))
        self._sha256_of = Once(partial(_read_sha256, path, manifest))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def ids(self) -> RowIds:
        """The image ids in row order."""
        return self._ids()

    @property
    def removed(self) -> dict[str, Place]:
        """Removed image id -> the number of its shard, and its position in it."""
        return self._removed()

    @property
    def sha256_of(self) -> dict[str, str]:
        """Image id -> sha256 of its file, where one was recorded."""
        return self._sha256_of()

    def holds(self, name: str) -> bool:
        """Tell whether an image is in the bank, removed or not."""
        return self.ids.row(name) is not None or name in self.removed

    def appended(self, manifest: Manifest, ids: Sequence[str]) -> BankState:
        """Return the state after a commit that added images, and changed nothing else."""
        return BankState(self.path, manifest, ids=self.ids.followed_by(ids), removed=self.removed)

    def shard(self, number: int) -> Shard:
        """Return a shard, mapped into memory."""
        return _map(self.path, self.manifest, number)

    def locate(self, row: int) -> Place:
        """Return the number of the shard that holds a row, and the row's position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a bank of {len(self)} images")
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, int(self.manifest.shards[number].live[row - int(self.starts[number])])

    def rows_of_shard(self, number: int) -> npt.NDArray[np.int64]:
        """Return the row of each image of a shard, (count,); -1 for removed images."""
        shard = self.manifest.shards[number]
        rows = np.full(shard.count, -1, np.int64)
        rows[shard.live] = np.arange(self.starts[number], self.starts[number + 1])
        return rows


def _first(ids: list[str], count: int) -> list[str]:
    return ids[:count]


def _given(value: T) -> T:
    return value


def _map(path: Path, manifest: Manifest, number: int) -> Shard:
    entry = manifest.shards[number]
    return map_shard(path / SHARDS / entry.file, entry.sha256, entry.count, manifest.layout)


def _read_ids(path: Path, manifest: Manifest) -> RowIds:
    ids: list[str] = []
    seen: set[str] = set()
    for number, entry in enumerate(manifest.shards):
        names = _map(path, manifest, number).texts("id")
        seen.update(names)  # those of removed images too, which may be restored
        ids += _live(names, entry)
    if repeated := sum(entry.count for entry in manifest.shards) - len(seen):
        raise BankError(f"the bank {path} is damaged: {repeated} ids occur more than once; extract a new bank")
    return RowIds.of(ids)


def _read_removed(path: Path, manifest: Manifest) -> dict[str, Place]:
    found = {}
    for number, entry in enumerate(manifest.shards):
        if entry.removed:
            names = _map(path, manifest, number).texts("id")
            found.update({names[position]: (number, position) for position in entry.removed})
    return found


def _read_sha256(path: Path, manifest: Manifest) -> dict[str, str]:
    digests: dict[str, str] = {}
    for number in range(len(manifest.shards)):
        names, found = (_live_texts(path, manifest, number, field) for field in ("id", "sha256"))
        digests.update(zip(names, found, strict=False))  # a shard may have none
    return {name: digest for name, digest in digests.items() if digest}


def _live_texts(path: Path, manifest: Manifest, number: int, field: str) -> list[str]:
    """Return a text of each image of a shard that was not removed, in the order of their rows."""
    return _live(_map(path, manifest, number).texts(field), manifest.shards[number])


def _live(texts: list[str], entry: ShardEntry) -> list[str]:
    return [texts[position] for position in entry.live] if texts and entry.removed else texts
