"""One committed state of a bank: its manifest, and which entry stands in which row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.codes import codes_path, read_codes
from spade_faiss.bank.manifest import Manifest
from spade_faiss.bank.pictures import Pictures
from spade_faiss.bank.places import SHARDS
from spade_faiss.bank.row_ids import RowIds
from spade_faiss.bank.shards import Shard, ShardEntry, map_shard
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.once import Once
from spade_faiss.core.types import IntArray
from spade_faiss.features.codes import Codes
from spade_faiss.features.tiles import Places, check_places

T = TypeVar("T")

# An entry's shard, and its position in it.
Place = tuple[int, int]


class Removed(NamedTuple):
    """What was removed from a state, and is not gone yet.

    Attributes:
        entries: the ids of entries.
        pictures: picture id -> the places of its entries, in their order.
    """

    entries: frozenset[str]
    pictures: dict[str, tuple[Place, ...]]


class BankState:
    """One committed state of a bank. It never changes: a bank replaces its state as a whole.

    Rows are the entries that were not removed, in the order in which they were added.

    Args:
        path: the bank's folder.
        manifest: what was committed.
        ids: the ids of all rows, where they are known; they are read from the shards at their first use otherwise.
        removed: what was removed, likewise.
    """

    def __init__(self, path: Path, manifest: Manifest, *, ids: RowIds | None = None, removed: Removed | None = None) -> None:
        self.path = path
        self.manifest = manifest
        # The first row of each shard, and the number of all rows.
        self.starts: IntArray = np.cumsum([0, *(shard.live_count for shard in manifest.shards)], dtype=np.int64)
        # None of them refers to this object: see `Once`.
        self._ids = Once(partial(_read_ids, path, manifest) if ids is None else partial(_given, ids))
        self._removed = Once(partial(_read_removed, path, manifest) if removed is None else partial(_given, removed))
        self._pictures = Once(partial(_read_pictures, path, manifest, self._ids))
        self._groups = Once(partial(_read_groups, path, manifest))
        self._siblings = Once(partial(_find_siblings, self._pictures, self._groups))
        self._places = Once(partial(_read_places, path, manifest))
        self._sha256_of = Once(partial(_read_sha256, path, manifest))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def ids(self) -> RowIds:
        """The entry ids in row order."""
        return self._ids()

    @property
    def pictures(self) -> Pictures:
        """The pictures that the rows were made of."""
        return self._pictures()

    @property
    def siblings(self) -> Pictures:
        """The groups of pictures that the rows belong to; the pictures themselves where there are no groups."""
        return self._siblings()

    def groups_at(self, rows: npt.NDArray[np.integer[Any]]) -> list[str]:
        """Return the group of each row, empty for none; an empty list where there are no groups."""
        groups = self._groups()
        return [groups[row] for row in rows.tolist()] if groups else []

    @property
    def group_of(self) -> dict[str, str]:
        """Picture id -> its group, where it has one: that of its original."""
        pictures = self.pictures
        groups = self.groups_at(pictures.originals)
        return {name: group for name, group in zip(pictures.ids, groups, strict=False) if group}

    @property
    def tile_places(self) -> Places | None:
        """(rows, 4) where each row's tile lies in its picture; None where rows are whole pictures."""
        return self._places()

    @property
    def removed(self) -> Removed:
        """What was removed."""
        return self._removed()

    @property
    def sha256_of(self) -> dict[str, str]:
        """Picture id -> sha256 of its file, where one was recorded."""
        return self._sha256_of()

    def holds(self, entry: str) -> bool:
        """Tell whether an entry is in the bank, removed or not."""
        return self.ids.row(entry) is not None or entry in self.removed.entries

    def places(self, picture: str) -> tuple[Place, ...]:
        """Return the places of a picture's rows; none for a picture that has no row."""
        number = self.pictures.number(picture)
        return () if number is None else tuple(self.locate(int(row)) for row in self.pictures.rows(number))

    def appended(self, manifest: Manifest, ids: Sequence[str]) -> BankState:
        """Return the state after a commit that added entries, and changed nothing else."""
        return BankState(self.path, manifest, ids=self.ids.followed_by(ids), removed=self.removed)

    @property
    def codes(self) -> Codes | None:
        """How maps become codes; None in a bank that stores none, or is empty yet."""
        entry = self.manifest.codes
        return None if entry is None else read_codes(codes_path(self.path, entry), entry.sha256, self.manifest.layout)

    def shard(self, number: int) -> Shard:
        """Return a shard, mapped into memory."""
        return _map(self.path, self.manifest, number)

    def locate(self, row: int) -> Place:
        """Return the number of the shard that holds a row, and the row's position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a bank of {len(self)} rows")
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, int(self.manifest.shards[number].live[row - int(self.starts[number])])

    def image_folders(self) -> set[Path]:
        """Return the folders that hold the files which pictures were read from."""
        found: dict[tuple[str, str], Path] = {}  # by its text: there are as many paths as pictures
        for number, entry in enumerate(self.manifest.shards):
            shard = self.shard(number)
            root = shard.root
            for path in _live(shard.texts("path"), entry):
                folder = root, path[: path.rfind("/") + 1]
                if path and folder not in found:
                    found[folder] = Path(root, path).parent
        return set(found.values())

    def rows_of_shard(self, number: int) -> npt.NDArray[np.int64]:
        """Return the row of each entry of a shard, (count,); -1 for removed ones."""
        shard = self.manifest.shards[number]
        rows = np.full(shard.count, -1, np.int64)
        rows[shard.live] = np.arange(self.starts[number], self.starts[number + 1])
        return rows


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
        seen.update(names)  # those of removed entries too, which may be restored
        ids += _live(names, entry)
    if repeated := sum(entry.count for entry in manifest.shards) - len(seen):
        raise BankError(f"the bank {path} is damaged: {repeated} ids occur more than once; extract a new bank")
    return RowIds.of(ids)


def _read_removed(path: Path, manifest: Manifest) -> Removed:
    entries: set[str] = set()
    pictures: dict[str, tuple[Place, ...]] = {}
    for number, entry in enumerate(manifest.shards):
        if entry.removed:
            shard = _map(path, manifest, number)
            names, of = shard.texts("id"), shard.picture_ids()
            for position in entry.removed:
                entries.add(names[position])
                pictures[of[position]] = (*pictures.get(of[position], ()), (number, position))
    return Removed(frozenset(entries), pictures)


def _read_pictures(path: Path, manifest: Manifest, ids: Once[RowIds]) -> Pictures:
    shards = [_map(path, manifest, number) for number in range(len(manifest.shards))]
    if not any(shard.texts("picture") for shard in shards):
        return Pictures(sum(entry.live_count for entry in manifest.shards), ids)
    live = [_live(shard.picture_ids(), entry) for shard, entry in zip(shards, manifest.shards, strict=True)]
    return Pictures.named([name for names in live for name in names])


def _read_groups(path: Path, manifest: Manifest) -> list[str]:
    """The group of each row, empty for none; an empty list where no row has one."""
    found: list[str] = []
    for number, entry in enumerate(manifest.shards):
        found += _live(_map(path, manifest, number).texts("group"), entry) or [""] * entry.live_count
    return found if any(found) else []


def _find_siblings(pictures: Once[Pictures], groups: Once[list[str]]) -> Pictures:
    of_picture, of_row = pictures(), groups()
    if not of_row:
        return of_picture
    firsts = zip(of_picture.ids, of_picture.originals.tolist(), strict=True)
    # No name of a group is that of a picture which has none.
    names = [f"group {of_row[row]}" if of_row[row] else f"picture {name}" for name, row in firsts]
    return Pictures.named([names[number] for number in of_picture.of(np.arange(len(of_row))).tolist()])


def _read_places(path: Path, manifest: Manifest) -> Places | None:
    preprocess = None if manifest.source is None else manifest.source.preprocess
    if preprocess is None or preprocess.tile is None:
        return None
    found = [_map(path, manifest, number).places for number in range(len(manifest.shards))]
    live = [places[entry.live] for places, entry in zip(found, manifest.shards, strict=True) if places is not None]
    if len(live) < len(found):
        raise BankError(f"the bank {path} is damaged: it does not say where its tiles lie; extract a new bank")
    places = np.concatenate([np.empty((0, 4), np.int32), *live])
    try:
        if manifest.layout.input_size != preprocess.input_size:
            raise InputError(f"its maps are of {manifest.layout.input_size} pixels, its tiles of {preprocess.input_size}")
        check_places(places, preprocess)
    except InputError as error:
        raise BankError(f"the bank {path} is damaged: {error}; extract a new bank") from error
    return places


def _read_sha256(path: Path, manifest: Manifest) -> dict[str, str]:
    digests: dict[str, str] = {}
    for number, entry in enumerate(manifest.shards):
        shard = _map(path, manifest, number)
        names, found = (_live(texts, entry) for texts in (shard.picture_ids(), shard.texts("sha256")))
        digests.update(zip(names, found, strict=False))  # a shard may have none
    return {name: digest for name, digest in digests.items() if digest}


def _live(texts: list[str], entry: ShardEntry) -> list[str]:
    return [texts[position] for position in entry.live] if texts and entry.removed else texts
