"""A shard: the features of some images in one HDF5 file that is written once. The only module that names an HDF5 path of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from spade_faiss.arrays import Arrays, map_arrays, write_arrays
from spade_faiss.features import FeatureBatch
from spade_faiss.files import FileEntry, check_file

SCHEMA = 1

_EMBEDDING = "image/embedding"


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """What a bank's manifest says of one shard."""

    count: int


@dataclass(frozen=True, eq=False)
class Shard:
    """The arrays of a shard, views of its mapped file: `embedding` (n, d), and `levels`, each (n, H, W, C)."""

    embedding: npt.NDArray[np.float32]
    levels: Arrays


def write_shard(path: Path, batch: FeatureBatch) -> ShardEntry:
    """Write a prepared batch as a new shard; the file appears whole or not at all.

    Raises:
        InputError: if the disk has no room for it.
    """
    strings = {"id": batch.ids, "path": batch.paths, "sha256": batch.sha256}
    digest = write_arrays(
        path,
        {_EMBEDDING: batch.embedding, **{f"level/{level}": maps for level, maps in batch.levels.items()}},
        attributes={"schema": SCHEMA, "root": batch.root},
        strings={f"image/{field}": list(values) for field, values in strings.items() if len(values)},
    )
    return ShardEntry(**vars(FileEntry.of(path, digest)), count=len(batch))


def map_shard(path: Path, sha256: str) -> Shard:
    """Map a shard into memory; its views keep the mapping alive."""
    arrays = map_arrays(path, sha256).arrays
    levels = {name.removeprefix("level/"): maps for name, maps in arrays.items() if name.startswith("level/")}
    return Shard(arrays[_EMBEDDING], levels)


def read_map(path: Path, sha256: str, level: str, position: int, out: npt.NDArray[Any]) -> None:
    """Copy an image's map into `out`, of its type and size."""
    map_arrays(path, sha256).read(f"level/{level}", position, out)


def prefetch_map(path: Path, sha256: str, level: str, position: int) -> None:
    """Ask for an image's map to be read from disk soon."""
    map_arrays(path, sha256).prefetch(f"level/{level}", position)


def release_map(path: Path, sha256: str, level: str, position: int) -> None:
    """Let go of the memory of an image's map; it is read again when it is looked at again."""
    map_arrays(path, sha256).release(f"level/{level}", position)


def read_strings(path: Path, field: str) -> list[str]:
    """The `id`, `path` or `sha256` of each image of a shard; empty where it has none."""
    with h5py.File(path) as file:
        return list(file[f"image/{field}"].asstr()[:]) if f"image/{field}" in file else []


def read_image_path(path: Path, position: int) -> Path | None:
    """Where the image at `position` was read from, if it came from a file."""
    with h5py.File(path) as file:
        return Path(str(file.attrs["root"]), file["image/path"].asstr()[position]) if "image/path" in file else None


def check_shard(path: Path, shard: ShardEntry) -> None:
    """Raise BankError if the file at `path` is not the shard that the manifest names; see `check_file`."""
    check_file(path, shard, f"shard {path}", "the manifest", "restore it from a backup or extract again")
