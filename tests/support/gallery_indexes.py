"""A bank with gallery indexes of three recipes: their files, what they hold, and how often they are trained and encoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from spade_faiss import Bank, Detector, Scores
from spade_faiss.core.types import FloatArray
from spade_faiss.index.built_index import index_folder
from spade_faiss.index.opened_gallery import EncodedLevel, open_gallery
from spade_faiss.search import compact, history, ivf
from spade_faiss.search.blocks import ArraySource, Blocks
from spade_faiss.search.recipe import Build, Query, Recipe
from tests.support.oracle import Features, batch_of, product

SHAPES = {"fine": (5, 6, 16), "coarse": (3, 4, 8)}
INPUT = (20, 24)
DIM = 8
COUNT = 11
SHARDS = [4, 1, 3]
STARTS = [0, 4, 5, 8, 11]

IVF = Recipe(name="ivf", build=Build(gallery="ivf", settings={"lists": 4}), query=Query(settings={"nprobe": 2}))
COMPACT = Recipe(name="codes", build=Build(gallery="compact", settings={"dims": 4}), query=Query(settings={"rerank": 3}))
HISTORY = Recipe(name="history", build=Build(gallery="history", settings={"lists": 2}), query=Query(settings={"nprobe": 1}))
RECIPES = [COMPACT, HISTORY, IVF]  # as their folders are sorted
MODULES: dict[str, Any] = {"compact": compact, "history": history, "ivf": ivf}

by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def normals(count: int = COUNT) -> Features:
    return product(1, count, SHAPES, DIM)


def queries() -> Features:
    return product(2, 3, SHAPES, DIM, defect=True)


def late() -> Features:
    """Normals that came later, and look like the others."""
    return product(2, 3, SHAPES, DIM)


def folder_of(bank: Bank, recipe: Recipe) -> Path:
    return index_folder(bank, recipe) / "gallery"


def manifest_path(bank: Bank, recipe: Recipe) -> Path:
    return index_folder(bank, recipe) / "gallery.json"


def trained_name(build: int = 0) -> str:
    """The file of what a build has trained."""
    return f"trained-{build:03d}.h5"


def shard_name(bank: Bank, number: int, build: int = 0) -> str:
    """The file of a shard's encodings."""
    return f"{build:03d}-{bank.manifest.shards[number].sha256[:16]}.h5"


def file_names(bank: Bank, build: int = 0) -> list[str]:
    """All files, sorted."""
    return sorted([trained_name(build), *(shard_name(bank, number, build) for number in range(len(bank.manifest.shards)))])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def command(bank: Bank, recipe: Recipe) -> str:
    return f"spade-faiss index {bank.path} --recipe {recipe.name}"


def swap(path: Path, data: bytes) -> None:
    """Put another file in its place; the old one may be mapped, and must not change under the mapping."""
    path.unlink()
    path.write_bytes(data)


def state_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything about the files of a folder that writing to it would change."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("*"))}


def scores_of(bank: Bank, recipe: Recipe, features: Features | None = None) -> Scores:
    return Detector.open(bank.path, recipe=recipe).score_features(batch_of(queries() if features is None else features))


def equal(a: Scores, b: Scores) -> None:
    np.testing.assert_array_equal(a.neighbor_ids, b.neighbor_ids)
    np.testing.assert_array_equal(a.maps, b.maps)
    for level, dist in a.level_dist.items():
        np.testing.assert_array_equal(dist, b.level_dist[level])
        np.testing.assert_array_equal(a.nearest[level], b.nearest[level])


def add(bank: Bank, features: Features, prefix: str = "late") -> None:
    bank.append(batch_of(features, [f"{prefix} {number}" for number in range(len(features))]))


def encoded_level(bank: Bank, recipe: Recipe, name: str) -> tuple[EncodedLevel, Blocks]:
    level = next(level for level in bank.layout.levels if level.name == name)

    def read(row: int) -> FloatArray:
        found: FloatArray = bank.level_map(name, row).reshape(-1, level.channels).astype(np.float32)
        return found

    blocks = Blocks(level, ArraySource(np.stack([read(row) for row in range(len(bank))])))
    return EncodedLevel(open_gallery(bank, recipe), level, blocks), blocks


def contents(bank: Bank, recipe: Recipe) -> list[npt.NDArray[Any]]:
    """All that was trained and encoded, of all levels and rows, copied."""
    found = []
    for name in SHAPES:
        encoded, _ = encoded_level(bank, recipe, name)
        of_level = [encoded.trained, *(encoded(row) for row in range(len(bank)))]
        found += [array.copy() for item in of_level for _, array in sorted(item.items())]
    return found


def same(a: list[npt.NDArray[Any]], b: list[npt.NDArray[Any]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Calls(NamedTuple):
    """Of a method's functions, one a level."""

    train: list[str]
    encode: list[FloatArray]


def watch(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, *, interrupt_at: int | None = None) -> Calls:
    """Count the calls; the `interrupt_at`-th encoding is interrupted."""
    module = MODULES[recipe.build.gallery]
    method, calls = module.METHOD, Calls([], [])
    assert method.train is not None
    assert method.encode is not None
    train_before, encode_before = method.train, method.encode

    def train(blocks: Blocks, build: Any) -> Any:
        calls.train.append(blocks.level.name)
        return train_before(blocks, build)

    def encode(block: FloatArray, trained: Any, build: Any) -> Any:
        if len(calls.encode) == interrupt_at:
            raise KeyboardInterrupt
        calls.encode.append(block)
        return encode_before(block, trained, build)

    monkeypatch.setattr(module, "METHOD", replace(method, train=train, encode=encode))
    return calls
