"""HDF5 files of arrays, which are written once, mapped into memory, and never changed."""

from __future__ import annotations

import mmap
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import atomic_path, hash_file
from spade_faiss.core.types import Arrays

# Each array starts on a cache line, so that a mapped view is aligned for every dtype and every SIMD level.
_ALIGNMENT = 64
_OPEN_FILES = 256
_MAPPED_BYTES = 2 << 20
_HEADROOM_BYTES = 1 << 20

# The attribute that lists the arrays of a file: damage that makes one of them invisible is noticed by it.
_NAMES = "arrays"


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], *, attributes: Mapping[str, str | int]) -> str:
    """Write arrays to a file, atomically.

    Args:
        path: the file to create or replace.
        arrays: name -> array of numbers or of text (see `text_array`); a '/' in a name makes a group.
        attributes: the attributes of the file.

    Returns:
        The sha256 of the file.

    Raises:
        InputError: if the disk has no room for it.
    """
    needed = sum(array.nbytes for array in arrays.values()) + _HEADROOM_BYTES
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise InputError(
            f"{path.parent} has {free} bytes free, {path.name} needs {needed}; make room and run the command again"
        )
    with atomic_path(path) as temporary:
        try:
            with _hdf5(temporary, "w") as file:
                # All text is of fixed length: HDF5 keeps other text in a heap, and a damaged heap can keep it busy for ever.
                for name, value in {**attributes, _NAMES: "\n".join(sorted(arrays))}.items():
                    file.attrs[name] = text_array([value])[0] if isinstance(value, str) else value
                for name, array in arrays.items():
                    file.create_dataset(name, array.shape, array.dtype)
            # HDF5 may crash the process if the disk fills up while it writes. Reserving the room first raises an error instead.
            _reserve(temporary, needed)
            with _hdf5(temporary, "r+") as file:
                for name, array in arrays.items():
                    file[name][...] = array
        except RuntimeError as error:  # what h5py raises where HDF5 cannot write
            raise InputError(
                f"there is no room for {path}, or it cannot be written ({error}); make room and run the command again"
            ) from error
        return hash_file(temporary)


def text_array(values: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """Convert text to an array that `write_arrays` takes: UTF-8, padded with NUL."""
    encoded = [value.encode() for value in values]
    kind = h5py.string_dtype("utf-8", max([1, *map(len, encoded)]))
    found: npt.NDArray[np.bytes_] = np.array(encoded, kind)
    return found


def _hdf5(path: Path, mode: str) -> h5py.File:
    return h5py.File(path, mode, alignment_threshold=1, alignment_interval=_ALIGNMENT)


def _reserve(path: Path, needed: int) -> None:
    if hasattr(os, "posix_fallocate"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, 0, needed)
        finally:
            os.close(descriptor)


@lru_cache(maxsize=_OPEN_FILES)
def map_arrays(path: Path, sha256: str) -> Mapped:
    """Map the arrays of a file into memory. Views of them keep the mapping alive after it has left the cache.

    Args:
        path: the file.
        sha256: its checksum, which is not compared: it is part of the cache's key, because a file may be replaced.

    Raises:
        BankError: for a file that is missing or damaged.
    """
    try:
        return Mapped(path)
    except FileNotFoundError as error:
        raise BankError(f"{path} was deleted after the bank was opened; open the bank again") from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise BankError(f"{path} is damaged ({error}); restore it from a backup") from error


class Mapped:
    """A file that is mapped into memory.

    Attributes:
        attributes: the attributes of the file.
        arrays: name -> read-only view of the mapped file.
    """

    def __init__(self, path: Path) -> None:
        layout: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}

        def note(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset) and item.dtype.kind in "iufS":
                layout[name] = item.id.get_offset(), item.shape, item.dtype

        with h5py.File(path) as file:
            self.attributes = {
                name: value.decode() if isinstance(value, bytes) else value for name, value in file.attrs.items()
            }
            file.visititems(note)
        if "\n".join(sorted(layout)) != (names := self.attributes.get(_NAMES)):
            raise ValueError(f"it holds {sorted(layout)}, but its list of arrays is {names!r}")
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        self.arrays: Arrays = {
            name: np.ndarray(shape, dtype, self._mapped, offset) for name, (offset, shape, dtype) in layout.items()
        }
        self._offsets = {name: offset for name, (offset, _, _) in layout.items()}

    def read(self, name: str, position: int, out: npt.NDArray[Any]) -> None:
        """Copy one item of an array into `out`, of its dtype and size. Reading a view instead would cost page faults."""
        if not hasattr(os, "preadv"):  # Windows
            np.copyto(out, self.arrays[name][position].reshape(out.shape))
            return
        rest = memoryview(out.data).cast("B")
        offset = self._offsets[name] + position * rest.nbytes
        while rest.nbytes:
            count = os.preadv(self._descriptor, [rest], offset)
            if count == 0:
                raise BankError(f"{self._path} is shorter than when it was opened; restore it from a backup")
            rest, offset = rest[count:], offset + count

    def place(self, name: str) -> tuple[Path, int]:
        """Return the file, and the byte of it where an array starts."""
        return self._path, self._offsets[name]

    def prefetch(self, name: str, position: int) -> None:
        """Ask the operating system to read one item of an array from disk soon."""
        self._advise("MADV_WILLNEED", name, position)

    def release(self, name: str, position: int) -> None:
        """Release the memory of one item. It stays in the system's file cache as long as there is room."""
        self._advise("MADV_DONTNEED", name, position)

    def _advise(self, option: str, name: str, position: int) -> None:
        size = self.arrays[name][position].nbytes
        start = self._offsets[name] + position * size
        # Linux may map files in pages of this size: what shares a page with the item is read and released with it.
        first = start // _MAPPED_BYTES * _MAPPED_BYTES
        end = min(-(-(start + size) // _MAPPED_BYTES) * _MAPPED_BYTES, len(self._mapped))
        if hasattr(mmap, option):
            with suppress(OSError):  # it is advice only, and need not be followed
                self._mapped.madvise(getattr(mmap, option), first, end - first)
