"""A cache of blocks, in memory or on a card: it holds the most recently used ones, up to a capacity."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from spade_faiss.core.process import PerProcess


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Block = TypeVar("Block", bound=_Sized)


class BlockCache(Generic[Block]):
    """The most recently used blocks of all levels, up to `capacity` bytes. Safe to share between threads."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[tuple[str, int], Block] = OrderedDict()
        self._bytes = 0
        self._lock = PerProcess(threading.Lock)

    def get(self, key: tuple[str, int]) -> Block | None:
        """Return the block if the cache holds it."""
        with self._lock():
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: tuple[str, int], block: Block) -> None:
        """Add a block; those that were unused for longest make room for it. One that is larger than the cache is not added."""
        with self._lock():
            if key in self._blocks or block.nbytes > self.capacity:
                return
            self._blocks[key] = block
            self._bytes += block.nbytes
            while self._bytes > self.capacity:
                _, oldest = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes

    def get_or_make(self, key: tuple[str, int], make: Callable[[], Block]) -> Block:
        """Return the block that the cache holds, or make it and add it."""
        block = self.get(key)
        if block is None:
            block = make()
            self.put(key, block)
        return block

    def reserve(self, nbytes: int) -> int:
        """Take up to so many bytes out of the cache for good, for what else stays in memory; returns how many there were."""
        with self._lock():
            granted = min(nbytes, self.capacity)
            self.capacity -= granted
            return granted

    def clear(self) -> None:
        """Drop all blocks."""
        with self._lock():
            self._blocks.clear()
            self._bytes = 0
