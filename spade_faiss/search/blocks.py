"""Blocks: the maps of normal images as searches read them, decoded once and kept while there is room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.search.cache import BlockCache

StoredArray = npt.NDArray[np.floating[Any]]

T = TypeVar("T")

# A center is the mean of this many blocks.
_CENTER_BLOCKS = 8
# A sample is of vectors of up to this many.
_SAMPLE_BLOCKS = 500


def _nothing(row: int) -> None:
    pass


def _keep(cache: BlockCache[Any], key: tuple[str, int], make: Callable[[], T]) -> T:
    """What the cache holds, or what is made now and kept while there is room."""
    made: T | None = cache.get(key)
    if made is None:
        made = make()
        cache.put(key, made)
    return made


class Blocks:
    """One level of a bank: `blocks(row)` is the map of the normal image at a bank row, (H*W, C) float32, not to be changed.

    Args:
        level: the level's name and shape.
        count: how many normal images there are.
        read: decodes a row's map, (H*W, C) float32; it may be a view of the bank.
        read_into: decodes it into memory that is there; None if it has nothing to decode.
        read_stored: a row's map as the bank stores it, (H*W, C) float16 or float32, a view; None if it is made of several:
            then `stored` decodes it.
        read_some: decodes only some locations of a row's map, (m, C) float32; None if that is not cheaper.
        cache: where decoded blocks are kept, if anywhere.
        decodes: False where `read` gives a view: there is nothing to keep then.
        prefetch: told which row will be read soon, so that the disk can start.
        release: told which row was read and is not needed now, so that its mapped pages need not stay.
    """

    def __init__(
        self,
        level: Level,
        count: int,
        read: Callable[[int], FloatArray],
        *,
        read_into: Callable[[int, FloatArray], None] | None = None,
        read_stored: Callable[[int], StoredArray] | None = None,
        read_some: Callable[[int, IntArray], FloatArray] | None = None,
        cache: BlockCache[Any] | None = None,
        decodes: bool = True,
        prefetch: Callable[[int], None] = _nothing,
        release: Callable[[int], None] = _nothing,
    ) -> None:
        self.level = level
        self._key = level.name
        self._count = count
        self.read = read
        self._read_into = read_into
        self.stored: Callable[[int], StoredArray] = read_stored or self
        self._read_some = read_some
        self._shared = cache
        self._cache = cache if decodes else None
        self._prefetch = prefetch
        self.release = release

    def __len__(self) -> int:
        return self._count

    def __call__(self, row: int, out: FloatArray | None = None) -> FloatArray:
        """The block of a bank row; `out` is where it may be decoded to if it will not be kept."""
        if self._cache is None or self._cache.capacity < self.block_bytes:
            if out is None or self._read_into is None:
                return self.read(row)
            self._read_into(row, out)
            return out
        return _keep(self._cache, (self._key, row), lambda: self.read(row))

    def kept(self, name: str, row: int, make: Callable[[], T]) -> T:
        """What `make` makes of a row's map, something with `nbytes`; kept beside decoded maps while there is room.

        `name` says what it is.
        """
        if self._shared is None:
            return make()
        return _keep(self._shared, (f"{self._key}/{name}", row), make)  # no level's name holds a '/'

    def take(self, row: int, locations: IntArray) -> FloatArray:
        """(m, C), the vectors at some locations of a bank row; where the block is not here it is not decoded for them."""
        if self._read_some is None:
            return self(row)[locations]
        block = None if self._cache is None else self._cache.get((self._key, row))
        return self._read_some(row, locations) if block is None else block[locations]

    def sample(self, count: int, seed: int) -> FloatArray:
        """(n, C), about `count` vectors of as many images as it takes, up to all of them; the same at every call."""
        rng = np.random.default_rng(seed)
        height, width, _ = self.level.shape
        rows = np.sort(rng.permutation(self._count)[:_SAMPLE_BLOCKS])
        each = min(height * width, -(-count // len(rows)))
        parts = []
        for row in rows.tolist():
            parts.append(self.read(row)[np.sort(rng.permutation(height * width)[:each])])
            self.release(row)
        return np.concatenate(parts)

    def derived(self, name: str, read: Callable[[int], FloatArray], channels: int) -> Blocks:
        """Blocks that are made from what is kept of this level, in the same cache: `channels` values at each location."""
        level = replace(self.level, channels=channels)
        made = Blocks(level, self._count, read, cache=self._shared, release=self.release)
        made._key = f"{self._key}/{name}"  # no level's name holds a '/'
        return made

    def prefetch(self, row: int) -> None:
        """Say that a row will be read soon."""
        if self._cache is None or self._cache.get((self._key, row)) is None:
            self._prefetch(row)

    @property
    def name(self) -> str:
        """By which its blocks are kept."""
        return self._key

    @property
    def block_bytes(self) -> int:
        """Bytes of one decoded block."""
        height, width, channels = self.level.shape
        return height * width * channels * np.dtype(np.float32).itemsize

    @cached_property
    def center(self) -> FloatArray:
        """(C,), about where the vectors of this level are: the mean of a few blocks spread over the bank.

        L2 does not depend on the origin, rounding does: searches subtract it before they multiply. It depends on the bank
        alone, so that the same search gives the same numbers in any batch.
        """
        mean: FloatArray = np.mean([self.read(row).mean(axis=0) for row in self._spread], axis=0, dtype=np.float32)
        return mean

    def typical(self, count: int) -> FloatArray:
        """(n, C), up to `count` vectors of the blocks that the center is of; the same at every call."""
        each = -(-count // len(self._spread))
        parts = [block[:: -(-len(block) // each)] for block in map(self.read, self._spread)]
        return np.concatenate(parts)

    @property
    def _spread(self) -> list[int]:
        return sorted({int(row) for row in np.linspace(0, self._count - 1, _CENTER_BLOCKS)})
