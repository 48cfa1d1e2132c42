"""Where the arrays of an HDF5 file lie, found without the HDF5 library.

A file may come from anybody, and the library does whatever a file asks for: it opens other files that a dataset names, unpacks
what is compressed, and walks along lists that may lead back to where they began. This module understands what `write_arrays`
writes and refuses everything else: superblock version 0, groups with symbol tables, and contiguous arrays of numbers and of
text of fixed length. Each structure is visited once, so that no file keeps it busy.

Source: HDF5 File Format Specification, version 3.0 (https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html).
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = (1 << 64) - 1
# No file of ours comes close to one of these: messages and entries in a file, groups inside of groups, bytes of one structure
# and of a name.
_MOST_STEPS = 100_000
_MOST_DEPTH = 8
_MOST_BYTES = 16 << 20
_MOST_NAME = 1024

_NIL, _SPACE, _TYPE, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x00, 0x01, 0x03, 0x08, 0x0C, 0x10, 0x11
# What says nothing about where an array lies: old and new fill values, a comment, old and new modification times.
_IGNORED = (_NIL, 0x04, 0x05, 0x0D, 0x0E, 0x12)
_REFUSED = {
    0x02: "links of a newer format",
    0x06: "links of a newer format",
    0x07: "an array in another file",
    0x0B: "a filter",
}

_BIG = sys.byteorder == "big"

_FLOATS = {  # size -> precision, where the exponent and the mantissa lie, and the bias, as IEEE 754 has them
    2: (0, 16, 10, 5, 0, 10, 15),
    4: (0, 32, 23, 8, 0, 23, 127),
    8: (0, 64, 52, 11, 0, 52, 1023),
}


@dataclass(frozen=True)
class StoredArray:
    """An array of a file: the place of its first byte, its shape and its dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Message:
    """A message of an object's header: what kind it is of, and its content."""

    kind: int
    data: bytes


def read_layout(descriptor: int) -> tuple[dict[str, StoredArray], dict[str, str | int]]:
    """Read where the arrays of an opened file lie.

    Returns:
        Name -> array, and the attributes of the file.

    Raises:
        ValueError: for a file that is damaged, or holds anything that `write_arrays` does not write.
        OSError: if it cannot be read.
    """
    try:
        return _Reader(descriptor).read()
    except struct.error as error:
        raise ValueError(f"it is cut off, or damaged: {error}") from error


class _Reader:
    """Reads one file. What it reads is counted: structures of a sound file do not overlap, and are few."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._seen: set[int] = set()
        self._steps = 0
        self._bytes_left = 2 * self._size + _MOST_BYTES
        self._arrays: dict[str, StoredArray] = {}

    def read(self) -> tuple[dict[str, StoredArray], dict[str, str | int]]:
        """Read the file, see `read_layout`."""
        head = self._bytes(0, 96)
        if head[:8] != _SIGNATURE:
            raise ValueError("it is no HDF5 file")
        if head[8:11] != b"\0\0\0" or head[12:15] != b"\0\x08\x08":
            raise ValueError(f"it is an HDF5 file of another kind than a bank has (superblock {head[8:15].hex(' ')})")
        base, _, end, driver = struct.unpack_from("<4Q", head, 24)
        if base != 0 or driver != _UNDEFINED or end > self._size:
            raise ValueError(f"it is cut off, or of another kind than a bank has ({end} bytes, found {self._size})")
        (root,) = struct.unpack_from("<Q", head, 64)
        messages = list(self._messages(root))
        self._group(self._only(messages, _SYMBOL_TABLE), "", 0)
        attributes: dict[str, str | int] = {}
        for message in messages:
            if message.kind == _ATTRIBUTE:
                name, value = _attribute(message.data)
                attributes[name] = value
        return self._arrays, attributes

    def _group(self, table: bytes, prefix: str, depth: int) -> None:
        """Note all arrays of a group and of the groups inside of it."""
        if depth > _MOST_DEPTH:
            raise ValueError(f"its groups are more than {_MOST_DEPTH} deep")
        tree, heap = _unpack("<2Q", table)
        names = self._heap(heap)
        for entry in self._entries(tree):
            self._step()
            name_at, header, cache = struct.unpack_from("<QQI", entry)
            if cache not in (0, 1):  # 2 is a link to a name
                raise ValueError("it holds a link")
            name = prefix + _text(names, name_at)
            messages = list(self._messages(header))
            if any(message.kind == _SYMBOL_TABLE for message in messages):
                self._group(self._only(messages, _SYMBOL_TABLE), f"{name}/", depth + 1)
            elif name in self._arrays:
                raise ValueError(f"it holds {name!r} twice")
            else:
                self._arrays[name] = self._array(name, messages)

    def _array(self, name: str, messages: list[_Message]) -> StoredArray:
        shape = _shape(self._only(messages, _SPACE))
        dtype = _dtype(self._only(messages, _TYPE))
        layout = self._only(messages, _LAYOUT)
        if layout[:2] != b"\x03\x01":
            raise ValueError(f"{name} is not stored in one piece (layout {layout[:2].hex(' ')})")
        offset, size = _unpack("<2Q", layout[2:18])
        needed = math.prod(shape) * dtype.itemsize
        if not needed or size != needed or offset + size > self._size:
            raise ValueError(f"{name}, {dtype} of shape {shape}, is said to take {size} bytes from {offset} on of {self._size}")
        if dtype.kind != "S" and offset % dtype.itemsize:
            raise ValueError(f"{name} lies at {offset}, not where values of {dtype.itemsize} bytes are read")
        return StoredArray(offset, shape, dtype)

    def _entries(self, root: int) -> Iterator[bytes]:
        """Yield the entries of a group, 40 bytes each, from its tree of tables."""
        waiting = [root]
        while waiting:
            address = waiting.pop()
            self._visit(address)
            start = self._bytes(address, 24)
            if start[:4] == b"SNOD":
                (count,) = struct.unpack_from("<H", start, 6)
                table = self._bytes(address + 8, 40 * count)
                yield from (table[place : place + 40] for place in range(0, len(table), 40))
            elif start[:5] == b"TREE\0":
                (count,) = struct.unpack_from("<H", start, 6)
                keys = self._bytes(address + 24, 16 * count)
                waiting += [child for (child,) in struct.iter_unpack("<8xQ", keys)]
            else:
                raise ValueError(f"there is no table of names at {address}")

    def _heap(self, address: int) -> bytes:
        """Return the names of a group's entries."""
        self._visit(address)
        start = self._bytes(address, 32)
        if start[:5] != b"HEAP\0":
            raise ValueError(f"there are no names at {address}")
        size, _, data = struct.unpack_from("<3Q", start, 8)
        return self._bytes(data, size)

    def _messages(self, address: int) -> Iterator[_Message]:
        """Yield the messages of an object's header."""
        self._visit(address)
        version, _, _, _, size = struct.unpack_from("<BBHII", self._bytes(address, 16))
        if version != 1:
            raise ValueError(f"the object at {address} has a header of version {version}, expected 1")
        waiting = [(address + 16, size)]
        while waiting:
            block = self._bytes(*waiting.pop())
            place = 0
            while place + 8 <= len(block):
                self._step()
                kind, length, flags = struct.unpack_from("<HHB", block, place)
                data = block[place + 8 : place + 8 + length]
                place += 8 + length
                if len(data) < length or flags & 2:
                    raise ValueError(f"a message of the object at {address} is cut off, or lies elsewhere")
                if kind == _CONTINUATION:
                    offset, length = _unpack("<2Q", data[:16])
                    self._visit(offset)
                    waiting.append((offset, length))
                elif kind in (_SPACE, _TYPE, _LAYOUT, _ATTRIBUTE, _SYMBOL_TABLE):
                    yield _Message(kind, data)
                elif kind not in _IGNORED:
                    raise ValueError(f"it holds {_REFUSED.get(kind, f'a message of kind {kind:#x}')}, which no bank has")

    def _only(self, messages: list[_Message], kind: int) -> bytes:
        found = [message.data for message in messages if message.kind == kind]
        if len(found) != 1:
            raise ValueError(f"an object has {len(found)} messages of kind {kind:#x}, expected 1")
        return found[0]

    def _visit(self, address: int) -> None:
        """Note a structure; no two may be the same, or a walk could go round in circles."""
        self._step()
        if address in self._seen:
            raise ValueError(f"it names what lies at {address} twice")
        self._seen.add(address)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise ValueError(f"it holds more than {_MOST_STEPS} objects")

    def _bytes(self, offset: int, size: int) -> bytes:
        if size > min(_MOST_BYTES, self._bytes_left) or offset + size > self._size:
            raise ValueError(f"it is cut off, or damaged: {size} bytes at {offset} of {self._size}")
        self._bytes_left -= size
        if not hasattr(os, "pread"):  # Windows
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, size)
        else:
            data = os.pread(self._descriptor, size, offset)
        if len(data) < size:
            raise ValueError(f"it is cut off at {offset + len(data)}")
        return data


def _unpack(layout: str, data: bytes) -> tuple[Any, ...]:
    if len(data) != struct.calcsize(layout):
        raise ValueError("a message is of another length than it must have")
    return struct.unpack(layout, data)


def _text(data: bytes, start: int) -> str:
    """Return the text that starts at a place and ends with a NUL."""
    end = data.find(b"\0", start, start + _MOST_NAME)
    if start >= len(data) or end <= start:
        raise ValueError("an object has no name")
    return data[start:end].decode()


def _shape(data: bytes) -> tuple[int, ...]:
    """Read a dataspace message."""
    if len(data) < 8 or data[0] not in (1, 2) or (data[0] == 2 and data[3] == 2):
        raise ValueError("an array has a shape of an unknown kind")
    rank, start = data[1], 8 if data[0] == 1 else 4
    if rank > 8 or len(data) < start + 8 * rank:
        raise ValueError(f"an array has {rank} axes")
    return struct.unpack_from(f"<{rank}Q", data, start)


def _dtype(data: bytes) -> np.dtype[Any]:
    """Read a datatype message: numbers in the byte order of this machine, and text of fixed length."""
    if len(data) < 8:
        raise ValueError("an array has no type")
    kind, low, middle, _ = data[:4]
    (size,) = struct.unpack_from("<I", data, 4)
    if kind >> 4 not in (1, 2, 3):
        raise ValueError(f"an array has a type of version {kind >> 4}")
    kind &= 15
    if kind == 3 and 0 < size < 1 << 24 and low & 15 in (0, 1):
        return np.dtype(f"S{size}")
    if kind == 0 and size in (1, 2, 4, 8) and low & 1 == _BIG and _unpack("<2H", data[8:12]) == (0, 8 * size):
        return np.dtype(f"{'i' if low & 8 else 'u'}{size}")
    is_float = kind == 1 and size in _FLOATS and low & 0x41 == _BIG and middle == 8 * size - 1
    if is_float and _unpack("<2H4BI", data[8:20]) == _FLOATS[size]:
        return np.dtype(f"f{size}")
    raise ValueError(
        f"an array is of a type that no bank has ({data[:8].hex(' ')}): expected numbers in the byte order of this machine, "
        f"{sys.byteorder}, or text of fixed length"
    )


def _attribute(data: bytes) -> tuple[str, str | int]:
    """Read an attribute message: one text or one integer."""
    version, _, name_size, type_size, space_size = struct.unpack_from("<BBHHH", data.ljust(8, b"\0"))
    if version not in (1, 2, 3) or (version > 1 and data[1]):
        raise ValueError(f"an attribute is of version {version}, or lies elsewhere")
    place, parts = 9 if version == 3 else 8, []
    for size in (name_size, type_size, space_size):
        parts.append(data[place : place + size])
        place += -(-size // 8) * 8 if version == 1 else size
    name, dtype = _text(parts[0] + b"\0", 0), _dtype(parts[1])
    if math.prod(_shape(parts[2].ljust(8, b"\0"))) != 1:
        raise ValueError(f"attribute {name!r} is a list")
    value = data[place : place + dtype.itemsize]
    if len(value) != dtype.itemsize or dtype.kind not in "iuS":
        raise ValueError(f"attribute {name!r} is cut off, or of type {dtype}")
    if dtype.kind == "S":
        return name, value.rstrip(b"\0").decode()
    return name, int.from_bytes(value, sys.byteorder, signed=dtype.kind == "i")
