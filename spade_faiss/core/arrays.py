"""HDF5 files of arrays, which are written once, mapped into memory, and never changed."""

from __future__ import annotations

import mmap
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from spade_faiss.core.copies import Use, fetched, let_go_by
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.files import atomic_path, hash_file
from spade_faiss.core.hdf5_layout import read_layout
from spade_faiss.core.inside import cannot_open, open_regular
from spade_faiss.core.mapping import Descriptors, FileIdentity, map_file
from spade_faiss.core.schema import shorten
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
    # The oldest layout, which `read_layout` reads, whatever the version of HDF5.
    return h5py.File(path, mode, libver="earliest", alignment_threshold=1, alignment_interval=_ALIGNMENT)


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
        path: the file; of a bank at a URL, it is fetched.
        sha256: its checksum, which is not compared: it is part of the cache's key, because a file may be replaced. What is
            fetched is compared.

    Raises:
        BankError: for a file that is missing or damaged, or holds anything but what `write_arrays` writes.
        AccessError: if the operating system does not open it.
    """
    try:
        use = Use()
        fetched(path, sha256, use)
        let_go_by(map_arrays.cache_clear)
        return Mapped(path, use)
    except FileNotFoundError as error:
        raise BankError(f"{path} was deleted after the bank was opened; open the bank again") from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{path} is damaged ({error}); restore it from a backup") from error


@lru_cache(maxsize=1)
def _descriptors() -> Descriptors:
    return Descriptors()


def _end(use: Use | None) -> None:
    """Nothing is left to do: what will call this refers to the use until then."""


class Mapped:
    """A file that is mapped into memory. It keeps no descriptor, so that a bank may have any number of shards.

    Attributes:
        attributes: the attributes of the file.
        arrays: name -> read-only view of the mapped file. Reading one after the file has become shorter ends the process: call
            `check_length` before. `read` needs no such call.
    """

    def __init__(self, path: Path, use: Use | None = None) -> None:
        descriptor = open_regular(path)
        try:
            self._file = FileIdentity.of(path, descriptor)
            layout, self.attributes = read_layout(descriptor)
            if "\n".join(sorted(layout)) != (names := self.attributes.get(_NAMES)):
                raise ValueError(f"it holds {shorten(sorted(layout))}, but its list of arrays is {shorten(names)}")
            self._mapped = map_file(descriptor, self._file.size)
            # Views keep the mapping, and the mapping keeps the file where it was fetched to.
            weakref.finalize(self._mapped, _end, use).atexit = False
        except OSError as error:
            raise cannot_open(path, error) from error
        finally:
            os.close(descriptor)
        self._descriptors = _descriptors()
        self._key = self._descriptors.register(self)
        self.arrays: Arrays = {
            name: np.ndarray(array.shape, array.dtype, self._mapped, array.offset) for name, array in layout.items()
        }
        self._offsets = {name: array.offset for name, array in layout.items()}

    def check_length(self) -> None:
        """Raise BankError if the file has become shorter since it was mapped."""
        self._file.check_length()

    def read(self, name: str, position: int, out: npt.NDArray[Any]) -> None:
        """Copy one item of an array into `out`, of its dtype and size. Reading a view instead would cost page faults.

        Raises:
            BankError: if the file has become shorter.
        """
        with self._descriptors.of(self._key, self._file) as descriptor:
            if descriptor is None or not hasattr(os, "preadv"):  # Windows
                self.check_length()
                np.copyto(out, self.arrays[name][position].reshape(out.shape))
                return
            rest = memoryview(out.data).cast("B")
            offset = self._offsets[name] + position * rest.nbytes
            while rest.nbytes:
                count = os.preadv(descriptor, [rest], offset)
                if count == 0:
                    raise BankError(f"{self._file.path} is shorter than when it was opened; restore it from a backup")
                rest, offset = rest[count:], offset + count

    def prefetch(self, name: str, position: int) -> None:
        """Ask the operating system to read one item of an array from disk soon."""
        self._advise("MADV_WILLNEED", name, [position])

    def release(self, name: str, positions: Iterable[int]) -> None:
        """Release the memory of some items. They stay in the system's file cache as long as there is room."""
        self._advise("MADV_DONTNEED", name, positions)

    def _advise(self, option: str, name: str, positions: Iterable[int]) -> None:
        if not hasattr(mmap, option):
            return
        size = self.arrays[name][0].nbytes
        # Linux may map files in pages of this size: what shares a page with an item is read and released with it.
        pages: list[list[int]] = []
        for position in sorted(positions):
            start = self._offsets[name] + position * size
            first, end = start // _MAPPED_BYTES, -(-(start + size) // _MAPPED_BYTES)
            if pages and first <= pages[-1][1]:
                pages[-1][1] = end
            else:
                pages.append([first, end])
        for first, end in pages:
            begin = first * _MAPPED_BYTES
            with suppress(OSError):  # it is advice only, and need not be followed
                self._mapped.madvise(getattr(mmap, option), begin, min(end * _MAPPED_BYTES, self._file.size) - begin)
