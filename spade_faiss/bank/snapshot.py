"""One committed state of a bank, to be read: rows are the images that were not removed, in the order they were added."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.locks import Lease
from spade_faiss.bank.manifest import Manifest
from spade_faiss.bank.shards import Shard, map_shard
from spade_faiss.core.errors import InputError
from spade_faiss.core.settings import Source
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import FeatureBatch
from spade_faiss.features.layout import Layout

SHARDS = "features"


class Snapshot:
    """The features that a manifest names, mapped into memory; its files stay on disk as long as its `lease` is held."""

    def __init__(self, path: Path, manifest: Manifest, lease: Lease) -> None:
        self.path = path.absolute()
        self._lease = lease
        self._adopt(manifest)

    def _adopt(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._starts = np.cumsum([0, *(shard.live_count for shard in manifest.shards)])
        for name in ("ids", "_row_of", "_known", "removed", "sha256_of"):
            self.__dict__.pop(name, None)  # drop the cached property

    @property
    def layout(self) -> Layout:
        """What all features of the bank have in common."""
        return self.manifest.layout

    @property
    def generation(self) -> int:
        """Counts the commits: a state of the bank is named by it."""
        return self.manifest.generation

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.manifest.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def facts(self) -> dict[str, Any]:
        """What identifies the bank and says how large it is."""
        source = self.manifest.source
        return {
            "path": str(self.path),
            "generation": self.generation,
            "images": len(self),
            "shards": len(self.manifest.shards),
            "bytes": self.bytes_on_disk,
            "bytes_per_image": round(self.bytes_on_disk / len(self)) if len(self) else 0,
            **asdict(self.layout),
            "source": None if source is None else asdict(source),
            "versions": self.manifest.versions,
        }

    def check_source(self, source: Source | None) -> None:
        """Raise InputError, with both values, if features from `source` cannot be compared with the bank's.

        Features without a source are taken on trust: the caller knows where they are from.
        """
        ours = self.manifest.source
        if source is None or ours is None or source == ours:
            return
        difference = first_difference(asdict(ours), asdict(source))
        assert difference is not None
        name, value, theirs = difference
        raise InputError(
            f"the bank {self.path} was extracted with {name}={value!r}, these features with {theirs!r}; "
            f"distances between them mean nothing. Use the bank's setting, or extract a new bank"
        )

    @cached_property
    def ids(self) -> list[str]:
        """The image ids in row order."""
        return list(self._row_of)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        names = (name for index in range(len(self.manifest.shards)) for name in self._texts(index, "id"))
        return {name: row for row, name in enumerate(names)}

    @cached_property
    def _known(self) -> set[str]:
        """The ids of all images, removed ones too."""
        return {*self._row_of, *self.removed}

    @cached_property
    def removed(self) -> dict[str, tuple[int, int]]:
        """Removed image id -> its shard and position."""
        found = {}
        for index, shard in enumerate(self.manifest.shards):
            if shard.removed:
                names = self._shard(index).texts("id")
                found.update({names[position]: (index, position) for position in shard.removed})
        return found

    @cached_property
    def sha256_of(self) -> dict[str, str]:
        """Image id -> sha256 of its file, where one was recorded."""
        digests: dict[str, str] = {}
        for index in range(len(self.manifest.shards)):
            digests.update(zip(self._texts(index, "id"), self._texts(index, "sha256"), strict=False))
        return {name: digest for name, digest in digests.items() if digest}

    def image_path(self, image: str) -> Path | None:
        """Where a normal image was read from, if it came from a file."""
        index, position = self.locate(self._row_of[image])
        return self._shard(index).image_path(position)

    def with_removed(self) -> Snapshot:
        """The same state as if nothing had been removed: what is built beside the bank covers all of it."""
        shards = tuple(replace(shard, removed=()) for shard in self.manifest.shards)
        return Snapshot(self.path, replace(self.manifest, shards=shards), self._lease)

    def rows_of_shard(self, index: int) -> npt.NDArray[np.int64]:
        """(count,), the row of each image of a shard; -1 for removed ones."""
        shard = self.manifest.shards[index]
        rows = np.full(shard.count, -1, np.int64)
        rows[shard.live] = np.arange(self._starts[index], self._starts[index + 1])
        return rows

    def embeddings_of_shard(self, index: int) -> FloatArray:
        """(n, d), the embeddings of a shard's images in the order of their rows; a read-only view where none was removed."""
        embedding = self._shard(index).embedding
        return embedding[self.manifest.shards[index].live] if self.manifest.shards[index].removed else embedding

    def embedding(self, rows: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """(n, d) embeddings of the given rows, copied."""
        found = np.empty((len(rows), self.layout.embedding_dim), np.float32)
        for place, row in enumerate(rows):
            index, position = self.locate(int(row))
            found[place] = self._shard(index).embedding[position]
        return found

    def read(self, rows: npt.NDArray[np.integer[Any]]) -> FeatureBatch:
        """The features of the given rows as they are stored, copied."""
        maps = {}
        for level in self.layout.levels:
            maps[level.name] = np.empty((len(rows), *level.shape), self.layout.dtype)
            for out, row in zip(maps[level.name], rows, strict=True):
                self.read_map(level.name, int(row), out)
        valid: npt.NDArray[np.bool_] | None = np.ones((len(rows), *self.layout.input_size), np.bool_)
        for place, row in enumerate(rows):
            index, position = self.locate(int(row))
            if (of_image := self._shard(index).valid(np.array([position]), self.layout.input_size)) is None:
                valid = None  # of an extractor that says nothing of it, or of a time when banks did not keep it
                break
            assert valid is not None
            valid[place] = of_image[0]
        return FeatureBatch([self.ids[row] for row in rows], self.embedding(rows), maps, self.manifest.source, valid=valid)

    def level_map(self, level: str, row: int) -> npt.NDArray[np.floating[Any]]:
        """One image's map at one level, (H, W, C) of the bank's dtype: a read-only view of the mapped file, not a copy."""
        index, position = self.locate(row)
        found: npt.NDArray[np.floating[Any]] = self._shard(index).levels[level][position]
        return found

    def read_map(self, level: str, row: int, out: npt.NDArray[np.floating[Any]]) -> None:
        """Copy one image's map at one level into `out`, (H, W, C) of the bank's dtype and contiguous."""
        index, position = self.locate(row)
        self._shard(index).read_map(level, position, out)

    def prefetch_map(self, level: str, row: int) -> None:
        """Ask for one image's map to be read from disk soon."""
        index, position = self.locate(row)
        self._shard(index).prefetch_map(level, position)

    def release_map(self, level: str, row: int) -> None:
        """Let go of the memory of one image's map, where it was read; it is read again when it is looked at again."""
        index, position = self.locate(row)
        self._shard(index).release_map(level, position)

    def locate(self, row: int) -> tuple[int, int]:
        """The number of the shard that holds a row, and its position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a bank of {len(self)} images")
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return index, int(self.manifest.shards[index].live[row - int(self._starts[index])])

    def check_texts(self, index: int) -> None:
        """Raise BankError if the texts of a shard cannot be read."""
        for field in ("id", "path", "sha256"):
            self._shard(index).texts(field)

    def _shard(self, index: int) -> Shard:
        entry = self.manifest.shards[index]
        return map_shard(self.path / SHARDS / entry.file, entry.sha256, entry.count, self.layout)

    def _texts(self, index: int, field: str) -> list[str]:
        """The texts of a shard's images in the order of their rows."""
        texts, entry = self._shard(index).texts(field), self.manifest.shards[index]
        return [texts[position] for position in entry.live] if texts and entry.removed else texts


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs: its name, and both values."""
    for name, value in ours.items():
        if isinstance(value, dict):
            if difference := first_difference(value, theirs[name]):
                return f"{name}.{difference[0]}", *difference[1:]
        elif value != theirs[name]:
            return name, value, theirs[name]
    return None
