"""A shard: the features of some images, in one HDF5 file that is written once. Only this module names its HDF5 paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.core.arrays import map_arrays, text_array, write_arrays
from spade_faiss.core.copies import copy_of, let_go_by
from spade_faiss.core.errors import BankError
from spade_faiss.core.files import FileEntry, check_file
from spade_faiss.core.once import once
from spade_faiss.core.products import check_product
from spade_faiss.core.types import Arrays
from spade_faiss.features.batch import LONGEST_TEXT, FeatureBatch
from spade_faiss.features.layout import Layout

SCHEMA = 2

# The size that shards are filled up to.
SHARD_BYTES = 256 << 20

_EMBEDDING = "image/embedding"
_VALID = "image/valid"
_ID = "image/id"
_PLACE = "image/place"
_OPTIONAL = ("image/path", "image/sha256", "image/picture", "image/group")
_OPEN_SHARDS = 256


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A manifest's record of one shard.

    Args:
        count: the number of its images.
        removed: the positions of those that were removed, ascending.
        product: the product that they all are of; empty in a bank without products.
    """

    count: int
    removed: tuple[int, ...] = ()
    product: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product:
            check_product(self.product)

    @once
    def live(self) -> npt.NDArray[np.int64]:
        """The positions of the images that were not removed, (live_count,)."""
        return np.delete(np.arange(self.count), self.removed)

    @property
    def live_count(self) -> int:
        """The number of images that were not removed."""
        return self.count - len(self.removed)


@dataclass(frozen=True, kw_only=True)
class StagedShard:
    """A shard that lies beside those of a bank and is not committed, see `Bank.stage`.

    Args:
        entry: its record, under the name that it has until it is committed.
        ids: the ids of its entries.
        pictures: the ids of the pictures that they were made of.
        sha256: the checksums of the files of those; empty where there are no files.
    """

    entry: ShardEntry
    ids: tuple[str, ...]
    pictures: tuple[str, ...]
    sha256: tuple[str, ...]


class Shard:
    """A shard that is mapped into memory. Its arrays are read-only views, which keep the mapping alive.

    Args:
        path: the file.
        sha256: its checksum, which is not compared; see `map_arrays`.
        count: the number of images that it must hold.
        layout: the shapes and the dtype that it must have.

    Raises:
        BankError: for a file that is missing or damaged, or whose arrays are not those of the layout.
    """

    def __init__(self, path: Path, sha256: str, count: int, layout: Layout) -> None:
        self._path = path
        self._mapped = map_arrays(path, sha256)
        arrays = self._mapped.arrays
        self._levels: Arrays = {name.removeprefix("level/"): maps for name, maps in arrays.items() if name.startswith("level/")}
        height, width = layout.input_size
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            _EMBEDDING: ((count, layout.embedding_dim), "float32"),
            _ID: ((count,), "S"),
            **{f"level/{level.name}": ((count, *level.stored_shape), layout.stored_dtype) for level in layout.levels},
        }
        optional = {
            _VALID: ((count, -(-height * width // 8)), "uint8"),
            _PLACE: ((count, 4), "int32"),
            **dict.fromkeys(_OPTIONAL, ((count,), "S")),
        }
        expected |= {name: of for name, of in optional.items() if name in arrays}
        found = {
            name: (array.shape, "S" if array.dtype.kind == "S" and array.itemsize <= LONGEST_TEXT else array.dtype.name)
            for name, array in arrays.items()
        }
        if different := [name for name in (*expected, *found) if found.get(name) != expected.get(name)]:
            raise BankError(
                f"shard {path} is damaged: {different[0]} is {found.get(different[0], 'missing')}, "
                f"expected {expected.get(different[0], 'no such array')}; restore it from a backup"
            )

    def check_length(self) -> None:
        """Raise BankError if the file has become shorter since it was mapped: to read its mapping would end the process."""
        self._mapped.check_length()

    @property
    def embedding(self) -> npt.NDArray[np.float32]:
        """The embeddings, (count, d), as they are stored.

        Raises:
            BankError: if the file has become shorter since it was mapped.
        """
        self._mapped.check_length()
        return self._mapped.arrays[_EMBEDDING]

    @property
    def levels(self) -> Arrays:
        """Level name -> maps, (count, *stored_shape), as they are stored; it raises what `embedding` raises."""
        self._mapped.check_length()
        return self._levels

    def read_map(self, level: str, position: int, out: npt.NDArray[Any]) -> None:
        """Copy an image's map into `out`, which has its dtype and size."""
        self._mapped.read(f"level/{level}", position, out)

    def prefetch_map(self, level: str, position: int) -> None:
        """Ask the operating system to read an image's map from disk soon."""
        self._mapped.prefetch(f"level/{level}", position)

    def release_embeddings(self) -> None:
        """Release the memory of the embeddings; they are read again at their next use."""
        self._mapped.release(_EMBEDDING, range(len(self._mapped.arrays[_EMBEDDING])))

    def release_maps(self, level: str, positions: Iterable[int]) -> None:
        """Release the memory of some images' maps; they are read again at their next use."""
        self._mapped.release(f"level/{level}", positions)

    def texts(self, field: str, part: slice = slice(None)) -> list[str]:
        """Return the `id`, `path`, `sha256`, `picture` or `group` of each entry, or of some; an empty list where the shard has
        none.

        Raises:
            BankError: for text that is not UTF-8 or holds a NUL, and for an id or a picture that is empty.
        """
        self._mapped.check_length()
        texts = self._mapped.arrays.get(f"image/{field}")
        try:
            found = [] if texts is None else [text.decode() for text in texts[part].tolist()]
        except UnicodeDecodeError as error:
            raise BankError(f"shard {self._path} is damaged ({error}); restore it from a backup") from error
        if any("\0" in text or (not text and field in ("id", "picture")) for text in found):
            raise BankError(f"shard {self._path} is damaged: its {field} is empty, or holds a NUL; restore it from a backup")
        return found

    def picture_ids(self) -> list[str]:
        """Return the id of the picture that each entry was made of; it raises what `texts` raises."""
        return self.texts("picture") or self.texts("id")

    def image_path(self, position: int) -> Path | None:
        """Return the file that an image was read from; None if it did not come from a file."""
        paths = self.texts("path", slice(position, position + 1))
        return Path(self.root, paths[0]) if paths and paths[0] else None

    @property
    def places(self) -> npt.NDArray[np.int32] | None:
        """(count, 4) where the entries lie in their pictures, see `tiles.TILE_COLUMNS`; None where they are whole pictures."""
        self._mapped.check_length()
        found: npt.NDArray[np.int32] | None = self._mapped.arrays.get(_PLACE)
        return found

    @property
    def root(self) -> str:
        """The folder that each `path` is relative to."""
        return str(self._mapped.attributes.get("root", "")).replace("\0", "")

    def valid(self, positions: npt.NDArray[np.int64], size: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
        """Return where the inputs at some positions are inspected, (n, H, W); None where they are everywhere."""
        packed = self._mapped.arrays.get(_VALID)
        if packed is None:
            return None
        self._mapped.check_length()
        flat = np.unpackbits(packed[positions], axis=1, count=size[0] * size[1])
        return flat.reshape(-1, *size).astype(np.bool_)


def write_shard(path: Path, batch: FeatureBatch, product: str = "") -> ShardEntry:
    """Write a prepared batch, all of one product, as a new shard, atomically.

    Raises:
        InputError: if the disk has no room for it.
    """
    pictures = () if list(batch.pictures) == list(batch.ids) else batch.pictures
    texts = {"id": batch.ids, "path": batch.paths, "sha256": batch.sha256, "picture": pictures, "group": batch.groups}
    arrays: Arrays = {f"image/{field}": text_array(values) for field, values in texts.items() if len(values)}
    arrays[_EMBEDDING] = batch.embedding
    if batch.valid is not None:
        arrays[_VALID] = np.packbits(batch.valid.reshape(len(batch), -1), axis=1)
    if batch.places is not None:
        arrays[_PLACE] = batch.places
    arrays |= {f"level/{level}": maps for level, maps in batch.levels.items()}
    digest = write_arrays(path, arrays, attributes={"schema": SCHEMA, "root": batch.root})
    return ShardEntry(**vars(FileEntry.of(path, digest)), count=len(batch), product=product)


@lru_cache(maxsize=_OPEN_SHARDS)
def map_shard(path: Path, sha256: str, count: int, layout: Layout) -> Shard:
    """Map a shard into memory, or return it from the cache; arguments and errors are those of `Shard`."""
    if copy_of(path) is not None:
        let_go_by(map_shard.cache_clear)
    return Shard(path, sha256, count, layout)


def check_shard(path: Path, shard: ShardEntry) -> None:
    """Raise BankError if the file at `path` is not the shard that the manifest records; see `check_file`."""
    check_file(path, shard, f"shard {path}", "the manifest", "restore it from a backup or extract again")
