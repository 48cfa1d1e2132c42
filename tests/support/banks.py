"""Banks of generated features, the files they consist of, and power cuts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spade_faiss.bank import shards
from spade_faiss.bank.bank import Bank
from spade_faiss.bank.origin import Origin
from spade_faiss.bank.snapshot import Snapshot
from spade_faiss.core import arrays
from spade_faiss.core.extraction import Preprocess, Source
from spade_faiss.features.batch import FeatureBatch, Level
from spade_faiss.features.layout import Layout

# Odd sizes: nothing is aligned by chance.
FINE = Level("blocks.1", channels=3, stride=4, height=5, width=7)
COARSE = Level("blocks.2", channels=5, stride=8, height=3, width=3)
DIM = 6
INPUT = (20, 28)
SOURCE = Source(backbone="net", weights_sha256="ab12", preprocess=Preprocess(resize=72, size=64))


def make_bank(path: str | Path, *, source: Source | None = None, weights_file: str | None = None, **settings: Any) -> Bank:
    layout = Layout(levels=(FINE, COARSE), embedding_dim=DIM, input_size=INPUT, **{"dtype": "float32", **settings})
    return Bank.create(path, layout, Origin(source=source, weights_file=weights_file))


def batch(*names: str, seed: int = 0, **extra: Any) -> FeatureBatch:
    """Features that are determined by the seed and the names."""
    rngs = [np.random.default_rng([seed, *name.encode()]) for name in names]
    return FeatureBatch(
        names,
        np.stack([rng.standard_normal(DIM, np.float32) for rng in rngs]),
        {level.name: np.stack([rng.standard_normal(level.shape, np.float32) for rng in rngs]) for level in (FINE, COARSE)},
        **extra,
    )


def assert_holds(bank: Snapshot, *batches: FeatureBatch, dtype: str = "float32") -> None:
    """The bank holds exactly these batches, in this order, bit for bit."""
    assert bank.ids == [name for part in batches for name in part.ids]
    assert len(bank) == len(bank.ids)
    rows = [(part, offset) for part in batches for offset in range(len(part))]
    for row, (part, offset) in enumerate(rows):
        np.testing.assert_array_equal(bank.embedding(np.array([row]))[0], part.embedding[offset].astype(np.float32))
        for level in bank.layout.levels:
            found = bank.level_map(level.name, row)
            assert found.dtype == dtype
            assert found.shape == level.shape
            np.testing.assert_array_equal(found, part.levels[level.name][offset].astype(dtype))


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder; who reads and writes is no content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {path.name, path.parent.name} & {".lock", ".writer.json", ".readers"}
    }


class PowerCutError(Exception):
    pass


def fail(*_: object, **__: object) -> None:
    raise PowerCutError


def fail_on_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`function`, until its n-th call raises."""
    calls: Iterator[int] = iter(range(1, 1000))

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise PowerCutError
        return function(*arguments, **options)

    return failing


def part_of(part: FeatureBatch, *positions: int) -> FeatureBatch:
    """Some of a batch's images."""
    return FeatureBatch(
        [part.ids[position] for position in positions],
        part.embedding[list(positions)],
        {name: maps[list(positions)] for name, maps in part.levels.items()},
        part.source,
        valid=None if part.valid is None else part.valid[list(positions)],
        paths=[part.paths[position] for position in positions if part.paths],
        sha256=[part.sha256[position] for position in positions if part.sha256],
        root=part.root,
    )


def forget_mappings() -> None:
    """Unmap all files, so that they are opened again when they are read."""
    arrays.map_arrays.cache_clear()
    shards.map_shard.cache_clear()
    gc.collect()


def shard_files(bank: Bank) -> list[str]:
    """The names of a bank's files of features."""
    return sorted(path.name for path in (bank.path / "features").glob("*.h5"))


def events(bank: Bank) -> list[tuple[int, str, int]]:
    """A bank's history: generation, action and number of images."""
    return [(event.generation, event.action, event.images) for event in bank.manifest.history]


ABC, DE, F = batch("a", "b", "c"), batch("d", "e"), batch("f")


def three_shards(path: Path) -> Bank:
    """A bank of six images in three shards."""
    bank = make_bank(path)
    for part in (ABC, DE, F):
        bank.append(part)
    return bank


def assert_same(one: Snapshot, other: Snapshot) -> None:
    """Two banks hold the same images in the same order, bit for bit, whatever shards they are in."""
    assert one.ids == other.ids
    assert one.pictures.ids == other.pictures.ids
    assert one.sha256_of == other.sha256_of
    assert one.group_of == other.group_of
    assert one.layout == other.layout
    rows = np.arange(len(one))
    np.testing.assert_array_equal(one.embedding(rows), other.embedding(rows))
    for row in rows.tolist():
        np.testing.assert_array_equal(one.inspected(row), other.inspected(row))
        for level in one.layout.levels:
            np.testing.assert_array_equal(one.level_map(level.name, row), other.level_map(level.name, row))
    assert [one.image_path(name) for name in one.pictures.ids] == [other.image_path(name) for name in one.pictures.ids]
