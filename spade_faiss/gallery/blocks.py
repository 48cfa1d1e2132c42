"""Blocks: the maps of normal images as searches read them, decoded once and kept while there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

import numpy as np

from spade_faiss.features import FloatArray, Level

# A centre is the mean of this many blocks.
_CENTRE_BLOCKS = 8


def _nothing(row: int) -> None:
    pass


class BlockCache:
    """The most recently used blocks of all levels, up to `capacity` bytes. Safe to share between threads."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[tuple[str, int], FloatArray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int]) -> FloatArray | None:
        """The block, if it is here."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: tuple[str, int], block: FloatArray) -> None:
        """Keep a block; the ones that were not used for longest make room."""
        with self._lock:
            if key in self._blocks or block.nbytes > self.capacity:
                return
            self._blocks[key] = block
            self._bytes += block.nbytes
            while self._bytes > self.capacity:
                _, oldest = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes


class Blocks:
    """One level of a bank: `blocks(row)` is the map of the normal image at a bank row, (H*W, C) float32, not to be changed.

    Args:
        level: the level's name and shape.
        count: how many normal images there are.
        read: decodes a row's map, (H*W, C) float32; it may be a view of the bank.
        cache: where decoded blocks are kept; None where `read` decodes nothing.
        prefetch: told which row will be read soon, so that the disk can start.
        release: told which row was read and is not needed now, so that its mapped pages need not stay.
    """

    def __init__(
        self,
        level: Level,
        count: int,
        read: Callable[[int], FloatArray],
        *,
        cache: BlockCache | None = None,
        prefetch: Callable[[int], None] = _nothing,
        release: Callable[[int], None] = _nothing,
    ) -> None:
        self.level = level
        self._count = count
        self._read = read
        self._cache = cache
        self._prefetch = prefetch
        self.release = release

    def __len__(self) -> int:
        return self._count

    def __call__(self, row: int) -> FloatArray:
        """The block of a bank row."""
        key = (self.level.name, row)
        if self._cache is None:
            return self._read(row)
        block = self._cache.get(key)
        if block is None:
            block = self._read(row)
            self._cache.put(key, block)
        return block

    def prefetch(self, row: int) -> None:
        """Say that a row will be read soon."""
        if self._cache is None or self._cache.get((self.level.name, row)) is None:
            self._prefetch(row)

    @property
    def block_bytes(self) -> int:
        """Bytes of one decoded block."""
        height, width, channels = self.level.shape
        return height * width * channels * np.dtype(np.float32).itemsize

    @cached_property
    def centre(self) -> FloatArray:
        """(C,), about where the vectors of this level are: the mean of a few blocks spread over the bank.

        L2 does not depend on the origin, rounding does: searches subtract it before they multiply. It depends on the bank
        alone, so that the same search gives the same numbers in any batch.
        """
        rows = np.unique(np.linspace(0, self._count - 1, _CENTRE_BLOCKS).astype(int))
        mean: FloatArray = np.mean([self._read(int(row)).mean(axis=0) for row in rows], axis=0, dtype=np.float32)
        return mean
