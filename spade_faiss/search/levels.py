"""The levels that are searched, a bank's own or all of them as one, and their maps as blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.types import FloatArray
from spade_faiss.features.batch import Level
from spade_faiss.features.resampling import upsample
from spade_faiss.search.blocks import Blocks, BlockSource, StoredArray
from spade_faiss.search.cache import BlockCache

CONCAT = "concat"


def searched_levels(levels: Sequence[Level], fusion: str) -> tuple[Level, ...]:
    """The levels that a search runs on.

    Args:
        levels: the bank's levels.
        fusion: `mean` for each level by itself, `concat` for one level that has the finest one's size and all channels.
    """
    if fusion == "mean":
        return tuple(levels)
    finest = max(levels, key=lambda level: level.height * level.width)
    return (replace(finest, name=CONCAT, channels=sum(level.channels for level in levels)),)


def vectors_of(level: Level, levels: Sequence[Level], maps_of: Callable[[str], npt.NDArray[np.floating[Any]]]) -> FloatArray:
    """The vectors of n images at a searched level.

    Args:
        level: one of `levels`, or all of them as one, see `searched_levels`.
        levels: the bank's levels.
        maps_of: returns the maps (n, H, W, C) of the level of a name.

    Returns:
        (n, H, W, C) float32.
    """
    if level in levels:
        return maps_of(level.name).astype(np.float32, copy=False)
    size = (level.height, level.width)
    parts = [maps_of(part.name).astype(np.float32, copy=False) for part in levels]
    return np.concatenate([part if part.shape[1:3] == size else upsample(part, size) for part in parts], axis=-1)


def open_blocks(bank: Snapshot, level: Level, cache: BlockCache[FloatArray] | None = None) -> Blocks:
    """The maps of all images of a bank at a searched level.

    Args:
        bank: the bank.
        level: one of its levels, or all of them as one, see `searched_levels`.
        cache: where decoded blocks are cached.
    """
    source = _LevelSource(bank, level) if level in bank.layout.levels else _ConcatSource(bank, level)
    return Blocks(level, source, cache)


class _LevelSource(BlockSource):
    """One of the bank's own levels: float32 maps are views of the mapped files, float16 ones are decoded."""

    def __init__(self, bank: Snapshot, level: Level) -> None:
        self._bank = bank
        self._level = level
        self.decodes = bank.layout.dtype == "float16"
        self._scratch = threading.local()

    def __len__(self) -> int:
        return len(self._bank)

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        if not self.decodes:
            return self.stored(row).astype(np.float32, copy=False)
        shape = (self._level.height * self._level.width, self._level.channels)
        if out is None:
            out = np.empty(shape, np.float32)
        if not hasattr(self._scratch, "map"):
            self._scratch.map = np.empty(shape, np.float16)
        self._bank.read_map(self._level.name, row, self._scratch.map)
        np.copyto(out, self._scratch.map)
        return out

    def stored(self, row: int) -> StoredArray:
        return self._bank.level_map(self._level.name, row).reshape(-1, self._level.channels)

    def prefetch(self, row: int) -> None:
        self._bank.prefetch_map(self._level.name, row)

    def release(self, row: int) -> None:
        self._bank.release_map(self._level.name, row)


class _ConcatSource(BlockSource):
    """All levels of the bank as one, which is put together at each read."""

    def __init__(self, bank: Snapshot, level: Level) -> None:
        self._bank = bank
        self._level = level

    def __len__(self) -> int:
        return len(self._bank)

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        maps = vectors_of(self._level, self._bank.layout.levels, lambda name: self._bank.level_map(name, row)[None])
        return maps.reshape(-1, self._level.channels)

    def prefetch(self, row: int) -> None:
        for level in self._bank.layout.levels:
            self._bank.prefetch_map(level.name, row)

    def release(self, row: int) -> None:
        for level in self._bank.layout.levels:
            self._bank.release_map(level.name, row)
