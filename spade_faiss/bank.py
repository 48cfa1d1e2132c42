"""The bank on disk: a manifest that names immutable, checksummed shards; commits, readers, the writer's lock."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from spade_faiss.config import Source, from_mapping
from spade_faiss.errors import BankError, InputError, NotFoundError
from spade_faiss.features import FeatureBatch, FloatArray, Layout, Level, prepare
from spade_faiss.files import TEMPORARY_PATTERN, atomic_path
from spade_faiss.shards import (
    Shard,
    ShardEntry,
    check_shard,
    map_shard,
    prefetch_map,
    read_image_path,
    read_map,
    read_strings,
    release_map,
    write_shard,
)

FORMAT = "spade_faiss bank"
SCHEMA = 1

_MANIFEST = "manifest.json"
_SHARDS = "features"
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed state of a bank."""

    generation: int
    layout: Layout
    source: Source | None
    weights_file: str | None
    shards: tuple[ShardEntry, ...]
    versions: dict[str, str]


class Bank:
    """The features of normal images: append to it, or read it; what was committed is never written again.

    A `Bank` reads the state that was current when it was opened, plus what it appends itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path.absolute()
        self._adopt(manifest)

    def _adopt(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._starts = np.cumsum([0, *(shard.count for shard in manifest.shards)])
        for name in ("ids", "_row_of", "sha256_of"):
            self.__dict__.pop(name, None)  # drop the cached property

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        levels: Sequence[Level],
        embedding_dim: int,
        input_size: tuple[int, int],
        dtype: str = "float16",
        normalize: str = "none",
        pool: int = 1,
        source: Source | None = None,
        weights_file: str | None = None,
    ) -> Bank:
        """Create an empty bank in a new or empty folder.

        Args:
            path: the folder.
            levels: the pyramid levels, finest first.
            embedding_dim: d of the image embedding.
            input_size: (height, width) of the backbone's input; score maps have this size.
            dtype: of stored maps, `float16` (half the disk and I/O) or `float32`.
            normalize: `none`, or `l2` to scale each location's vector to unit length.
            pool: odd side of the neighbourhood that each location is averaged over; 1 for none.
            source: who makes the features; queries must have the same.
            weights_file: where the backbone's weights were loaded from, to load them again.

        Raises:
            InputError: for a setting out of range, or a folder that holds something else.
        """
        layout = Layout(
            levels=tuple(levels),
            embedding_dim=embedding_dim,
            input_size=input_size,
            dtype=dtype,
            normalize=normalize,
            pool=pool,
        )
        return cls._create(Path(path), layout, source, weights_file)

    @classmethod
    def _create(cls, folder: Path, layout: Layout, source: Source | None, weights_file: str | None) -> Bank:
        _check_new(folder)
        manifest = Manifest(
            generation=0, layout=layout, source=source, weights_file=weights_file, shards=(), versions=_versions()
        )
        (folder / _SHARDS).mkdir(parents=True, exist_ok=True)
        with _writer_lock(folder):
            _check_new(folder)  # again: another process may have been faster
            _write_manifest(folder, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, path: str | Path) -> Bank:
        """Open a bank and check that its shards are those that the manifest names.

        A shard whose size or modification time is not the recorded one is read in full and its checksum compared.

        Raises:
            NotFoundError: if there is no bank at `path`.
            BankError: for a damaged or newer manifest, and for a missing or changed shard.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        for shard in manifest.shards:
            check_shard(folder / _SHARDS / shard.file, shard)
        return cls(folder, manifest)

    @classmethod
    def open_or_create(
        cls, path: str | Path, layout: Layout, *, source: Source | None = None, weights_file: str | None = None
    ) -> Bank:
        """Open the bank at `path`, or create it; an existing one must have this layout and source.

        Raises:
            InputError: if it has not, with both values.
        """
        if not (Path(path) / _MANIFEST).exists():
            return cls._create(Path(path), layout, source, weights_file)
        bank = cls.open(path)
        if source is not None and bank.manifest.source is None:
            raise InputError(
                f"the bank {path} holds the features of another extractor, not of {source.backbone!r}; make a new bank"
            )
        bank.check_source(source)
        if difference := _first_difference(asdict(bank.layout), asdict(layout)):
            name, ours, theirs = difference
            raise InputError(
                f"the bank {path} has {name}={ours!r}, asked for {theirs!r}; use the bank's setting, or make a new bank"
            )
        return bank

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

    def append(self, batch: FeatureBatch) -> None:
        """Store a batch as one new shard and commit it: after this returns, the batch survives a crash.

        Raises:
            InputError: for a batch that does not fit the bank's layout or source, or an id that the bank holds already.
            BankError: if another process is writing to the bank.
        """
        self.check_source(batch.source)
        self.append_prepared(prepare(batch, self.layout))

    def append_prepared(self, batch: FeatureBatch) -> None:
        """`append` for a batch that `prepare` has returned, from this bank's source."""
        with _writer_lock(self.path):
            current = _read_manifest(self.path)
            if current.generation != self.generation:
                self._adopt(current)
            if known := [name for name in batch.ids if name in self._row_of]:
                raise InputError(f"the bank {self.path} already holds {len(known)} of these images, the first is {known[0]!r}")
            shard = write_shard(self.path / _SHARDS / f"{len(current.shards):06d}.h5", batch)
            manifest = replace(
                current, generation=current.generation + 1, shards=(*current.shards, shard), versions=_versions()
            )
            _write_manifest(self.path, manifest)
            row_of = self._row_of
            self._adopt(manifest)
            # Kept, not read again: a long extraction would read all ids so far for each of its shards.
            row_of.update(zip(batch.ids, range(len(row_of), len(self)), strict=True))
            self.__dict__["_row_of"] = row_of

    def check_source(self, source: Source | None) -> None:
        """Raise InputError, with both values, if features from `source` cannot be compared with the bank's.

        Features without a source are taken on trust: the caller knows where they are from.
        """
        ours = self.manifest.source
        if source is None or ours is None or source == ours:
            return
        difference = _first_difference(asdict(ours), asdict(source))
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
        names = (name for index in range(len(self.manifest.shards)) for name in self._strings(index, "id"))
        return {name: row for row, name in enumerate(names)}

    @cached_property
    def sha256_of(self) -> dict[str, str]:
        """Image id -> sha256 of its file, where one was recorded."""
        digests: dict[str, str] = {}
        for index in range(len(self.manifest.shards)):
            digests.update(zip(self._strings(index, "id"), self._strings(index, "sha256"), strict=False))
        return digests

    def image_path(self, image: str) -> Path | None:
        """Where a normal image was read from, if it came from a file."""
        index, position = self.locate(self._row_of[image])
        return read_image_path(self._shard_path(index), position)

    def embedding_blocks(self) -> Iterator[FloatArray]:
        """The embeddings shard by shard, (count, d) each, mapped and read-only."""
        for index in range(len(self.manifest.shards)):
            yield self._shard(index).embedding

    def embedding(self, rows: npt.NDArray[np.integer[Any]]) -> FloatArray:
        """(n, d) embeddings of the given rows, copied."""
        found = np.empty((len(rows), self.layout.embedding_dim), np.float32)
        for position, row in enumerate(rows):
            index, place = self.locate(int(row))
            found[position] = self._shard(index).embedding[place]
        return found

    def read(self, rows: npt.NDArray[np.integer[Any]]) -> FeatureBatch:
        """The features of the given rows as they were prepared, copied."""
        maps = {}
        for level in self.layout.levels:
            maps[level.name] = np.empty((len(rows), *level.shape), self.layout.dtype)
            for out, row in zip(maps[level.name], rows, strict=True):
                self.read_map(level.name, int(row), out)
        return FeatureBatch([self.ids[row] for row in rows], self.embedding(rows), maps, self.manifest.source)

    def level_map(self, level: str, row: int) -> npt.NDArray[np.floating[Any]]:
        """One image's map at one level, (H, W, C) of the bank's dtype: a read-only view of the mapped file, not a copy."""
        index, position = self.locate(row)
        found: npt.NDArray[np.floating[Any]] = self._shard(index).levels[level][position]
        return found

    def read_map(self, level: str, row: int, out: npt.NDArray[np.floating[Any]]) -> None:
        """Copy one image's map at one level into `out`, (H, W, C) of the bank's dtype and contiguous."""
        index, position = self.locate(row)
        read_map(self._shard_path(index), self.manifest.shards[index].sha256, level, position, out)

    def prefetch_map(self, level: str, row: int) -> None:
        """Ask for one image's map to be read from disk soon."""
        index, position = self.locate(row)
        prefetch_map(self._shard_path(index), self.manifest.shards[index].sha256, level, position)

    def release_map(self, level: str, row: int) -> None:
        """Let go of the memory of one image's map, where it was read; it is read again when it is looked at again."""
        index, position = self.locate(row)
        release_map(self._shard_path(index), self.manifest.shards[index].sha256, level, position)

    def locate(self, row: int) -> tuple[int, int]:
        """The number of the shard that holds a row, and its position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a bank of {len(self)} images")
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return index, row - int(self._starts[index])

    def _shard_path(self, index: int) -> Path:
        return self.path / _SHARDS / self.manifest.shards[index].file

    def _shard(self, index: int) -> Shard:
        return map_shard(self._shard_path(index), self.manifest.shards[index].sha256)

    def _strings(self, index: int, field: str) -> list[str]:
        return read_strings(self._shard_path(index), field)


def _check_new(folder: Path) -> None:
    if (folder / _MANIFEST).exists():
        raise InputError(f"{folder} already holds a bank; open it, or choose another folder")
    if not folder.exists():
        return
    if folder.is_dir() and any((folder / _SHARDS).glob("*.h5")):
        raise InputError(f"{folder} holds shards but no {_MANIFEST}; restore it from a backup, or choose another folder")
    # What a creation that was interrupted leaves behind is no obstacle.
    if not folder.is_dir() or any(
        item.name not in (_SHARDS, _LOCK) and not item.match(TEMPORARY_PATTERN) for item in folder.iterdir()
    ):
        raise InputError(f"{folder} exists and is not a bank; choose a new or empty folder")


@contextmanager
def _writer_lock(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / _LOCK, timeout=0):
            # Of a killed writer: this process is the only one now. Not below indexes/, which may be built at the same time.
            for leftover in (*folder.glob(TEMPORARY_PATTERN), *(folder / _SHARDS).glob(TEMPORARY_PATTERN)):
                leftover.unlink()
            yield
    except Timeout as error:
        raise BankError(f"another process is writing to the bank {folder}; wait until it has finished") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {"format": FORMAT, "schema": SCHEMA, **asdict(manifest)}
    content["sha256"] = _hash_manifest(content)
    with atomic_path(folder / _MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / _MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"there is no bank at {folder} (no {_MANIFEST}); make one with: spade-faiss fit IMAGES --bank {folder}"
        )
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError("not a bank's manifest")
        schema = content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BankError(f"{path} is damaged ({error}); restore it from a backup") from error
    if schema != SCHEMA:
        raise BankError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; use the spade_faiss version that wrote it")
    digest = content.pop("sha256", None)
    expected = _hash_manifest({"format": FORMAT, "schema": SCHEMA, **content})
    if digest != expected:
        raise BankError(f"{path} is damaged: its sha256 is {expected}, it says {digest}; restore it from a backup")
    try:
        return from_mapping(Manifest, content, str(path))
    except InputError as error:
        raise BankError(str(error)) from error


def _hash_manifest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, Any, Any] | None:
    for name, value in ours.items():
        if isinstance(value, dict):
            if difference := _first_difference(value, theirs[name]):
                return f"{name}.{difference[0]}", *difference[1:]
        elif value != theirs[name]:
            return name, value, theirs[name]
    return None


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("spade-faiss", "h5py", "numpy")}
    return {**packages, "python": platform.python_version()}
