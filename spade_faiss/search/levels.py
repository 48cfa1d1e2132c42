"""The levels that are searched: a bank's own, or all of them as one; their maps as blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core.types import FloatArray, IntArray
from spade_faiss.features.batch import Level
from spade_faiss.features.resampling import upsample
from spade_faiss.search.blocks import Blocks, StoredArray
from spade_faiss.search.cache import BlockCache

CONCAT = "concat"


def searched_levels(levels: Sequence[Level], fusion: str) -> tuple[Level, ...]:
    """The levels themselves, or under fusion `concat` one of the finest one's size with the channels of all."""
    if fusion == "mean":
        return tuple(levels)
    finest = max(levels, key=lambda level: level.height * level.width)
    return (replace(finest, name=CONCAT, channels=sum(level.channels for level in levels)),)


def vectors_of(level: Level, levels: Sequence[Level], maps_of: Callable[[str], npt.NDArray[np.floating[Any]]]) -> FloatArray:
    """(n, H, W, C) float32 of a searched level: one of `levels`, or all of them at the finest one's size."""
    if level in levels:
        return maps_of(level.name).astype(np.float32, copy=False)
    size = (level.height, level.width)
    parts = [maps_of(part.name).astype(np.float32, copy=False) for part in levels]
    return np.concatenate([part if part.shape[1:3] == size else upsample(part, size) for part in parts], axis=-1)


def open_blocks(bank: Snapshot, level: Level, cache: BlockCache[FloatArray] | None = None) -> Blocks:
    """The maps of all images of a bank at a searched level.

    Args:
        bank: the bank.
        level: one of its levels, or all as one, see `searched_levels`.
        cache: where decoded ones are kept.
    """
    scratch = threading.local()

    def read(row: int) -> FloatArray:
        if halves:
            read_into(row, out := np.empty((level.height * level.width, level.channels), np.float32))
            return out
        return vectors_of(level, levels, lambda name: bank.level_map(name, row)[None]).reshape(-1, level.channels)

    def read_into(row: int, out: FloatArray) -> None:
        if not hasattr(scratch, "map"):
            scratch.map = np.empty(out.shape, np.float16)
        bank.read_map(level.name, row, scratch.map)
        np.copyto(out, scratch.map)

    def read_stored(row: int) -> StoredArray:
        return bank.level_map(level.name, row).reshape(-1, level.channels)

    def read_some(row: int, locations: IntArray) -> FloatArray:
        found = bank.level_map(level.name, row).reshape(-1, level.channels)[locations]
        return found.astype(np.float32, copy=False)

    def prefetch(row: int) -> None:
        for part in stored:
            bank.prefetch_map(part.name, row)

    def release(row: int) -> None:
        for part in stored:
            bank.release_map(part.name, row)

    levels = bank.layout.levels
    own = level in levels
    stored = (level,) if own else levels
    halves = own and bank.layout.dtype == "float16"
    return Blocks(
        level,
        len(bank),
        read,
        read_into=read_into if halves else None,
        read_stored=read_stored if own else None,
        read_some=read_some if own else None,
        cache=cache,
        decodes=halves or not own,
        prefetch=prefetch,
        release=release,
    )
