"""The levels that are searched, a bank's own or several of them as one, and their maps as blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.errors import BankError, InputError
from spade_faiss.core.hints import verify_command
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.features.layout import LARGEST, within_range
from spade_faiss.features.resampling import upsample
from spade_faiss.features.roi import cells_with_any, nearest_cells
from spade_faiss.search.blocks import Blocks, BlockSource, MapPart, StoredArray, decoded
from spade_faiss.search.cache import BlockCache

CONCAT = "concat"

Stored = TypeVar("Stored", bound=StoredArray)


def searched_levels(levels: Sequence[Level], fusion: str, chosen: Sequence[str] = ()) -> tuple[Level, ...]:
    """The levels that a search runs on.

    Args:
        levels: the bank's levels.
        fusion: `mean` for each level by itself, `concat` for all of them as one.
        chosen: names of the levels to search, those to be searched as one joined by `+`; empty for all levels.

    Returns:
        Levels of the bank, and joined ones: they have the size of their finest level and the channels of all.

    Raises:
        InputError: if there is no level of a name.
    """
    by_name = {level.name: level for level in levels}
    names = tuple(chosen) or tuple(by_name)
    if unknown := [part for name in names for part in _parts_of_name(name, by_name) if part not in by_name]:
        raise InputError(f"there is no level {unknown[0]!r}; the bank has {', '.join(by_name)}")
    if fusion == "mean":
        return tuple(_joined(name, [by_name[part] for part in _parts_of_name(name, by_name)]) for name in names)
    parts = [by_name[part] for name in names for part in _parts_of_name(name, by_name)]
    return (_joined("+".join(part.name for part in parts) if chosen else CONCAT, parts),)


def parts_of(level: Level, levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels of the bank that a searched level consists of, see `searched_levels`."""
    by_name = {part.name: part for part in levels}
    if level.name == CONCAT and CONCAT not in by_name:
        return tuple(levels)
    return tuple(by_name[name] for name in _parts_of_name(level.name, by_name))


def index_name(level: Level, levels: Sequence[Level]) -> str:
    """The name of a searched level in an index: those of the bank's levels that it consists of, joined by `+`."""
    return "+".join(part.name for part in parts_of(level, levels))


def vectors_of(level: Level, levels: Sequence[Level], maps_of: Callable[[str], npt.NDArray[np.floating[Any]]]) -> FloatArray:
    """The vectors of n images at a searched level.

    Args:
        level: one of `levels`, or several of them as one, see `searched_levels`.
        levels: the bank's levels.
        maps_of: returns the maps of the level of a name, (n, *stored_shape); those of codes are decoded.

    Returns:
        (n, locations, C) float32.
    """
    if level in levels:
        maps = maps_of(level.name).astype(np.float32, copy=False)
        return maps.reshape(len(maps), -1, level.channels)
    parts = [_at_size_of(level, part, maps_of(part.name).astype(np.float32, copy=False)) for part in parts_of(level, levels)]
    return np.concatenate(parts, axis=-1)


def _at_size_of(level: Level, part: Level, maps: FloatArray) -> FloatArray:
    """The stored maps of one of the levels that are searched as one, (n, locations, C) of the joined level."""
    n, size = len(maps), (level.height, level.width)
    if (part.height, part.width) == size:
        return maps.reshape(n, -1, part.channels)
    if part.roi is not None:
        # Between two locations of which one is not inspected, it counts as the inspected one that is nearest to it.
        maps = maps.take(nearest_cells(part.roi), axis=1).reshape(n, *part.shape)
    resized = upsample(maps, size).reshape(n, -1, part.channels)
    return resized if level.roi is None else resized.take(level.cells, axis=1)


def _parts_of_name(name: str, by_name: Mapping[str, Level]) -> list[str]:
    """The names that are joined in one; the name of a level may hold a `+` itself."""
    return [name] if name in by_name else name.split("+")


def _joined(name: str, parts: Sequence[Level]) -> Level:
    """Several levels as one, at the size of the finest; one level is itself."""
    if len(parts) == 1:
        return parts[0]
    finest = max(parts, key=lambda part: part.height * part.width)  # with its region of interest
    return replace(finest, name=name, channels=sum(part.channels for part in parts), extracted=None, packed_bytes=None)


def open_blocks(bank: Snapshot, level: Level, cache: BlockCache[FloatArray] | None = None) -> Blocks:
    """The maps of all images of a bank at a searched level.

    Args:
        bank: the bank.
        level: one of its levels, or several of them as one, see `searched_levels`.
        cache: where decoded blocks are cached.
    """
    # The rows of each product are counted from 0, and all products share a cache; no level's name holds a '/'.
    key = f"product {bank.product}/{level.name}" if bank.product else None
    if bank.layout.own_rois:
        return Blocks(level, _PartialSource(bank, level), cache, key)
    source = _LevelSource(bank, level) if level in bank.layout.levels else _JoinedSource(bank, level)
    return Blocks(level, source, cache, key)


def open_checked_blocks(bank: Snapshot, level: Level) -> Blocks:
    """The maps of all images of a bank at a searched level, to build an index of.

    Reading one raises BankError if it holds values that are not finite, or so large that their squares leave float32's range.
    """
    return Blocks(level, _CheckedSource(bank, level) if level in bank.layout.levels else _CheckedJoinedSource(bank, level))


class _LevelSource(BlockSource):
    """One of the bank's own levels: float32 maps are views of the mapped files, float16 ones and codes are decoded."""

    def __init__(self, bank: Snapshot, level: Level) -> None:
        self._bank = bank
        self._level = level
        self.decodes = bank.layout.dtype != "float32"
        codes = bank.codes_of(level.name)
        self.decoder = None if codes is None else codes.decode
        self._stored_shape = (level.locations, level.stored_shape[-1])
        self._scratch = threading.local()

    def __len__(self) -> int:
        return len(self._bank)

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        if not self.decodes:
            return decoded(self.stored(row), None)
        shape = (self._level.locations, self._level.channels)
        if out is None:
            out = np.empty(shape, np.float32)
        if not hasattr(self._scratch, "map"):
            self._scratch.map = np.empty(self._stored_shape, self._bank.layout.stored_dtype)
        self._bank.read_map(self._level.name, row, self._scratch.map)
        return decoded(self._scratch.map, self.decoder, out)

    def stored(self, row: int) -> StoredArray:
        return self._bank.level_map(self._level.name, row).reshape(self._stored_shape)

    def parts(self) -> tuple[MapPart, ...] | None:
        return (MapPart(self.stored, decoder=self.decoder),)

    def check(self) -> None:
        self._bank.check_lengths()

    def prefetch(self, row: int) -> None:
        self._bank.prefetch_map(self._level.name, row)

    def release(self, rows: Iterable[int]) -> None:
        self._bank.release_maps(self._level.name, rows)


class _PartialSource(_LevelSource):
    """One of the bank's own levels, of images that have regions of interest of their own: a block holds what lies inside."""

    partial = True

    def __init__(self, bank: Snapshot, level: Level) -> None:
        super().__init__(bank, level)
        self.decodes = True

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        return decoded(self.stored(row), self.decoder)

    def stored(self, row: int) -> StoredArray:
        return super().stored(row).take(self.cells(row), axis=0)

    def cells(self, row: int) -> IntArray:
        inspected = cells_with_any(self._bank.inspected(row)[np.newaxis], self._level.height, self._level.width)
        return np.flatnonzero(inspected)

    def parts(self) -> tuple[MapPart, ...]:
        return (MapPart(super().stored, decoder=self.decoder),)


class _JoinedSource(BlockSource):
    """Several levels of the bank as one, which is put together at each read."""

    def __init__(self, bank: Snapshot, level: Level) -> None:
        self._bank = bank
        self._level = level
        self._parts = parts_of(level, bank.layout.levels)

    def __len__(self) -> int:
        return len(self._bank)

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        maps = vectors_of(self._level, self._bank.layout.levels, lambda name: self._bank.vectors_of_map(name, row)[None])
        return maps.reshape(-1, self._level.channels)

    def parts(self) -> tuple[MapPart, ...] | None:
        grid = (self._level.height, self._level.width)
        sizes = [(part.height, part.width) for part in self._parts]
        if self._level.roi is not None and any(size != grid for size in sizes):
            return None  # what is stored of a region of interest is no grid that could be resized
        sources = [_LevelSource(self._bank, part) for part in self._parts]
        return tuple(
            MapPart(source.stored, None if size == grid else size, source.decoder)
            for source, size in zip(sources, sizes, strict=True)
        )

    def check(self) -> None:
        self._bank.check_lengths()

    def prefetch(self, row: int) -> None:
        for level in self._parts:
            self._bank.prefetch_map(level.name, row)

    def release(self, rows: Iterable[int]) -> None:
        rows = list(rows)
        for level in self._parts:
            self._bank.release_maps(level.name, rows)


class _CheckedSource(_LevelSource):
    """One of the bank's own levels, whose values are looked at when they are read."""

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        return _checked(super().read(row, out), self._bank, self._level)

    def stored(self, row: int) -> StoredArray:
        return _checked(super().stored(row), self._bank, self._level)


class _CheckedJoinedSource(_JoinedSource):
    """Several levels of the bank as one, whose values are looked at when they are read."""

    def read(self, row: int, out: FloatArray | None = None) -> FloatArray:
        return _checked(super().read(row, out), self._bank, self._level)


def _checked(block: Stored, bank: Snapshot, level: Level) -> Stored:
    if not within_range(block):
        raise BankError(
            f"the bank {bank.path} holds maps of level {level.name!r} that are not finite, or beyond {LARGEST:g}; "
            f"find their shard with: {verify_command(bank.path)} --deep"
        )
    return block
