"""A shard: the features of some images in one HDF5 file that is written once. The only module that names an HDF5 path of it."""

from __future__ import annotations

import logging
import mmap
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from spade_faiss.errors import BankError, InputError
from spade_faiss.features import FeatureBatch
from spade_faiss.files import atomic_path, hash_file

SCHEMA = 1

_EMBEDDING = "image/embedding"
# A shard's arrays start on a cache line, so that a mapped view is aligned for any dtype and vector unit.
_ALIGNMENT = 64
_OPEN_SHARDS = 256
_HEADROOM_BYTES = 1 << 20

_log = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What a bank's manifest says of one shard."""

    file: str
    count: int
    bytes: int
    mtime_ns: int
    sha256: str


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
    needed = batch.embedding.nbytes + sum(maps.nbytes for maps in batch.levels.values()) + _HEADROOM_BYTES
    # Asked beforehand: HDF5 may crash the process when the disk fills up while it closes a file.
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise InputError(f"{path.parent} has {free} bytes free, a shard needs {needed}; make room and run the command again")
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w", alignment_threshold=1, alignment_interval=_ALIGNMENT) as file:
            file.attrs["schema"] = SCHEMA
            file.attrs["root"] = batch.root
            for field, strings in (("id", batch.ids), ("path", batch.paths), ("sha256", batch.sha256)):
                if len(strings):
                    file.create_dataset(f"image/{field}", data=list(strings), dtype=h5py.string_dtype())
            file.create_dataset(_EMBEDDING, data=batch.embedding)
            for level, maps in batch.levels.items():
                file.create_dataset(f"level/{level}", data=maps)
        digest = hash_file(temporary)
    status = path.stat()
    return ShardEntry(file=path.name, count=len(batch), bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=digest)


@lru_cache(maxsize=_OPEN_SHARDS)
def map_shard(path: Path, sha256: str) -> Shard:
    """Map a shard into memory; its views keep the mapping alive after it has left the cache.

    The checksum is part of the cache's key: another bank may later stand at the same path.
    """
    with h5py.File(path) as file:
        names = [_EMBEDDING, *(f"level/{name}" for name in file["level"])]
        layout = {name: (file[name].id.get_offset(), file[name].shape, file[name].dtype) for name in names}
    with path.open("rb") as raw:
        mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {name: np.ndarray(shape, dtype, mapped, offset) for name, (offset, shape, dtype) in layout.items()}
    embedding = arrays.pop(_EMBEDDING)
    return Shard(embedding, {name.removeprefix("level/"): maps for name, maps in arrays.items()})


def read_strings(path: Path, field: str) -> list[str]:
    """The `id`, `path` or `sha256` of each image of a shard; empty where it has none."""
    with h5py.File(path) as file:
        return list(file[f"image/{field}"].asstr()[:]) if f"image/{field}" in file else []


def read_image_path(path: Path, position: int) -> Path | None:
    """Where the image at `position` was read from, if it came from a file."""
    with h5py.File(path) as file:
        return Path(str(file.attrs["root"]), file["image/path"].asstr()[position]) if "image/path" in file else None


def check_shard(path: Path, shard: ShardEntry) -> None:
    """Raise BankError if the file at `path` is not the shard that the manifest names.

    It is read in full where its size or modification time is not the recorded one.
    """
    if not path.is_file():
        raise BankError(f"shard {path}, which the manifest names, is missing; restore it from a backup or extract again")
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (shard.bytes, shard.mtime_ns):
        return
    found = f"{status.st_size} bytes" if status.st_size != shard.bytes else f"sha256 {hash_file(path)}"
    expected = f"{shard.bytes} bytes" if status.st_size != shard.bytes else f"sha256 {shard.sha256}"
    if found != expected:
        raise BankError(
            f"shard {path} has changed since it was written: {found}, the manifest says {expected}; "
            f"restore it from a backup or extract again"
        )
    _log.info("shard %s has a new modification time; its checksum is right", path)
    try:  # a copied bank: give the shard its recorded time back, so that the next opening need not read it all
        os.utime(path, ns=(status.st_atime_ns, shard.mtime_ns))
    except OSError:
        _log.info("could not restore the modification time of %s; it is checked in full at every opening", path)
